"""Runs the lines of the GPU check in processes of their own, each with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from training.bench.lines import FAIL, Result, Setup
from training.consts import ROOT
from training.launch.supervisor import kill_on_parent_death

POLL = 0.1  # seconds between two looks at a process
MINUTES = 5.0  # for which the limits of the lines are made
LOG_LINES = 60  # of a process that did not answer, kept in the JSON


@dataclass(frozen=True)
class Line:
    """A line of the table. `limit` are the seconds after which it counts as hung, if the whole check has five minutes."""

    name: str
    title: str
    limit: float


@dataclass(frozen=True)
class Group:
    """Lines that share a process, and the module that computes them (`lines.serve`)."""

    module: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Budget:
    """Minutes for all lines, from now on. With more of them, each line has more as well."""

    minutes: float
    begin: float = field(default_factory=time.monotonic)

    @property
    def used_up(self) -> bool:
        return time.monotonic() > self.begin + 60 * self.minutes

    def limit(self, line: Line) -> float:
        return line.limit * max(1.0, self.minutes / MINUTES)


def run_group(group: Group, setup: Setup, budget: Budget) -> Iterator[Result]:
    """Yields the result of each line. A process that dies or hangs fails its line; a new one takes the others.

    Lines that have not begun when the budget is used up fail.
    """
    waiting = list(group.lines)
    while waiting:
        if budget.used_up:
            for line in waiting:
                yield Result(line.name, FAIL, "not run: the time was used up. Give it more with --minutes")
            return
        for result in _run_process(group.module, tuple(waiting), setup, budget):
            yield result
            del waiting[0]


def _run_process(module: str, lines: Sequence[Line], setup: Setup, budget: Budget) -> Iterator[Result]:
    """Yields results of the lines in order, the last one a failure if the process did not finish them."""
    results, log = Path(setup.folder) / "results", Path(setup.folder) / "log"
    results.write_text("")
    setup = replace(setup, results=str(results))
    names = [line.name for line in lines]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(asdict(setup)), *names],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_environment(setup),
            start_new_session=True,
            preexec_fn=kill_on_parent_death,
        )
    found, begin = 0, time.monotonic()
    try:
        while found < len(lines):
            ended = process.poll() is not None  # before reading, so that nothing is missed
            answers = [line for line in results.read_text().splitlines(keepends=True) if line.endswith("\n")]
            for answer in answers[found:]:
                yield Result(**json.loads(answer))
                found, begin = found + 1, time.monotonic()
            if found == len(lines):
                return
            waited, limit = time.monotonic() - begin, budget.limit(lines[found])
            reason = None
            if ended and len(answers) == found:
                reason = f"its process ended with {_exit_code(process.returncode)}{_last_words(log)}"
            elif budget.used_up:
                reason = f"stopped after {waited:.0f} s: the time was used up. Give it more with --minutes"
            elif waited > limit:
                reason = f"hangs: no answer within {limit:.0f} s"
            if reason:
                _dump_stacks(process)
                yield Result(names[found], FAIL, reason, {"log": _tail(log)}, round(waited, 1))
                return
            time.sleep(POLL)
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _exit_code(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _dump_stacks(process: subprocess.Popen[bytes]) -> None:
    """Lets a process write where its threads are (`lines.serve` listens)."""
    if process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        time.sleep(1)


def _tail(log: Path) -> list[str]:
    """The last lines that a process wrote."""
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-LOG_LINES:]


def _last_words(log: Path) -> str:
    lines = _tail(log)
    return f". Its last words: {lines[-1].strip()}" if lines else ""


def _environment(setup: Setup) -> dict[str, str]:
    """One GPU, no network, no launcher's variables, and caches in the scratch folder."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    visible = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    folder = Path(setup.folder)
    return environment | {
        "CUDA_VISIBLE_DEVICES": visible if setup.device == "cuda" else "",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH")))),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
