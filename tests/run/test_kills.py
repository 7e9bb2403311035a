"""Real runs, really killed: at any moment, by any signal, on a full disk; what goes on is the run that was begun."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from tests.conftest import jsonl, say_rows
from tests.run.test_trainer import BF16, ROOT, deepspeed, record, torchrun, without_a_launcher
from tests.storage.test_checkpoint import flip
from training.launch.exits import CANNOT_CONTINUE, INTERRUPTED, REFUSED
from training.run.resume import RESHARDED
from training.storage import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

ALONE, TWO_RANKS = 30, 18  # steps of the runs
# Checkpoints between two lines of the log, with a held-out loss and without one due.
EVERY = ["--save-steps", "3", "--eval-steps", "4", "--logging-steps", "2", "--lr", "1e-3"]
FIGURES = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")
PATIENCE = 400  # seconds that a start may take on a busy machine, where an operator may have to be compiled


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", say_rows(120))


class Run:
    """A command that trains into `folder`, started as a user would, in a process group of its own."""

    def __init__(
        self, rows: str, folder: Path, ranks: int, *more: object, by: Callable[[int], list[str]] = deepspeed,
        **environment: str,
    ) -> None:  # fmt: skip
        options = ["--input-model", "demo", "--training-dataset", rows, "--test-size", "20",
                   "--gradient-checkpointing", "off", *EVERY, "--local-output-dir", folder]  # fmt: skip
        steps = ALONE if ranks == 0 else TWO_RANKS
        launcher = [sys.executable, "-m", "training.trainer"]
        if ranks:
            launcher = by(ranks)
            options += ["--deepspeed", BF16, "--per-device-train-batch-size", 8 // ranks]
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
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # where tests run with "&"
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def pids(self, kind: str) -> list[int]:
        """Processes of this run: its "ranks", their "supervisors", DeepSpeed's "launcher", or "all" of them."""
        found: dict[int, tuple[int, str]] = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
                state, parent = (place / "stat").read_text().rpartition(")")[2].split()[:2]
            except (OSError, ValueError):
                continue  # it has just ended
            if str(self.folder) in words and state != "Z":
                module = "launcher" if any("launcher.launch" in word for word in words) else "runner"
                if "training.trainer" in words and "--module" not in words and module != "launcher":
                    module = "trainer"
                found[int(place.name)] = (int(parent), module)
        trainers, launchers = (
            {pid for pid, (_, module) in found.items() if module == name} for name in ("trainer", "launcher")
        )
        ranks = {pid for pid in trainers if found[pid][0] in trainers}
        supervisors = trainers - ranks
        return sorted(
            {"all": set(found), "rank": ranks, "supervisor": supervisors, "launcher": launchers}[kind]
        )

    def wait_until(self, reached: Callable[[], bool]) -> bool:
        """False if the run ended before."""
        end = time.monotonic() + PATIENCE
        while not reached():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, self.said
            time.sleep(0.0005)
        return True

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code of the command, once none of its processes is left."""
        code = self.process.wait(timeout=seconds)
        end = time.monotonic() + seconds
        while left := self.pids("all"):
            assert time.monotonic() < end, f"left behind: {left}\n{self.said}"
            time.sleep(0.05)
        return code

    def ended(self, code: int = 0, seconds: float = PATIENCE) -> str:
        """What it said, once it has ended with this code."""
        assert self.wait(seconds) == code, self.said
        return self.said

    def kill(self) -> None:
        for pid in self.pids("all"):
            os.kill(pid, signal.SIGKILL)

    def starting(self) -> bool:
        return bool(self.pids("rank"))

    def both_started(self) -> bool:
        return len(self.pids("rank")) == 2

    def stepping(self) -> bool:
        return "s/step" in self.said

    def saving(self) -> bool:
        torn = [f for f in checkpoint.checkpoints(self.folder) if not (f / checkpoint.MANIFEST_FILE).exists()]
        # There is a line of the log before each save, and none was left torn.
        return bool(torn) and self.stepping()

    def placing(self) -> bool:
        return (self.folder / "model.safetensors").exists()


@pytest.fixture
def start(rows: str) -> Iterator[Callable[..., Run]]:
    """Starts runs, and leaves none behind."""
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
    """The folder of a run on so many ranks that nobody disturbs, with all its checkpoints; 0: without DeepSpeed.

    One rank has the same global batches as two.
    """

    @cache
    def reference(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed") / f"of-{ranks}"
        Run(rows, folder, ranks, "--save-total-limit", 100).ended()
        return folder

    return reference


def history(folder: Path) -> list[dict[str, float]]:
    """Every logged figure that does not depend on the clock."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in FIGURES if name in entry} for entry in entries]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name from there."""
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


def assert_it_goes_on(start: Callable[..., Run], folder: Path, ranks: int, undisturbed: Path) -> str:
    """What the run said that went on to the end, as if nobody had disturbed it."""
    said = start(folder, ranks, "--resume", "auto").ended()
    assert_the_same_run(folder, undisturbed)
    return said


# What is killed at which moment, one a start.
SIXTEEN = [("start", "group"), ("save", "rank"), ("step", "rank"), ("save", "group"), ("step", "supervisor"),
           ("save", "supervisor"), ("step", "group"), ("step", "rank"), ("save", "rank"), ("start", "rank"),
           ("step", "supervisor"), ("save", "group"), ("final", "rank"), ("final", "supervisor"),
           ("final", "group"), ("start", "supervisor")]  # fmt: skip
SEVEN = [("step", "rank"), ("save", "rank"), ("step", "launcher"), ("save", "group"), ("step", "supervisor"),
         ("final", "rank"), ("final", "group")]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "plan"),
    [(0, SIXTEEN), (2, SEVEN)],
    ids=["a single process sixteen times", "two ZeRO-3 ranks seven times"],
)
def test_a_run_that_is_killed_again_and_again_is_the_same_bit_for_bit(
    start, undisturbed, folder, ranks, plan
):
    chance = random.Random(1)
    model = folder / "model.safetensors"
    for moment, victim in plan:
        model.unlink(missing_ok=True)  # of an end that was killed, so that the next can be seen
        run = start(folder, ranks, "--resume", "auto")
        whole = [f.name for f in checkpoint.checkpoints(folder) if checkpoint.read_manifest(f)]
        told = f"{ranks or 1} rank(s)  {moment:<6} {victim:<11}"
        reached = {"start": run.starting, "step": run.stepping, "save": run.saving, "final": run.placing}
        if not run.wait_until(reached[moment]):
            # The kill before it hit a rank that had nothing left to do, while the other one finished the run.
            assert moment == "final", f"{moment} was not reached\n{run.said}"
            assert record(folder)["status"] == "finished", run.said
            print(told, "came too late: the run had finished")
            model.hardlink_to(checkpoint.checkpoints(folder)[-1] / model.name)
            continue
        if moment in ("start", "step"):
            time.sleep(chance.uniform(0, 3 if moment == "start" else 0.2))
        victims = run.pids("all" if victim == "group" else victim)
        begin = time.monotonic()
        for pid in victims if victim in ("group", "launcher") else victims[-1:]:
            os.kill(pid, signal.SIGKILL)
        run.wait(60)
        seconds = time.monotonic() - begin
        if victim == "rank":
            assert "host memory" in run.said, run.said
            assert "Its last lines:" in run.said
        passed = run.said.count("is skipped")
        torn_now = [f.name for f in checkpoint.checkpoints(folder) if checkpoint.read_manifest(f) is None]
        print(
            f"{told} began at {whole[-1] if whole else 'the start':<14} {passed} skipped;"
            f" torn by it: {', '.join(torn_now) or 'none':<14} all gone after {seconds:.1f} s"
        )
    assert_it_goes_on(start, folder, ranks, undisturbed(ranks))


# --- another number of ranks -------------------------------------------------------------------------


def drift(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """The largest relative difference of two runs in a loss."""
    assert [(entry["step"], entry.keys()) for entry in ours] == [
        (entry["step"], entry.keys()) for entry in theirs
    ]
    return max(
        abs(mine[name] / other[name] - 1)
        for mine, other in zip(ours, theirs, strict=True)
        for name in {"loss", "eval_loss"} & mine.keys()
    )


def test_two_ranks_go_on_in_the_second_epoch_bit_for_bit(start, undisturbed, folder):
    """A step of 8 of 100 rows: the first epoch has 13."""
    start(folder, 2, "--resume", undisturbed(2) / "checkpoint-15").ended()
    assert_the_same_run(folder, undisturbed(2))


def test_two_ranks_go_on_with_a_rate_and_a_decay_that_are_forced(start, undisturbed, folder):
    changed = ("--lr", "1e-4", "--weight-decay", "0.5", "--force")
    start(folder, 2, "--resume", undisturbed(2) / "checkpoint-15", *changed).ended()
    rates = {entry["step"]: entry["learning_rate"] for entry in history(folder) if "loss" in entry}
    assert (rates[14], rates[16], rates[18]) == (1e-3, 1e-4, 1e-4)
    [shard, _] = sorted((folder / "checkpoint-18").rglob("*optim_states.pt"))
    saved = torch.load(shard, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]
    groups = [(group["lr"], group["weight_decay"]) for group in saved["param_groups"]]
    assert groups == [(1e-4, 0.5), (1e-4, 0.0)]


@pytest.mark.parametrize(("before", "after", "step"), [(2, 1, 6), (1, 2, 6), (1, 2, 15)])
def test_a_run_goes_on_with_another_number_of_ranks(start, undisturbed, folder, before, after, step):
    """Within rounding: no further from the run that was begun than two undisturbed runs are from each other."""
    began = undisturbed(before)
    source = began / f"checkpoint-{step}"
    written = contents(source)
    said = start(folder, after, "--resume", source).ended()
    assert "for another number of devices" in said
    assert contents(source) == written
    assert not (folder / RESHARDED).exists()
    ours, theirs = history(folder), history(began)
    shared = sum(entry["step"] <= step for entry in theirs)
    assert ours[:shared] == theirs[:shared], "what was logged before"
    rounding = drift(history(undisturbed(1)), history(undisturbed(2)))
    print(f"{before} -> {after} ranks: {drift(ours, theirs):.1e}; 1 and 2 ranks undisturbed: {rounding:.1e}")
    assert 0 < drift(ours[: shared + 2], theirs[: shared + 2]) < 2e-3
    assert drift(ours, theirs) < 1.5 * rounding


def test_a_broken_shard_is_refused_in_words_and_nothing_changes(start, undisturbed, folder):
    shutil.copytree(undisturbed(2) / "checkpoint-6", folder / "checkpoint-6")
    (folder / "run.json").write_text(json.dumps(record(undisturbed(2)) | {"status": "running"}))
    [shard, _] = sorted((folder / "checkpoint-6").rglob("*optim_states.pt"))
    flip(shard, shard.stat().st_size // 2)
    before = contents(folder)
    said = start(folder, 1, "--resume", "auto").ended(REFUSED)
    assert f"{shard.name} has changed since it was written" in said
    assert "Traceback" not in said
    assert contents(folder) == before


# --- stopped by a signal -----------------------------------------------------------------------------


# DeepSpeed's launcher ends with 1 when it is told to stop, and its runner of Ctrl-C: that is not ours to change.
@pytest.mark.parametrize(
    ("ranks", "ways"),
    [
        (0, [("rank", INTERRUPTED), ("terminal", INTERRUPTED), ("supervisor", INTERRUPTED)]),
        (2, [("rank", INTERRUPTED), ("terminal", -signal.SIGINT), ("launcher", 1)]),
    ],
)
def test_a_run_that_is_told_to_stop_in_each_way_finishes_its_step_saves_and_goes_on_bit_for_bit(
    start, undisturbed, folder, ranks, ways
):
    for whom, expected in ways:
        run = start(folder, ranks, "--resume", "auto")
        assert run.wait_until(run.stepping), run.said
        if whom == "terminal":
            os.killpg(run.process.pid, signal.SIGINT)  # a group of its own, as a terminal makes one
        else:
            os.kill(run.pids(whom)[-1], signal.SIGTERM)
        said = run.ended(expected, 60 if ranks else 30)
        assert said.count("type the same command with --resume auto") == 1, said
        assert said.count("Traceback") == (whom == "terminal" and ranks > 0), "DeepSpeed's runner has one"
        assert record(folder)["status"] == "stopped"
        assert not checkpoint.problems_of(checkpoint.checkpoints(folder)[-1])
    assert_it_goes_on(start, folder, ranks, undisturbed(ranks))


def test_the_launchers_command_may_be_killed_or_told_to_stop_and_the_run_goes_on(start, undisturbed, folder):
    """By whatever ends it, no process stays; with a signal that can be taken the ranks save, and so they do without."""
    for by, number in itertools.product((deepspeed, torchrun), (signal.SIGKILL, signal.SIGTERM)):
        run = start(folder, 2, "--resume", "auto", "--max-steps", 10_000, by=by)
        assert run.wait_until(run.stepping), run.said
        run.process.send_signal(number)
        run.wait(60)
        assert run.said.count("type the same command with --resume auto") == 1, run.said
        newest = checkpoint.checkpoints(folder)[-1]
        assert not checkpoint.problems_of(newest)
        assert record(folder)["status"] == "stopped"
    ours, theirs = history(newest), history(undisturbed(2))
    same = [entry for entry in theirs if entry["step"] <= ours[-1]["step"] and "loss" in entry]
    assert len(same) > 3
    assert [entry for entry in ours if "loss" in entry][: len(same)] == same


def test_a_run_that_is_killed_whole_leaves_no_shared_memory(start, folder):
    run = start(folder, 2, "--max-steps", 10_000)
    assert run.wait_until(run.stepping), run.said
    port = run.process.args[run.process.args.index("--master_port") + 1]
    used = [(Path("/proc") / str(pid) / "maps").read_text() for pid in run.pids("rank")]
    without_a_name = [f"_{port}_{rank} (deleted)" for rank in range(2)]
    assert all(buffer in maps for maps in used for buffer in without_a_name), "each has both buffers"
    os.killpg(run.process.pid, signal.SIGKILL)
    run.wait(60)
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))


def test_a_second_ctrl_c_ends_a_run_at_once(start, folder):
    run = start(folder, 0)
    assert run.wait_until(run.stepping), run.said
    os.kill(run.pids("rank")[0], signal.SIGSTOP)  # a step without end
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(2)
    assert run.process.poll() is None
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait(10) == 128 + signal.SIGKILL


# --- a rank that hangs, a disk that is full ----------------------------------------------------------


def test_a_rank_that_hangs_or_dies_ends_the_run_wherever_it_is_and_its_last_lines_are_told(start, tmp_path):
    """While data is prepared, in a step, in the last save; under both launchers. One waits while the next one starts."""
    patience = 20
    begun = []
    for name, by, number in (
        ("starting", deepspeed, signal.SIGSTOP),
        ("stepping", deepspeed, signal.SIGSTOP),
        ("saving", torchrun, signal.SIGSTOP),
        ("stepping", torchrun, signal.SIGKILL),
    ):
        steps = 3 if name == "saving" else 10_000
        options = ("--rank-timeout", patience, "--max-steps", steps)
        run = start(tmp_path / f"{name}-{by.__name__}", 2, *options, by=by)
        reached = {"starting": run.both_started, "stepping": run.stepping, "saving": run.saving}[name]
        assert run.wait_until(reached), run.said
        os.kill(run.pids("rank")[-1], number)
        begun.append((time.time(), name, number, run))
    for begin, name, number, run in begun:
        assert run.wait() != 0
        # To its last words: it may have ended while another started.
        seconds = run.log.stat().st_mtime - begin
        print(f"{run.folder.name}: {seconds:.0f} s")
        # The time-out of one that is starting begins when the other rank is there.
        assert seconds < patience + 60 or name == "starting"
        if number == signal.SIGKILL:
            assert "ended: killed, most likely because host memory ran out" in run.said, run.said
        else:
            assert f"waited {patience} s (--rank-timeout) for another rank" in run.said, run.said
            assert "is still running 25 s after SIGTERM\nIts last lines:" in run.said, run.said
        assert "Its last lines:" in run.said


def test_a_disk_that_fills_up_in_a_save_leaves_the_older_checkpoint_good(
    start, undisturbed, failing_disk, folder
):
    room = 2 * sum(file.stat().st_size for file in (undisturbed(0) / "checkpoint-3").iterdir())
    disk = {"LD_PRELOAD": failing_disk, "FULL_DISK": f"{room}:{folder}"}
    said = start(folder, 0, "--resume", "auto", **disk).ended(CANNOT_CONTINUE)
    older, torn = checkpoint.checkpoints(folder)[-2:]
    assert f"{torn} could not be written" in said
    assert f"{older.name} is good" in said
    assert said.count("Make room") == 1
    assert checkpoint.read_manifest(torn) is None
    assert not checkpoint.problems_of(older)
    said = assert_it_goes_on(start, folder, 0, undisturbed(0))
    assert f"{torn} is skipped: it was not written to the end" in said


def test_a_disk_that_is_full_at_the_finish_line_costs_nothing_that_was_trained(
    start, undisturbed, failing_disk, folder
):
    """What is left to write then: the record, the model's small files (its weights are links), and their card."""
    shutil.copytree(undisturbed(0), folder)
    (folder / "run.json").write_text(json.dumps(record(folder) | {"status": "running"}))
    last = checkpoint.checkpoints(folder)[-1]
    own = ("ledger.json", "trainer_state.json", "README.md", "run.json")
    small = [name for name in checkpoint.read_manifest(last)["model"] if not name.endswith(".safetensors")]
    needed = sum((folder / name).stat().st_size for name in (*own, *small))
    saved = contents(last)
    for room in (0, needed // 2, needed - 1000):
        disk = {"LD_PRELOAD": failing_disk, "FULL_DISK": f"{room}:{folder}"}
        said = start(folder, 0, "--resume", "auto", **disk).ended(CANNOT_CONTINUE)
        assert "No space left on device" in said
        assert "Make room" in said
        assert "Traceback" not in said
        assert record(folder)["status"] == "running"
        assert contents(last) == saved
    said = assert_it_goes_on(start, folder, 0, undisturbed(0))
    assert "s/step" not in said, "nothing is trained again"


def test_a_disk_that_takes_no_more_curves_ends_no_training(start, undisturbed, failing_disk, folder):
    said = start(folder, 0, LD_PRELOAD=failing_disk, FULL_DISK=f"1000:{folder}/runs").ended()
    assert said.count("no more TensorBoard logs (") == 1
    assert "No space left on device" in said
    assert_the_same_run(folder, undisturbed(0))
