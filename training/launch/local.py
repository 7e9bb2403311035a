"""Starts the trainer on this machine for notebook, flow and demo; shows its output and raises if it fails.

Imports neither torch nor transformers, so that the driver needs little memory beside the ranks."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.consts import INSTALLED, ROOT
from training.errors import OptionsError, TrainingFailedError
from training.launch.exits import exit_meaning, oom_kills
from training.machine.cores import binding_words, usable_cores
from training.options.command_line import option_words
from training.options.deepspeed import read_json, read_zero
from training.options.wording import COMMAND, worded

LAST_LINES = 20
LAST_WIDTH = 400  # longest repeated line, in characters: one line of DeepSpeed's contains the whole command
TRAINER = "training.trainer"

WORKING_FOLDER = None if INSTALLED else ROOT  # of commands; None: that of this process

# The `deepspeed` command as a module: the first line of its script names Python by path, which cannot have a space.
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner")

# Executes the command so that it gets SIGTERM, and saves, when the notebook's kernel or the flow's step is killed. A
# preexec_fn could hang in a process with threads.
_STARTER = """
import os, signal, sys
from training.launch.supervisor import signal_on_parent_death
signal_on_parent_death(signal.SIGTERM)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def deepspeed_command(options: Mapping[str, Any], num_gpus: int) -> list[str]:
    """The `deepspeed` command for these options (names of TrainingOptions) on one node, or `python` for one device without it.

    With an offloaded optimizer each rank gets cores of its own, where that works.

    Raises ModuleNotFoundError if DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError(
            "DeepSpeed is not installed. Type python -m pip install -r requirements.txt"
        )
    return [*launcher_words(num_gpus, options.get("deepspeed")), *option_words(options)]


def launcher_words(num_gpus: int, deepspeed_json: str | None) -> list[str]:
    """The command up to the trainer's options. One rank without DeepSpeed needs no launcher, which would wrap the model."""
    if num_gpus == 1 and not deepspeed_json:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return ["env", f"CUDA_VISIBLE_DEVICES={first}", sys.executable, "-m", TRAINER]
    # --quiet: the launcher prints only errors.
    words = ["--num_gpus", str(num_gpus), "--master_port", str(free_port()), "--quiet", "--module", TRAINER]
    bound = binding_words(num_gpus) if _offloads_optimizer(deepspeed_json) else ()
    return [*DEEPSPEED, *bound, *words]


def free_port() -> int:
    """A free port of this machine. DeepSpeed's default port would collide with that of another run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _offloads_optimizer(json_file: str | None) -> bool:
    """Whether a DeepSpeed JSON offloads the optimizer; the trainer reports a file that cannot be read."""
    with contextlib.suppress(OptionsError):
        return bool(json_file) and read_zero(read_json(str(json_file))).offload_optimizer
    return False


def shell_command(command: Sequence[str]) -> str:
    """The command of `deepspeed_command` as a person would type it: without the port and --quiet."""
    if tuple(command[: len(DEEPSPEED)]) != DEEPSPEED:
        return shlex.join("python" if word == sys.executable else word for word in command)
    words = ["deepspeed", *command[len(DEEPSPEED) :]]
    if "--master_port" in words:
        start = words.index("--master_port")
        del words[start : start + 3]
    return shlex.join(words)


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    Attributes:
        code: its exit code.
        interrupted: this process was told to stop it, by Ctrl-C or a notebook's Interrupt.
        out_of_memory: whether the kernel's out-of-memory killer was active meanwhile; None if unknown.
        last_lines: the end of its output.
    """

    code: int
    interrupted: bool
    out_of_memory: bool | None
    last_lines: str

    def failure(self, typed: str | None = None, note: str = "") -> TrainingFailedError:
        """The error to raise for it, in the words of the command that was `typed` (options/wording.py)."""
        meaning = "interrupted" if self.interrupted else exit_meaning(self.code, self.out_of_memory)
        return TrainingFailedError(
            f"Training ended with exit code {self.code}: {worded(meaning, typed)}\n"
            f"{note and worded(note, typed)}Its last lines:\n{self.last_lines}",
            self.code,
        )


def run_command(
    command: Sequence[str],
    cpu_ranks: int = 0,
    typed: str | None = None,
    watch: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    folder: Path | None = WORKING_FOLDER,
) -> Ending:
    """Runs the command and shows each line as it is printed.

    Without a `folder` of its own the command runs in the repository's, where it finds the package, so paths of data and
    outputs must be absolute. After Ctrl-C, or a notebook's Interrupt, it finishes its step and saves; a second one kills it.

    Args:
        cpu_ranks: number of ranks that share this machine's cores; 0 if they use GPUs.
        typed: the command that a person typed: advice is in its words (options/wording.py).
        folder: the command's working folder; None for that of this process.
        watch: a context that is entered with the session of the command's processes while it runs.
    """
    kills_before = oom_kills()
    last: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
    process = subprocess.Popen(
        [sys.executable, "-c", _STARTER, *command],
        env=launch_environment(cpu_ranks) | ({COMMAND: typed} if typed else {}),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",  # can be printed on a terminal that knows only ASCII
        start_new_session=True,  # so that only this function forwards a terminal's Ctrl-C
    )
    interrupted = False
    with watch(process.pid):
        while True:
            try:
                for line in process.stdout or ():  # ends when the last rank ends, maybe after the launcher
                    print(line, end="", flush=True)  # a notebook's cell would not show an inherited stdout
                    last.append(line if len(line) <= LAST_WIDTH else f"{line[:LAST_WIDTH]} ...\n")
                code = process.wait()
                break
            except BaseException as error:
                if interrupted or not isinstance(error, KeyboardInterrupt):
                    os.killpg(process.pid, signal.SIGKILL)
                    raise
                interrupted = True
                process.send_signal(signal.SIGINT)
    kills = oom_kills()
    out_of_memory = None if kills_before is None or kills is None else kills > kills_before
    return Ending(code, interrupted, out_of_memory, "".join(last).rstrip())


def launch_environment(cpu_ranks: int = 0) -> dict[str, str]:
    """Environment of the command. Shares the cores among CPU ranks, which would each start a thread per core."""
    environment = os.environ | {"PATH": _path(), "PYTHONUNBUFFERED": "1"}
    if cpu_ranks:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // cpu_ranks)))
    return environment


def _path() -> str:
    """PATH with this Python's programs first, so that ninja is found even if the environment is not activated."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
