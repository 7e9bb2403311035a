"""Pictures of a run: drawn from the logged metrics, refused without any."""

from __future__ import annotations

import io
import os
from pathlib import Path

import click
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from training.machine.catalogue import find_machine
from training.options.trainer_options import TrainingOptions
from training.pictures import COLOURS, PictureFile, draw_plan, draw_run
from training.plan.presets import preset_options
from training.plan.report import draw
from training.plan.request import plan_options

TRAINED = {"step": 10, "loss": 2.0, "tokens_per_second": 900.0, "peak_memory_gib": 1.5}
HELD_OUT = {"step": 10, "eval_loss": 1.9}


@pytest.mark.parametrize(
    "entries",
    [[TRAINED, HELD_OUT], [HELD_OUT], [TRAINED], [TRAINED | {"step": 10 * n} for n in range(1, 90)]],
)
def test_a_run_is_drawn_from_any_logged_metrics(entries: list[dict[str, float]], tmp_path: Path) -> None:
    draw_run(entries, "a run", str(tmp_path / "run.png"))
    picture = imread(tmp_path / "run.png")
    assert picture.shape[1] == 1100
    assert picture.std() > 0.01  # not an empty page


def test_both_losses_are_drawn_and_metrics_that_were_not_logged_get_no_panel() -> None:
    files = [io.BytesIO() for _ in range(3)]
    for file, entries in zip(files, ([HELD_OUT], [TRAINED], [TRAINED, HELD_OUT]), strict=True):
        draw_run(entries, "a run", file)
    short, trained, both = (file.getvalue() for file in files)
    assert trained != both
    assert imread(io.BytesIO(short)).shape[0] < imread(io.BytesIO(both)).shape[0]


def test_the_held_out_loss_of_each_source_is_a_line_with_its_name(tmp_path: Path) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    entries = [
        {"step": step, "eval_loss": 2.0, "eval_loss_alpaca": 1.5 + step, "eval_loss_my-rows": 2.5}
        for step in (0, 1)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
        draw_run(entries, "a run", str(tmp_path / "run.png"))
    legend = figures[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "held-out rows, 2.000 at the end",
        "held-out rows of alpaca, 2.500 at the end",
        "held-out rows of my-rows, 2.500 at the end",
    ]


def test_a_plan_is_drawn_with_every_part_of_its_memory_and_time(tmp_path: Path) -> None:
    plan = plan_options(
        TrainingOptions(local_output_dir="x", dbfs_output_dir="/dbfs/x", **preset_options("a100", 8)),
        8,
        find_machine("8xA100-40GB"),
    )
    adapters = plan_options(
        TrainingOptions(local_output_dir="x", lora=16, quantize="nf4", **preset_options("a10", 1, lora=True)),
        1,
        find_machine("g5.2xlarge"),
    )
    parts = (each for one in (plan, adapters) for each in (*one.gpu_memory_gib, *one.run_seconds))
    assert set(parts) == COLOURS.keys()
    draw(plan, tmp_path / "plan.svg")
    drawn = (tmp_path / "plan.svg").read_text()
    for name, seconds in plan.run_seconds.items():
        assert f"<!-- {name}  {seconds / 60:,.1f} -->" in drawn
    draw_plan({"weights": 1.0}, 0.0, "CPU rank", {"steps": 0.1}, "seconds", "small", tmp_path / "small.png")
    assert imread(tmp_path / "small.png").std() > 0.01


def test_a_run_without_a_logged_step_raises() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_run([{"step": 0}], "a run", io.BytesIO())


def test_a_picture_file_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere" / "a.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "old.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("link.png", "folder.png", "pipe.png", "none/a.png", f"{300 * 'x'}.png", "a.xyz"):
        with pytest.raises(click.BadParameter, match="in a folder that exists and can be written"):
            PictureFile().convert(str(tmp_path / name), None, None)
    for name in ("old.png", "new.svg"):
        assert PictureFile().convert(str(tmp_path / name), None, None) == tmp_path / name
    assert not (tmp_path / "new.svg").exists()
