"""Checks this code on one GPU: right numbers, speed, memory, saving. It needs no network.

python -m training.bench.gpu --json check.json"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from training.bench.lines import FAIL, NOT_APPLICABLE, PASS, Result, Setup
from training.bench.processes import MINUTES, Budget, Group, Line, run_group
from training.console import set_up_console
from training.files import can_write, write_json
from training.machine.environment import installed_version, version_problems
from training.options.command_line import PathName
from training.run.identity import RECORDED_PACKAGES, git_commit

NUMERICS, STEPS, RUNS = (f"training.bench.check_{name}" for name in ("numerics", "steps", "runs"))
MACHINE = Line("machine", "machine", 60)
GROUPS = (
    Group(
        NUMERICS,
        (
            Line("loop", "attention, one call a document", 40),
            Line("varlen", "attention, one call a layer", 40),
            Line("proof", "packing: the proof of a run", 40),
            Line("leak", "packing: on the device", 40),
            Line("loss-fp16", "loss in chunks, fp16", 40),
            Line("loss-bf16", "loss in chunks, bf16", 40),
        ),
    ),
    Group(STEPS, (Line("zero3-plain", "a step: ZeRO-3 without leaf modules", 75),)),
    Group(STEPS, (Line("zero3", "a step: ZeRO-3", 75),)),
    Group(STEPS, (Line("zero2", "a step: ZeRO-2", 75),)),
    Group(STEPS, (Line("alone", "a step: without DeepSpeed", 75),)),
    Group(STEPS, (Line("waits", "waits for the device in a step", 60),)),
    Group(STEPS, (Line("offload", "ten steps with an offloaded optimizer", 150),)),
    Group(RUNS, (Line("save", "a run of the demo, saved", 90),)),
    Group(RUNS, (Line("reshard", "resumed for another number of ranks", 90),)),
)
NAMES = [line.name for group in GROUPS for line in group.lines]

# GPT-J-6B; how many of its layers fit is computed from the free memory.
REAL = {"width": 4096, "heads": 16, "vocabulary": 50400, "rows": 8, "seconds": 1.0}
TINY = {"layers": 2, "width": 64, "heads": 4, "vocabulary": 1024, "rows": 4, "seconds": 0.1}


def check(names: Sequence[str], minutes: float) -> Iterator[Result]:
    """Yields the results of the machine and of the named lines."""
    budget = Budget(minutes)
    with tempfile.TemporaryDirectory(prefix="dolly-check-", ignore_cleanup_errors=True) as folder:
        # In a process of its own, because a CUDA context takes memory until its process ends.
        device = "cuda" if _has_gpu() else "cpu"
        sizes = TINY if device == "cpu" else REAL | {"layers": 1}
        setup = Setup(device, "bf16", folder=folder, results="", **sizes)  # type: ignore[arg-type]
        [machine] = run_group(Group(NUMERICS, (MACHINE,)), setup, budget)
        yield machine
        if machine.status == FAIL:
            return
        setup = replace(setup, precision=machine.figures["precision"])
        if device == "cuda":
            from training.bench.short_runs import layers_that_fit

            setup = replace(setup, layers=layers_that_fit(setup, machine.figures["free_gib"]))
        for group in GROUPS:
            lines = tuple(line for line in group.lines if line.name in names)
            yield from run_group(replace(group, lines=lines), setup, budget)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def head(machine: Result) -> dict[str, Any]:
    """What was checked, and where: date, machine, versions, commit."""
    import torch

    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        **machine.figures,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "host": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: installed_version(name) for name in RECORDED_PACKAGES}
        | {"torch": torch.__version__},
        "git_commit": git_commit(),
    }


def _driver() -> str | None:
    """Version of NVIDIA's driver; None without one."""
    if not (command := shutil.which("nvidia-smi")):
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def table(where: dict[str, Any], results: Sequence[Result]) -> str:
    """Head and results in Markdown, for docs/evidence.md."""
    titles = {line.name: line.title for group in GROUPS for line in group.lines} | {
        MACHINE.name: MACHINE.title
    }
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in where["versions"].items())
    device = where.get("device", "no device")
    if where.get("memory_gib"):
        device += f", {where['memory_gib']:.1f} GiB, driver {where['driver']}, CUDA {where['cuda']}"
    lines = [
        f"{device}; {where['host']}; {versions}; commit {(where['git_commit'] or 'unknown')[:12]}; {where['date']}",
        "",
        "| check | result | measured | s |",
        "|---|---|---|---|",
    ]
    for result in results:
        text = " ".join(result.text.replace("|", "\\|").split())
        lines.append(f"| {titles[result.name]} | {result.status} | {text} | {result.seconds:.0f} |")
    counts = [
        f"{sum(r.status == status for r in results)} {status}" for status in (PASS, FAIL, NOT_APPLICABLE)
    ]
    return "\n".join([*lines, "", ", ".join(counts)])


@click.command()
@click.option("--json", "file", type=PathName("file"), metavar="FILE", help="File to write.")
@click.option(
    "--only", "names", type=click.Choice(NAMES), multiple=True, help="Check this line alone; repeatable."
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.1),
    default=MINUTES,
    show_default=True,
    help="Time for all lines.",
)
@click.option(
    "--any-versions", is_flag=True, help="Check the installed packages, even if they are not those pinned."
)
def main(file: str | None, names: tuple[str, ...], minutes: float, any_versions: bool) -> None:
    """Check this code on one GPU, or in tiny sizes on a CPU. The exit code is 1 if a line fails."""
    set_up_console()
    problems = version_problems()
    if problems and not any_versions:
        raise click.UsageError(f"{problems[0]}. Or type --any-versions to check the installed ones")
    if file is not None and not can_write(Path(file)):
        raise click.UsageError(f"--json {file}: cannot be written. Name a file in a folder of your own")
    begin, results = time.monotonic(), []
    for result in check(names or NAMES, minutes):
        results.append(result)
        print(
            f"{time.monotonic() - begin:4.0f} s  {result.name}: {result.status}. {result.text}",
            file=sys.stderr,
        )
    where = head(results[0])
    print(table(where, results))
    if file is not None:
        write_json(Path(file), {"where": where, "results": [asdict(result) for result in results]})
    raise SystemExit(int(any(result.status == FAIL for result in results)))


if __name__ == "__main__":
    main()
