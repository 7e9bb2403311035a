"""Real runs that are killed at any moment, by any signal or a full disk, and resume to the same result."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.conftest import jsonl, made_once, say_rows
from tests.starts import ALONE, FLOAT32, ROOT, changed_start, deepspeed, record, torchrun, without_a_launcher
from tests.storage.test_checkpoint import flip
from training.consts import SUPERVISED
from training.launch.exits import CANNOT_CONTINUE, INTERRUPTED, REFUSED
from training.run.final_model import UNFINISHED
from training.run.lock import one_writer
from training.run.reshard import RESHARDED
from training.storage import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

ONE_RANK_STEPS, TWO_RANK_STEPS = 30, 18
# Checkpoints fall between log lines, with and without a held-out loss due.
INTERVALS = ["--save-steps", "3", "--eval-steps", "4", "--logging-steps", "2", "--lr", "1e-3"]
FIGURES = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")
TIMEOUT = 400  # seconds for a start on a busy machine, including the compilation of an operator


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(made_once(tmp_path_factory, "rows.jsonl", lambda file: jsonl(file, say_rows(120))))


class Run:
    """A training command that writes to `folder`, started as by a user in its own process group."""

    def __init__(
        self, rows: str, folder: Path, ranks: int, *more: object, by: Callable[[int], list[str]] = torchrun,
        **environment: str,
    ) -> None:  # fmt: skip
        options = ["--input-model", "demo", "--training-dataset", rows, "--test-size", "20",
                   "--gradient-checkpointing", "off", *INTERVALS, "--local-output-dir", folder]  # fmt: skip
        steps = ONE_RANK_STEPS if ranks == 0 else TWO_RANK_STEPS
        launcher = ALONE
        if ranks:
            launcher = by(ranks)
            options += ["--deepspeed", FLOAT32, "--per-device-train-batch-size", 8 // ranks]
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*launcher, *map(str, options), "--max-steps", str(steps), *map(str, more)],
                cwd=ROOT,
                env=without_a_launcher() | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(
                    signal.signal, signal.SIGINT, signal.SIG_DFL
                ),  # "&" in a shell ignores SIGINT
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def pids(self, kind: str) -> list[int]:
        """Processes of this run: its "ranks", their "supervisors", DeepSpeed's "launcher", or "all" of them."""
        found: dict[int, str] = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                environment = (process / "environ").read_bytes()
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            except (OSError, ValueError):
                continue  # the process has just ended
            if str(self.folder) in words and state != "Z":
                module = "launcher" if any("launcher.launch" in word for word in words) else "runner"
                if "training.trainer" in words and "--module" not in words and module != "launcher":
                    # A child that has not begun its own program yet is like its supervisor.
                    module = "rank" if f"{SUPERVISED}=".encode() in environment else "supervisor"
                found[int(process.name)] = module
        return sorted(pid for pid, module in found.items() if kind in ("all", module))

    def wait_until(self, reached: Callable[[], bool]) -> bool:
        """Waits for the state. Returns False if the run ended first."""
        end = time.monotonic() + TIMEOUT
        while not reached():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, self.output
            time.sleep(0.003)
        return True

    def wait(self, seconds: float = TIMEOUT) -> int:
        """Waits until no process of the run is left, and returns the command's exit code."""
        code = self.process.wait(timeout=seconds)
        end = time.monotonic() + seconds
        while left := self.pids("all"):
            assert time.monotonic() < end, f"left behind: {left}\n{self.output}"
            time.sleep(0.05)
        return code

    def wait_for_exit(self, code: int = 0, seconds: float = TIMEOUT) -> str:
        """Waits for this exit code and returns the output."""
        assert self.wait(seconds) == code, self.output
        return self.output

    def kill(self) -> None:
        for pid in self.pids("all"):
            os.kill(pid, signal.SIGKILL)

    def starting(self) -> bool:
        return bool(self.pids("rank"))

    def both_started(self) -> bool:
        return len(self.pids("rank")) == 2

    def stepping(self) -> bool:
        return "s/step" in self.output

    def has_logged(self, step: int) -> bool:
        """Whether a line of this step, or of a later one, was printed."""
        logged = re.findall(r"^\s*step ([\d,]+)/", self.output, re.MULTILINE)
        return any(int(number.replace(",", "")) >= step for number in logged)

    def saving(self) -> bool:
        incomplete = [
            f for f in checkpoint.checkpoints(self.folder) if not (f / checkpoint.MANIFEST_FILE).exists()
        ]
        # A line is logged before each save, and no save was left incomplete before.
        return bool(incomplete) and self.stepping()

    def placing(self) -> bool:
        return (self.folder / UNFINISHED).exists() or (self.folder / "model.safetensors").exists()


@pytest.fixture
def start(rows: str) -> Iterator[Callable[..., Run]]:
    """Starts runs, and kills them all at the end."""
    runs: list[Run] = []

    def begin(folder: Path, ranks: int, *more: object, **how: object) -> Run:
        runs.append(Run(rows, folder, ranks, *more, **how))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()
        run.process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def undisturbed(rows: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of an undisturbed run on `ranks` ranks with all its checkpoints; 0: without DeepSpeed.

    The global batches are the same for one and two ranks.
    """

    def reference(ranks: int) -> Path:
        return made_once(
            tmp_path_factory,
            f"undisturbed-{ranks}",
            lambda folder: Run(rows, folder, ranks, "--save-total-limit", 100).wait_for_exit(),
        )

    return reference


def history(folder: Path) -> list[dict[str, float]]:
    """All logged figures that do not depend on time."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in FIGURES if name in entry} for entry in entries]


def contents(folder: Path) -> dict[str, bytes]:
    """{relative name: content} of every file below a folder."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def assert_the_same_run(folder: Path, undisturbed: Path) -> None:
    ours, theirs = record(folder), record(undisturbed)
    assert ours["status"] == "finished"
    assert history(folder) == history(undisturbed)
    assert (folder / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert (ours["train_loss"], ours["held_out_loss"]) == (theirs["train_loss"], theirs["held_out_loss"])


def assert_shared_memory_has_no_name(run: Run) -> None:
    """So that it ends with the processes, however they end."""
    port = run.process.args[run.process.args.index("--master_port") + 1]
    used = [(Path("/proc") / str(pid) / "maps").read_text() for pid in run.pids("rank")]
    unlinked = [f"_{port}_{rank} (deleted)" for rank in range(2)]
    assert all(buffer in maps for maps in used for buffer in unlinked), "each rank maps both buffers"
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))


def assert_resumes_to_the_same_run(
    start: Callable[..., Run], folder: Path, ranks: int, undisturbed: Path
) -> str:
    """Resumes the run to its end, checks that it equals the undisturbed one, and returns its output."""
    output = start(folder, ranks, "--resume", "auto").wait_for_exit()
    assert_the_same_run(folder, undisturbed)
    return output


# (moment, victim) of each kill, one per start.
SIXTEEN = [("start", "group"), ("save", "rank"), ("step", "rank"), ("save", "group"), ("step", "supervisor"),
           ("save", "supervisor"), ("step", "group"), ("step", "rank"), ("save", "rank"), ("start", "rank"),
           ("step", "supervisor"), ("save", "group"), ("final", "rank"), ("final", "supervisor"),
           ("final", "group"), ("start", "supervisor")]  # fmt: skip
SEVEN = [("step", "rank"), ("save", "rank"), ("step", "launcher"), ("save", "group"), ("step", "supervisor"),
         ("final", "rank"), ("final", "group")]  # fmt: skip
BEFORE, DURING, AFTER = "before a file", "during a file", "after a file"  # of a save in the background
THREE = [(BEFORE, "rank"), (AFTER, "supervisor"), ("final", "group")]
TWO = [(DURING, "group"), ("step", "launcher")]
# For `changed_start`: the second save of each start takes a second before, during and after each file.
SLOW_SAVE = """
import os, sys, time
if "DOLLY_SUPERVISED" in os.environ and "training.trainer" in sys.orig_argv:
    from training.run import background

    folders = []

    def begin(writer, folder, real=background.Writer.begin):
        folders.append(folder)
        real(writer, folder)

    def wait(moment):
        folders[1].parent.with_suffix(".moment").write_text(moment)
        time.sleep(1)

    class Slow:
        def __init__(self, stream):
            self.stream, self.waited = stream, False

        def write(self, block):
            size = self.stream.write(block)
            if not self.waited:
                self.stream.file.flush()
                self.waited = True
                wait("during a file")
            return size

        def flush(self):
            pass

    def write_hashed(file, write, real=background.write_hashed):
        if len(folders) != 2:
            return real(file, write)
        wait("before a file")
        digest = real(file, lambda stream: write(Slow(stream)))
        wait("after a file")
        return digest

    background.Writer.begin, background.write_hashed = begin, write_hashed
"""


@pytest.mark.parametrize(
    ("ranks", "plan"),
    [
        pytest.param(0, THREE, id="a single process three times"),
        pytest.param(2, TWO, id="two ZeRO-3 ranks twice"),
        pytest.param(0, SIXTEEN, id="a single process sixteen times", marks=pytest.mark.long),
        pytest.param(2, SEVEN, id="two ZeRO-3 ranks seven times", marks=pytest.mark.long),
    ],
)
def test_a_run_that_is_killed_many_times_ends_bit_for_bit_the_same(
    start, undisturbed, folder, tmp_path, ranks, plan
):
    """Also while a save is under way in the background, before, during and after a file."""
    chance, now = random.Random(1), folder.with_suffix(".moment")
    slow_save = changed_start(tmp_path, SLOW_SAVE)
    model = folder / "model.safetensors"
    for moment, victim in plan:
        placed = model.read_bytes() if model.exists() else b""
        model.unlink(missing_ok=True)  # so that the next `placing` is visible
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        now.write_text("")
        slow = slow_save if moment.endswith("a file") else {}
        run = start(folder, ranks, "--resume", "auto", by=deepspeed, **slow)
        complete = [f.name for f in checkpoint.checkpoints(folder) if checkpoint.read_manifest(f)]
        label = f"{ranks or 1} rank(s)  {moment:<6} {victim:<11}"
        reached = {"start": run.starting, "step": run.stepping, "save": run.saving, "final": run.placing}
        reached |= dict.fromkeys((BEFORE, DURING, AFTER), lambda moment=moment: now.read_text() == moment)
        if not run.wait_until(reached[moment]):
            # The previous kill hit a rank that had already finished, and the other rank finished the run.
            assert moment == "final", f"{moment} was not reached\n{run.output}"
            assert record(folder)["status"] == "finished", run.output
            print(label, "came too late: the run had finished")
            model.write_bytes(placed)
            continue
        if moment in ("start", "step"):
            time.sleep(chance.uniform(0, 3 if moment == "start" else 0.2))
        victims = run.pids("all" if victim == "group" else victim)
        if ranks and victim == "group":
            assert_shared_memory_has_no_name(run)
        begin = time.monotonic()
        for pid in victims if victim in ("group", "launcher") else victims[-1:]:
            os.kill(pid, signal.SIGKILL)
        run.wait(60)
        seconds = time.monotonic() - begin
        if victim == "rank":
            assert "host memory" in run.output, run.output
            assert "Its last lines:" in run.output
        skipped = run.output.count("is skipped")
        incomplete = [f.name for f in checkpoint.checkpoints(folder) if checkpoint.read_manifest(f) is None]
        if moment.endswith("a file"):
            newest = checkpoint.checkpoints(folder)[-2:]
            assert [bool(checkpoint.read_manifest(f)) for f in newest] == [True, False], run.output
        print(
            f"{label} began at {complete[-1] if complete else 'the start':<14} {skipped} skipped;"
            f" incomplete: {', '.join(incomplete) or 'none':<14} all gone after {seconds:.1f} s"
        )
    assert_resumes_to_the_same_run(start, folder, ranks, undisturbed(ranks))


# --- another number of ranks -------------------------------------------------------------------------


def drift(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """The largest relative difference between the losses of two runs."""
    assert [(entry["step"], entry.keys()) for entry in ours] == [
        (entry["step"], entry.keys()) for entry in theirs
    ]
    return max(
        abs(mine[name] / other[name] - 1)
        for mine, other in zip(ours, theirs, strict=True)
        for name in {"loss", "eval_loss"} & mine.keys()
    )


def test_two_ranks_resume_in_the_second_epoch_bit_for_bit(start, undisturbed, folder):
    """8 of 100 rows a step, so the first epoch has 13 steps."""
    start(folder, 2, "--resume", undisturbed(2) / "checkpoint-15").wait_for_exit()
    assert_the_same_run(folder, undisturbed(2))


def test_two_ranks_resume_with_a_forced_learning_rate_and_weight_decay(start, undisturbed, folder):
    changed = ("--lr", "1e-4", "--weight-decay", "0.5", "--force")
    start(folder, 2, "--resume", undisturbed(2) / "checkpoint-15", *changed).wait_for_exit()
    rates = {entry["step"]: entry["learning_rate"] for entry in history(folder) if "loss" in entry}
    assert (rates[14], rates[16], rates[18]) == (1e-3, 1e-4, 1e-4)
    [shard, _] = sorted((folder / "checkpoint-18").rglob("*optim_states.pt"))
    saved = torch.load(shard, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]
    groups = [(group["lr"], group["weight_decay"]) for group in saved["param_groups"]]
    assert groups == [(1e-4, 0.5), (1e-4, 0.0)]


@pytest.mark.parametrize(("before", "after", "step"), [(2, 1, 6), (1, 2, 15)])
def test_a_run_resumes_on_another_number_of_ranks(start, undisturbed, folder, before, after, step):
    """Within rounding: the drift is like that between undisturbed runs on one and two ranks."""
    first_run = undisturbed(before)
    source = first_run / f"checkpoint-{step}"
    written = contents(source)
    output = start(folder, after, "--resume", source).wait_for_exit()
    assert "for another number of devices" in output
    assert contents(source) == written
    assert not (folder / RESHARDED).exists()
    ours, theirs = history(folder), history(first_run)
    shared = sum(entry["step"] <= step for entry in theirs)
    assert ours[:shared] == theirs[:shared], "entries before the resume"
    rounding = drift(history(undisturbed(1)), history(undisturbed(2)))
    print(f"{before} -> {after} ranks: {drift(ours, theirs):.1e}; 1 and 2 ranks undisturbed: {rounding:.1e}")
    assert 0 < drift(ours[: shared + 2], theirs[: shared + 2]) < 2e-3
    # The largest of some twenty figures: 1 to 2 times that of the undisturbed runs, and it grows with the steps.
    # Tests of the conversion compare the optimizer's state bit for bit (test_reshard.py).
    assert drift(ours, theirs) < 3 * rounding


def test_a_damaged_shard_is_refused_and_no_file_changes(start, undisturbed, folder):
    shutil.copytree(undisturbed(2) / "checkpoint-6", folder / "checkpoint-6")
    (folder / "run.json").write_text(json.dumps(record(undisturbed(2)) | {"status": "running"}))
    [shard, _] = sorted((folder / "checkpoint-6").rglob("*optim_states.pt"))
    flip(shard, shard.stat().st_size // 2)
    before = contents(folder)
    output = start(folder, 1, "--resume", "auto", by=deepspeed).wait_for_exit(REFUSED)
    assert f"{shard.name} has changed since it was written" in output
    assert "Traceback" not in output
    assert contents(folder) == before


# --- stopped by a signal -----------------------------------------------------------------------------


# DeepSpeed's launcher ends with 1 on SIGTERM, and its runner is killed by Ctrl-C. Both exit codes are DeepSpeed's.
@pytest.mark.parametrize(
    ("ranks", "ways"),
    [
        (0, [("terminal", INTERRUPTED), ("supervisor", INTERRUPTED)]),
        # A signal to one of the ranks is tried in test_several_sources_run.py.
        (2, [("terminal", -signal.SIGINT), ("launcher", 1)]),
    ],
)
def test_a_run_stopped_by_any_signal_finishes_its_step_saves_and_resumes_bit_for_bit(
    start, undisturbed, folder, ranks, ways
):
    for target, expected in ways:
        run = start(folder, ranks, "--resume", "auto", by=deepspeed)
        assert run.wait_until(run.stepping), run.output
        if target == "terminal":
            os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
        else:
            os.kill(run.pids(target)[-1], signal.SIGTERM)
        output = run.wait_for_exit(expected, 60 if ranks else 30)
        assert output.count("type the same command with --resume auto") == 1, output
        assert output.count("Traceback") == (target == "terminal" and ranks > 0), (
            "DeepSpeed's runner prints one"
        )
        assert record(folder)["status"] == "stopped"
        assert not checkpoint.problems_of(checkpoint.checkpoints(folder)[-1])
    assert_resumes_to_the_same_run(start, folder, ranks, undisturbed(ranks))


def test_a_run_whose_launcher_is_killed_or_stopped_saves_and_resumes(start, undisturbed, folder):
    """No process stays, and the ranks save. SIGTERM of DeepSpeed's launcher is tried above."""
    for by, number, logged in ((deepspeed, signal.SIGKILL, 2), (torchrun, signal.SIGTERM, 8)):
        run = start(folder, 2, "--resume", "auto", "--max-steps", 10_000, by=by)
        assert run.wait_until(partial(run.has_logged, logged)), run.output
        run.process.send_signal(number)
        run.wait(60)
        assert run.output.count("type the same command with --resume auto") == 1, run.output
        newest = checkpoint.checkpoints(folder)[-1]
        assert not checkpoint.problems_of(newest)
        assert record(folder)["status"] == "stopped"
    ours, theirs = history(newest), history(undisturbed(2))
    same = [entry for entry in theirs if entry["step"] <= ours[-1]["step"] and "loss" in entry]
    assert len(same) > 3
    assert [entry for entry in ours if "loss" in entry][: len(same)] == same


def test_a_second_ctrl_c_ends_a_run_at_once(start, folder):
    run = start(folder, 0)
    assert run.wait_until(run.stepping), run.output
    os.kill(run.pids("rank")[0], signal.SIGSTOP)  # a step that never ends
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(2)
    assert run.process.poll() is None
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait(10) == 128 + signal.SIGKILL


# --- hanging ranks, full disks ------------------------------------------------------------------------


# For `changed_start`: rank 1 fails in the second save, while rank 0 waits. As with NCCL, nothing ends the wait or the
# shutdown of the process group: no signal, no dead peer.
FAILING_SAVE = """
import os, signal, sys, time
if "DOLLY_SUPERVISED" in os.environ and "training.trainer" in sys.orig_argv:
    import torch
    from training.run.background import Writer

    def wait_forever(*args, **how):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        time.sleep(10_000)

    def begin(writer, folder, real=Writer.begin):
        if folder.name != "checkpoint-6":
            return real(writer, folder)
        if os.environ["RANK"] == "0":
            wait_forever()
        (folder.parents[1] / "failed-at").write_text(str(time.time()))
        raise OSError(28, "No space left on device")

    torch.distributed.destroy_process_group, Writer.begin = wait_forever, begin
"""


def test_a_rank_that_fails_or_hangs_ends_the_run_with_its_message(start, tmp_path):
    """During data preparation, a step and a save, under both launchers. The runs overlap to save time."""
    timeout = 20
    failing = changed_start(tmp_path, FAILING_SAVE)
    runs = []
    with ThreadPoolExecutor() as pool:
        for moment, by, number, environment in (
            ("saving", deepspeed, 0, failing),
            ("starting", deepspeed, signal.SIGSTOP, {}),
            ("stepping", deepspeed, signal.SIGSTOP, {}),
            ("saving", torchrun, signal.SIGSTOP, {}),
        ):
            steps = 3 if moment == "saving" and number else 10_000
            options = ("--rank-timeout", timeout, "--max-steps", steps)
            run = start(tmp_path / f"{moment}-{by.__name__}", 2, *options, by=by, **environment)
            reached = {"starting": run.both_started, "stepping": run.stepping, "saving": run.saving}[moment]
            assert run.wait_until(reached), run.output
            rank = "1"
            if number:
                pid = run.pids("rank")[-1]
                rank = re.search(r"\0RANK=(\d)", Path(f"/proc/{pid}/environ").read_text())[1]
                os.kill(pid, number)
            ended = pool.submit(lambda run=run: (run.wait(), time.time()))
            runs.append((moment, number, rank, run, time.time(), ended))
        for moment, number, rank, run, begin, ended in runs:
            code, end = ended.result()
            begin = begin if number else float((tmp_path / "failed-at").read_text())
            seconds = end - begin - (timeout if number else 0)
            print(f"{run.folder.name}, signal {number}: over {seconds:.1f} s after the rank's own time")
            # While starting, the timeout begins only when the other rank has joined.
            assert seconds < 20 or moment == "starting"
            assert_nothing_is_left(run)
            if number:
                gave_up = f"Rank {1 - int(rank)} waited {timeout} s (--rank-timeout) for another rank"
                hangs = (
                    f"Rank {rank} was still running after another rank had given up waiting\nIts last lines:"
                )
                assert gave_up in run.output, run.output
                assert hangs in run.output, run.output
            else:
                assert code == CANNOT_CONTINUE
                assert f"{run.folder}/checkpoint-6 could not be written" in run.output, run.output
                assert "checkpoint-3 is complete" in run.output
                assert not checkpoint.problems_of(run.folder / "checkpoint-3")


def assert_nothing_is_left(run: Run) -> None:
    """Neither shared memory nor a lock; `run.wait` has seen that no process is left."""
    [port] = {word.partition("=")[2] or following for word, following in itertools.pairwise(run.process.args)
              if word.startswith(("--master_port", "--master-port"))}  # fmt: skip
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))
    with one_writer(run.folder):
        pass


def test_a_disk_that_fills_up_during_a_save_leaves_the_older_checkpoint_intact(
    start, undisturbed, failing_disk, folder
):
    room = 2 * sum(file.stat().st_size for file in (undisturbed(0) / "checkpoint-3").iterdir())
    disk = {"LD_PRELOAD": failing_disk, "FULL_DISK": f"{room}:{folder}"}
    output = start(folder, 0, "--resume", "auto", **disk).wait_for_exit(CANNOT_CONTINUE)
    older, incomplete = checkpoint.checkpoints(folder)[-2:]
    assert f"{incomplete} could not be written" in output
    assert f"{older.name} is complete" in output
    assert output.count("Make room") == 1
    assert checkpoint.read_manifest(incomplete) is None
    assert not checkpoint.problems_of(older)
    output = assert_resumes_to_the_same_run(start, folder, 0, undisturbed(0))
    assert f"{incomplete} is skipped: it was not written to the end" in output


def test_a_full_disk_after_the_last_step_loses_no_training(start, undisturbed, failing_disk, folder):
    """Only the record, the model's small files (its weights are links) and its card are still to be written."""
    shutil.copytree(undisturbed(0), folder)
    (folder / "run.json").write_text(json.dumps(record(folder) | {"status": "running"}))
    last = checkpoint.checkpoints(folder)[-1]
    own = ("ledger.json", "trainer_state.json", "README.md", "run.json")
    small = [name for name in checkpoint.read_manifest(last)["model"] if not name.endswith(".safetensors")]
    needed = sum((folder / name).stat().st_size for name in (*own, *small))
    saved = contents(last)
    for room in (0, needed - 1000):
        disk = {"LD_PRELOAD": failing_disk, "FULL_DISK": f"{room}:{folder}"}
        output = start(folder, 0, "--resume", "auto", **disk).wait_for_exit(CANNOT_CONTINUE)
        assert "No space left on device" in output
        assert "Make room" in output
        assert "Traceback" not in output
        assert record(folder)["status"] == "running"
        assert contents(last) == saved
    output = assert_resumes_to_the_same_run(start, folder, 0, undisturbed(0))
    assert "s/step" not in output, "no step is trained again"


def test_a_full_disk_for_tensorboard_logs_does_not_end_training(start, undisturbed, failing_disk, folder):
    output = start(folder, 0, LD_PRELOAD=failing_disk, FULL_DISK=f"1000:{folder}/runs").wait_for_exit()
    assert output.count("no more TensorBoard logs (") == 1
    assert "No space left on device" in output
    assert_the_same_run(folder, undisturbed(0))
