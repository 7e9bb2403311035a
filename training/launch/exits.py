"""Exit codes: what ours say, how a rank ends with one, and what those of a rank, a launcher or a subprocess mean in words."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

REFUSED = 2  # the options, the data or the machine; click ends with it as well
ENDED = 70  # EX_SOFTWARE of sysexits.h: training cannot go on, and the rank has said why
INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: not now, try again
LOST_PEER = 76  # EX_PROTOCOL: this rank is sound, another one ended or hangs
_CONTINUE = "Continue with --resume auto"
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


def exit_meaning(code: int, out_of_memory: bool | None = None) -> str:
    """What an exit code means, and what to do about it, as one sentence or two.

    Args:
        code: as Python's subprocess gives it (-9), a shell (137), or the DeepSpeed launcher (247).
        out_of_memory: whether the kernel killed a process for want of memory while this one ran, where known
            (`oom_kills` before and after).
    """
    if code == 0:
        return "finished"
    if code == REFUSED:
        return "refused before training: the reasons, and what to type, stand above"
    if code == ENDED:
        return f"training could not go on: the reason, and what to do, stand above. {_CONTINUE}"
    if code == INTERRUPTED:
        return f"stopped by SIGTERM or Ctrl-C, with a checkpoint. {_CONTINUE}"
    if code == LOST_PEER:
        return f"another rank ended or hangs: look for what it says. {_CONTINUE}"
    if code in (126, 127):
        return "a program could not be started. Activate the environment with requirements.txt in it"
    name = _signal_name(code)
    if name == "SIGKILL":
        if out_of_memory:
            return f"killed by the system, because host memory ran out. {_MORE_MEMORY}"
        if out_of_memory is None:
            return f"killed, most likely because host memory ran out. {_MORE_MEMORY}"
        return (
            "killed (SIGKILL) though the system reports no lack of memory: by a person, a scheduler, or the launcher "
            f"because another rank had failed. {_CONTINUE}"
        )
    if name:
        return _SIGNALS.get(name, f"ended by the signal {name}. {_CONTINUE}")
    return "failed: its error stands above, in the lines of the first rank that stopped"


def _signal_name(code: int) -> str:
    """The signal behind an exit code: n as -n in Python, as 128 + n in a shell, and as 256 - n where a launcher
    hands Python's code on; "" for none. 255 is left out: it is how sys.exit(-1) and a failed ssh end."""
    if code < 0:
        number = -code
    elif 128 < code < 192:
        number = code - 128
    elif 192 < code < 255:
        number = 256 - code
    else:
        return ""
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""


def oom_kills(root: Path = Path("/")) -> int | None:
    """Processes killed so far for want of memory: in our control group, else on the machine; None if nothing tells.

    Two counts, before and after, are evidence; one is not, as it may be of yesterday.
    https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.events), cgroup-v1/memory.html (memory.oom_control)
    """
    files = []
    for line in _lines(root / "proc/self/cgroup"):
        _, _, place = line.partition(":")
        controllers, _, group = place.partition(":")
        if not controllers:
            files.append(root / "sys/fs/cgroup" / group.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(root / "sys/fs/cgroup/memory" / group.lstrip("/") / "memory.oom_control")
    for file in (*files, root / "proc/vmstat"):
        for line in _lines(file):
            name, _, count = line.partition(" ")
            if name == "oom_kill" and count.strip().isdigit():
                return int(count)
    return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, ValueError):
        return []


def end_with(command: Callable[[], object]) -> NoReturn:
    """Runs a click command and ends the process with its exit code, without Python's own shutdown.

    While that takes the interpreter down, threads of gloo and of torch may still ask for it, which now and then aborts
    a rank ("terminate called without an active exception") whose run has finished, or lets it hang.
    """
    code = 0
    try:
        command()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads any more, or ever did
            stream.flush()
    os._exit(code & 0xFF)
