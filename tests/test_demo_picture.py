"""The demo's table and picture: losses, and some held-out answers, those of conversations first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner
from matplotlib.image import imread

from training import demo
from training.data.columns import Columns
from training.data.conversations import Turn
from training.options.command_line import parse_words
from training.options.trainer_options import TrainingOptions
from training.pictures import draw_demo

ROWS = Columns(
    instruction=["Name a river.", "Name a lake.", "And then?", "Count the words.", "And the next one?"],
    input=["", "", "", "owl\nfox", ""],
    output=["The Rhine", "Como", "Wednesday", "2", "3"],
    history=[(), (), (Turn("Which day follows\nMonday?", "Tuesday"),), (), (Turn("What follows 1?", "2"),)],
)
LOGGED = [{"step": 0, "eval_loss": 7.0}, {"step": 20, "loss": 5.0}, {"step": 40, "eval_loss": 1.0}]


def test_examples_ask_with_different_first_words_and_conversations_come_first() -> None:
    shown = demo.examples(ROWS, ["a\nb", "c", "d", "e", "f"], ["The Rhine", "x", "Wednesday", "3", "3"])
    assert shown == [
        ("Which day follows Monday? -> Tuesday\n  And then?", "d", "Wednesday", "Wednesday"),
        ("Name a river.", "a b", "The Rhine", "The Rhine"),
        ("Count the words. owl fox", "e", "3", "2"),
    ]


def test_rows_without_a_history_need_no_column_for_it() -> None:
    columns = Columns(ROWS.instruction, ROWS.input, ROWS.output)
    shown = demo.examples(columns, [""] * 5, ["x"] * 5)
    assert [cells[0] for cells in shown] == ["Name a river.", "And then?", "Count the words. owl fox"]


def test_the_table_shows_every_turn_within_100_columns() -> None:
    shown = [
        ("Which day follows Monday? -> Tuesday\n  And then?", "Belpelue drums", "Wednesday", "Wednesday"),
        (
            "When did Ivan have the coat? Ivan had a green coat on Tuesday.",
            "",
            "On " + "x" * 40,
            "On Tuesday.",
        ),
    ]
    text = demo.table(shown)
    assert text.splitlines() == [
        "instruction                                           before          after ('=': correct)",
        "Which day follows Monday? -> Tuesday",
        "  And then?                                           Belpelue dru  = Wednesday",
        "When did Ivan have the coat? Ivan had a green coat",
        "  on Tuesday.                                                       ! On xxxxxxxxxxxxxxxxxxxxxxxxxxx",
    ]
    assert max(map(len, text.splitlines())) == 100


@pytest.mark.parametrize("name", ["demo.png", "demo.svg"])
def test_the_picture_has_the_losses_the_result_and_the_answers(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    long = "x" * 200
    examples = [
        ("Which day follows Monday? -> Tuesday\n  And then?", "", "Friday", "Wednesday"),
        ("Name a river.", long, "The Rhine", "The Rhine"),
        (long, "", "3", "2"),
    ]
    draw_demo(LOGGED, examples, "97%", file)
    if file.suffix == ".svg":
        svg = file.read_text()
        for text in (
            "held-out rows, 1.000",
            "97%",
            "expected",
            "The Rhine",
            f"{'x' * 19}…",
            "Which day follows Monday? -&gt; Tuesday",
        ):
            assert f"<!-- {text}" in svg, text
        assert long not in svg
    else:
        assert imread(file).std() > 0.01


def test_a_picture_file_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    result = CliRunner().invoke(demo.main, ["--plot", str(tmp_path / "none" / "demo.png")])
    assert result.exit_code == 2
    assert "in a folder that exists and can be written" in result.output


@pytest.mark.parametrize("typed", [["--training-dataset", "own.jsonl"], ["--training-dataset=own.jsonl"], []])
def test_typed_rows_replace_the_demos_rows_and_their_number_of_held_out_rows(
    typed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=9)

    monkeypatch.setattr(demo.subprocess, "run", run)
    result = CliRunner().invoke(demo.main, ["--local-output-dir", str(tmp_path / "out"), "--", *typed])
    assert "training failed with exit code 9" in result.output
    words = commands[0][commands[0].index("training.trainer") + 1 :]
    options = TrainingOptions(**parse_words(words)[0])
    assert options.training_dataset == (("own.jsonl",) if typed else ("demo",))
    assert options.test_size == (None if typed else 400)


def test_an_empty_output_folder_is_left_to_the_trainer_which_refuses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(values: dict[str, object], *_: object) -> None:
        raise click.ClickException(f"{values['local_output_dir']!r}")

    monkeypatch.setattr(demo, "run_trainer", run)
    assert "Error: ''" in CliRunner().invoke(demo.main, ["--local-output-dir", ""]).output
