"""Exit codes: those of a rank, what the codes of ranks and launchers mean, and how a rank exits."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

REFUSED = 2  # the options, the data or the machine; click exits with it as well
ENDED = 70  # EX_SOFTWARE of sysexits.h: training cannot go on, and the rank has said why
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: not now, try again
LOST_PEER = 76  # EX_PROTOCOL: this rank is sound, another one ended or hangs
_CONTINUE = "Continue with --resume auto"
_CODES = {
    0: "finished",
    REFUSED: "refused before training: the reasons, and what to type, stand above",
    ENDED: f"training could not go on: the reason, and what to do, stand above. {_CONTINUE}",
    INTERRUPTED: f"stopped by SIGTERM or Ctrl-C, with a checkpoint. {_CONTINUE}",
    LOST_PEER: f"another rank ended or hangs: look for what it says. {_CONTINUE}",
    126: "a program could not be started. Activate the environment with requirements.txt in it",
    127: "a program could not be started. Activate the environment with requirements.txt in it",
}
_SIGNALS = {
    "SIGHUP": f"its terminal or connection was closed. Start it inside tmux or with nohup. {_CONTINUE}",
    "SIGINT": f"interrupted by Ctrl-C before it could save. {_CONTINUE}",
    "SIGILL": "it met an instruction that this CPU lacks: an operator compiled on another machine. "
    "Type rm -r ~/.cache/torch_extensions",
    "SIGABRT": "aborted, most likely because the ranks lost each other (NCCL or gloo): look for the first rank that "
    f"failed. {_CONTINUE}",
    "SIGBUS": "memory that it shares with other processes ran out: /dev/shm is full or too small. "
    "Start the container with --shm-size=16g",
    "SIGSEGV": "crashed inside a library (segmentation fault). Compare the installed versions: "
    "python -m pip install -r requirements.txt",
    "SIGTERM": "told to stop (SIGTERM), by a person, a scheduler, the end of a spot machine, or the launcher because "
    f"another rank had failed. {_CONTINUE}",
}
_MORE_MEMORY = (
    "Start fewer ranks, use a machine with more host memory, or a config without an offloaded optimizer. "
    + _CONTINUE
)
_SIGKILL = {  # by whether the kernel killed a process for want of memory; None: unknown
    True: f"killed by the system, because host memory ran out. {_MORE_MEMORY}",
    None: f"killed, most likely because host memory ran out. {_MORE_MEMORY}",
    False: "killed (SIGKILL) though the system reports no lack of memory: by a person, a scheduler, or the launcher "
    f"because another rank had failed. {_CONTINUE}",
}


def exit_meaning(code: int, out_of_memory: bool | None = None) -> str:
    """What an exit code means, and what to do about it, as one sentence or two.

    Args:
        code: a signal n is -n in Python's subprocess, 128 + n in a shell, and 256 - n from the DeepSpeed launcher,
            which passes Python's code on.
        out_of_memory: whether the kernel killed a process for want of memory while this one ran, where known
            (`oom_kills` before and after).
    """
    if code in _CODES:
        return _CODES[code]
    signals = {number.value: number.name for number in signal.Signals}
    name = signals.get(-code) or signals.get(code - 128) or signals.get(256 - code)
    if name is None or code == 255:  # 255 is sys.exit(-1), or a failed ssh
        return "failed: its error stands above, in the lines of the first rank that stopped"
    if name == "SIGKILL":
        return _SIGKILL[out_of_memory]
    return _SIGNALS.get(name, f"ended by the signal {name}. {_CONTINUE}")


def oom_kills(root: Path = Path("/")) -> int | None:
    """Processes killed so far for want of memory: in our control group, else on the machine; None if nothing says.

    Two counts, before and after, are evidence; one count may be from yesterday.
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
    """Runs a click command and exits with its code, without Python's own shutdown.

    During that shutdown threads of gloo and of torch may still ask for the interpreter, which now and then aborts a
    rank whose run has finished ("terminate called without an active exception"), or lets it hang.
    """
    code = 0
    try:
        command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or the process has none
            stream.flush()
    os._exit(code & 0xFF)
