"""Sample answers during training: generated once per due step by that step's model, without changing training."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, TrainerState

from tests.conftest import jsonl, say_rows, write
from tests.run.test_kills import Run, assert_the_same_run
from tests.run.test_resume import TrainFunction, run
from tests.starts import DEMO
from training import trainer
from training.consts import GREEDY, SAMPLE_TOKENS
from training.data.conversations import Prompt, Turn, row_of_prompt
from training.data.prompt_files import read_prompts
from training.errors import DataError, OptionsError
from training.model.generation import answer_prompts, load_model_tokenizer_for_generate
from training.options.intervals import steps_between_samples
from training.options.trainer_options import TrainingOptions
from training.storage import metrics
from training.storage.copy import model_files
from training.tracking import callbacks, samples
from training.tracking.progress import print_line
from training.tracking.samples import Samples

PROMPTS = [
    Prompt("Say 3."),
    Prompt("Say 4 please."),
    Prompt("Count the words.", "red blue\ngreen"),
    Prompt("Say 3.", history=(Turn("Say 1.", "1", "Be short.\n\n"), Turn("Say 2.", "two\nor 2"))),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An epoch of 14 steps."""
    return jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", say_rows(120))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", [row_of_prompt(p) for p in PROMPTS])


@pytest.fixture
def train_small(rows: str, model_with_dropout: str, monkeypatch: pytest.MonkeyPatch) -> TrainFunction:
    return partial(run, rows, monkeypatch=monkeypatch, input_model=model_with_dropout)


# --- prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "Name a river.\r\n\n  Add 1 and 2.  \nName a river.\n", [("Name a river.", ""), ("Add 1 and 2.", "")]),
        ("a.TXT", "\ufeffSchöne Grüße", [("Schöne Grüße", "")]),
        ("a.txt", "one line\u2028still the same", [("one line\u2028still the same", "")]),
        ("a.json", '[{"instruction": "a", "input": "b"}, {"instruction": "c"}]', [("a", "b"), ("c", "")]),
        ("a.jsonl", '{"instruction": "a", "context": null, "output": 7}\n{"instruction": 7}', [("a", ""), ("7", "")]),
    ],
)  # fmt: skip
def test_prompts_are_read_from_lines_or_objects_without_duplicates(
    tmp_path: Path, name: str, content: str, expected: list[tuple[str, str]]
) -> None:
    assert read_prompts(write(tmp_path / name, content)) == [Prompt(*prompt) for prompt in expected]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", None, "no such file"),
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b"\n  \n", "has no instructions"),
        ("a.txt", b"good\nb\xe4d", "line 2: not UTF-8"),
        ("a.csv", b"instruction\na\n", "cannot read '.csv' files. Expected one of .txt, .json, .jsonl"),
        ("a.json", b"[]", "has no instructions"),
        ("a.json", b'[{"prompt": "a"}]', "no column 'instruction'. Found 'prompt'; expected instruction; input"),
        ("a.jsonl", b'{"instruction": "a"}\n{"instruction": \n', "line 2: broken JSON"),
        ("a.jsonl", b'[{"instruction": []}]', "instruction is list [], expected a string"),
        ("a.jsonl", b'{"instruction": " ", "input": "b"}', "row 1: the instruction is empty"),
        ("a.json", b'[{"instruction": "a"}, {"instruction": null}, {"instruction": "b"}, {"input": "c"}]',
         "row 2: the instruction is empty. 2 rows are like this; the first: 2, 4"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_used_are_reported_with_file_and_row(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_prompts(str(file))
    assert words in str(error.value)
    assert str(file) in str(error.value)


def test_a_folder_or_an_invalid_name_is_refused_as_a_prompt_file(tmp_path: Path) -> None:
    for name in (str(tmp_path), "~nobody-of-this-name/a.txt", "a\0b.txt"):
        with pytest.raises(DataError):
            read_prompts(name)


def test_all_problems_of_the_sample_options_are_reported_before_loading_anything(tmp_path: Path) -> None:
    words = [*DEMO, "--local-output-dir", str(tmp_path / "out")]
    for more, messages in (
        (["--sample-prompts", str(tmp_path / "none.txt")], ["--sample-prompts", "no such file"]),
        (
            ["--sample-every", "5"],
            ["--sample-every 5: has no effect without --sample-prompts. Add --sample-prompts FILE"],
        ),
        (
            ["--sample-every", "often", "--sample-prompts", ""],
            ["--sample-every often: expected steps, such as 100, or epochs", "--sample-prompts is empty"],
        ),
    ):
        result = CliRunner().invoke(trainer.main, [*words, *more])
        assert result.exit_code == 2
        assert all(text in result.stderr for text in messages), result.stderr
        assert not (tmp_path / "out").exists()


# --- when samples are due ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "steps", "due"),
    [
        (None, 3, [0, 3, 6, 9]),
        ("4", 3, [0, 4, 8]),
        ("1epoch", 4, [0, 4, 8]),
        ("2 epochs", 4, [0, 8]),
        ("0.5epochs", 3, [0, 2, 3, 5, 6, 8, 9]),
        ("0.1epochs", 30, [0, 3, 6, 9]),  # 0.1 x 30 is more than 3 in floating point
        (".1epoch", 5, list(range(10))),  # due twice within a step: sampled once
    ],
)
def test_samples_are_due_at_the_first_step_at_or_after_their_time(
    every: str | None, steps: int, due: list[int]
) -> None:
    samples = Samples.__new__(Samples)
    samples.every = steps_between_samples(TrainingOptions(local_output_dir="x", sample_every=every), steps)
    assert [n for n in range(10) if samples._due(TrainerState(global_step=n))] == due


@pytest.mark.parametrize(
    "every", ["0", "0epochs", "-1", "1.5", "nan", "1e3", "1epochs2", "epoch", "inf epochs", " 5 ", "٣"]
)
def test_a_sample_interval_that_is_neither_steps_nor_epochs_is_refused(every: str) -> None:
    with pytest.raises(OptionsError, match="expected steps, such as 100, or epochs"):
        steps_between_samples(TrainingOptions(local_output_dir="x", sample_every=every), 10)


# --- training is unchanged ---------------------------------------------------------------------------


def logged_values(output: Path) -> list[dict[str, float]]:
    """All logged values except those that depend on the clock."""
    clock = ("second", "runtime", "mfu", "memory", "flos")
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if not any(word in k for word in clock)} for entry in entries]


@pytest.mark.parametrize(
    ("dropout", "changed"),
    [
        (True, {}),
        pytest.param(False, {"gradient_checkpointing": "on"}, marks=pytest.mark.slow),
        pytest.param(False, {"batching": "padded"}, marks=pytest.mark.slow),
    ],
    ids=["dropout", "packed, checkpointing", "padded"],
)
def test_losses_and_weights_are_the_same_with_and_without_samples(
    train_small: TrainFunction, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    dropout: bool, changed: dict[str, Any],
) -> None:  # fmt: skip
    monkeypatch.setattr(samples, "SAMPLE_TOKENS", 8)
    changed = changed | {"max_steps": 6} | ({} if dropout else {"input_model": "demo"})
    train_small(tmp_path / "without", **changed)
    train_small(tmp_path / "with", sample_prompts=prompts, sample_every="1", **changed)
    steps = [entry["step"] for entry in metrics.read(tmp_path / "with" / "samples.jsonl")]
    assert steps == [step for step in range(7) for _ in PROMPTS]
    assert logged_values(tmp_path / "with") == logged_values(tmp_path / "without")
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without"))
    assert ours == theirs


@pytest.fixture
def samples_of(answering_model: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., Samples]:
    """Makes a Samples callback without a Trainer."""
    trainer = SimpleNamespace(
        model=answering_model, processing_class=tokenizer, args=SimpleNamespace(device=torch.device("cpu"))
    )
    return lambda prompts: Samples(trainer, prompts, Fraction(1), tmp_path / "samples.jsonl")


def test_sampling_restores_the_model_and_all_random_states(
    answering_model: Any, samples_of: Callable[..., Samples]
) -> None:
    """The model here draws from every source of random numbers."""
    drawn = []

    def draw(*_: Any) -> None:
        drawn.append((torch.rand(1), np.random.rand(), random.random(), answering_model.training))

    answering_model.train()
    answering_model.config.use_cache = False
    config, hook = answering_model.config.to_dict(), answering_model.register_forward_hook(draw)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    try:
        assert samples_of(PROMPTS)._generate_answers() == ["AB"] * len(PROMPTS)
        assert answering_model.training
        assert answering_model.config.to_dict() == config
    finally:
        hook.remove()
        answering_model.eval()
        answering_model.config.use_cache = True
    assert drawn
    assert not any(training for *_, training in drawn)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_a_prompt_longer_than_the_models_context_is_truncated_and_answered(
    samples_of: Callable[..., Samples],
) -> None:
    assert samples_of([Prompt("word " * 2000), Prompt("a")])._generate_answers() == ["AB", "AB"]


def test_a_model_with_too_few_positions_for_an_answer_is_refused(
    train_small: TrainFunction, prompts: str, model_with_dropout: str, tmp_path: Path
) -> None:
    AutoTokenizer.from_pretrained(model_with_dropout).save_pretrained(tmp_path / "base")
    config = GPT2Config.from_pretrained(model_with_dropout, n_positions=56)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    small = {"input_model": str(tmp_path / "base"), "max_dropped_fraction": 1.0}
    with pytest.raises(
        OptionsError, match=r"the model has 56 positions, too few for a prompt and an answer\. Leave it out"
    ):
        train_small(tmp_path / "out", sample_prompts=prompts, **small)


# --- file, console and TensorBoard ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample_options(prompts: str) -> dict[str, Any]:
    return {"sample_prompts": prompts, "sample_every": "4", "max_steps": 14, "lr": 1e-2}


@pytest.fixture(scope="module")
def sampled(
    rows: str,
    sample_options: dict[str, Any],
    model_with_dropout: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Output of one epoch with samples every four steps and all checkpoints; printed.txt beside it."""
    output = tmp_path_factory.mktemp("sampled") / "out"
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.tracking.progress.tqdm.write", lambda text, file: lines.append(text))
        run(rows, output, patch, input_model=model_with_dropout, save_total_limit=50, **sample_options)
    output.with_name("printed.txt").write_text("\n".join(lines))
    return output


@pytest.fixture
def start_or_resume(
    rows: str,
    sample_options: dict[str, Any],
    model_with_dropout: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> TrainFunction:
    """Starts or resumes the same run in another folder."""
    return partial(run, rows, tmp_path / "out", monkeypatch, input_model=model_with_dropout, **sample_options)


STAGES = [0, 4, 8, 12, 14]


def test_the_samples_file_has_every_prompt_of_every_due_step_in_order(sampled: Path) -> None:
    entries = metrics.read(sampled / "samples.jsonl")
    written = [{k: e[k] for k in e if k not in ("epoch", "response")} for e in entries]
    assert written == [{"step": n} | row_of_prompt(p) for n in STAGES for p in PROMPTS]
    assert [list(e) for e in entries[2:4]] == [
        ["step", "epoch", "instruction", "input", "response"],
        ["step", "epoch", "instruction", "input", "history", "response"],
    ]
    assert entries[3]["history"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Say 1."},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Say 2."},
        {"role": "assistant", "content": "two\nor 2"},
    ]
    log = json.loads((sampled / "trainer_state.json").read_text())["log_history"]
    epochs = {e["step"]: e["epoch"] for e in log}
    assert all(e["epoch"] == epochs[e["step"]] for e in entries)
    assert len({tuple(e["response"] for e in entries if e["step"] == n) for n in STAGES}) > 1, (
        "the answers change as the model learns"
    )


def greedy(folder: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Greedy answers of the model in a folder."""
    model, tokenizer = load_model_tokenizer_for_generate(str(folder), dtype=dtype, device="cpu")
    options = {"model": model, "tokenizer": tokenizer, "max_new_tokens": SAMPLE_TOKENS}
    return answer_prompts(PROMPTS, **options, **GREEDY)


def test_samples_are_the_greedy_answers_of_the_model_of_their_step(sampled: Path) -> None:
    entries = metrics.read(sampled / "samples.jsonl")
    for step, folder in ((12, sampled / "checkpoint-12"), (14, sampled)):
        assert [e["response"] for e in entries if e["step"] == step] == greedy(folder)


def test_the_console_shows_one_block_of_samples_for_each_due_step(sampled: Path) -> None:
    printed = sampled.with_name("printed.txt").read_text()
    heads = [line.split(",")[0] for line in printed.splitlines() if "answers of the model" in line]
    assert heads == [f"step {n}/14  epoch {n / 14:.2f}  answers of the model" for n in STAGES]
    last = metrics.read(sampled / "samples.jsonl")[-len(PROMPTS) :]
    block = printed.rpartition("answers of the model")[2].splitlines()[1:]
    assert block[0] == "  Say 3."
    assert block[1].strip() == (last[0]["response"].splitlines() or ["(nothing)"])[0].strip()
    assert "  Count the words.\n  red blue\n  green\n" in printed
    turns = "system: Be short.\n  user: Say 1.\n  assistant: 1\n  user: Say 2.\n  assistant: two\n  or 2\n  user: Say 3."
    assert f"\n  {turns}\n      " in printed


def test_tensorboard_shows_each_prompt_with_its_answers(sampled: Path) -> None:
    events = EventAccumulator(str(sampled / "runs"))
    events.Reload()
    for number, prompt in enumerate(PROMPTS):
        texts = events.Tensors(f"answers/{number:03}/text_summary")
        assert [text.step for text in texts] == STAGES
        shown = texts[0].tensor_proto.string_val[0].decode()
        assert prompt.instruction in shown
        assert ("assistant: two" in shown) == bool(prompt.history)


def test_metrics_and_samples_are_published_with_the_model(sampled: Path) -> None:
    assert {"metrics.jsonl", "samples.jsonl"} <= {file.name for file in model_files(sampled)}


def test_control_characters_are_not_printed_and_long_lists_are_cut(
    samples_of: Callable[..., Samples], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = samples_of([Prompt(f"Say {n}.") for n in range(12)])
    answers = ["\x1b[2Jclear\r", "", *["x"] * 10]
    print_line(samples._format_answers(TrainerState(global_step=3, max_steps=9), answers, 1.0))
    text = capsys.readouterr().out
    assert "�[2Jclear�" in text
    assert "\n  Say 1.\n      (nothing)\n" in text
    assert "Say 9." in text
    assert "Say 10." not in text
    assert f"and 2 more in {tmp_path / 'samples.jsonl'}" in text


# --- resumed runs --------------------------------------------------------------------------------------


def without_clock(output: Path) -> list[dict[str, Any]]:
    names = ("step", "max_steps", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")
    entries = metrics.read(output / "metrics.jsonl")
    # A save is logged when it is complete, at the end of a step that the disk chooses.
    return [{k: e[k] for k in names if k in e} for e in entries if "blocked_seconds" not in e]


def assert_same_samples_and_metrics(output: Path, uninterrupted: Path) -> None:
    assert (output / "samples.jsonl").read_bytes() == (uninterrupted / "samples.jsonl").read_bytes()
    assert without_clock(output) == without_clock(uninterrupted)


@pytest.mark.parametrize(
    ("stop_at", "newest"),
    [pytest.param(3, 0, marks=pytest.mark.slow), (8, 4), pytest.param(14, 14, marks=pytest.mark.slow)],
    ids=["between due steps", "at a due step", "at the end"],
)
def test_a_stopped_and_resumed_run_writes_every_sample_once(
    start_or_resume: TrainFunction, sampled: Path, tmp_path: Path, stop_at: int, newest: int
) -> None:
    start_or_resume(stop_at=stop_at)
    steps = [entry["step"] for entry in metrics.read(tmp_path / "out" / "samples.jsonl")]
    assert max(steps) == newest, "a signal leaves no time for samples"
    start_or_resume()
    assert_same_samples_and_metrics(tmp_path / "out", sampled)


def truncate_files(output: Path, uninterrupted: Path) -> None:
    """Leaves the files as a kill in step 13 does: of step 12 one complete sample and one cut off."""
    lines = (uninterrupted / "samples.jsonl").read_bytes().splitlines(keepends=True)
    whole = 3 * len(PROMPTS) + 1  # of steps 0, 4 and 8, and the first of step 12
    (output / "samples.jsonl").write_bytes(b"".join(lines[:whole]) + lines[whole][:20])
    (output / "metrics.jsonl").write_bytes(
        (uninterrupted / "metrics.jsonl").read_bytes() + b'{"step": 13, "lo'
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop_at", "damage"),
    [(12, truncate_files), (3, lambda output, _: (output / "checkpoint-3" / "manifest.json").unlink())],
    ids=["after a checkpoint", "before its first checkpoint"],
)
def test_a_killed_and_resumed_run_writes_every_sample_once(
    start_or_resume: TrainFunction,
    sampled: Path,
    tmp_path: Path,
    stop_at: int,
    damage: Callable[[Path, Path], None],
) -> None:
    start_or_resume(stop_at=stop_at)
    damage(tmp_path / "out", sampled)
    start_or_resume()
    assert_same_samples_and_metrics(tmp_path / "out", sampled)
    assert all(entry["seconds"] for entry in metrics.read(tmp_path / "out" / "metrics.jsonl"))


@pytest.mark.slow
def test_a_run_resumed_in_another_folder_has_the_earlier_samples_and_metrics(
    start_or_resume: TrainFunction, sampled: Path, tmp_path: Path
) -> None:
    before = (sampled / "samples.jsonl").read_bytes()
    start_or_resume(resume=str(sampled / "checkpoint-9"))
    assert_same_samples_and_metrics(tmp_path / "out", sampled)
    assert (sampled / "samples.jsonl").read_bytes() == before


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_zero3_ranks_train_and_sample_the_same_when_killed_three_times(
    rows: str, prompts: str, tmp_path: Path
) -> None:
    runs: list[Run] = []

    def start(name: str, *more: object) -> Run:
        runs.append(Run(rows, tmp_path / name, 2, "--save-total-limit", 100, *more))
        return runs[-1]

    sample_words = ["--sample-prompts", prompts, "--sample-every", "2"]
    try:
        start("without").wait_for_exit()
        printed = start("with", *sample_words).wait_for_exit()
        assert printed.count("answers of the model") == 10, "only rank 0 prints"
        assert_the_same_run(tmp_path / "with", tmp_path / "without")
        samples = tmp_path / "killed" / "samples.jsonl"
        for step in (6, 8, 14):  # a checkpoint is also due at step 6
            killed = start("killed", "--resume", "auto", *sample_words)
            assert killed.wait_until(lambda at=step: any(e["step"] >= at for e in metrics.read(samples)))
            killed.kill()
            killed.wait(60)
        start("killed", "--resume", "auto", *sample_words).wait_for_exit()
        assert_the_same_run(tmp_path / "killed", tmp_path / "without")
        assert samples.read_bytes() == (tmp_path / "with" / "samples.jsonl").read_bytes()
    finally:
        for started in runs:
            started.kill()
    answers = [e["response"] for e in metrics.read(samples)[-len(PROMPTS) :]]
    assert answers == greedy(tmp_path / "with", torch.float32)


@pytest.mark.slow
def test_a_full_disk_does_not_end_a_run(
    start_or_resume: TrainFunction,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = [tmp_path / "out" / name for name in ("metrics.jsonl", "samples.jsonl")]

    def no_room(self: Any, *args: Any, **kwargs: Any) -> None:
        for file in files:
            file.symlink_to("/dev/full")

    monkeypatch.setattr(callbacks.MetricsLog, "on_train_begin", no_room)
    # Reading /dev/full never ends.
    monkeypatch.setattr(Samples, "_existing_answers", lambda *args: set())
    monkeypatch.setattr(metrics, "saves_of", lambda *args: {})
    record, _ = start_or_resume(max_steps=2)
    assert record["status"] == "finished"
    for file in files:
        message = f"{file} could not be written (No space left on device); the run continues without it"
        assert message in caplog.text
