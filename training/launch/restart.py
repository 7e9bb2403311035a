"""Starts a run again after an end that a restart can cure, until it has finished."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from training.consts import RUN_FILE
from training.files import local_path
from training.launch.exits import INTERRUPTED, exit_meaning, restart_cures
from training.launch.local import WORKING_FOLDER, Ending, free_port, run_command
from training.launch.supervisor import status_of
from training.options.trainer_options import DEFAULT_RANK_TIMEOUT
from training.options.wording import worded
from training.storage import checkpoint
from training.storage.record import read_run_record

DEFAULT_RESTARTS = 5
MOST_WITHOUT_PROGRESS = 5  # starts in a row that bring no new checkpoint
LONGEST_PAUSE = 60  # seconds before a start
# Seconds beyond --rank-timeout after which a process that is stopped (SIGSTOP) is taken for hanging. The other ranks and
# their supervisors act first.
GRACE = 10
_LOOK_EVERY = 2.0  # seconds between two looks at the processes


def launch(
    command: Sequence[str],
    cpu_ranks: int = 0,
    typed: str | None = None,
    restarts: int = 0,
    folder: Path | None = WORKING_FOLDER,
) -> None:
    """Runs the command, and starts it again with --resume auto, at most `restarts` times.

    It gives up after an end that no restart cures (`exits.restart_cures`), if host memory ran out a second time, and after
    `MOST_WITHOUT_PROGRESS` starts without a new checkpoint. Ctrl-C and a notebook's Interrupt end the run.

    Args:
        command: from `deepspeed_command`.
        cpu_ranks, typed, folder: as in `run_command`.

    Raises TrainingFailedError.
    """
    named = _last_value(command, "--local-output-dir")
    output = (folder or Path()) / local_path(named) if named else None
    rank_timeout = int(_last_value(command, "--rank-timeout") or DEFAULT_RANK_TIMEOUT)
    watch = partial(_kill_stopped, seconds=rank_timeout + GRACE)
    restarted = without_progress = out_of_memory = 0
    while True:
        before = _newest_step(output)
        ending = run_command(command, cpu_ranks, typed, watch, folder)
        if not ending.code and (output is None or _status(output) == "finished"):
            return
        if not ending.code:
            # DeepSpeed's runner ends with 0 if a signal ended its launch.py. The ranks get SIGTERM then.
            ending = replace(ending, code=INTERRUPTED)
        newest = _newest_step(output)
        without_progress = without_progress + 1 if newest == before else 0
        out_of_memory += _lacked_memory(ending)
        if ending.interrupted and _status(output) == "stopped":
            ending = replace(ending, code=INTERRUPTED)  # DeepSpeed's runner has a code of its own
        if not restarts or ending.interrupted or not restart_cures(ending.code):
            raise ending.failure(typed)
        if problem := _reason_to_give_up(out_of_memory, without_progress, restarts - restarted):
            raise ending.failure(typed, f"It is not started again: {problem}\n")
        restarted += 1
        pause = min(LONGEST_PAUSE, 2**without_progress)
        place = f"from checkpoint-{newest}" if newest is not None else "from its start"
        meaning = worded(exit_meaning(ending.code, ending.out_of_memory), typed).split(". ")[0]
        print(
            f"\nRestart {restarted} of {restarts} in {pause} s, {place}: exit code {ending.code}, {meaning}",
            flush=True,
        )
        time.sleep(pause)
        command = _command_that_continues(command, output)


def _reason_to_give_up(out_of_memory: int, without_progress: int, left: int) -> str | None:
    """Why a run is not started again although a restart could cure its end; None if it is started."""
    if out_of_memory > 1:
        return "host memory ran out twice"
    if without_progress >= MOST_WITHOUT_PROGRESS:
        return f"{without_progress} starts in a row brought no new checkpoint. Type a shorter --save-every"
    return None if left else "it has been started again as often as --restarts allows"


def _lacked_memory(ending: Ending) -> bool:
    """Whether the system killed a rank because host memory ran out."""
    return bool(ending.out_of_memory) and exit_meaning(ending.code, True) != exit_meaning(ending.code, False)


def _status(output: Path | None) -> str | None:
    """The run's own word for how it stands: "running", "stopped" or "finished"."""
    return ((output and read_run_record(output)) or {}).get("status")


def _newest_step(output: Path | None) -> int | None:
    """Step of the newest complete checkpoint."""
    newest = checkpoint.newest_complete(output) if output else None
    return checkpoint.step_of(newest) if newest else None


def _command_that_continues(command: Sequence[str], output: Path | None) -> list[str]:
    """The command with another port and --resume auto, which counts because it comes last.

    A run that begins at a checkpoint of another run keeps its --resume until run.json names that checkpoint.
    """
    words = list(command)
    if "--master_port" in words:
        words[words.index("--master_port") + 1] = str(free_port())
    named = _last_value(words, "--resume") not in (None, "never", "auto")
    if named and not (output and (output / RUN_FILE).is_file()):
        return words
    return words if words[-2:] == ["--resume", "auto"] else [*words, "--resume", "auto"]


def _last_value(words: Sequence[str], flag: str) -> str | None:
    """The value of an option that counts, as click reads the words."""
    value = None
    for word, following in pairwise([*words, ""]):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


@contextlib.contextmanager
def _kill_stopped(session: int, seconds: float) -> Iterator[None]:
    """Kills all processes of a session if one of them is stopped (SIGSTOP) for `seconds`. Works only on Linux.

    A stopped launcher or supervisor would let the run wait forever. A stopped rank is killed earlier by the others.
    """
    ended = threading.Event()

    def look() -> None:
        since: dict[int, float] = {}
        while not ended.wait(_LOOK_EVERY):
            now = time.monotonic()
            since = {pid: since.get(pid, now) for pid in stopped_processes(session)}
            if any(now - begin > seconds for begin in since.values()):
                names = ", ".join(map(str, since))
                print(f"Process {names} has been stopped for {seconds:.0f} s: the run is killed", flush=True)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(session, signal.SIGKILL)
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def stopped_processes(session: int) -> list[int]:
    """Processes of a session that are stopped by a signal (state T). Empty where there is no /proc."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = status_of(process)
            if status.state == "T" and status.session == session:
                found.append(int(process.name))
    return sorted(found)
