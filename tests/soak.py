"""Kills a run at random moments until it has survived a number of kills, and compares its weights with an undisturbed run.

python -m tests.soak --kills 60

Two ZeRO-3 ranks train the demo under `training.launch`. A random process of the run (a rank, a supervisor, the launcher), or
all of them, gets SIGKILL, SIGTERM or SIGSTOP. Now and then the local folder or the remote checkpoints are deleted as well. If
a run ends first, another one begins. The command ends with 1 if a run is lost, or if its weights differ."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click

from training.consts import ROOT
from training.options.command_line import option_words

STEPS = 400
OPTIONS = {
    "deepspeed": "config/ds_z3_fp32_config.json",
    "input_model": "demo",
    "training_dataset": "demo",
    "test_size": 20,
    "max_steps": STEPS,
    "save_steps": 20,
    "eval_steps": 100,
    "logging_steps": 1,
    "lr": 1e-4,
    "rank_timeout": 10,
}
LONGEST_WAIT = 300  # seconds from a kill to the first new step, after which the run is lost
SIGNALS = {"SIGKILL": 3, "SIGTERM": 1, "SIGSTOP": 1}  # relative frequencies
VICTIMS = {"rank": 3, "supervisor": 2, "launcher": 2, "all": 3}
# What is deleted after all processes were killed.
DELETED = {"": 2, "local folder": 1, "remote folder": 1}
A_STEP = re.compile(r"^step (\d+)/\d+  loss", re.MULTILINE)


@dataclass
class Kill:
    """A kill, and what it cost: seconds to the first new step, and steps that were computed twice.

    `seconds` is None if the run had no step left.
    """

    signal: str
    victim: str
    deleted: str
    seconds: float | None = None
    repeated: int = 0


class Run:
    """A run under the restarter, with its output in `place`/out and its remote checkpoints in `place`/remote."""

    def __init__(self, place: Path, restarts: int) -> None:
        place.mkdir(parents=True)
        self.output, self.remote, self.log = place / "out", place / "remote", place / "log"
        options = OPTIONS | {"local_output_dir": str(self.output), "checkpoint_to": str(self.remote)}
        command = [sys.executable, "-m", "training.launch", "--num-gpus", "2", "--restarts", str(restarts)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, "--", *option_words(options)],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def weights(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in sorted(self.output.glob("*.safetensors"))}

    def text(self, start: int = 0) -> str:
        """What the run has printed since byte `start`."""
        return self.log.read_bytes()[start:].decode(errors="replace")

    def wait_for(self, pattern: str, start: int, seconds: float) -> re.Match[str] | None:
        """The first match in what was printed since byte `start`; None if the run ends before. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while True:
            over = self.process.poll() is not None
            if match := re.search(pattern, self.text(start), re.MULTILINE):
                return match
            if over:
                return None
            if time.monotonic() > end:
                raise TimeoutError(f"no {pattern!r} within {seconds:.0f} s; see {self.log}")
            time.sleep(0.05)

    def processes(self) -> dict[str, list[int]]:
        """The process ids of this run without the restarter, by what they are."""
        found: dict[str, list[int]] = {name: [] for name in VICTIMS}
        trainers: dict[int, int] = {}  # process: parent
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if str(self.output) not in words or "training.launch" in words:
                continue
            found["all"].append(int(process.name))
            if "deepspeed.launcher.launch" in words or "deepspeed.launcher.runner" in words:
                found["launcher"].append(int(process.name))
            else:
                trainers[int(process.name)] = parent
        for pid, parent in trainers.items():
            found["rank" if parent in trainers else "supervisor"].append(pid)
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.processes()["all"]:
            os.kill(pid, signal.SIGKILL)


def choose(frequencies: dict[str, int], chance: random.Random) -> str:
    return chance.choices(list(frequencies), list(frequencies.values()))[0]


def kill_once(run: Run, chance: random.Random) -> Kill | None:
    """Kills a process of the run at a random moment, and waits for the first new step. None if the run ended before.

    Raises TimeoutError if the run does not go on.
    """
    start = run.log.stat().st_size
    if run.wait_for(A_STEP.pattern, start, LONGEST_WAIT) is None:
        return None
    time.sleep(chance.uniform(0, 10))
    victim = choose(VICTIMS, chance)
    kill = Kill("SIGKILL" if victim == "all" else choose(SIGNALS, chance), victim, "")
    pids = run.processes()[victim]
    if not pids or run.process.poll() is not None:
        return None
    begin, start = time.monotonic(), run.log.stat().st_size
    for pid in pids if victim == "all" else [chance.choice(pids)]:
        try:
            os.kill(pid, getattr(signal, kill.signal))
        except ProcessLookupError:
            continue
    if victim == "all":
        kill.deleted = choose(DELETED, chance)
        if kill.deleted:
            shutil.rmtree(run.output if kill.deleted == "local folder" else run.remote, ignore_errors=True)
    if run.wait_for(rf"^Restart \d+ of(.|\n)*?{A_STEP.pattern}", start, LONGEST_WAIT) is None:
        return kill  # the run had no step left
    kill.seconds = time.monotonic() - begin
    text = run.text()
    restart = text.index("\nRestart ", len(text) - len(run.text(start)))
    reached, first = A_STEP.findall(text[:restart])[-1], A_STEP.search(text[restart:])
    kill.repeated = max(0, int(reached) - int(first[1]) + 1) if first else 0
    return kill


def table(kills: list[Kill], runs: int) -> str:
    """The kills by signal and process, what they cost, as text."""
    kinds = Counter(
        (kill.signal, f"{kill.victim}{kill.deleted and f', {kill.deleted} deleted'}") for kill in kills
    )
    lines = [f"{len(kills)} kills survived in {runs} runs"]
    lines += [f"  {count:>5}  {name:<8} {victim}" for (name, victim), count in sorted(kinds.items())]
    seconds = sorted(kill.seconds for kill in kills if kill.seconds is not None)
    repeated = [kill.repeated for kill in kills]
    if seconds:
        lines.append(
            f"from a kill to the first new step: median {statistics.median(seconds):.0f} s, worst {seconds[-1]:.0f} s"
        )
    lines.append(f"steps computed twice: {sum(repeated)} in all, at most {max(repeated)} after a kill")
    return "\n".join(lines)


@click.command()
@click.option("--kills", default=60, show_default=True, type=click.IntRange(1), help="Kills to survive.")
@click.option("--seed", default=0, show_default=True, help="Seed of moments, signals and processes.")
def main(kills: int, seed: int) -> None:
    """Kill a run at random moments, and compare its weights with those of an undisturbed run."""
    place, chance = Path(tempfile.mkdtemp(prefix="dolly-soak-")), random.Random(seed)
    undisturbed = Run(place / "undisturbed", 0)
    if undisturbed.process.wait():
        raise click.ClickException(f"the undisturbed run failed: see {undisturbed.log}")
    survived: list[Kill] = []
    runs = 0
    while len(survived) < kills:
        runs += 1
        run = Run(place / f"run-{runs}", 1_000_000)
        try:
            while len(survived) < kills and (kill := kill_once(run, chance)):
                survived.append(kill)
                print(f"{len(survived):>5}  {kill}", flush=True)
            run.process.wait(LONGEST_WAIT + STEPS)
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            raise click.ClickException(f"lost after {len(survived)} kills: {error}") from error
        finally:
            run.end()
        if run.process.returncode or run.weights != undisturbed.weights:
            raise click.ClickException(f"ended with {run.process.returncode} or other weights: see {run.log}")
        shutil.rmtree(run.output.parent)
    print(f"{table(survived, runs)}\nthe weights of every run are those of the undisturbed one, bit for bit")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
