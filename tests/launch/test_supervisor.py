"""The supervisor of a rank: it copies the output, reports the end, forwards signals and leaves nothing behind."""

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

from tests.starts import TORCHRUN, free_port
from training.launch.exits import CANNOT_CONTINUE, INTERRUPTED, LOST_PEER, REFUSED
from training.launch.local import DEEPSPEED as DEEPSPEED_COMMAND
from training.launch.supervisor import remove_shared_buffer, sibling_supervisors

ROOT = Path(__file__).parents[2]
# A stand-in for training/trainer.py, because `supervise` starts `python -m training.trainer`.
STAND_IN = """
from training.launch.supervisor import supervise
supervise()
import os, signal, sys, time
"""
# os.write, because a handler that prints while the code that it interrupts prints raises RuntimeError.
LISTEN = "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'stopping\\n'), os._exit(75)))"
READY = "print('ready', flush=True); time.sleep(60)"
STOPPED = "Stopped before training started. To train, type the same command again\n"
LAUNCH = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'training.trainer'])"


def python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-c", code, *words]


def starts(command: list[str], *words: str) -> list[str]:
    return python(f"import subprocess; subprocess.run({command!r})", *words)


# Spark's worker, forked from `python -m pyspark.daemon`, starts torchrun; the deepspeed command starts launch.py.
SPARK = starts(python(LAUNCH, "torch.distributed.run"), "-m", "pyspark.daemon")
DEEPSPEED = starts(python(LAUNCH, "deepspeed.launcher.launch"))


class Supervised:
    def __init__(self, folder: Path, rank_code: str, **how: object) -> None:
        self.folder, package = folder, folder / "training"
        package.mkdir()
        for name in ("__init__.py", "consts.py", "errors.py", "launch"):
            (package / name).symlink_to(ROOT / "training" / name)
        (package / "trainer.py").write_text(str(how.pop("first", "")) + STAND_IN + textwrap.dedent(rank_code))
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "DOLLY_SUPERVISED")}
        environment |= how.pop("environment", {})
        command = how.pop("command", [sys.executable, "-m", "training.trainer", "--lr", "1"])
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
        self.process = subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)

    def end(self, seconds: float = 30) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err


Start = Callable[..., Supervised]


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Start]:
    """Starts a supervised rank, and waits until it has printed the line `until`."""
    started = []

    def start(rank_code: str, until: str = "", **how: object) -> Supervised:
        started.append(Supervised(tmp_path, rank_code, **how))
        assert not until or started[-1].process.stdout.readline() == f"{until}\n"
        return started[-1]

    yield start
    for rank in started:
        rank.process.kill()
        rank.process.wait()


def has_ended(pid: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_the_output_of_a_rank_is_copied_unchanged_on_both_streams(supervised: Start) -> None:
    code, out, err = supervised("""
        print(sys.argv[1:], flush=True)
        sys.stdout.buffer.write(b"\\xe2\\x82\\xac no line end")
        print("bar 1\\rbar 2", file=sys.stderr)
    """).end()
    assert (code, out, err) == (0, "['--lr', '1']\n€ no line end", "bar 1\nbar 2\n")


@pytest.mark.parametrize("code", [0, REFUSED, CANNOT_CONTINUE, INTERRUPTED, LOST_PEER])
def test_an_expected_exit_code_is_not_reported_again(supervised: Start, code: int) -> None:
    assert supervised(f"print('why', file=sys.stderr); sys.exit({code})").end() == (code, "", "why\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_rank_is_reported_in_words_with_its_last_lines(supervised: Start) -> None:
    code, _, err = supervised(
        "for n in range(40): print('line', n, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)",
        environment={"RANK": "3"},
    ).end()
    assert code == 137
    assert "Rank 3 ended: killed, most likely because host memory ran out" in err
    assert "Its last lines:\n  line 25\n  line 26" in err
    assert "line 24" not in err
    assert err.rstrip().endswith("line 39")


def test_a_crashed_rank_is_reported_with_its_traceback(supervised: Start) -> None:
    code, _, err = supervised("1 / 0").end()
    assert code == 1
    assert err.count("ZeroDivisionError") == 2, "once as it was printed, once in the last lines"
    assert "Rank 0 ended: failed" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_forwarded_to_the_rank_which_then_stops(
    supervised: Start, number: signal.Signals
) -> None:
    run = supervised(f"{LISTEN}; {READY}", until="ready")
    run.process.send_signal(number)
    assert run.end() == (INTERRUPTED, "stopping\n", "")


def test_a_signal_before_the_rank_has_a_handler_stops_it_too(supervised: Start) -> None:
    run = supervised("print('importing', flush=True); time.sleep(60)", until="importing")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == (INTERRUPTED, "", STOPPED)


@pytest.mark.parametrize(("pause", "code"), [(0.1, INTERRUPTED), (1.5, 137)])
def test_a_second_ctrl_c_kills_unless_it_repeats_the_first_within_a_second(
    supervised: Start, pause: float, code: int
) -> None:
    rank = "signal.signal(signal.SIGTERM, lambda *_: None); print('ready', flush=True); time.sleep(4); sys.exit(75)"
    run = supervised(rank, until="ready")
    run.process.send_signal(signal.SIGINT)
    time.sleep(pause)
    run.process.send_signal(signal.SIGINT)
    assert run.end()[0] == code


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")
def test_a_rank_ends_with_its_killed_supervisor(supervised: Start) -> None:
    run = supervised(f"{LISTEN}; print(os.getpid(), flush=True); time.sleep(60)")
    rank = int(run.process.stdout.readline())
    run.process.kill()
    assert has_ended(rank)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")
@pytest.mark.parametrize(
    ("command", "environment", "number"),
    [
        (python(LAUNCH), {"RANK": "0"}, signal.SIGKILL),
        (DEEPSPEED, {}, signal.SIGTERM),
        (SPARK, {}, signal.SIGKILL),
    ],
    ids=[
        "a launcher",
        "the deepspeed command, which forwards no signal",
        "Spark's worker of a cancelled task",
    ],
)
def test_a_rank_stops_as_after_sigterm_when_its_launcher_ends(
    supervised: Start, command: list[str], environment: dict[str, str], number: signal.Signals
) -> None:
    run = supervised(f"{LISTEN}; {READY}", until="ready", command=command, environment=environment)
    run.process.send_signal(number)
    assert run.process.stdout.read() == "stopping\n", "and the pipe is closed"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_continues_when_the_shell_that_started_it_ends(supervised: Start) -> None:
    run = supervised(f"{LISTEN}; print(os.getppid(), flush=True); time.sleep(60)", command=python(LAUNCH))
    supervisor = int(run.process.stdout.readline())
    run.process.kill()
    time.sleep(1)
    os.kill(supervisor, signal.SIGTERM)  # fails if it has ended
    assert has_ended(supervisor)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_launcher_killed_while_the_supervisor_starts_leaves_no_process(supervised: Start) -> None:
    """The launcher ends before the supervisor has called prctl."""
    first = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(1)"
    how = {"command": python(LAUNCH), "environment": {"RANK": "0"}, "start_new_session": True}
    run = supervised("time.sleep(60)", first=first, **how)
    supervisor = int(run.process.stdout.readline())
    run.process.kill()
    assert has_ended(supervisor)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_deepspeed_command_may_end_before_the_supervisor_starts(supervised: Start) -> None:
    """launch.py keeps running and takes seconds to start the ranks."""
    late = starts(python(f"import time; time.sleep(1); {LAUNCH}", "deepspeed.launcher.launch"))
    run = supervised(f"{LISTEN}; {READY}", command=late, start_new_session=True)
    time.sleep(0.3)
    run.process.kill()
    output = run.process.stdout.read()  # until the pipe is closed
    assert output in ("ready\nstopping\n", "stopping\n", ""), "stopped, perhaps before it was ready"


def test_a_closed_output_pipe_does_not_stop_the_rank(supervised: Start, tmp_path: Path) -> None:
    """As in `deepspeed ... | head -1`, or after a terminal is closed; prints more than a pipe holds."""
    done = tmp_path / "done"
    run = supervised(f"""
        for n in range(20000): print('line of some length', n, flush=True)
        open({str(done)!r}, 'w').close()
    """)
    run.process.stdout.readline()
    run.process.stdout.close()
    assert run.process.wait(timeout=30) == 0
    assert done.exists()


@pytest.mark.parametrize(("seconds", "reported"), [(1, True), (25, False)])
def test_a_rank_that_hangs_is_reported_before_the_launcher_kills_it(
    supervised: Start, seconds: int, reported: bool
) -> None:
    rank = "signal.signal(signal.SIGTERM, lambda *_: None); print('step 7', flush=True); time.sleep(3); sys.exit(75)"
    first = f"import training.launch.supervisor; training.launch.supervisor.REPORT_HANG_AFTER = {seconds}"
    run = supervised(rank, until="step 7", first=first, environment={"RANK": "1"})
    run.process.send_signal(signal.SIGTERM)
    report = f"\nRank 1 is still running {seconds} s after SIGTERM\nIts last lines:\n  step 7\n"
    assert run.end() == (INTERRUPTED, "", report if reported else "")


def test_the_supervisor_imports_no_torch_transformers_or_numpy() -> None:
    words = "import sys, training.launch.supervisor; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_only_the_shared_memory_of_this_rank_is_removed(tmp_path, monkeypatch):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    ends = ("29500_0", "29500_1", "29501_1")
    names = [f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{end}" for end in ends]
    for name in names:
        (tmp_path / name).touch()
    remove_shared_buffer(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [names[0], names[2]]
    remove_shared_buffer(tmp_path)  # a missing file is no error


def test_a_signal_before_the_rank_is_started_is_not_lost(supervised: Start) -> None:
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
def test_a_rank_that_hangs_is_killed_soon_after_sparks_worker_ends(supervised: Start) -> None:
    first = "import training.launch.supervisor; training.launch.supervisor.KILL_AFTER = 1"
    hanging = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY}"
    run = supervised(hanging, until="ready", first=first, command=SPARK)
    run.process.kill()
    begin = time.monotonic()
    assert run.process.stdout.read() == ""
    assert time.monotonic() - begin < 30


# --- the other ranks of a run ----------------------------------------------------------------------

# Starts two ranks and prints how each ends, in order.
LAUNCH_TWO = """
import os, subprocess, sys, time
ranks = {
    rank: subprocess.Popen([sys.executable, "-m", "training.trainer"], env=os.environ | {"RANK": rank}) for rank in "01"
}
while ranks:
    for rank in [rank for rank, process in ranks.items() if process.poll() is not None]:
        print(rank, ranks.pop(rank).returncode, flush=True)
    time.sleep(0.05)
"""
RUN = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501", "WORLD_SIZE": "2"}
# Rank 0 waits for rank 1 in a library: it handles no SIGTERM, and notices nothing.
TWO_RANKS = """
import pathlib
if os.environ["RANK"] == "0":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    print("step 7", flush=True)
    pathlib.Path("ready").touch()
    time.sleep({seconds})
    sys.exit(0)
while not pathlib.Path("ready").exists(): time.sleep(0.05)
{end}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("end", "code", "report"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "Rank 1 ended: killed, most likely"),
        ("print('why', file=sys.stderr); sys.exit(70)", CANNOT_CONTINUE, "why\n"),
        ("1 / 0", 1, "Rank 1 ended: failed"),
        ("sys.exit(76)", LOST_PEER, "Rank 0 was still running after another rank had given up waiting\nIts last lines:\n  step 7"),
    ],
    ids=["killed", "failed with a message", "failed with a traceback", "waited in vain"],
)  # fmt: skip
def test_a_rank_that_fails_ends_the_others_at_once_and_first(
    supervised: Start, end: str, code: int, report: str
) -> None:
    begin = time.monotonic()
    run = supervised(TWO_RANKS.format(seconds=60, end=end), command=python(LAUNCH_TWO), environment=RUN)
    _, out, err = run.end()
    assert out == f"step 7\n1 {code}\n0 {LOST_PEER}\n"
    assert report in err
    assert ("step 7" in err) == (code == LOST_PEER), (
        "the lines of a rank that is not at fault are not repeated"
    )
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize("code", [0, REFUSED, INTERRUPTED])
def test_a_rank_that_finishes_refuses_or_saves_leaves_the_others_alone(supervised: Start, code: int) -> None:
    rank_code = TWO_RANKS.format(seconds=2, end=f"sys.exit({code})")
    run = supervised(rank_code, command=python(LAUNCH_TWO), environment=RUN)
    assert run.end() == (0, f"step 7\n1 {code}\n0 0\n", "")


# Starts a launcher for each node and prints the exit codes.
TWO_LAUNCHERS = """
import subprocess, sys
launchers = [subprocess.Popen([*sys.argv[1:], "--node_rank", node, "-m", "training.trainer"]) for node in "01"]
print("launchers", *(launcher.wait() for launcher in launchers))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "one torchrun a rank, as under Spark"])
def test_no_launcher_waits_for_the_others_of_a_failed_rank(supervised: Start, launcher: str) -> None:
    """Otherwise DeepSpeed's and torchrun wait 30 seconds for a rank that handles no SIGTERM."""
    port = str(free_port())
    command = {
        "deepspeed": [
            *DEEPSPEED_COMMAND,
            "--num_gpus",
            "2",
            "--master_port",
            port,
            "--module",
            "training.trainer",
        ],
        "torchrun": [*TORCHRUN, "--nproc_per_node=2", f"--master_port={port}", "-m", "training.trainer"],
    }.get(
        launcher,
        python(TWO_LAUNCHERS, *TORCHRUN, "--nnodes=2", "--nproc_per_node=1", f"--master_port={port}"),
    )
    end = "pathlib.Path('ended').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    run = supervised(TWO_RANKS.format(seconds=60, end=end), command=command)
    _, _, err = run.end(seconds=120)
    assert "Rank 1 ended: killed, most likely" in err
    assert time.time() - (run.folder / "ended").stat().st_mtime < 20


def test_only_supervisors_of_the_same_run_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RUN.items():
        monkeypatch.setenv(name, value)

    def process(
        pid: int, handled: int = signal.SIGUSR1, module: str = "training.trainer", **changed: str
    ) -> None:
        folder = tmp_path / str(pid)
        folder.mkdir()
        variables = RUN | {"RANK": "1"} | changed
        (folder / "environ").write_text("\0".join(f"{name}={value}" for name, value in variables.items()))
        (folder / "cmdline").write_text(f"python\0-m\0{module}\0--lr\0001")
        (folder / "status").write_text(f"Name:\tpython\nSigCgt:\t{1 << handled - 1:016x}\n")

    process(11)
    process(12, MASTER_PORT="29502")  # another run
    process(13, DOLLY_SUPERVISED="log")  # a rank
    process(
        14, handled=signal.SIGTERM
    )  # torchrun in a Spark task, whose command line names the module as well
    process(15, module="another.module")
    process(os.getpid())
    assert sibling_supervisors(tmp_path) == [11]
    monkeypatch.delenv("MASTER_PORT")
    assert sibling_supervisors(tmp_path) == []
