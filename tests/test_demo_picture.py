"""The demo's table and picture: losses, and some held-out answers with different first words."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from matplotlib.image import imread

from training import demo
from training.pictures import draw_demo

ROWS = [
    {"instruction": "Name a river.", "input": "", "output": "The Rhine"},
    {"instruction": "Name a lake.", "input": "", "output": "Como"},
    {"instruction": "Count the words.", "input": "owl\nfox", "output": "2"},
]
LOGGED = [{"step": 0, "eval_loss": 7.0}, {"step": 20, "loss": 5.0}, {"step": 40, "eval_loss": 1.0}]


def test_examples_are_single_lines_with_different_first_words() -> None:
    shown = demo.examples(ROWS, ["a\nb", "c", "d"], ["The Rhine", "x", "3"])
    assert shown == [
        ("Name a river.", "a b", "The Rhine", "The Rhine"),
        ("Count the words. owl fox", "d", "3", "2"),
    ]
    _, right, wrong = demo.table(shown).splitlines()
    assert right.endswith("= The Rhine")
    assert wrong.endswith("! 3")


@pytest.mark.parametrize("name", ["demo.png", "demo.svg"])
def test_the_picture_has_the_losses_the_result_and_the_answers(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    long = "x" * 200
    draw_demo(LOGGED, [("Name a river.", long, "The Rhine", "The Rhine"), (long, "", "3", "2")], "97%", file)
    if file.suffix == ".svg":
        svg = file.read_text()
        for text in ("held-out rows, 1.000", "97%", "expected", "The Rhine", f"{'x' * 19}…"):
            assert f"<!-- {text}" in svg, text
        assert long not in svg
    else:
        assert imread(file).std() > 0.01


def test_a_picture_file_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    result = CliRunner().invoke(demo.main, ["--plot", str(tmp_path / "none" / "demo.png")])
    assert result.exit_code == 2
    assert "in a folder that exists and can be written" in result.output
