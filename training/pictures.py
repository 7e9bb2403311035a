"""Pictures: the memory of a device by part, as one stacked bar against its size; and the figures of a run, step by step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import click

from training.files import writable

# What stays is blue, what ZeRO moves green, what comes and goes with the rows orange, the rest grey.
COLOURS = {
    "weights": "#1f4e8c",
    "gradients": "#3f7fbf",
    "optimizer": "#8db8de",
    "gathered layers": "#2e8b57",
    "activations": "#e0701a",
    "logits and loss": "#f5b067",
    "communication": "#8fd0a8",
    "optimizer step": "#c6dbef",
    "context and fragmentation": "#b5b5b5",
}
ENDINGS = (".png", ".pdf", ".svg")
MARKED = 30  # points of a run up to which each is marked: one alone makes no line


class PictureFile(click.ParamType):
    """A file to draw into at the end, whose ending is the format: refused at the beginning if it could not be."""

    name = "FILE.png"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        file = Path(value)
        if not self._can_be_drawn(file):
            self.fail(
                f"{value}: expected a file that ends in .png, .pdf or .svg, in a folder that exists and can be written",
                param,
                ctx,
            )
        return file

    @staticmethod
    def _can_be_drawn(file: Path) -> bool:
        if file.suffix not in ENDINGS:
            return False
        folder = file.absolute().parent
        try:
            if file.exists() or file.is_symlink():
                return file.is_file() and os.access(file, os.W_OK)
            return folder.is_dir() and writable(folder)
        except OSError:  # too long a name, a folder that may not be entered
            return False


def draw_memory(parts_gib: dict[str, float], room_gib: float, device: str, title: str, file: Path) -> None:
    """Writes the picture into `file`, whose ending is the format. `room_gib` 0: the device has no memory of its own."""
    from matplotlib.figure import Figure

    shown = {name: value for name, value in parts_gib.items() if value >= 0.005}
    total = sum(shown.values())
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for name, value in shown.items():
        label = f"{name}  {value:.2f}"
        axes.barh(0, value, left=left, color=COLOURS[name], label=label, height=0.5, edgecolor="white")
        left += value
    if room_gib:
        axes.axvline(room_gib, color="black", linewidth=1.5)
        side = "right" if room_gib > 0.5 * max(total, room_gib) else "left"
        axes.annotate(f" {device}: {room_gib:.1f} GiB ", (room_gib, 0.42), ha=side, va="center", fontsize=9)
    axes.set_xlim(0, 1.04 * max(total, room_gib))
    axes.set_ylim(-0.3, 0.5)
    axes.set_yticks([])
    axes.set_xlabel(f"GiB of each {device}")
    axes.set_title(title, fontsize=11, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(file, dpi=150)


def draw_run(entries: Sequence[dict[str, Any]], title: str, file: str | IO[bytes]) -> None:
    """Writes a PNG of a run: loss on train and held-out rows, tokens a second, memory, over its steps.

    `entries` are those of metrics.jsonl (training/metrics.py). Raises ValueError where none of them has a loss.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    def points(key: str) -> tuple[list[int], list[float]]:
        found = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]

    curves = {"train rows": points("loss"), "held-out rows": points("eval_loss")}
    if not any(steps for steps, _ in curves.values()):
        raise ValueError("no step of this run has been logged yet: there is nothing to draw")
    # A run shorter than --logging-steps has held-out losses alone.
    logged = any("tokens_per_second" in entry for entry in entries)
    layout: list[Any] = [["loss", "loss"], ["speed", "memory"]]
    heights, rows = [3, 2], 2 if logged else 1
    figure = Figure(figsize=(10, 6.4 if logged else 4), layout="constrained")
    panels = figure.subplot_mosaic(layout[:rows], height_ratios=heights[:rows])
    for (label, (steps, losses)), colour in zip(curves.items(), ("gradients", "activations"), strict=True):
        if steps:
            last = f"{label}, {losses[-1]:.3f} in the end"
            panels["loss"].plot(steps, losses, label=last, color=COLOURS[colour], marker=_marker(steps))
    panels["loss"].set_title("loss, nats a response token", fontsize=10, loc="left")
    panels["loss"].legend(frameon=False)
    for panel, key, words in (
        ("speed", "tokens_per_second", "real tokens a second, all devices"),
        ("memory", "peak_memory_gib", "peak memory of rank 0, GiB"),
    ):
        if panel not in panels:
            continue
        steps, values = points(key)
        panels[panel].plot(steps, values, color=COLOURS["weights"], marker=_marker(steps))
        panels[panel].set_ylim(0, 1.15 * max(values, default=1.0))
        panels[panel].set_title(words, fontsize=10, loc="left")
        panels[panel].yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        panels[panel].yaxis.set_major_locator(MaxNLocator(4))
    end = max(entry["step"] for entry in entries)
    for axes in panels.values():
        axes.set_xlim(0, max(end, 1))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(file, dpi=110, format="png")


def _marker(steps: Sequence[int]) -> str:
    return "." if len(steps) <= MARKED else ""
