"""The process beside each rank: hands on what it says, tells how it ended, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from training.launch.exits import ENDED, INTERRUPTED, LOST_PEER, REFUSED
from training.launch.supervisor import remove_shared_buffer

ROOT = Path(__file__).parents[2]
# Stands for the training proper in a package of the same name, as `supervise` starts `python -m training.trainer`.
STAND_IN = """
from training.launch.supervisor import supervise
supervise()
import os, signal, sys, time
"""
LISTEN = "signal.signal(signal.SIGTERM, lambda *_: (print('stopping', flush=True), os._exit(75)))"
READY = "print('ready', flush=True); time.sleep(60)"
STOPPED = "Stopped before it had begun. To go on, type the same command again\n"
LAUNCH = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'training.trainer'])"


def python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-c", code, *words]


def starts(command: list[str], *words: str) -> list[str]:
    return python(f"import subprocess; subprocess.run({command!r})", *words)


# Spark's worker, forked from `python -m pyspark.daemon`, starts torchrun; DeepSpeed's command, launch.py.
SPARK = starts(python(LAUNCH, "torch.distributed.run"), "-m", "pyspark.daemon")
DEEPSPEED = starts(python(LAUNCH, "deepspeed.launcher.launch"))


class Supervised:
    def __init__(self, place: Path, rank_does: str, **how: object) -> None:
        package = place / "training"
        package.mkdir()
        for name in ("__init__.py", "consts.py", "launch"):
            (package / name).symlink_to(ROOT / "training" / name)
        (package / "trainer.py").write_text(str(how.pop("first", "")) + STAND_IN + textwrap.dedent(rank_does))
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "DOLLY_SUPERVISED")}
        environment |= how.pop("environment", {})
        command = how.pop("command", [sys.executable, "-m", "training.trainer", "--lr", "1"])
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
        self.process = subprocess.Popen(command, cwd=place, env=environment, text=True, **pipes)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


Start = Callable[..., Supervised]


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Start]:
    """Starts a supervised rank, and waits `until` it has said something."""
    started = []

    def start(rank_does: str, until: str = "", **how: object) -> Supervised:
        started.append(Supervised(tmp_path, rank_does, **how))
        assert not until or started[-1].process.stdout.readline() == f"{until}\n"
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_what_a_rank_prints_arrives_as_it_is_on_both_streams(supervised: Start) -> None:
    code, out, err = supervised("""
        print(sys.argv[1:], flush=True)
        sys.stdout.buffer.write(b"\\xe2\\x82\\xac no line end")
        print("bar 1\\rbar 2", file=sys.stderr)
    """).end()
    assert (code, out, err) == (0, "['--lr', '1']\n€ no line end", "bar 1\nbar 2\n")


@pytest.mark.parametrize("code", [0, REFUSED, ENDED, INTERRUPTED, LOST_PEER])
def test_of_an_end_that_the_rank_told_itself_nothing_is_repeated(supervised: Start, code: int) -> None:
    assert supervised(f"print('why', file=sys.stderr); sys.exit({code})").end() == (code, "", "why\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_that_is_killed_is_told_in_words_with_its_last_lines(supervised: Start) -> None:
    code, _, err = supervised(
        "for n in range(40): print('line', n, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)",
        environment={"RANK": "3"},
    ).end()
    assert code == 137
    assert "Rank 3 ended: killed, most likely because host memory ran out" in err
    assert "Its last lines:\n  line 25\n  line 26" in err
    assert "line 24" not in err
    assert err.rstrip().endswith("line 39")


def test_a_rank_that_crashes_is_told_with_its_traceback(supervised: Start) -> None:
    code, _, err = supervised("1 / 0").end()
    assert code == 1
    assert err.count("ZeroDivisionError") == 2, "as it came, and in the last lines"
    assert "Rank 0 ended: failed" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_rank_which_ends_in_its_own_way(
    supervised: Start, number: signal.Signals
) -> None:
    run = supervised(f"{LISTEN}; {READY}", until="ready")
    run.process.send_signal(number)
    assert run.end() == (INTERRUPTED, "stopping\n", "")


def test_a_signal_before_the_rank_can_listen_is_a_stop_as_well(supervised: Start) -> None:
    run = supervised("print('importing', flush=True); time.sleep(60)", until="importing")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == (INTERRUPTED, "", STOPPED)


@pytest.mark.parametrize(("pause", "code"), [(0.1, INTERRUPTED), (1.5, 137)])
def test_a_second_ctrl_c_ends_at_once_but_not_the_echo_of_the_first(
    supervised: Start, pause: float, code: int
) -> None:
    rank = "signal.signal(signal.SIGTERM, lambda *_: None); print('ready', flush=True); time.sleep(4); sys.exit(75)"
    run = supervised(rank, until="ready")
    run.process.send_signal(signal.SIGINT)
    time.sleep(pause)
    run.process.send_signal(signal.SIGINT)
    assert run.end()[0] == code


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a child with its parent")
def test_no_rank_outlives_a_killed_supervisor(supervised: Start) -> None:
    run = supervised(f"{LISTEN}; print(os.getpid(), flush=True); time.sleep(60)")
    rank = int(run.process.stdout.readline())
    run.process.kill()
    assert gone(rank)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a child with its parent")
@pytest.mark.parametrize(
    ("command", "environment", "number"),
    [
        (python(LAUNCH), {"RANK": "0"}, signal.SIGKILL),
        (DEEPSPEED, {}, signal.SIGTERM),
        (SPARK, {}, signal.SIGKILL),
    ],
    ids=[
        "a launcher",
        "DeepSpeed's command, which hands no signal on",
        "the worker of a cancelled task of Spark",
    ],
)
def test_the_end_of_whatever_launched_a_rank_is_taken_for_a_sigterm(
    supervised: Start, command: list[str], environment: dict[str, str], number: signal.Signals
) -> None:
    run = supervised(f"{LISTEN}; {READY}", until="ready", command=command, environment=environment)
    run.process.send_signal(number)
    assert run.process.stdout.read() == "stopping\n", "and then nobody holds the pipe any more"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_shell_that_is_left_takes_no_run_along(supervised: Start) -> None:
    run = supervised(f"{LISTEN}; print(os.getppid(), flush=True); time.sleep(60)", command=python(LAUNCH))
    supervisor = int(run.process.stdout.readline())
    run.process.kill()
    time.sleep(1)
    os.kill(supervisor, signal.SIGTERM)  # it was there
    assert gone(supervisor)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_launcher_that_is_killed_while_its_supervisor_starts_leaves_nobody(supervised: Start) -> None:
    """Before the supervisor can ask the system to be told of its launcher's end."""
    first = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(1)"
    how = {"command": python(LAUNCH), "environment": {"RANK": "0"}, "start_new_session": True}
    run = supervised("time.sleep(60)", first=first, **how)
    supervisor = int(run.process.stdout.readline())
    run.process.kill()
    assert gone(supervisor)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_deepspeed_command_may_end_before_a_supervisor_is_there(supervised: Start) -> None:
    """launch.py, which outlives it, takes seconds to start the ranks."""
    late = starts(python(f"import time; time.sleep(1); {LAUNCH}", "deepspeed.launcher.launch"))
    run = supervised(f"{LISTEN}; {READY}", command=late, start_new_session=True)
    time.sleep(0.3)
    run.process.kill()
    said = run.process.stdout.read()  # until nobody holds the pipe any more
    assert said in ("ready\nstopping\n", ""), "told to stop, perhaps before it could listen"


def test_a_reader_that_goes_away_does_not_stop_the_rank(supervised: Start, tmp_path: Path) -> None:
    """As in `deepspeed ... | head -1`, or where a terminal is closed: more than a pipe holds, and nobody reads."""
    done = tmp_path / "done"
    run = supervised(f"""
        for n in range(20000): print('line of some length', n, flush=True)
        open({str(done)!r}, 'w').close()
    """)
    run.process.stdout.readline()
    run.process.stdout.close()
    assert run.process.wait(timeout=30) == 0
    assert done.exists()


@pytest.mark.parametrize(("patience", "told"), [(1, True), (25, False)])
def test_a_rank_that_hangs_is_told_before_the_launcher_kills_it(
    supervised: Start, patience: int, told: bool
) -> None:
    rank = "signal.signal(signal.SIGTERM, lambda *_: None); print('step 7', flush=True); time.sleep(3); sys.exit(75)"
    first = f"import training.launch.supervisor; training.launch.supervisor.PATIENCE = {patience}"
    run = supervised(rank, until="step 7", first=first, environment={"RANK": "1"})
    run.process.send_signal(signal.SIGTERM)
    words = f"\nRank 1 is still busy {patience} s after it was told to stop\nIts last lines:\n  step 7\n"
    assert run.end() == (INTERRUPTED, "", words if told else "")


def test_the_supervisor_is_small() -> None:
    """It lives beside every rank: no torch, no transformers."""
    words = "import sys, training.launch.supervisor; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_the_shared_memory_of_this_rank_alone_is_given_back(tmp_path, monkeypatch):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    ends = ("29500_0", "29500_1", "29501_1")
    names = [f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{end}" for end in ends]
    for name in names:
        (tmp_path / name).touch()
    remove_shared_buffer(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [names[0], names[2]]
    remove_shared_buffer(tmp_path)  # nothing there is no fault


def test_a_signal_that_comes_before_there_is_a_rank_is_not_lost(supervised: Start) -> None:
    first = """
import os, signal, subprocess
real = subprocess.Popen
def slow(*args, **how):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*args, **how)
if "DOLLY_SUPERVISED" not in os.environ: subprocess.Popen = slow
"""
    code, _, err = supervised("time.sleep(60)", first=first).end()
    assert (code, err) == (INTERRUPTED, STOPPED)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_that_hangs_does_not_outlive_the_worker_of_spark_for_long(supervised: Start) -> None:
    first = "import training.launch.supervisor; training.launch.supervisor.KILLED_AFTER = 1"
    deaf = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY}"
    run = supervised(deaf, until="ready", first=first, command=SPARK)
    run.process.kill()
    begin = time.monotonic()
    assert run.process.stdout.read() == ""
    assert time.monotonic() - begin < 30
