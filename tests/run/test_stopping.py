"""What ends a run before its time is told with the step, the rank and the rows; and nothing bad is saved."""

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
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner
from deepspeed.runtime.fp16 import loss_scaler
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState

from tests.conftest import jsonl
from tests.run.test_trainer import BF16, deepspeed, record, run
from training import files, trainer
from training.data.tokens import prepare_dataset, split_held_out
from training.errors import Interrupted, TrainingError
from training.launch.exits import CANNOT_CONTINUE
from training.options.command_line import option_words
from training.options.trainer_options import TrainingOptions
from training.run import completion_trainer, finish, saving, steps
from training.run.ending import StopRequest, default_sigterm, lost_peer, timed_out
from training.run.step_guard import OVERFLOWS_IN_A_ROW, StepGuard
from training.storage import checkpoint
from training.trainer import train

RARE = "Z"  # in one row alone
TEST_SIZE = 8


# --- asked to end ------------------------------------------------------------------------------------


@pytest.fixture
def request_(monkeypatch: pytest.MonkeyPatch) -> StopRequest:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    request = StopRequest()
    request.listen()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_rank_that_waits_for_others_dies_of_sigterm_at_once(request_: StopRequest) -> None:
    """Where it waits in C++, Python's handler would be called when the wait is over: never."""
    with default_sigterm():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_where_no_step_is_computed_a_signal_ends_at_once_and_its_repetition_does_nothing(
    request_: StopRequest, number: signal.Signals
) -> None:
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert request_.received


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_step_is_computed_to_its_end(request_: StopRequest, number: signal.Signals) -> None:
    request_.computing = True
    os.kill(os.getpid(), number)
    assert request_.received


def guard_of(*ranks: tuple[int, int], skipped: bool = False, asked: bool = False) -> StepGuard:
    """A guard that sees these (asked, bad micro-step) of the other ranks."""
    request = StopRequest()
    request.received = asked
    accelerator = SimpleNamespace(
        gather=lambda mine: torch.cat([mine, torch.tensor(ranks, dtype=mine.dtype).reshape(-1, 2)]),
        optimizer_step_was_skipped=skipped,
    )
    trainer = SimpleNamespace(
        accelerator=accelerator, describe_bad_loss=lambda *place: f"rank, micro-step {place}"
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
    ("losses", "ranks", "place"),
    [
        ([1.0, float("nan"), 1.0], [], (0, 1)),
        ([float("inf")], [], (0, 0)),
        ([1.0, -float("inf"), float("nan")], [], (0, 1)),
        ([1.0, 2.0], [(0, -1), (0, 1)], (2, 1)),
        ([1.0, float("nan")], [(0, 0)], (0, 1)),
    ],
)
def test_the_first_loss_that_is_no_number_is_found_on_whatever_rank(
    losses: list[float], ranks: list[tuple[int, int]], place: tuple[int, int]
) -> None:
    with pytest.raises(TrainingError, match=re.escape(f"rank, micro-step {place}")):
        step(guard_of(*ranks), *losses)


def test_micro_steps_are_counted_anew_in_each_step() -> None:
    guard = guard_of()
    step(guard, 1.0, 2.0, 3.0)
    with pytest.raises(TrainingError, match=r"\(0, 1\)"):
        step(guard, 1.0, float("nan"))


@pytest.mark.parametrize("ranks", [[(1, -1)], [(0, -1), (1, -1)]])
def test_one_rank_that_is_asked_to_stop_stops_them_all_with_a_checkpoint(
    ranks: list[tuple[int, int]],
) -> None:
    guard = guard_of(*ranks)
    control = step(guard, 1.0)
    assert guard.stopped
    assert control.should_training_stop
    assert control.should_save
    assert not control.should_evaluate, "time is short"
    assert step(guard_of(*ranks), 1.0, step=10).should_evaluate, "the last step is the end of the run"


def test_without_a_reason_a_run_goes_on_and_a_checkpoint_has_its_held_out_loss() -> None:
    guard = guard_of((0, -1))
    assert not step(guard, 1.0).should_training_stop
    assert step(guard, 1.0, should_save=True).should_evaluate
    assert not guard.stopped


def test_fp16_steps_that_overflow_in_a_row_end_the_run_at_the_limit_and_a_good_one_counts_anew() -> None:
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


def test_deepspeeds_own_end_at_its_least_loss_scale_is_told_in_the_same_words(
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


def test_an_error_of_a_lost_rank_is_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    gloo = RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]"
    )
    assert not lost_peer(gloo), "there are no ranks"
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


# --- numbers that are none, on a real run ------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, int, int]:
    """A file, the number of its one row with RARE, which is trained on, and that of a held-out row."""
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
    """The base model with one number of a token's embedding spoilt."""

    def spoil(token: str, value: float = float("nan")) -> str:
        target = shutil.copytree(base_folder, tmp_path / "base")
        weights = load_file(target / "model.safetensors")
        weights["transformer.wte.weight"][tokenizer.convert_tokens_to_ids(token), 0] = value
        save_file(weights, target / "model.safetensors", {"format": "pt"})
        return str(target)

    return spoil


def named_rows(words: str, trained: int) -> None:
    [listed] = re.findall(r"was computing rows ([\d, ]+) of the dataset", words)
    numbers = [int(number) for number in listed.split(",")]
    assert trained in numbers
    assert len(numbers) <= 3, "a rank's micro-batch, not the global batch"


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_a_loss_that_is_no_number_ends_the_run_with_step_rank_and_rows(
    begin: Begin, poisoned: Poison, rows: tuple[str, int, int], output: Path,
    batching: str, value: float,
) -> None:  # fmt: skip
    with pytest.raises(TrainingError, match=r"step \d+: the loss of rank 0 is NaN or infinite") as told:
        begin(input_model=poisoned(RARE, value), batching=batching, save_steps=100)
    named_rows(str(told.value), rows[1])
    assert not checkpoint.checkpoints(output)
    assert record(output)["status"] == "running"


@pytest.mark.parametrize(
    ("held_out", "told"),
    [
        (False, r"step 2: 1 tensors of the model hold NaN .*transformer.wte.weight"),
        (True, "step 0: the held-out loss is NaN or infinite"),
    ],
    ids=["no row, and the finished model would be refused after days", "a held-out row"],
)
def test_a_weight_that_is_no_number_is_not_saved_where_no_trained_row_reads_it(
    begin: Begin, poisoned: Poison, rows: tuple[str, int, int], output: Path, held_out: bool, told: str
) -> None:
    content = [json.loads(line) for line in Path(rows[0]).read_text().splitlines()]
    content[rows[2] - 1]["output"] += " ~" * held_out
    file = jsonl(output.with_suffix(".jsonl"), content)
    with pytest.raises(TrainingError, match=told):
        begin(input_model=poisoned("~"), training_dataset=file)
    assert not any(map(checkpoint.read_manifest, checkpoint.checkpoints(output)))


@pytest.mark.slow
def test_on_two_zero3_ranks_one_tells_the_step_the_rank_and_the_rows(
    options: dict[str, Any], poisoned: Poison, rows: tuple[str, int, int], output: Path
) -> None:
    options |= {"input_model": poisoned(RARE), "save_steps": 100}
    result = run(deepspeed(2), *option_words(options), "--deepspeed", BF16, timeout=300)
    assert result.returncode == CANNOT_CONTINUE, result.stdout
    assert len(re.findall(r"Training ended at step \d+: the loss of rank [01] is NaN", result.stdout)) == 1
    assert "Traceback" not in result.stdout
    named_rows(result.stdout, rows[1])
    assert not checkpoint.checkpoints(output)


# --- a disk without room -----------------------------------------------------------------------------


def fill(patch: pytest.MonkeyPatch, module: Any, name: str, when: Callable[..., bool]) -> None:
    """The disk is full for these calls of a function."""
    real = getattr(module, name)

    def full(place: Path, *args: Any, **kwargs: Any) -> Any:
        if when(place, *args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
        return real(place, *args, **kwargs)

    patch.setattr(module, name, full)


def test_a_checkpoint_that_would_not_fit_is_not_begun(
    begin: Begin, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for the first two, and then there is not."""
    real = files.free_bytes

    def free(place: Path) -> int | None:
        return 1000 if len(checkpoint.checkpoints(output)) == 2 else real(place)

    monkeypatch.setattr(saving, "free_bytes", free)
    with pytest.raises(TrainingError) as told:
        begin(save_steps=1)
    assert re.match(
        r"step 3: a checkpoint needs .* are free in .*\. Make room\. checkpoint-2 is good", str(told.value)
    )
    assert [folder.name for folder in checkpoint.checkpoints(output)] == ["checkpoint-1", "checkpoint-2"]
    assert not any(map(checkpoint.problems_of, checkpoint.checkpoints(output)))


@pytest.mark.parametrize("name", ["write_json", "digests", "write_manifest"])
def test_a_disk_that_is_full_at_the_very_end_of_a_save_is_told_in_words(
    begin: Begin, output: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fill(monkeypatch, checkpoint, name, lambda place, *_: "checkpoint-4" in str(place))
    with pytest.raises(
        TrainingError, match=r"No space left on device.*Make room\. checkpoint-2 is good"
    ) as told:
        begin()
    assert told.value.alone
    assert checkpoint.read_manifest(output / "checkpoint-4") is None
    assert not checkpoint.problems_of(output / "checkpoint-2")


@pytest.mark.parametrize(
    "name",
    [
        "write_run_record",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("place_model", "write_model_card")),
    ],
)
def test_a_disk_that_is_full_at_the_finish_line_is_told_and_the_end_is_done_again(
    begin: Begin, output: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    begun = name == "write_run_record"
    fill(monkeypatch, finish, name, lambda _, what, *__: not (begun and what["status"] == "running"))
    words = r"its last step: the model of .* could not be placed .*No space left.*--resume auto"
    with pytest.raises(TrainingError, match=words):
        begin(save_steps=100)
    assert record(output)["status"] == "running"
    monkeypatch.undo()
    monkeypatch.setattr(steps, "load_model", lambda *args: pytest.fail("nothing is trained again"))
    assert begin(save_steps=100, resume="auto")["status"] == "finished"


# --- what ends the command ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
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
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, ""),  # a fault of ours keeps its traceback
        (RuntimeError("shape mismatch"), 1, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_person_can_mend_ends_the_command_in_words(
    request_: StopRequest, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, told: str
) -> None:
    monkeypatch.setattr(trainer, "train", Mock(side_effect=error))
    monkeypatch.delenv("RANK", raising=False)
    result = CliRunner().invoke(trainer.main, ["--local-output-dir", "OUT"])
    assert result.exit_code == code
    assert told in result.output
    assert (result.exception is error) == (code == 1)
