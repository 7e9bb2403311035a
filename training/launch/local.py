"""Starts the trainer's command for notebook, flow and demo, shows its output, and raises with the reason if it fails.

Imports neither torch nor transformers, so that a driver stays small beside the ranks that it starts."""

from __future__ import annotations

import collections
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.consts import ROOT
from training.errors import TrainingFailedError
from training.launch.exits import exit_meaning, oom_kills
from training.options.command_line import option_words

LAST_LINES = 20
LAST_WIDTH = 400  # characters of a line that are repeated: DeepSpeed's own has the whole command in it
TRAINER = "training.trainer"

# The `deepspeed` command as a module. Its script names its Python in its first line, where the system takes a path
# with a space for two words.
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner")

# Becomes the command, which gets a SIGTERM, and saves, when the notebook's kernel or the flow's step is killed. It is
# no preexec_fn, which may hang in a process with threads.
_STARTER = """
import os, signal, sys
from training.launch.supervisor import at_death_of_parent
at_death_of_parent(signal.SIGTERM)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def deepspeed_command(options: Mapping[str, Any], num_gpus: int) -> list[str]:
    """The words that a user would type for these options, by the names of TrainingOptions, on one node.

    Raises ModuleNotFoundError where this Python has no DeepSpeed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError(
            "DeepSpeed is not installed. Type python -m pip install -r requirements.txt"
        )
    with socket.socket() as probe:  # DeepSpeed's default port is the same for every run; two would collide
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # --quiet: the launcher itself prints errors alone.
    words = ["--num_gpus", str(num_gpus), "--master_port", port, "--quiet", "--module", TRAINER]
    return [*DEEPSPEED, *words, *option_words(options)]


def typed(command: Sequence[str]) -> str:
    """What `deepspeed_command` returns as a person would type it: without a port of its own and without --quiet."""
    words = ["deepspeed", *command[len(DEEPSPEED) :]]
    if "--master_port" in words:
        at = words.index("--master_port")
        del words[at : at + 3]
    return shlex.join(words)


def launch(command: Sequence[str], cpu_ranks: int = 0) -> None:
    """Runs the command and shows each line as it comes. Raises TrainingFailedError if it exits with another code than 0.

    The command runs in the repository's folder: relative paths of data and outputs must have been made absolute.
    Ctrl-C, and a notebook's Interrupt, let it finish the step and save; a second one kills it.

    `cpu_ranks` is how many ranks share this machine's cores; 0 where they have GPUs.
    """
    kills_before = oom_kills()
    last: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
    process = subprocess.Popen(
        [sys.executable, "-c", _STARTER, *command],
        env=launch_environment(cpu_ranks),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a terminal's Ctrl-C comes through this function, once
    )
    interrupted = False
    while True:
        try:
            for line in process.stdout or ():  # ends with the last rank, which may outlive the launcher
                print(line, end="", flush=True)  # no inherited stdout: a notebook shows this in the cell
                last.append(line if len(line) <= LAST_WIDTH else f"{line[:LAST_WIDTH]} ...\n")
            code = process.wait()
            break
        except BaseException as error:
            if interrupted or not isinstance(error, KeyboardInterrupt):
                os.killpg(process.pid, signal.SIGKILL)
                raise
            interrupted = True
            process.send_signal(signal.SIGINT)
    if code:
        kills = oom_kills()
        out_of_memory = None if kills_before is None or kills is None else kills > kills_before
        meaning = "interrupted" if interrupted else exit_meaning(code, out_of_memory)
        raise TrainingFailedError(
            f"Training ended with exit code {code}: {meaning}\nIts last lines:\n{''.join(last).rstrip()}",
            code,
        )


def launch_environment(cpu_ranks: int = 0) -> dict[str, str]:
    """The command's environment: PATH, and the cores shared among CPU ranks, as each would start a thread a core."""
    environment = os.environ | {"PATH": _path(), "PYTHONUNBUFFERED": "1"}
    if cpu_ranks:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or cpu_ranks) // cpu_ranks)))
    return environment


def _path() -> str:
    """PATH with this Python's own programs first: ninja, also where nobody activated the environment."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
