"""A small process beside each rank, which says in plain words how the rank ended.

A rank that the system kills cannot say so itself, and the launchers only print `exits with return code = -9`. So
`python -m training.trainer` starts itself once more, copies what that process prints, and when it dies unexpectedly
repeats its last lines with the meaning of its exit code. It imports neither torch nor transformers."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO

from training.consts import SUPERVISED
from training.launch.exits import ENDED, INTERRUPTED, LOST_PEER, REFUSED, exit_meaning

LAST_LINES = 15
ECHO = 1.0  # seconds in which a Ctrl-C may come twice: from the terminal, and once more from torchrun
KILLED_AFTER = 30  # seconds that the launchers wait after SIGTERM
PATIENCE = 25  # seconds after SIGTERM until a rank that hangs is reported, before it is killed
EXPECTED_EXITS = (0, REFUSED, ENDED, INTERRUPTED, LOST_PEER)  # the rank itself has said why


def supervise() -> None:
    """Returns in the rank itself. In the process that a launcher or a user starts it waits for the rank, and exits."""
    if SUPERVISED in os.environ:
        return
    rank = os.environ.get("RANK", "0")
    environment = os.environ | {SUPERVISED: "terminal" if sys.stderr.isatty() else "log"}
    command = [sys.executable, "-u", "-m", "training.trainer", *sys.argv[1:]]
    if "RANK" in os.environ:  # a launcher that is killed leaves nobody to end its ranks
        at_death_of_parent(signal.SIGTERM)
        if _orphaned(Path("/proc/self")):  # the launcher was killed before that
            sys.exit(INTERRUPTED)
    last: collections.deque[bytes] = collections.deque(maxlen=LAST_LINES)
    still_busy = f"Rank {rank} is still busy {PATIENCE} s after it was told to stop"
    hanging = threading.Timer(PATIENCE, _report, (still_busy, last))
    hanging.daemon = True
    children: list[subprocess.Popen[bytes]] = []
    stops = _forward_signals(children, hanging)  # before there is a rank, or an early signal would be lost
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_prepare_rank
    )
    children.append(child)
    if stops:
        child.terminate()
    readers = [
        threading.Thread(target=_copy_output, args=(pipe, target, last), daemon=True)
        for pipe, target in ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer))
    ]
    for thread in (*readers, threading.Thread(target=_stop_with_starter, args=(child,), daemon=True)):
        thread.start()
    code = child.wait()
    for reader in readers:
        reader.join(timeout=5)  # a grandchild may hold the pipe open
    hanging.cancel()
    remove_shared_buffer()  # of a rank that ended before it could
    if code == -signal.SIGTERM and stops:  # before it could listen
        code = INTERRUPTED
        if rank == "0":
            _write("Stopped before it had begun. To go on, type the same command again\n")
    if code not in EXPECTED_EXITS:
        _report(f"Rank {rank} ended: {exit_meaning(code)}", last)
    # Shells and launchers expect 128 + n of a process that a signal has ended.
    os._exit(128 - code if code < 0 else code)


def _stop_with_starter(rank: subprocess.Popen[bytes]) -> None:
    """Takes the end of the process that started the launcher for a SIGTERM, where nobody forwards one.

    The `deepspeed` command, when it is stopped, leaves launch.py and the ranks behind. Spark kills the worker of a task
    that is cancelled, or when another rank has failed, and leaves its torchrun; nobody kills what still lives then.
    """
    launcher = Path(f"/proc/{os.getppid()}")
    with contextlib.suppress(OSError):
        starter = _parent_of(launcher)
        of_spark = re.search(rb"pyspark\.(daemon|worker)", Path(f"/proc/{starter}/cmdline").read_bytes())
        if not of_spark and b"deepspeed.launcher.launch" not in (launcher / "cmdline").read_bytes():
            return
        while _parent_of(launcher) == starter and not _orphaned(launcher):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        if of_spark:
            time.sleep(KILLED_AFTER)
            rank.kill()


def _orphaned(process: Path) -> bool:
    """Whether a process has lost its parent: its parent is process 1, though its group is another process's.

    What process 1 starts itself (systemd, a container) leads a group of its own or belongs to that of process 1.
    """
    try:
        _, parent, group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
        return parent == "1" and group not in ("0", "1", process.resolve().name)
    except OSError:  # no Linux
        return False


def _parent_of(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])  # proc_pid_stat(5)


def remove_shared_buffer(folder: Path = Path("/dev/shm")) -> None:
    """Removes what DeepSpeed's CPU collectives leave in shared memory for good: 66 MiB a rank and run.

    The name is that of shm_comm (csrc/cpu/comm/shm.cpp): user, address and port of the meeting place, rank.
    """
    words = [os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")]
    if all(words):
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_{'_'.join(map(str, words))}"
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _report(event: str, last: collections.deque[bytes]) -> None:
    lines = b"".join(list(last)).decode(errors="replace").splitlines()
    shown = "".join(f"  {line}\n" for line in lines if line.strip()) or "  (none)\n"
    _write(f"\n{event}\nIts last lines:\n{shown}")


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stderr.write(text)
        sys.stderr.flush()


def _copy_output(pipe: IO[bytes], target: IO[bytes], last: collections.deque[bytes]) -> None:
    """Copies what the rank prints as it comes, also a progress bar that ends no line, and keeps the last lines."""
    unfinished = b""
    while chunk := os.read(pipe.fileno(), 65536):
        with contextlib.suppress(OSError):  # a reader that is slow or gone must not stop the rank
            target.write(chunk)
            target.flush()
        *lines, unfinished = (unfinished + chunk).split(b"\n")
        last.extend(line.rpartition(b"\r")[2] + b"\n" for line in lines)
    if unfinished:
        last.append(unfinished)


def _forward_signals(children: list[subprocess.Popen[bytes]], hanging: threading.Timer) -> list[float]:
    """Forwards SIGTERM and Ctrl-C to the rank, which finishes its step and saves; a second Ctrl-C kills it.

    Returns the times of the signals, a list that grows: the next signal may interrupt the handler.
    """
    stops: list[float] = []

    def forward(number: int, frame: FrameType | None) -> None:
        stops.append(time.monotonic())
        if len(stops) == 1 and "RANK" in os.environ:
            hanging.start()
        again = number == signal.SIGINT and stops[-1] - stops[0] > ECHO
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    return stops


def _prepare_rank() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes through the supervisor
    die_with_parent()


def die_with_parent() -> None:
    """For `preexec_fn`: kills the started process when its parent ends, so that none is left behind."""
    at_death_of_parent(signal.SIGKILL)


def at_death_of_parent(number: int) -> None:
    """Sends this process the signal when its parent ends. Linux alone can promise it (prctl(2))."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
