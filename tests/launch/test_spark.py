"""Several nodes: through a real Spark with two worker JVMs, by torchrun and by a hostfile on two loopback nodes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.run.test_trainer import BF16, DEMO, TORCHRUN, deepspeed, free_port, record, run
from training.errors import OptionsError
from training.launch.exits import REFUSED
from training.launch.local import DEEPSPEED
from training.launch.spark import failure, launch_on_spark, node_problems, spark_problems

ROOT = Path(__file__).parents[2]
OPTIONS = {"input_model": "demo", "training_dataset": "demo", "test_size": 100, "deepspeed": BF16}
STEPS = {"max_steps": 6, "logging_steps": 2}
FEW = [*DEMO, "--deepspeed", BF16, "--max-steps", 6, "--logging-steps", 2]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and listens on lo"),
    pytest.mark.timeout(1500),  # the first test that needs the driver waits for all of its runs
]


# --- before anything is started ----------------------------------------------------------------------


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").touch()
    options = {
        "training_dataset": "mine.jsonl",
        "input_model": "EleutherAI/gpt-j-6B",
        "local_output_dir": "out",
        "dbfs_output_dir": "s3://bucket/dolly",
        "resume": "auto",
    }
    with pytest.raises(OptionsError) as told:
        launch_on_spark(options, num_nodes=1, gpus_per_node=0)
    problems = told.value.problems
    assert len(problems) == 6
    assert "1 nodes: Spark starts 2 or more" in problems[0]
    assert "0 ranks a node" in problems[1]
    assert "--deepspeed is missing" in problems[2]
    assert f"--local-output-dir out: the nodes work in other folders. Type {tmp_path}/out" in problems[3]
    assert f"--training-dataset mine.jsonl: the nodes work in other folders. Type {tmp_path}" in problems[4]
    assert "no active Spark session" in problems[5]


def test_without_pyspark_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyspark", "pyspark.sql"):
        monkeypatch.setitem(sys.modules, name, None)
    (fault,) = spark_problems(OPTIONS | {"local_output_dir": "/shared/out"}, 2, 8)
    assert "python -m pip install '.[spark]'" in fault


def test_what_is_missing_on_which_node_is_told() -> None:
    nodes = [
        {"host": "a", "installed": True, "shared": True},
        {"host": "b", "installed": False, "shared": True},
        {"host": "c", "installed": True, "shared": False},
        {"host": "c", "installed": True, "shared": False},
    ]
    assert node_problems(nodes[:1], Path("/shared/out")) == []
    package, storage = node_problems(nodes, Path("/shared/out"))
    assert "is not installed on b. " in package
    assert "--local-output-dir /shared/out: c cannot write there" in storage


# --- when it fails -----------------------------------------------------------------------------------

# What Spark 4.3 tells, shortened.
TOLD = """An error occurred while calling o81.collectToPython.
: org.apache.spark.SparkException: Job aborted due to stage failure: Could not recover from a failed barrier ResultStage.
org.apache.spark.api.python.PythonException: [PYTHON_EXCEPTION] Traceback (most recent call last):
  File "/venv/pyspark/ml/torch/distributor.py", line 530, in _execute_command
RuntimeError: Command ['/venv/bin/python', '-m', 'torch.distributed.run'] failed with return code 1. The task output is included below: built
Cannot train:
  - /data/rows.jsonl, line 2: broken JSON
E1127 08:01:48.792000 21057 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 2) local_rank: 0
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Root Cause (first observed failure):
  exitcode  : 2 (pid: 21579)
============================================================

 SQLSTATE: 38000
\tat org.apache.spark.api.python.BasePythonRunner$ReaderIterator.handlePythonException(PythonRunner.scala:1097)
\tat java.base/java.lang.Thread.run(Thread.java:840)
"""


@pytest.mark.parametrize("place", ["", ".venv/lib/python3.11/site-packages/"])
def test_a_failure_is_told_in_the_words_of_the_rank_without_pages_of_java(place: str) -> None:
    error = failure(TOLD.replace("torch/distributed", f"{place}torch/distributed"))
    assert error.code == REFUSED
    assert str(error) == (
        "Training ended with exit code 2: refused before training: the reasons, and what to type, stand above\n"
        "Its last lines:\nbuilt\nCannot train:\n  - /data/rows.jsonl, line 2: broken JSON"
    )


def test_where_no_rank_failed_sparks_reason_is_told() -> None:
    lost = (
        ": org.apache.spark.SparkException: Job aborted: ExecutorLostFailure (executor 3 exited)\nDriver stacktrace:\n"
        "\tat org.apache.spark.scheduler.DAGScheduler.abortStage(DAGScheduler.scala:4568)\n"
    )
    error = failure(lost)
    assert error.code is None
    assert "ExecutorLostFailure (executor 3 exited)" in str(error)
    assert "DAGScheduler" not in str(error)


# --- really run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run under the `deepspeed` launcher of one node."""
    folder = tmp_path_factory.mktemp("launcher") / "out"
    result = run(deepspeed(2), *FEW, "--local-output-dir", folder)
    assert result.returncode == 0, result.stdout
    return folder


@pytest.fixture(scope="module")
def on_spark(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Runs of one driver, one after the other; the last is interrupted as a notebook's cell is."""
    place = tmp_path_factory.mktemp("spark")
    (place / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", \n')

    def options(name: str, **changes: object) -> dict:
        return OPTIONS | STEPS | {"local_output_dir": str(place / name)} | changes

    runs = {
        "absent": {"options": options("absent"), "installed": False},
        "trained": {"options": options("trained")},
        "refused": {"options": options("refused", training_dataset=str(place / "rows.jsonl"))},
        "killed": {"options": options("killed", max_steps=500), "kill": True},
        "elsewhere": {"options": options("") | {"local_output_dir": "/proc/self/cwd/out"}},
        "too many": {"options": options("many"), "ranks": 3},
        "no GPU": {"options": options("none"), "use_gpu": True},
        "interrupted": {"options": options("interrupted", max_steps=500)},
    }
    (place / "runs.json").write_text(json.dumps(list(runs.values())))
    said = place / "said.txt"
    with open(said, "w") as stream:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.spark_runs", str(place / "runs.json"), str(place / "outcomes.json")],
            cwd=ROOT, env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
            stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + 1200
        while (
            driver.poll() is None
            and "step 2/500" not in said.read_text().rpartition(f"=== run {len(runs) - 1}")[2]
        ):
            assert time.monotonic() < end, said.read_text()[-3000:]
            time.sleep(0.2)
        driver.send_signal(signal.SIGINT)
        driver.wait(timeout=120)
    finally:
        driver.kill()
    parts = said.read_text().split("=== run ")[1:]
    outcomes = json.loads((place / "outcomes.json").read_text())
    assert len(outcomes) == len(runs), said.read_text()[-3000:]
    return {
        name: outcome | {"said": part, "folder": Path(one["options"]["local_output_dir"])}
        for (name, one), outcome, part in zip(runs.items(), outcomes, parts, strict=True)
    }


def assert_trained_alike(ours: Path, theirs: Path) -> None:
    mine, other = record(ours), record(theirs)
    assert (mine["world_size"], mine["precision"], mine["steps"]) == (2, "bf16", 6)
    assert mine["held_out_loss"] == other["held_out_loss"]
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_workers_train_the_model_of_the_launcher_and_show_once_what_the_ranks_print(
    on_spark: dict, launched: Path
) -> None:
    trained = on_spark["trained"]
    said = trained["said"]
    assert trained["error"] is None, said
    assert_trained_alike(trained["folder"], launched)
    assert said.count("step 2/6  loss") == said.count("step 6/6  held-out loss") == 1
    assert "2 ranks: 2 on " in said


@pytest.mark.slow
def test_a_rank_that_refuses_or_is_killed_reaches_the_caller_with_its_message(on_spark: dict) -> None:
    for name, code, words, refusals in (
        ("refused", REFUSED, "rows.jsonl, line 2: broken JSON", 1),  # one rank tells what both have found
        ("killed", 137, "Rank 1 ended: killed, most likely because host memory ran out", 0),  # rank 0 was loading
    ):  # fmt: skip
        ended = on_spark[name]
        assert (ended["kind"], ended["code"]) == ("TrainingFailedError", code)
        assert words in ended["error"]
        assert ended["said"].count("Cannot train") == refusals
    refused = on_spark["refused"]
    assert "Traceback" not in refused["error"]
    assert "org.apache" not in refused["error"]
    assert not refused["folder"].exists()


@pytest.mark.slow
def test_what_the_cluster_lacks_is_told_before_training(on_spark: dict) -> None:
    for name, words in (
        ("absent", "the package is not installed on "),
        ("elsewhere", "--local-output-dir /proc/self/cwd/out: "),
        ("too many", "the cluster runs 2 tasks at once, and 3 ranks need one each"),
        ("no GPU", "spark.task.resource.gpu.amount is not set, and each rank needs a task with one GPU"),
    ):
        assert on_spark[name]["kind"] == "OptionsError", on_spark[name]["said"]
        assert words in on_spark[name]["error"]
        assert on_spark[name]["seconds"] < 300, "Spark itself needs ten minutes to say so"


@pytest.mark.slow
def test_an_interrupted_cell_leaves_a_checkpoint(on_spark: dict) -> None:
    interrupted = on_spark["interrupted"]
    assert interrupted["kind"] == "KeyboardInterrupt"
    assert "Traceback" not in interrupted["said"]
    assert record(interrupted["folder"])["status"] == "stopped"
    assert list(interrupted["folder"].glob("checkpoint-*/manifest.json"))


@pytest.mark.slow
def test_spark_leaves_no_process_and_listens_on_this_machine_alone(on_spark: dict) -> None:
    for name, outcome in on_spark.items():
        assert outcome["left"] == [], name
        assert outcome["addresses"] == ["127.0.0.1"], name


@pytest.mark.slow
def test_torchrun_on_two_nodes_trains_the_model_of_the_launcher(launched: Path, tmp_path: Path) -> None:
    """As README has it, each node's command with this machine as node 0."""
    port, results = free_port(), {}

    def node(number: int) -> None:
        launcher = [
            *TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
            "--rdzv_id=dolly", f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", "-m", "training.trainer",
        ]  # fmt: skip
        results[number] = run(launcher, *FEW, "--local-output-dir", tmp_path / "out")

    nodes = [threading.Thread(target=node, args=(number,)) for number in range(2)]
    for thread in nodes:
        thread.start()
    for thread in nodes:
        thread.join()
    assert [results[number].returncode for number in range(2)] == [0, 0], results
    assert_trained_alike(tmp_path / "out", launched)


# Takes the place of ssh to each node: runs what DeepSpeed hands to pdsh here, once for each host of -w, %n its number.
PDSH = """#!/usr/bin/env python3
import subprocess, sys
words = sys.argv[1:]
assert words[:3] == ["-S", "-f", "1024"], words
hosts = words[words.index("-w") + 1].split(",")
command = " ".join(words[words.index("-w") + 2:])
nodes = [subprocess.Popen(["bash", "-c", command.replace("%n", str(n))]) for n in range(len(hosts))]
sys.exit(max(node.wait() for node in nodes))
"""


@pytest.mark.slow
def test_a_hostfile_starts_a_rank_on_each_of_its_nodes(
    launched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but ssh itself: DeepSpeed reads the hostfile, and each node's launcher starts its ranks."""
    if " " in f"{ROOT}{sys.executable}":
        pytest.skip("DeepSpeed gives ssh both paths without quotes")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "pdsh").write_text(PDSH)
    (programs / "pdsh").chmod(stat.S_IRWXU)
    (tmp_path / "hostfile").write_text("node-0 slots=1\nnode-1 slots=1\n")
    launcher = [
        *DEEPSPEED, "--hostfile", str(tmp_path / "hostfile"), "--no_ssh_check",
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--module", "training.trainer",
    ]  # fmt: skip
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    result = run(launcher, *FEW, "--local-output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stdout
    assert_trained_alike(tmp_path / "out", launched)
