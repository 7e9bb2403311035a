"""Starts the one command for whoever does not type it: notebook, flow and demo choose options, this runs them.

Imports neither torch nor transformers, so that a driver stays small beside the ranks that it starts.
"""

from __future__ import annotations

import collections
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from training.checks import ROOT
from training.exits import exit_meaning, oom_kills
from training.options import option_words

LAST_LINES = 20
TRAINER = "training.trainer"


class TrainingFailedError(RuntimeError):
    """The command ended with an exit code other than 0. The message has its meaning and its last lines.

    Attributes:
        code: of the launcher, as subprocess gives it; on Spark of the rank that failed first, None where none did.
    """

    def __init__(self, message: str, code: int | None = None):
        self.code = code
        super().__init__(message)


def deepspeed_command(options: Mapping[str, Any], num_gpus: int) -> list[str]:
    """What a user would type for these options, by the names of TrainingOptions, on one node.

    Raises FileNotFoundError where the environment has no `deepspeed` command.
    """
    launcher = shutil.which("deepspeed", path=_path())
    if launcher is None:
        raise FileNotFoundError(
            "the deepspeed command is not on PATH. Type python -m pip install -r requirements.txt"
        )
    return [launcher, "--num_gpus", str(num_gpus), "--module", TRAINER, *option_words(options)]


def typed(command: Sequence[str]) -> str:
    """The command as a person would type it."""
    return shlex.join([Path(command[0]).name, *command[1:]])


def launch(command: Sequence[str], cpu_ranks: int = 0) -> None:
    """Runs the command, showing each line as it comes. Raises TrainingFailedError if it ends with another code than 0.

    It runs in the repository's folder, whatever the caller's is: relative paths of data and outputs must have been
    made absolute. Ctrl-C, and a notebook's Interrupt, let it finish the step and save.

    `cpu_ranks` is how many ranks share this machine's cores; 0 where they have GPUs.
    """
    killed_before = oom_kills()
    last: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
    process = subprocess.Popen(
        command,
        env=launch_environment(cpu_ranks),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a terminal's Ctrl-C comes through this function, once
    )
    assert process.stdout is not None
    try:
        for line in _lines(process, process.stdout):
            print(line, end="", flush=True)  # print, not an inherited stdout: a notebook shows it in the cell
            last.append(line)
        code = process.wait()
    except BaseException:
        process.kill()
        raise
    if code:
        killed_after = oom_kills()
        known = killed_before is not None and killed_after is not None
        meaning = exit_meaning(code, killed_after > killed_before if known else None)
        raise TrainingFailedError(
            f"Training ended with exit code {code}: {meaning}\nIts last lines:\n{''.join(last).rstrip()}",
            code,
        )


def launch_environment(cpu_ranks: int = 0) -> dict[str, str]:
    """The environment of the command: our own programs first on PATH, and cores shared among ranks on a CPU, or each
    would start a thread for every core."""
    environment = os.environ | {"PATH": _path(), "PYTHONUNBUFFERED": "1"}
    if cpu_ranks:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or cpu_ranks) // cpu_ranks)))
    return environment


def _lines(process: subprocess.Popen[str], output: TextIO) -> Iterator[str]:
    """The lines of a process. An interruption is handed on to it, and the lines go on until it has saved and ended."""
    while True:
        try:
            yield from output
            return
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)


def _path() -> str:
    """PATH with this Python's own programs first: deepspeed and ninja, also where nobody activated the environment."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
