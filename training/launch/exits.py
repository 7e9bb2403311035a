"""Exit codes of a rank, their meaning in words, and a safe way for a rank to exit."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

REFUSED = 2  # options, data or machine were refused; click's own code for usage errors
CANNOT_CONTINUE = 70  # EX_SOFTWARE of sysexits.h: training failed, and the rank has reported why
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
LOST_PEER = 76  # EX_PROTOCOL: this rank works, another one ended or hangs
_CONTINUE = "Continue with --resume auto"
_NO_PROGRAM = "a program could not be started. Activate the environment that has requirements.txt installed"
_CODES = {
    0: "finished",
    REFUSED: "refused before training: see the reasons and what to type above",
    CANNOT_CONTINUE: f"training could not continue: see the reason above. {_CONTINUE}",
    INTERRUPTED: f"stopped by SIGTERM or Ctrl-C, with a checkpoint. {_CONTINUE}",
    LOST_PEER: f"another rank ended or hangs: see the message of that rank. {_CONTINUE}",
    126: _NO_PROGRAM,
    127: _NO_PROGRAM,
}
_SIGNALS = {
    "SIGHUP": f"the terminal or connection was closed. Start training inside tmux or with nohup. {_CONTINUE}",
    "SIGINT": f"interrupted by Ctrl-C before it could save. {_CONTINUE}",
    "SIGILL": "illegal instruction: an operator was compiled for another CPU. "
    "Type rm -r ~/.cache/torch_extensions",
    "SIGABRT": "aborted, most likely because the ranks lost each other (NCCL or gloo): see the first rank that "
    f"failed. {_CONTINUE}",
    "SIGBUS": "shared memory ran out: /dev/shm is full or too small. Start the container with --shm-size=16g",
    "SIGSEGV": "crashed inside a library (segmentation fault). Compare the installed versions: "
    "python -m pip install -r requirements.txt",
    "SIGTERM": "terminated (SIGTERM) by a person, a scheduler, the end of a spot machine, or the launcher because "
    f"another rank had failed. {_CONTINUE}",
}
_MORE_MEMORY = (
    "Start fewer ranks, use a machine with more host memory, or a config without an offloaded optimizer. "
    + _CONTINUE
)
_SIGKILL = {  # keys: whether the kernel's out-of-memory killer was active; None: unknown
    True: f"killed by the system because host memory ran out. {_MORE_MEMORY}",
    None: f"killed, most likely because host memory ran out. {_MORE_MEMORY}",
    False: "killed (SIGKILL) by a person, a scheduler, or the launcher because another rank had failed; the system "
    f"reports no lack of memory. {_CONTINUE}",
}


# After these the same command can go on. The others have a cause that is still there.
_CURED_BY_A_RESTART = (1, INTERRUPTED, LOST_PEER)  # 1: an error of a library, a network or a device
_SIGNALS_CURED_BY_A_RESTART = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGABRT", "SIGSEGV")


def restart_cures(code: int) -> bool:
    """Whether the same command, with --resume auto, can go on after this exit code (see `exit_meaning`)."""
    return code in _CURED_BY_A_RESTART or _signal_name(code) in _SIGNALS_CURED_BY_A_RESTART


def exit_meaning(code: int, out_of_memory: bool | None = None) -> str:
    """Meaning of an exit code and what to do about it, in one or two sentences.

    Args:
        code: signal n is -n in Python's subprocess, 128 + n in a shell, and 256 - n from the DeepSpeed launcher,
            which exits with Python's code.
        out_of_memory: whether the kernel's out-of-memory killer was active during the run (`oom_kills` before and
            after); None if unknown.
    """
    if code in _CODES:
        return _CODES[code]
    name = _signal_name(code)
    if name is None:
        return "failed: see the error of the first rank that stopped, above"
    if name == "SIGKILL":
        return _SIGKILL[out_of_memory]
    return _SIGNALS.get(name, f"ended by the signal {name}. {_CONTINUE}")


def _signal_name(code: int) -> str | None:
    """Name of the signal in an exit code; None if there is none."""
    if code == 255:  # sys.exit(-1), or a failed ssh
        return None
    signals = {number.value: number.name for number in signal.Signals}
    return signals.get(-code) or signals.get(code - 128) or signals.get(256 - code)


def oom_kills(root: Path = Path("/")) -> int | None:
    """Number of out-of-memory kills so far in our control group, else on the machine; None if not reported.

    Compare the counts before and after a run: a single count may be old.
    https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.events), cgroup-v1/memory.html (memory.oom_control)
    """
    groups, files = root / "sys/fs/cgroup", []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if not controllers:
            files.append(groups / group.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(groups / "memory" / group.lstrip("/") / "memory.oom_control")
    for file in (*files, root / "proc/vmstat"):
        for line in _lines(file):
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []


def run_and_exit(command: Callable[[], object]) -> NoReturn:
    """Runs a click command and exits with its code, skipping Python's shutdown.

    During the shutdown, threads of gloo and torch may still use the interpreter. This sometimes aborts a rank whose run
    has finished ("terminate called without an active exception"), or makes it hang. After an error it exits while the
    traceback still holds the model and the process group, because their destructors may wait for the other ranks.
    """
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        _exit(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        _exit(1)
    _exit(0)


def _exit(code: int) -> NoReturn:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or the process has none
            stream.flush()
    os._exit(code & 0xFF)
