"""A small parent process of each rank, which reports how the rank ended.

A rank that the system kills cannot report it, and the launchers only print `exits with return code = -9`. So
`python -m training.trainer` starts itself again as a child and copies its output. If the child dies unexpectedly, it
repeats the last lines with the meaning of the exit code. If the run cannot continue without the child, it ends the other
ranks of this machine. It imports neither torch nor transformers."""

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
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from training.consts import SUPERVISED
from training.errors import printable
from training.launch.exits import CANNOT_CONTINUE, INTERRUPTED, LOST_PEER, REFUSED, exit_meaning

LAST_LINES = 15
REPEATED_CTRL_C = 1.0  # seconds in which a second SIGINT is the same Ctrl-C, forwarded by torchrun
KILL_AFTER = 30  # seconds that the launchers wait between SIGTERM and SIGKILL
REPORT_HANG_AFTER = 25  # seconds after SIGTERM until a rank that hangs is reported, before it is killed
EXPECTED_EXITS = (0, REFUSED, CANNOT_CONTINUE, INTERRUPTED, LOST_PEER)  # the rank has reported the reason
# After these the other ranks end by themselves, or still have to save.
HARMLESS_EXITS = (0, REFUSED, INTERRUPTED)
# Another rank is the cause, which gets these seconds to end first: the launchers take the code of the first, and DeepSpeed's
# polls every second. NCCL's watchdog aborts a rank whose collective has failed.
CAUSED_BY_OTHERS = {LOST_PEER: 3, -signal.SIGABRT: 1}
# What supervisors send to each other. Not SIGTERM: a rank would try to save, or wait in a library and never handle it.
END_RANK, END_HANGING_RANK = signal.SIGUSR1, signal.SIGUSR2


def supervise(worded: Callable[[str], str] = str) -> None:
    """In the process that a launcher or a user starts: runs the rank as a child and exits. In the rank: returns.

    `worded` puts the advice of an exit code into the words of the command that was typed.
    """
    if SUPERVISED in os.environ:
        return
    rank = os.environ.get("RANK", "0")
    environment = os.environ | {SUPERVISED: "terminal" if sys.stderr.isatty() else "log"}
    command = [sys.executable, "-u", "-m", "training.trainer", *sys.argv[1:]]
    if "RANK" in os.environ:  # a killed launcher cannot end its ranks
        signal_on_parent_death(signal.SIGTERM)
        if _orphaned(Path("/proc/self")):  # the launcher was killed before the line above
            sys.exit(INTERRUPTED)
    last: collections.deque[bytes] = collections.deque(maxlen=LAST_LINES)
    event = f"Rank {rank} is still running {REPORT_HANG_AFTER} s after SIGTERM"
    hang_timer = threading.Timer(REPORT_HANG_AFTER, _report, (event, last))
    hang_timer.daemon = True
    children: list[subprocess.Popen[bytes]] = []
    stops = _forward_signals(children, hang_timer)  # before the rank starts, or an early signal would be lost
    kills = _listen_to_siblings(children, f"Rank {rank}", last)
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
    hang_timer.cancel()
    remove_shared_buffer()  # a killed rank has not done it
    if code == -signal.SIGTERM and stops:  # before the rank installed its handler
        code = INTERRUPTED
        if rank == "0":
            _write("Stopped before training started. To train, type the same command again\n")
    if code == -signal.SIGKILL and kills:
        code = LOST_PEER
    if code not in EXPECTED_EXITS:
        _report(worded(f"Rank {rank} ended: {exit_meaning(code)}"), last)
    if "RANK" in os.environ and code not in HARMLESS_EXITS:
        _end_siblings(code, stops, kills)
    # Shells and launchers expect 128 + n for signal n.
    os._exit(128 - code if code < 0 else code)


def _stop_with_starter(rank: subprocess.Popen[bytes]) -> None:
    """Stops the rank when the process that started the launcher ends, because neither of these sends a SIGTERM.

    If the `deepspeed` command is stopped, launch.py and the ranks keep running. If a task is cancelled, or another rank
    fails, Spark kills the task's worker but not its torchrun and ranks.
    """
    launcher = Path(f"/proc/{os.getppid()}")
    with contextlib.suppress(OSError):
        starter = status_of(launcher).parent
        of_spark = re.search(rb"pyspark\.(daemon|worker)", Path(f"/proc/{starter}/cmdline").read_bytes())
        if not of_spark and b"deepspeed.launcher.launch" not in (launcher / "cmdline").read_bytes():
            return
        while status_of(launcher).parent == starter and not _orphaned(launcher):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        if of_spark:
            time.sleep(KILL_AFTER)
            rank.kill()


def _orphaned(process: Path) -> bool:
    """Whether a process has lost its parent: its parent is process 1, but its group leader is another process.

    Processes started by process 1 (systemd, a container) lead their own group or belong to the group of process 1.
    """
    try:
        status = status_of(process)
        return status.parent == 1 and status.group not in (0, 1, int(process.resolve().name))
    except OSError:  # no Linux
        return False


class Status(NamedTuple):
    """A process as Linux reports it: its state is one letter, the others are process ids."""

    state: str
    parent: int
    group: int
    session: int


def status_of(process: Path) -> Status:
    """The status of the process with this folder in /proc (proc_pid_stat(5)). Raises OSError."""
    # The name of the program comes before, in brackets, and may hold spaces and brackets.
    state, *numbers = (process / "stat").read_text().rpartition(")")[2].split()[:4]
    return Status(state, *map(int, numbers))


def remove_shared_buffer(folder: Path = Path("/dev/shm")) -> None:
    """Removes the shared memory that DeepSpeed's CPU collectives never free: 66 MiB per rank and run.

    Its name is set by shm_comm (csrc/cpu/comm/shm.cpp): user, master address and port, rank.
    """
    words = [os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")]
    if all(words):
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_{'_'.join(map(str, words))}"
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def _report(event: str, last: collections.deque[bytes]) -> None:
    lines = b"".join(list(last)).decode(errors="replace").splitlines()
    shown = "".join(f"  {printable(line)}\n" for line in lines if line.strip()) or "  (none)\n"
    _write(f"\n{event}\nIts last lines:\n{shown}")


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # the reader has closed the pipe
        sys.stderr.write(text)
        sys.stderr.flush()


def _copy_output(pipe: IO[bytes], target: IO[bytes], last: collections.deque[bytes]) -> None:
    """Copies the rank's output at once, including unfinished lines of progress bars, and keeps the last lines."""
    unfinished = b""
    while chunk := os.read(pipe.fileno(), 65536):
        with contextlib.suppress(OSError):  # a closed pipe must not stop the rank
            target.write(chunk)
            target.flush()
        *lines, unfinished = (unfinished + chunk).split(b"\n")
        last.extend(line.rpartition(b"\r")[2] + b"\n" for line in lines)
    if unfinished:
        last.append(unfinished)


def _forward_signals(children: list[subprocess.Popen[bytes]], hang_timer: threading.Timer) -> list[float]:
    """Forwards SIGTERM and Ctrl-C to the rank, which finishes its step and saves; a second Ctrl-C kills it.

    Returns the list to which the handler appends the time of each signal.
    """
    stops: list[float] = []

    def forward(number: int, frame: FrameType | None) -> None:
        stops.append(time.monotonic())
        if len(stops) == 1 and "RANK" in os.environ:
            hang_timer.start()
        kill = number == signal.SIGINT and stops[-1] - stops[0] > REPEATED_CTRL_C
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if kill else signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    return stops


def _listen_to_siblings(
    children: list[subprocess.Popen[bytes]], name: str, last: collections.deque[bytes]
) -> list[int]:
    """Kills the rank when the supervisor of another rank asks for it. Returns the list of these signals."""
    kills: list[int] = []

    def kill(number: int, frame: FrameType | None) -> None:
        kills.append(number)
        for child in children:
            if child.poll() is None:
                if number == END_HANGING_RANK:
                    _report(f"{name} was still running after another rank had given up waiting", last)
                child.kill()

    for number in (END_RANK, END_HANGING_RANK):
        signal.signal(number, kill)
    return kills


def _end_siblings(code: int, stops: list[float], kills: list[int]) -> None:
    """Ends the other ranks of this run on this machine. They would wait for this one, and the launcher for them."""
    end = time.monotonic() + CAUSED_BY_OTHERS.get(code, 0)
    while not stops and time.monotonic() < end:
        time.sleep(0.1)
    for supervisor in [] if kills else sibling_supervisors():
        with contextlib.suppress(OSError):  # it has just ended
            os.kill(supervisor, END_HANGING_RANK if code in CAUSED_BY_OTHERS else END_RANK)


def sibling_supervisors(processes: Path = Path("/proc")) -> list[int]:
    """Supervisors of this run's other ranks on this machine, under any launcher. Empty where there is no /proc."""
    run = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")}
    found = []
    for process in processes.glob("[0-9]*") if all(run.values()) else ():
        with contextlib.suppress(OSError):
            entries = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            variables = dict(entry.partition("=")[::2] for entry in entries)
            supervisor = b"training.trainer" in (process / "cmdline").read_bytes().split(b"\0")
            if supervisor and SUPERVISED not in variables and run.items() <= variables.items():
                found += [int(process.name)] * _handles(process, END_RANK)
    return sorted(set(found) - {os.getpid()})


def _handles(process: Path, number: int) -> bool:
    """Whether a process has a handler for a signal (proc_pid_status(5)). A launcher has none, and would end."""
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", (process / "status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def _prepare_rank() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor forwards a terminal's Ctrl-C
    kill_on_parent_death()


def kill_on_parent_death() -> None:
    """For `preexec_fn`: the started process is killed when its parent ends."""
    signal_on_parent_death(signal.SIGKILL)


def signal_on_parent_death(number: int) -> None:
    """Sends this process the signal when its parent ends. Works only on Linux (prctl(2))."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
