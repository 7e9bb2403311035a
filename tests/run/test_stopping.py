"""A run that ends early reports step, rank and rows, and saves nothing bad."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner
from deepspeed.runtime.fp16 import loss_scaler
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState

from tests.conftest import jsonl
from tests.starts import FLOAT32, deepspeed, record, run
from training import files, trainer
from training.data.held_out import split_held_out
from training.data.tokens import prepare_dataset
from training.errors import Interrupted, OptionsError, TrainingError
from training.launch.exits import CANNOT_CONTINUE, INTERRUPTED, REFUSED
from training.options.command_line import option_words
from training.options.trainer_options import TrainingOptions
from training.run import completion_trainer, final_model, finish, saving, steps
from training.run.background import NO_SAVE, Writer
from training.run.completion_trainer import StepCounter
from training.run.failures import StopRequest, default_sigterm, lost_peer, timed_out
from training.run.step_guard import OVERFLOWS_IN_A_ROW, StepGuard
from training.storage import checkpoint
from training.trainer import train

RARE = "Z"  # in one row only
TEST_SIZE = 8


# --- SIGTERM and Ctrl-C ---------------------------------------------------------------------------------


@pytest.fixture
def request_(monkeypatch: pytest.MonkeyPatch) -> StopRequest:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    request = StopRequest()
    request.listen()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_while_the_last_save_is_completed_lets_it_complete(request_: StopRequest) -> None:
    """The ranks agree to stop when the first of them has the signal. The others may get it later."""
    completed = []

    def finish_save() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        completed.append(True)

    guard = StepGuard(Mock(finish_save=finish_save), request_)
    guard.on_train_begin(Mock(), TrainerState(), TrainerControl())
    guard.on_train_end(Mock(), TrainerState(), TrainerControl())
    assert completed
    assert request_.received


def test_sigterm_ends_a_rank_that_waits_for_others_at_once(request_: StopRequest) -> None:
    """While a library waits in C++, a Python handler would not run."""
    with default_sigterm():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_outside_of_steps_a_signal_interrupts_at_once_and_a_second_does_nothing(
    request_: StopRequest, number: signal.Signals
) -> None:
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert request_.received


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_training_lets_the_step_finish(request_: StopRequest, number: signal.Signals) -> None:
    request_.computing = True
    os.kill(os.getpid(), number)
    assert request_.received


def guard_of(*ranks: tuple[int, int], skipped: bool = False, received: bool = False) -> StepGuard:
    """A guard to which the other ranks report these (stop requested, bad micro-step), and no save in flight."""
    request = StopRequest()
    request.received = received
    reports = [(*of_rank, NO_SAVE) for of_rank in ranks]
    accelerator = SimpleNamespace(
        gather=lambda mine: torch.cat([mine, torch.tensor(reports, dtype=mine.dtype).reshape(-1, 3)]),
        optimizer_step_was_skipped=skipped,
    )
    trainer = SimpleNamespace(
        accelerator=accelerator,
        describe_bad_loss=lambda *bad: f"rank, micro-step {bad}",
        writer=Writer(background=True),
        check_save=lambda reports: None,
        finish_save=lambda: None,
        counter=StepCounter(),
    )
    return StepGuard(trainer, request)


def step(
    guard: StepGuard, *losses: float, step: int = 7, max_steps: int = 10, **control: bool
) -> TrainerControl:
    for loss in losses:
        guard.note_loss(torch.tensor(loss))
    control = TrainerControl(**control)
    guard.on_step_end(None, TrainerState(global_step=step, max_steps=max_steps), control)
    return control


@pytest.mark.parametrize(
    ("losses", "ranks", "bad"),
    [
        ([1.0, float("nan"), 1.0], [], (0, 1)),
        ([float("inf")], [], (0, 0)),
        ([1.0, -float("inf"), float("nan")], [], (0, 1)),
        ([1.0, 2.0], [(0, -1), (0, 1)], (2, 1)),
        ([1.0, float("nan")], [(0, 0)], (0, 1)),
    ],
)
def test_the_first_nan_or_infinite_loss_is_found_on_any_rank(
    losses: list[float], ranks: list[tuple[int, int]], bad: tuple[int, int]
) -> None:
    with pytest.raises(TrainingError, match=re.escape(f"rank, micro-step {bad}")):
        step(guard_of(*ranks), *losses)


def test_micro_steps_are_counted_from_zero_in_each_step() -> None:
    guard = guard_of()
    step(guard, 1.0, 2.0, 3.0)
    with pytest.raises(TrainingError, match=r"\(0, 1\)"):
        step(guard, 1.0, float("nan"))


@pytest.mark.parametrize("ranks", [[(1, -1)], [(0, -1), (1, -1)]])
def test_a_stop_request_on_one_rank_stops_all_ranks_with_a_checkpoint(
    ranks: list[tuple[int, int]],
) -> None:
    guard = guard_of(*ranks)
    control = step(guard, 1.0)
    assert guard.stopped
    assert control.should_training_stop
    assert control.should_save
    assert not control.should_evaluate, "time is short"
    assert step(guard_of(*ranks), 1.0, step=10).should_evaluate, "the last step is the end of the run"


def test_without_a_stop_request_the_run_continues_and_checkpoints_are_evaluated() -> None:
    guard = guard_of((0, -1))
    assert not step(guard, 1.0).should_training_stop
    assert step(guard, 1.0, should_save=True).should_evaluate
    assert not guard.stopped


def test_fp16_overflows_in_a_row_end_the_run_and_a_good_step_resets_the_count() -> None:
    guard = guard_of(skipped=True)
    for _ in range(OVERFLOWS_IN_A_ROW - 1):
        step(guard, 1.0)
    guard.trainer.accelerator.optimizer_step_was_skipped = False
    step(guard, 1.0)
    guard.trainer.accelerator.optimizer_step_was_skipped = True
    for _ in range(OVERFLOWS_IN_A_ROW - 1):
        step(guard, 1.0)
    with pytest.raises(TrainingError, match=f"overflowed fp16 in {OVERFLOWS_IN_A_ROW} steps in a row"):
        step(guard, 1.0)
    assert guard.overflows == 2 * OVERFLOWS_IN_A_ROW - 1


def test_deepspeeds_minimum_loss_scale_error_gets_the_same_message(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)
    scaler = loss_scaler.DynamicLossScaler(
        init_scale=1, scale_window=1000, min_scale=1, delayed_shift=1, consecutive_hysteresis=False
    )
    overflow = partial(scaler.update_scale, overflow=True)
    monkeypatch.setattr(
        completion_trainer.CompletionTrainer, "training_step", lambda *args, **kwargs: overflow()
    )
    with pytest.raises(TrainingError, match="step 1: the gradients have overflowed fp16"):
        begin()


def test_errors_of_a_lost_rank_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    gloo = RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]"
    )
    assert not lost_peer(gloo), "without other ranks"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert lost_peer(gloo)
    assert not timed_out(gloo)
    for words in (
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 15000ms for recv operation",
        "Application timeout caused pair closure",
    ):
        assert lost_peer(RuntimeError(words))
        assert timed_out(RuntimeError(words))
    assert lost_peer(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert not lost_peer(RuntimeError("shape mismatch"))
    assert not lost_peer(OSError(errno.ENOSPC, "No space left on device", "gloo"))


# --- NaN and infinite numbers in a real run ---------------------------------------------------------


@pytest.fixture(scope="module")
def rows(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, int, int]:
    """(file, number of its only training row with RARE, number of a held-out row)."""
    folder = tmp_path_factory.mktemp("rows")
    content = [{"instruction": f"say {n}", "input": "", "output": f"a {n}"} for n in range(1, 41)]
    prepared, _ = prepare_dataset(jsonl(folder / "plain.jsonl", content), tokenizer, 256)
    trained, held_out = (part["row"][5] for part in split_held_out(prepared, TEST_SIZE, 42))
    content[trained - 1]["output"] += f" {RARE}"
    return jsonl(folder / "rows.jsonl", content), trained, held_out


Begin = Callable[..., dict[str, Any]]
Poison = Callable[..., str]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def options(base_folder: Path, rows: tuple[str, int, int], output: Path) -> dict[str, Any]:
    return {
        "local_output_dir": str(output), "input_model": str(base_folder), "training_dataset": rows[0],
        "test_size": TEST_SIZE, "per_device_train_batch_size": 2, "epochs": 1,
        "gradient_accumulation_steps": 3, "save_steps": 2, "eval_steps": 100, "logging_steps": 1,
    }  # fmt: skip


@pytest.fixture
def begin(options: dict[str, Any]) -> Begin:
    return lambda **changed: train(TrainingOptions(**options | changed))


@pytest.fixture
def poisoned(base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Poison:
    """Copies the base model with one bad number in a token's embedding."""

    def poison(token: str, value: float = float("nan")) -> str:
        target = shutil.copytree(base_folder, tmp_path / "base")
        weights = load_file(target / "model.safetensors")
        weights["transformer.wte.weight"][tokenizer.convert_tokens_to_ids(token), 0] = value
        save_file(weights, target / "model.safetensors", {"format": "pt"})
        return str(target)

    return poison


def assert_rows_named(message: str, file: str, trained: int) -> None:
    [listed] = re.findall(rf"was computing rows? ([\d, ]+) of {file}\. Look at them", message)
    numbers = [int(number) for number in listed.split(",")]
    assert trained in numbers
    assert len(numbers) <= 3, "a rank's micro-batch, not the global batch"


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_a_nan_or_infinite_loss_ends_the_run_with_step_rank_and_rows(
    begin: Begin, poisoned: Poison, rows: tuple[str, int, int], output: Path,
    batching: str, value: float,
) -> None:  # fmt: skip
    with pytest.raises(TrainingError, match=r"step \d+: the loss of rank 0 is NaN or infinite") as error:
        begin(input_model=poisoned(RARE, value), batching=batching, save_steps=100)
    assert_rows_named(str(error.value), *rows[:2])
    assert not checkpoint.checkpoints(output)
    assert record(output)["status"] == "running"


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (False, r"step 2: 1 tensors of the model hold NaN .*transformer.wte.weight"),
        (
            True,
            "step 0: the held-out loss of the base model .*base is NaN or infinite before any training. Its weights hold "
            "NaN or infinite numbers in transformer.wte.weight. Download it again, or name another base model$",
        ),
    ],
    ids=["in no row", "in a held-out row"],
)
def test_a_nan_weight_that_no_training_row_reads_is_not_saved(
    begin: Begin, poisoned: Poison, rows: tuple[str, int, int], output: Path, held_out: bool, message: str
) -> None:
    content = [json.loads(line) for line in Path(rows[0]).read_text().splitlines()]
    content[rows[2] - 1]["output"] += " ~" * held_out
    file = jsonl(output.with_suffix(".jsonl"), content)
    with pytest.raises(TrainingError, match=message):
        begin(input_model=poisoned("~"), training_dataset=file)
    assert not any(map(checkpoint.read_manifest, checkpoint.checkpoints(output)))


@pytest.mark.slow
def test_on_two_zero3_ranks_one_reports_step_rank_and_rows(
    options: dict[str, Any], poisoned: Poison, rows: tuple[str, int, int], output: Path
) -> None:
    options |= {"input_model": poisoned(RARE), "save_steps": 100}
    result = run(deepspeed(2), *option_words(options), "--deepspeed", FLOAT32, timeout=300)
    assert result.returncode == CANNOT_CONTINUE, result.stdout
    assert len(re.findall(r"Training ended at step \d+: the loss of rank [01] is NaN", result.stdout)) == 1
    assert "Traceback" not in result.stdout
    assert_rows_named(result.stdout, *rows[:2])
    assert not checkpoint.checkpoints(output)


# --- a full disk ----------------------------------------------------------------------------------


def fill(patch: pytest.MonkeyPatch, module: Any, name: str, when: Callable[..., bool]) -> None:
    """Makes calls of a function fail as on a full disk if `when` is true."""
    real = getattr(module, name)

    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        if when(path, *args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *args, **kwargs)

    patch.setattr(module, name, full)


def test_a_checkpoint_that_would_not_fit_is_not_started(
    begin: Begin, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has room for two checkpoints."""
    real = files.free_bytes

    def free(path: Path) -> int | None:
        return 1000 if len(checkpoint.checkpoints(output)) == 2 else real(path)

    monkeypatch.setattr(saving, "free_bytes", free)
    with pytest.raises(TrainingError) as error:
        begin(save_steps=1)
    assert re.match(
        r"step 3: a checkpoint needs .* are free in .*\. Make room\. checkpoint-2 is complete",
        str(error.value),
    )
    assert [folder.name for folder in checkpoint.checkpoints(output)] == ["checkpoint-1", "checkpoint-2"]
    assert not any(map(checkpoint.problems_of, checkpoint.checkpoints(output)))


def test_a_file_with_the_name_of_a_checkpoint_is_kept_and_reported(
    begin: Begin, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_notes(*_: Any) -> None:  # during the save of step 2
        (output / "checkpoint-4").write_text("notes")

    monkeypatch.setattr(saving, "_lack_of_space", write_notes)
    with pytest.raises(TrainingError) as error:
        begin()
    assert re.match(
        r"step 4: .*checkpoint-4 is not a folder, .*\. Move it away\. checkpoint-2 is complete",
        str(error.value),
    )
    assert not error.value.alone, "all ranks raise it"
    assert (output / "checkpoint-4").read_text() == "notes"


@pytest.mark.parametrize("name", ["write_json", "digests", "write_manifest"])
def test_a_disk_that_fills_up_at_the_end_of_a_save_is_reported(
    begin: Begin, output: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fill(monkeypatch, checkpoint, name, lambda path, *_: "checkpoint-4" in str(path))
    with pytest.raises(
        TrainingError, match=r"No space left on device.*Make room\. checkpoint-2 is complete"
    ) as error:
        begin()
    assert error.value.alone
    assert checkpoint.read_manifest(output / "checkpoint-4") is None
    assert not checkpoint.problems_of(output / "checkpoint-2")


def full_disk(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("name", "instead", "reason"),
    [
        ("_write", full_disk, r"\[Errno 28\] No space left on device\); .* are free there\. Make room\."),
        ("_run", lambda writer: None, r"the thread that wrote it ended without a word\)\."),
    ],
    ids=["a full disk", "a writer that dies"],
)
def test_a_save_that_fails_in_the_background_ends_the_run_and_leaves_the_older_checkpoint(
    begin: Begin, output: Path, monkeypatch: pytest.MonkeyPatch, name: str, instead: Any, reason: str
) -> None:
    real = getattr(Writer, name)

    def only_the_second(writer: Writer) -> Any:
        return (instead if writer.folder.name == "checkpoint-4" else real)(writer)

    monkeypatch.setattr(Writer, name, only_the_second)
    with pytest.raises(
        TrainingError, match=rf"step 4: .*checkpoint-4 could not be written \({reason}"
    ) as error:
        begin(eval_steps=2, max_steps=20, epochs=9)
    assert str(error.value).endswith(
        "checkpoint-2 is complete: type the same command with --resume auto to continue from it"
    )
    assert not error.value.alone, "all ranks raise it"
    assert [folder.name for folder in checkpoint.checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]
    assert checkpoint.read_manifest(output / "checkpoint-4") is None
    assert not checkpoint.problems_of(output / "checkpoint-2")


KILL = "and launchers kill a run 30 s after the signal."


@pytest.mark.parametrize(
    ("seconds", "kept", "message"),
    [
        (29.0, True, "about 29 s"),
        (
            61.0,
            True,
            f"about 61 s, {KILL} checkpoint-40 is complete, so 10 steps would be lost, 0:20 of training",
        ),
        (
            61.0,
            False,
            f"about 61 s, {KILL} no checkpoint is complete, so 50 steps would be lost, 1:40 of training",
        ),
    ],
)
def test_a_stopped_run_says_what_is_lost_if_it_is_killed_before_its_save_ends(
    tmp_path: Path, seconds: float, kept: bool, message: str
) -> None:
    (tmp_path / "checkpoint-40").mkdir()
    if kept:
        checkpoint.write_manifest(tmp_path / "checkpoint-40", None, [], {})
    stopped = SimpleNamespace(save_seconds=seconds, seconds=lambda: 100.0)
    assert saving._stopping(stopped, tmp_path, 50) == f"stopped at step 50: saving takes {message}"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (finish, "write_run_record"),
        pytest.param(final_model, "copy_files", marks=pytest.mark.slow),
        pytest.param(finish, "write_model_card", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_after_the_last_step_is_reported_and_finishing_is_repeated(
    begin: Begin, output: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    starts_running = name == "write_run_record"
    fill(
        monkeypatch,
        module,
        name,
        lambda _, record, *__: not (starts_running and record["status"] == "running"),
    )
    message = r"its last step: the model of .* could not be placed .*No space left.*--resume auto"
    with pytest.raises(TrainingError, match=message):
        begin(save_steps=100)
    assert record(output)["status"] == "running"
    monkeypatch.undo()
    monkeypatch.setattr(steps, "load_model", lambda *args: pytest.fail("nothing is trained again"))
    assert begin(save_steps=100, resume="auto")["status"] == "finished"


# --- errors of the command -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OptionsError("--lr 0: is no rate"), REFUSED, "Cannot train:\n  - --lr 0: is no rate"),
        (TrainingError("step 3: a bad loss"), CANNOT_CONTINUE, "Training ended at step 3: a bad loss"),
        (Interrupted(), INTERRUPTED, "Stopped. To continue, type the same command again"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/disk/out/ledger.json"),
            CANNOT_CONTINUE,
            "Training ended: /disk/out/ledger.json could not be written (No space left on device). Make room",
        ),
        (
            OSError(errno.EROFS, "Read-only file system"),
            CANNOT_CONTINUE,
            "Training ended: OUT could not be written (Read-only file system)",
        ),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"
            ),
            CANNOT_CONTINUE,
            "Rank 0 ran out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB). Type --gradient-",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            CANNOT_CONTINUE,
            "Rank 0 ran out of host memory. Start fewer ranks",
        ),
        (MemoryError(), CANNOT_CONTINUE, "Rank 0 ran out of host memory. Start fewer ranks"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, ""),  # a bug keeps its traceback
        (RuntimeError("shape mismatch"), 1, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_that_a_user_can_fix_end_the_command_with_a_message(
    request_: StopRequest, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    """The process group is left alone: NCCL's shutdown would wait for ranks that wait for this one."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", destroy := Mock())
    monkeypatch.setattr(trainer, "train", Mock(side_effect=error))
    monkeypatch.delenv("RANK", raising=False)
    result = CliRunner().invoke(trainer.main, ["--local-output-dir", "OUT"])
    assert result.exit_code == code
    assert message in result.output
    assert (result.exception is error) == (code == 1)
    destroy.assert_not_called()
