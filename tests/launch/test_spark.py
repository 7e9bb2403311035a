"""Training on two nodes: real Spark with two worker JVMs, torchrun, and a hostfile, all on this machine."""

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

from tests.starts import DEMO, FLOAT32, TORCHRUN, deepspeed, free_port, record, run
from training.errors import OptionsError
from training.launch.exits import REFUSED
from training.launch.local import DEEPSPEED
from training.launch.spark import launch_on_spark, node_problems, spark_problems, training_failure

ROOT = Path(__file__).parents[2]
OPTIONS = {"input_model": "demo", "training_dataset": "demo", "test_size": 100, "deepspeed": FLOAT32}
STEPS = {"max_steps": 6, "logging_steps": 2}
FEW = [*DEMO, "--deepspeed", FLOAT32, "--max-steps", 6, "--logging-steps", 2]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and listens on lo"),
    pytest.mark.timeout(1500),  # the first test that uses the driver waits for all its runs
]


# --- checks before training --------------------------------------------------------------------------


def test_all_problems_are_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.jsonl", "more.jsonl"):
        (tmp_path / name).touch()
    options = {
        "training_dataset": ("mine.jsonl", "a/b", "more.jsonl"),
        "input_model": "EleutherAI/gpt-j-6B",
        "local_output_dir": "out",
        "dbfs_output_dir": "s3://bucket/dolly",
        "sample_prompts": "asked.txt",
        "resume": "auto",
    }
    with pytest.raises(OptionsError) as refused:
        launch_on_spark(options, num_nodes=1, gpus_per_node=0)
    problems = refused.value.problems
    assert len(problems) == 8
    assert "1 nodes: expected 2 or more" in problems[0]
    assert "0 ranks per node" in problems[1]
    assert "--deepspeed is missing" in problems[2]
    relative = "is a relative path, and the nodes have other working folders"
    assert problems[3:7] == [
        f"{flag} {name}: {relative}. Type {tmp_path}/{name}"
        for flag, name in (
            ("--training-dataset", "mine.jsonl"),
            ("--training-dataset", "more.jsonl"),
            ("--local-output-dir", "out"),
            ("--sample-prompts", "asked.txt"),
        )
    ]
    assert "no active Spark session" in problems[7]


def test_a_missing_pyspark_is_reported_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyspark", "pyspark.sql"):
        monkeypatch.setitem(sys.modules, name, None)
    (problem,) = spark_problems(OPTIONS | {"local_output_dir": "/shared/out"}, 2, 8)
    assert "python -m pip install '.[spark]'" in problem


def test_nodes_without_package_or_shared_folder_are_named() -> None:
    nodes = [
        {"host": "a", "installed": True, "shared": True},
        {"host": "b", "installed": False, "shared": True},
        {"host": "c", "installed": True, "shared": False},
        {"host": "c", "installed": True, "shared": False},
    ]
    assert node_problems(nodes[:1], Path("/shared/out")) == []
    package, storage = node_problems(nodes, Path("/shared/out"))
    assert "is not installed on b. " in package
    assert "--local-output-dir /shared/out: c cannot write to this folder" in storage


# --- errors from Spark -------------------------------------------------------------------------------

# An error of Spark 4.3, shortened.
SPARK_ERROR = """An error occurred while calling o81.collectToPython.
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


@pytest.mark.parametrize("prefix", ["", ".venv/lib/python3.11/site-packages/"])
def test_a_failure_shows_the_last_lines_of_the_rank_and_no_java(prefix: str) -> None:
    error = training_failure(SPARK_ERROR.replace("torch/distributed", f"{prefix}torch/distributed"))
    assert error.code == REFUSED
    assert str(error) == (
        "Training ended with exit code 2: refused before training: see the reasons and what to type above\n"
        "Its last lines:\nbuilt\nCannot train:\n  - /data/rows.jsonl, line 2: broken JSON"
    )


def test_sparks_reason_is_shown_if_no_rank_failed() -> None:
    lost = (
        ": org.apache.spark.SparkException: Job aborted: ExecutorLostFailure (executor 3 exited)\nDriver stacktrace:\n"
        "\tat org.apache.spark.scheduler.DAGScheduler.abortStage(DAGScheduler.scala:4568)\n"
    )
    error = training_failure(lost)
    assert error.code is None
    assert "ExecutorLostFailure (executor 3 exited)" in str(error)
    assert "DAGScheduler" not in str(error)


# --- real runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with the `deepspeed` launcher on one node."""
    folder = tmp_path_factory.mktemp("launcher") / "out"
    result = run(deepspeed(2), *FEW, "--local-output-dir", folder)
    assert result.returncode == 0, result.stdout
    return folder


@pytest.fixture(scope="module")
def on_spark(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Runs of one Spark driver, one after the other; the last one is interrupted like a notebook's cell."""
    folder = tmp_path_factory.mktemp("spark")

    def options(name: str, **changes: object) -> dict:
        return OPTIONS | STEPS | {"local_output_dir": str(folder / name)} | changes

    runs = {
        "absent": {"options": options("absent"), "installed": False},
        "trained": {"options": options("trained")},
        "killed": {"options": options("killed", max_steps=500), "kill": True},
        "elsewhere": {"options": options("") | {"local_output_dir": "/proc/self/cwd/out"}},
        "too many": {"options": options("many"), "ranks": 3},
        "no GPU": {"options": options("none"), "use_gpu": True},
        "interrupted": {"options": options("interrupted", max_steps=500)},
    }
    (folder / "runs.json").write_text(json.dumps(list(runs.values())))
    log = folder / "log.txt"
    with open(log, "w") as stream:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.spark_runs", str(folder / "runs.json"), str(folder / "outcomes.json")],
            cwd=ROOT, env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
            stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + 1200
        while (
            driver.poll() is None
            and "step 2/500" not in log.read_text().rpartition(f"=== run {len(runs) - 1}")[2]
        ):
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        driver.send_signal(signal.SIGINT)
        driver.wait(timeout=120)
    finally:
        driver.kill()
    parts = log.read_text().split("=== run ")[1:]
    outcomes = json.loads((folder / "outcomes.json").read_text())
    assert len(outcomes) == len(runs), log.read_text()[-3000:]
    return {
        name: outcome | {"log": part, "folder": Path(one["options"]["local_output_dir"])}
        for (name, one), outcome, part in zip(runs.items(), outcomes, parts, strict=True)
    }


def assert_same_model(output: Path, reference: Path) -> None:
    ours, theirs = record(output), record(reference)
    assert (ours["world_size"], ours["precision"], ours["steps"]) == (2, "fp32", 6)
    assert ours["held_out_loss"] == theirs["held_out_loss"]
    assert (output / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_spark_workers_train_the_same_model_as_the_launcher_and_log_once(
    on_spark: dict, launched: Path
) -> None:
    trained = on_spark["trained"]
    log = trained["log"]
    assert trained["error"] is None, log
    assert_same_model(trained["folder"], launched)
    assert log.count("step 2/6  loss") == log.count("step 6/6  held-out loss") == 1
    assert "2 ranks: 2 on " in log


@pytest.mark.slow
def test_the_message_of_a_killed_rank_reaches_the_caller(on_spark: dict) -> None:
    killed = on_spark["killed"]
    assert (killed["kind"], killed["code"]) == ("TrainingFailedError", 137)
    assert "Rank 1 ended: killed, most likely because host memory ran out" in killed["error"]
    for words in ("Traceback", "org.apache"):
        assert words not in killed["error"]


@pytest.mark.slow
def test_problems_of_the_cluster_are_reported_before_training(on_spark: dict) -> None:
    for name, words in (
        ("absent", "the package is not installed on "),
        ("elsewhere", "--local-output-dir /proc/self/cwd/out: "),
        ("too many", "the cluster runs 2 tasks at once, but 3 ranks need 3"),
        ("no GPU", "spark.task.resource.gpu.amount is not set, expected 1"),
    ):
        assert on_spark[name]["kind"] == "OptionsError", on_spark[name]["log"]
        assert words in on_spark[name]["error"]
        assert on_spark[name]["seconds"] < 300, "Spark itself reports it only after ten minutes"


@pytest.mark.slow
def test_an_interrupted_cell_leaves_a_checkpoint(on_spark: dict) -> None:
    interrupted = on_spark["interrupted"]
    assert interrupted["kind"] == "KeyboardInterrupt"
    assert "Traceback" not in interrupted["log"]
    assert record(interrupted["folder"])["status"] == "stopped"
    assert list(interrupted["folder"].glob("checkpoint-*/manifest.json"))


@pytest.mark.slow
def test_spark_leaves_no_process_and_listens_only_on_loopback(on_spark: dict) -> None:
    for name, outcome in on_spark.items():
        assert outcome["left"] == [], name
        assert outcome["addresses"] == ["127.0.0.1"], name


@pytest.mark.slow
def test_torchrun_on_two_nodes_trains_the_same_model_as_the_launcher(launched: Path, tmp_path: Path) -> None:
    """Runs the commands of docs/several-nodes.md, with this machine as node 0."""
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
    assert_same_model(tmp_path / "out", launched)


# Replaces pdsh: runs DeepSpeed's command on this machine, once per host of -w, with %n replaced by its number.
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
def test_a_hostfile_starts_one_rank_on_each_node(
    launched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything except ssh: DeepSpeed reads the hostfile, and each node's launcher starts its rank."""
    if " " in f"{ROOT}{sys.executable}":
        pytest.skip("DeepSpeed does not quote these paths for ssh")
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
    assert_same_model(tmp_path / "out", launched)
