"""Charts: memory and time of a plan by part, metrics of a run by step, losses and answers of the demo."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import click

from training.consts import SOURCE_LOSS
from training.errors import printable
from training.files import expanded, writable

# Persistent memory is blue, what ZeRO communicates green, what depends on the batch orange, the rest grey.
COLOURS = {
    "weights": "#1f4e8c",
    "frozen weights": "#12305a",
    "adapter": "#1f4e8c",
    "gradients": "#3f7fbf",
    "optimizer": "#8db8de",
    "gathered layers": "#2e8b57",
    "unpacked layer": "#57b27f",
    "activations": "#e0701a",
    "logits and loss": "#f5b067",
    "communication": "#8fd0a8",
    "optimizer step": "#c6dbef",
    "context and fragmentation": "#b5b5b5",
    # Time: training is blue, the held-out loss green, what is written orange, the rest grey.
    "steps": "#1f4e8c",
    "evaluations": "#2e8b57",
    "checkpoints": "#e0701a",
    "publishing": "#f5b067",
    "merging": "#a8521b",
    "start": "#b5b5b5",
    "download": "#8c8c8c",
    "loading": "#d0d0d0",
    "model": "#8c6d31",
    "verification": "#6b6b6b",
}
ENDINGS = (".png", ".pdf", ".svg")
# The demo's table: headings, and for each column its x position and the number of characters shown.
EXAMPLE_COLUMNS = ("instruction", "before", "after", "expected")
EXAMPLE_LAYOUT = ((0.0, 62), (0.46, 20), (0.62, 30), (0.81, 30))
PANELS = 6  # of a row in the picture of an evaluation
MAX_MARKERS = 30  # most points that get a marker: a single point draws no line


class PictureFile(click.ParamType):
    """An image file whose suffix is the format. Refused before the run if it cannot be written."""

    name = "FILE.png"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        file = Path(expanded(value))
        if not self._is_writable(file):
            self.fail(
                f"{value}: expected a file that ends in .png, .pdf or .svg, in a folder that exists and can be written",
                param,
                ctx,
            )
        return file

    @staticmethod
    def _is_writable(file: Path) -> bool:
        if file.suffix not in ENDINGS:
            return False
        folder = file.absolute().parent
        try:
            if file.exists() or file.is_symlink():
                return file.is_file() and os.access(file, os.W_OK)
            return folder.is_dir() and writable(folder)
        except OSError:  # the name is too long, or the folder cannot be entered
            return False


def draw_plan(
    memory_gib: dict[str, float],
    room_gib: float,
    device: str,
    time: dict[str, float],
    unit: str,
    title: str,
    file: Path,
) -> None:
    """Draws the memory of a device and the time of a run, by part, into `file`, whose suffix is the format.

    `room_gib` 0: no line for its capacity. `time` is in `unit`, in the order in which the parts pass.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    memory_axes, time_axes = figure.subplots(2)
    total = sum(memory_gib.values())
    _draw_bar(memory_axes, memory_gib, 0.005, 2, max(total, room_gib))
    if room_gib:
        memory_axes.axvline(room_gib, color="black", linewidth=1.5)
        side = "right" if room_gib > 0.5 * max(total, room_gib) else "left"
        label = f" {device}: {room_gib:.1f} GiB "
        memory_axes.annotate(label, (room_gib, 0.42), ha=side, va="center", fontsize=9)
    memory_axes.set_xlabel(f"GiB of each {device}")
    _draw_bar(time_axes, time, 0.0005 * sum(time.values()), 1, sum(time.values()))
    time_axes.set_xlabel(f"{unit} of the run, {sum(time.values()):,.1f} in all")
    memory_axes.set_title(printable(title), fontsize=11, loc="left", parse_math=False)
    figure.savefig(file, dpi=150)


def _draw_bar(axes: Any, parts: dict[str, float], least: float, digits: int, end: float) -> None:
    """Draws parts of at least `least` one after the other as one bar, with a legend below."""
    left = 0.0
    for name, value in parts.items():
        if value < least:
            continue
        label = f"{name}  {value:,.{digits}f}"
        axes.barh(0, value, left=left, color=COLOURS[name], label=label, height=0.5, edgecolor="white")
        left += value
    axes.set_xlim(0, 1.04 * end)
    axes.set_ylim(-0.3, 0.5)
    axes.set_yticks([])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=4, fontsize=9, frameon=False)


def draw_run(entries: Sequence[dict[str, Any]], title: str, file: str | IO[bytes]) -> None:
    """Draws a PNG of a run by step: loss on train and held-out rows, tokens per second, memory.

    `entries` are those of metrics.jsonl (storage/metrics.py). Raises ValueError if none has a loss.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    # A run shorter than --logging-steps has only held-out losses.
    logged = any("tokens_per_second" in entry for entry in entries)
    layout: list[Any] = [["loss", "loss"], ["speed", "memory"]]
    heights, rows = [3, 2], 2 if logged else 1
    figure = Figure(figsize=(10, 6.4 if logged else 4), layout="constrained")
    panels = figure.subplot_mosaic(layout[:rows], height_ratios=heights[:rows])
    _draw_losses(panels["loss"], entries)
    for panel, key, label in (
        ("speed", "tokens_per_second", "real tokens per second, all devices"),
        ("memory", "peak_memory_gib", "peak memory of rank 0, GiB"),
    ):
        if panel not in panels:
            continue
        steps, values = _points(entries, key)
        panels[panel].plot(steps, values, color=COLOURS["weights"], marker=_marker(steps))
        panels[panel].set_ylim(0, 1.15 * max(values, default=1.0))
        panels[panel].set_title(label, fontsize=10, loc="left")
        panels[panel].yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        panels[panel].yaxis.set_major_locator(MaxNLocator(4))
    for axes in panels.values():
        _step_axis(axes, entries)
    figure.suptitle(printable(title), fontsize=11, x=0.01, ha="left", parse_math=False)
    figure.savefig(file, dpi=110, format="png")


def draw_demo(
    entries: Sequence[dict[str, Any]], examples: Sequence[tuple[str, ...]], result: str, file: Path
) -> None:
    """Draws the demo's losses, and below them a table of (question, answer before, answer after, expected).

    Earlier turns of a conversation are lines above the question, in grey. The suffix of `file` is the format. `entries`
    are those of metrics.jsonl.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(11, 7.2), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
    count = sum(len(cells[0].split("\n")) for cells in examples)
    losses, table = figure.subplots(2, height_ratios=[3, 0.4 * (count + 1)])
    _draw_losses(losses, entries)
    _step_axis(losses, entries)
    table.axis("off")
    table.set(xlim=(0, 1), ylim=(count + 0.1, -1))
    table.set_title(result, fontsize=10, loc="left")
    line = -1
    for cells in (EXAMPLE_COLUMNS, *examples):
        is_heading, correct = line < 0, cells[2] == cells[3]
        *earlier, last = cells[0].split("\n")
        for turn in earlier:
            _draw_cell(table, 0, line, turn, color="#6b6b6b")
            line += 1
        for column, text in enumerate((last, *cells[1:])):
            colour = "black" if column != 2 or is_heading else "#1a7f37" if correct else "#b42318"
            _draw_cell(table, column, line, text, color=colour, weight="bold" if is_heading else "normal")
        line += 1
        table.axhline(line, color="#d0d0d0", linewidth=0.8)
    figure.suptitle("The demo: a small GPT-J learns to follow instructions", fontsize=12, x=0.03, ha="left")
    figure.savefig(file, dpi=110)


def _draw_cell(table: Any, column: int, line: int, text: str, **style: str) -> None:
    """Draws a cell of the demo's table, cut at the width of its column."""
    x, width = EXAMPLE_LAYOUT[column]
    text = printable(text)
    text = text if len(text) <= width else f"{text[: width - 1]}…"
    # a text may hold $
    table.text(x, line + 0.5, text, va="center", fontsize=9, parse_math=False, **style)


def draw_evaluation(
    tables: Sequence[tuple[str, Sequence[tuple[str, bool, Mapping[str, Any]]]]], file: Path
) -> None:
    """Draws base and tuned model beside each other, each figure with its interval.

    Args:
        tables: (title, figures); a figure is (label, whether it is a share, {"base", "tuned"} with "value", "low" and
            "high"). It has axes of its own, because the figures have different units.
        file: its suffix is the format.
    """
    from matplotlib.figure import Figure

    rows = [
        (title if start == 0 else "", figures[start : start + PANELS])
        for title, figures in tables
        for start in range(0, len(figures), PANELS)
    ]
    figure = Figure(figsize=(1.9 * PANELS, 3.0 * len(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), squeeze=False)[:, 0]
    for part, (title, panels) in zip(parts, rows, strict=True):
        part.suptitle(printable(title), fontsize=11, x=0.01, ha="left", parse_math=False)
        grid = part.subplots(1, PANELS, squeeze=False)[0]
        for axes, panel in zip(grid, panels, strict=False):
            _draw_models(axes, *panel)
        for axes in grid[len(panels) :]:
            axes.axis("off")
    figure.savefig(file, dpi=110)


def _draw_models(axes: Any, label: str, is_share: bool, models: Mapping[str, Any]) -> None:
    """Draws one figure of both models as bars with their values and intervals."""
    for place, (name, colour) in enumerate((("base", "context and fragmentation"), ("tuned", "weights"))):
        interval = models[name]
        value, top = interval["value"], interval["high"] or interval["value"]
        axes.bar(place, value, color=COLOURS[colour], width=0.65)
        if interval["low"] is not None:
            ends = [[value - interval["low"]], [interval["high"] - value]]
            axes.errorbar(place, value, yerr=ends, color="black", capsize=4, linewidth=1.2)
        text = f"{value:.1%}" if is_share else f"{value:,.4g}"
        axes.annotate(text, (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks([0, 1], ["base", "tuned"], fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title(printable(label), fontsize=9, pad=12, parse_math=False)
    axes.margins(y=0.12)
    if is_share:
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set(ylim=(0, 1.12), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0])
    else:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _points(entries: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the entries that have the key."""
    points = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _draw_losses(axes: Any, entries: Sequence[dict[str, Any]]) -> None:
    """Draws the loss of train and held-out rows, with the last values in the legend. Raises ValueError without a loss.

    The held-out rows of each source follow as dotted lines if there are several.
    """
    curves = {"train rows": _points(entries, "loss"), "held-out rows": _points(entries, "eval_loss")}
    if not any(steps for steps, _ in curves.values()):
        raise ValueError("this run has not logged a step yet: there is nothing to draw")
    for (label, (steps, losses)), colour in zip(curves.items(), ("gradients", "activations"), strict=True):
        if steps:
            last = f"{label}, {losses[-1]:.3f} at the end"
            axes.plot(steps, losses, label=last, color=COLOURS[colour], marker=_marker(steps))
    for number, name in enumerate(_source_losses(entries)):
        steps, losses = _points(entries, name)
        label = f"held-out rows of {name.removeprefix(SOURCE_LOSS)}, {losses[-1]:.3f} at the end"
        axes.plot(steps, losses, ":", label=label, color=f"C{number % 10}", marker=_marker(steps))
    axes.set_title("loss, nats per response token", fontsize=10, loc="left")
    axes.legend(frameon=False)


def _source_losses(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The keys of the held-out losses by source, in the order of the sources."""
    keys = dict.fromkeys(key for entry in entries for key, loss in entry.items() if loss is not None)
    return [key for key in keys if key.startswith(SOURCE_LOSS)]


def _step_axis(axes: Any, entries: Sequence[dict[str, Any]]) -> None:
    """Sets up the x axis: integer steps from 0 to the last logged one, with a light grid."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, max(1, *(entry["step"] for entry in entries)))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _marker(steps: Sequence[int]) -> str:
    return "." if len(steps) <= MAX_MARKERS else ""
