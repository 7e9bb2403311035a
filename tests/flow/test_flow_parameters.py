"""The flow's parameters for the trainer's options have the same name, type and help."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training.consts import DEFAULT_INPUT_MODEL, DEMO
from training.data.conversations import prompt_of
from training.data.prompt_files import read_prompts
from training.errors import OptionsError
from training.machine.catalogue import find_machine
from training.options.trainer_options import TrainingOptions

FLOWS = Path(__file__).parents[2] / "flows"


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FLOWS))
    import train_dolly_flow

    return train_dolly_flow


def stand_in(flow: Any, **typed: Any) -> Any:
    """A run of the flow with these parameters, whose machine has no problems."""
    nothing = dict.fromkeys((*flow.PARAMETERS, "sample_prompts", "training_file", "dbfs_output_root"))
    run = SimpleNamespace(**nothing | {"trainer_options": "", "file_names": {}, "names": {}} | typed)
    run._machine_problems = lambda *of: []
    run._own_file = partial(flow.TrainDollyFlow._own_file, run)
    return run


def parse(flow: Any, more: str, problems: list[str]) -> TrainingOptions:
    return flow.parse_options(["--local-output-dir", "/out", "--resume", "auto"], more, problems)


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("input_model", str, "  [default: EleutherAI/gpt-j-6B]"),
        ("test_size", int, ""),
        ("epochs", float, "  [default: 1]"),
        ("max_steps", int, ""),
        ("lr", float, "  [default: Dolly's]"),
        ("seed", int, "  [default: 42]"),
        ("lora", int, "  [default: 0]"),
        ("lora_alpha", float, ""),
        ("quantize", str, ""),
        ("sample_every", str, ""),
    ],
)
def test_a_parameter_has_the_type_and_the_help_of_its_option(
    flow: Any, name: str, kind: type, default: str
) -> None:
    parameter = flow.option(name, {"epochs": "1", "lr": "Dolly's"}.get(name, ""))
    parameter.init()
    assert parameter.name == name.replace("_", "-")
    assert parameter.kwargs["type"] is kind
    assert parameter.kwargs["help"] == TrainingOptions.__dataclass_fields__[name].metadata["help"] + default
    assert parameter.kwargs.get("default") is None, "a default must not override a recipe"


@pytest.mark.parametrize(
    ("typed", "model", "test_size"),
    [
        ({}, DEMO, 400),
        ({"training_file": b"[]"}, DEMO, None),
        ({"training_file": b"[]", "test_size": 30}, DEMO, 30),
        ({"training_file": b"[]", "test_size": 30, "trainer_options": "--test-size 20"}, DEMO, 20),
        ({"training_dataset": "/data/rows.csv"}, DEMO, None),
        ({"input_model": "EleutherAI/pythia-70m"}, "EleutherAI/pythia-70m", None),
        ({"gpu_family": "a100"}, DEFAULT_INPUT_MODEL, None),
    ],
)
def test_a_cpu_trains_the_demos_model_and_its_number_of_held_out_rows_is_for_the_demos_rows(
    flow: Any, tmp_path: Path, typed: dict[str, Any], model: str, test_size: int | None
) -> None:
    run = stand_in(
        flow, **{"gpu_family": "cpu", "ranks": 2, "all_ranks": 2, "folder": str(tmp_path / "run")} | typed
    )
    run.output = f"{tmp_path}/run/model"
    options = flow.TrainDollyFlow._options(run, find_machine("8xA100-40GB"), True)
    assert (options.input_model, options.test_size) == (model, test_size)


def test_the_sample_prompts_of_the_demo_are_rows_and_a_follow_up_after_its_first_turn(
    flow: Any, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.json"
    file.write_bytes(flow.default_prompts(True))
    *others, follow_up = read_prompts(str(file))
    assert follow_up == prompt_of("And after that?", history=[["Which day follows Monday?", "Tuesday"]])
    assert len(others) == 6
    assert not any(prompt.history for prompt in others)


def test_the_help_of_the_datasets_says_how_to_name_several(flow: Any) -> None:
    parameter = flow.option("training_dataset")
    parameter.init()
    assert parameter.kwargs["help"].endswith("Several are separated by commas.  [default: tatsu-lab/alpaca]")


@pytest.mark.parametrize(
    ("typed", "more", "sources"),
    [
        ("a/b, rows.csv", "", ("a/b", "{}/rows.csv")),
        ("a/b,rows.csv", "--training-dataset demo", ("demo",)),
        (None, "--training-dataset demo --training-dataset=a/b", ("demo", "a/b")),
        (None, "", ("demo",)),
    ],
)
def test_the_parameter_takes_several_datasets_and_those_of_trainer_options_replace_them(
    flow: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    typed: str | None,
    more: str,
    sources: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("")
    run = stand_in(
        flow,
        gpu_family="cpu",
        ranks=2,
        all_ranks=2,
        folder="run",
        training_dataset=typed,
        trainer_options=more,
    )
    run.output = f"{tmp_path}/run/model"
    options = flow.TrainDollyFlow._options(run, find_machine("8xA100-40GB"), True)
    assert options.training_dataset == tuple(source.format(tmp_path) for source in sources)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ({}, {"lora": 0, "quantize": None}),
        ({"lora": 8, "lora_alpha": 8.0, "lora_targets": "q_proj"},
         {"lora": 8, "lora_alpha": 8.0, "lora_targets": "q_proj", "deepspeed": None, "quantize": None}),
        ({"lora": 16, "lora_dropout": 0.1, "quantize": "nf4"}, {"lora_dropout": 0.1, "quantize": "nf4", "deepspeed": None}),
    ],
)  # fmt: skip
def test_adapters_on_one_gpu_are_trained_without_deepspeed(
    flow: Any, tmp_path: Path, typed: dict[str, Any], expected: dict[str, Any]
) -> None:
    run = stand_in(
        flow, **{"gpu_family": "a10", "ranks": 1, "all_ranks": 1, "folder": str(tmp_path / "run")} | typed
    )
    run.output = f"{tmp_path}/run/model"
    options = flow.TrainDollyFlow._options(run, find_machine("g5.2xlarge"), True)
    assert {name: getattr(options, name) for name in expected} == expected
    assert bool(options.deepspeed) == (not typed), "the recipe of full tuning"


def test_invalid_values_are_reported_together_with_earlier_problems(flow: Any) -> None:
    problems = ["one more"]
    parse(flow, "--epochs many --seed -1", problems)
    assert [problem.split()[0] for problem in problems] == ["one", "Invalid", "Invalid"]
    problems = ["one more"]
    parse(flow, "--epoch 3 --lr fast", problems)
    assert problems[1] == "No such option '--epoch'. Type --epochs"
    assert len(problems) == 3
    with pytest.raises(OptionsError, match=r"one more\n.*No closing quotation"):
        parse(flow, "--epochs '3", ["one more"])


def test_a_checkpoint_in_the_callers_folder_becomes_absolute_and_auto_stays(
    flow: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("auto", "checkpoint-3"):
        (tmp_path / folder).mkdir()
    assert parse(flow, "", []).resume == "auto"
    assert parse(flow, "--resume checkpoint-3", []).resume == str(tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    "words", [["--training-file", "my/own.json"], ["--training-file=my/own.json", "--lr", "1"]]
)
def test_own_rows_keep_their_suffix_and_are_called_as_they_were_typed(
    flow: Any, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["flow.py", "run", *words])
    names = json.loads(flow.typed_names())
    assert names == {"training_file": "my/own.json"}
    content = b"// a comment"
    run = stand_in(flow, folder="/runs/a", file_names=names, training_file=content)
    assert flow.file_in_run("/run", "training_file", b'{"a": 1}', None) == "/run/rows.json", (
        "no name is known"
    )
    path = run._own_file("training_file", content)
    assert path == "/runs/a/rows/own.json", "with this suffix the comment is not taken for CSV"
    problem = f"{path}, line 1: broken. Or name another --training-dataset with --max-length 9"
    assert flow.TrainDollyFlow._worded(run, problem) == (
        "my/own.json, line 1: broken. Or name another --training-file with --trainer-options '--max-length 9'"
    )
