"""The demo of LoRA: the small GPT-J learns every task but one, then an adapter on it learns that one.

A base with random weights would learn little by adapters alone. So a short full training makes the base first."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.data.demo_rows import DEMO_SEED, Row, rows_by_task
from training.files import write_file
from training.plan.presets import DEMO_ADAPTER, DEMO_BASE, demo_options

NEW_TASK = "rewrite"  # sentences in the past tense, negative, or as a question
HELD_OUT = 25  # rows of each task


def split_rows(tasks: Mapping[str, list[Row]]) -> tuple[list[Row], list[Row], list[dict[str, Any]]]:
    """(rows of the base, rows of the adapter, held-out rows of every task, whose category is the task).

    The base gets every task but the new one. The adapter gets the new one, and as many rows of the others, so that it
    does not forget them.
    """
    rng = random.Random(DEMO_SEED)
    base: list[Row] = []
    new: list[Row] = []
    held_out: list[dict[str, Any]] = []
    for task, rows in tasks.items():
        shuffled = rng.sample(rows, len(rows))
        held_out += [{**row, "category": task} for row in shuffled[:HELD_OUT]]
        (new if task == NEW_TASK else base).extend(shuffled[HELD_OUT:])
    return base, new + rng.sample(base, len(new)), held_out


def write_rows(output: Path) -> dict[str, str]:
    """Writes the rows into base.jsonl, adapter.jsonl and held_out.jsonl of a new folder. Returns the paths by name."""
    output.mkdir(parents=True)
    files = {}
    parts: tuple[list[Any], ...] = split_rows(rows_by_task())
    for name, rows in zip(("base", "adapter", "held_out"), parts, strict=True):
        files[name] = str(output / f"{name}.jsonl")
        write_file(Path(files[name]), "".join(json.dumps(row) + "\n" for row in rows))
    return files


def runs(output: Path, files: Mapping[str, str], ranks: int, rank: int) -> list[dict[str, Any]]:
    """The trainer's options of both runs: all weights of the base, then an adapter of that rank on it."""
    base = demo_options(ranks, files["base"]) | DEMO_BASE | {"local_output_dir": str(output / "base")}
    adapter = demo_options(ranks, files["adapter"]) | DEMO_ADAPTER
    adapter |= {"input_model": str(output / "base"), "lora": rank, "local_output_dir": str(output / "lora")}
    return [base, adapter]


def table(tasks: Sequence[str], before: Sequence[float], after: Sequence[float]) -> str:
    """Exact matches by task: of the base, and of the base with its adapter. The new task is the last."""
    shares: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for task, *pair in zip(tasks, before, after, strict=True):
        shares[task].append((pair[0], pair[1]))

    def line(title: str, pairs: list[tuple[float, float]]) -> str:
        old, new = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        return f"{title:<48}{len(pairs):>6}{old:>16.0%}{new:>16.0%}"

    others = sorted(task for task in shares if task != NEW_TASK)
    lines = [f"{'exact matches on held-out rows':<48}{'rows':>6}{'base':>16}{'with adapter':>16}"]
    lines += [line(task.replace("_", " "), shares[task]) for task in others]
    lines.append(line("all tasks that the base was trained on", [p for t in others for p in shares[t]]))
    lines.append(line(f"{NEW_TASK}, which only the adapter was trained on", shares[NEW_TASK]))
    return "\n".join(lines)


def train(output: Path, ranks: int, rank: int, run: Callable[[dict[str, Any], str], None]) -> str:
    """Trains base and adapter in `output`; returns the file of the held-out rows. `run` starts a run and says what it is."""
    files = write_rows(output)
    base, adapter = runs(output, files, ranks, rank)
    run(base, f"First run: all weights, on every kind of task but '{NEW_TASK}'")
    run(
        adapter,
        f"Second run: an adapter of rank {rank} on that model, which stays frozen, also on '{NEW_TASK}'",
    )
    return files["held_out"]
