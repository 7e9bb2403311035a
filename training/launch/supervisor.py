"""One small process beside each rank, which tells in plain words how the rank ended.

A rank that the system kills cannot say so itself, and the launchers only print `exits with return code = -9`. So
`python -m training.trainer` starts itself once more, hands on what that process prints, and when it dies
unexpectedly repeats its last lines with the meaning of its exit code. It imports neither torch nor transformers."""

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
from typing import BinaryIO

from training.consts import SUPERVISED
from training.launch.exits import ENDED, INTERRUPTED, LOST_PEER, REFUSED, exit_meaning

LAST_LINES = 15
ECHO = 1.0  # seconds in which a Ctrl-C may come twice: from the terminal, and once more from torchrun
KILLED_AFTER = 30  # seconds that the launchers wait after SIGTERM
PATIENCE = 25  # seconds after SIGTERM until a rank that hangs is told, before it is killed
EXPECTED_EXITS = (0, REFUSED, ENDED, INTERRUPTED, LOST_PEER)  # the rank has said itself what there is to say


def supervise() -> None:
    """Returns in the rank proper. In the process that a launcher or a user starts it never does: it waits and exits."""
    if SUPERVISED in os.environ:
        return
    rank = os.environ.get("RANK", "0")
    environment = os.environ | {SUPERVISED: "terminal" if sys.stderr.isatty() else "log"}
    command = [sys.executable, "-u", "-m", "training.trainer", *sys.argv[1:]]
    if "RANK" in os.environ:  # a launcher that is killed leaves nobody to end its ranks
        at_death_of_parent(signal.SIGTERM)
        if _orphaned(Path("/proc/self")):  # it was killed before that
            sys.exit(INTERRUPTED)
    last: collections.deque[bytes] = collections.deque(maxlen=LAST_LINES)

    def tell_of_hanging() -> None:
        _tell(f"Rank {rank} is still busy {PATIENCE} s after it was told to stop", last)

    hanging = threading.Timer(PATIENCE, tell_of_hanging)
    hanging.daemon = True
    started: list[subprocess.Popen[bytes]] = []
    taken = _forward_signals(
        started, hanging
    )  # before there is a rank: a signal must find somebody to take it
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_in_the_rank
    )
    started.append(child)
    if taken:
        child.terminate()
    assert child.stdout is not None
    assert child.stderr is not None
    readers = [
        threading.Thread(target=_hand_on, args=(pipe, target, last), daemon=True)
        for pipe, target in ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer))
    ]
    for thread in (*readers, threading.Thread(target=_end_with_starter, args=(child,), daemon=True)):
        thread.start()
    code = child.wait()
    for reader in readers:
        reader.join(timeout=5)  # a grandchild may hold the pipe open
    hanging.cancel()
    remove_shared_buffer()  # of a rank that ended before it could
    if code == -signal.SIGTERM and taken:  # before it could listen
        code = INTERRUPTED
        if rank == "0":
            _write("Stopped before it had begun. To go on, type the same command again\n")
    if code not in EXPECTED_EXITS:
        _tell(f"Rank {rank} ended: {exit_meaning(code)}", last)
    # A process that ends by a signal is told apart from one that fails: shells and launchers expect 128 + n.
    os._exit(128 - code if code < 0 else code)


def _end_with_starter(rank: subprocess.Popen[bytes]) -> None:
    """Takes the end of the process that started the launcher for a SIGTERM, where nobody hands one on.

    The `deepspeed` command leaves launch.py and the ranks. Spark kills the worker of a task that is cancelled, or of
    which another rank has failed, and leaves its torchrun; nor is there anybody who would kill what still lives then.
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
    """Whether who started a process has gone: it was left to the system's first one, and is of another's group.

    What that one starts itself, as systemd or a container does, leads a group of its own or is in that one's.
    """
    try:
        _, parent, group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
        return parent == "1" and group not in ("0", "1", process.resolve().name)
    except OSError:  # no Linux
        return False


def _parent_of(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])  # proc_pid_stat(5)


def remove_shared_buffer(folder: Path = Path("/dev/shm")) -> None:
    """Gives back what DeepSpeed's CPU collectives leave in shared memory: 66 MiB a rank and run, for good.

    By the name that shm_comm gives it (csrc/cpu/comm/shm.cpp): user, address and port of the meeting place, rank.
    """
    place = [os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")]
    if all(place):
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_{'_'.join(map(str, place))}"
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _tell(what: str, last: collections.deque[bytes]) -> None:
    lines = b"".join(list(last)).decode(errors="replace").splitlines()
    said = "".join(f"  {line}\n" for line in lines if line.strip()) or "  (none)\n"
    _write(f"\n{what}\nIts last lines:\n{said}")


def _write(words: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stderr.write(words)
        sys.stderr.flush()


def _hand_on(pipe: BinaryIO, target: BinaryIO, last: collections.deque[bytes]) -> None:
    """Copies what the rank prints as it comes, also a progress bar that ends no line, and keeps the last lines."""
    begun = b""
    while chunk := os.read(pipe.fileno(), 65536):
        with contextlib.suppress(OSError):  # who does not read, or has gone, must not stop the rank
            target.write(chunk)
            target.flush()
        *lines, begun = (begun + chunk).split(b"\n")
        last.extend(line.rpartition(b"\r")[2] + b"\n" for line in lines)
    if begun:
        last.append(begun)


def _forward_signals(started: list[subprocess.Popen[bytes]], hanging: threading.Timer) -> list[float]:
    """SIGTERM and Ctrl-C reach the rank, which finishes its step and saves; a second Ctrl-C ends it at once.

    The list is that of the moments at which they came, a list because a handler may be interrupted by the next one.
    """
    taken: list[float] = []

    def forward(number: int, frame: FrameType | None) -> None:
        taken.append(time.monotonic())
        if len(taken) == 1 and "RANK" in os.environ:
            hanging.start()
        again = number == signal.SIGINT and taken[-1] - taken[0] > ECHO
        for child in started:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    return taken


def _in_the_rank() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes through the supervisor
    die_with_parent()


def die_with_parent() -> None:
    """For `preexec_fn`: a process that is started must not outlive a killed one, so that none is left behind."""
    at_death_of_parent(signal.SIGKILL)


def at_death_of_parent(number: int) -> None:
    """Lets this process get the signal when its parent ends. Linux alone can promise it (prctl(2))."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
