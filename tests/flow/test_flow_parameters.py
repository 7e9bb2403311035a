"""The flow's parameters for the trainer's options have the same name, type and help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training.errors import OptionsError
from training.options.trainer_options import TrainingOptions

FLOWS = Path(__file__).parents[2] / "flows"


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FLOWS))
    import train_dolly_flow

    return train_dolly_flow


def parse(flow: Any, more: str, problems: list[str]) -> TrainingOptions:
    return flow._parse_options(["--local-output-dir", "/out", "--resume", "auto"], more, problems)


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("input_model", str, "  [default: EleutherAI/gpt-j-6B]"),
        ("epochs", float, "  [default: 1]"),
        ("max_steps", int, ""),
        ("lr", float, "  [default: Dolly's]"),
        ("seed", int, "  [default: 42]"),
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


def test_invalid_values_are_reported_together_with_earlier_problems(flow: Any) -> None:
    problems = ["one more"]
    parse(flow, "--epochs many --seed -1", problems)
    assert [problem.split()[0] for problem in problems] == ["one", "Invalid", "Invalid"]
    with pytest.raises(OptionsError, match=r"one more\n.*No such option '--epoch'"):
        parse(flow, "--epoch 3", ["one more"])


def test_a_checkpoint_in_the_callers_folder_becomes_absolute_and_auto_stays(
    flow: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("auto", "checkpoint-3"):
        (tmp_path / folder).mkdir()
    assert parse(flow, "", []).resume == "auto"
    assert parse(flow, "--resume checkpoint-3", []).resume == str(tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    ("content", "suffix"),
    [(b"PAR1\x15", ".parquet"), (b"\xef\xbb\xbf\n [{}]", ".json"), (b'{"a": 1}', ".jsonl"), (b"a,b", ".csv")],
)
def test_the_suffix_of_a_file_is_detected_from_its_content(flow: Any, content: bytes, suffix: str) -> None:
    assert flow._suffix(content, ".csv") == suffix
