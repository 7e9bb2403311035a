"""The flow on several nodes: its pods, what it refuses, and a real run of two nodes on this machine."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from click.testing import CliRunner
from metaflow.exception import MetaflowNotFound

from flows import model_on_s3, pod
from flows.flow_parameters import changed_options, several_nodes
from tests.flow.test_flow import FETCH, FLOW, ROOT, SHORT, Metaflow
from training.launch.local import deepspeed_command

NODES_FLOW = FLOW.with_name("train_dolly_nodes_flow.py")
TWO_RANKS = ["--gpu-family", "cpu", "--max-steps", "8", "--trainer-options", SHORT]


@pytest.fixture
def metaflow(s3_server: str, tmp_path: Path) -> Metaflow:
    return Metaflow(tmp_path, s3_server)


@pytest.mark.parametrize(
    ("words", "several"),
    [
        ("run", False),
        ("run --num-nodes 1", False),
        ("run --num-nodes 2", True),
        ("run --num-nodes=2 --seed 1", True),
        ("run --num-nodes 0", True),  # the flow of several nodes refuses it
        ("run --num-nodes 2 --num-nodes 1", False),  # the last one counts
    ],
)
def test_more_nodes_than_one_start_the_flow_of_several_nodes(words: str, several: bool) -> None:
    assert several_nodes(["flow.py", *words.split()]) is several


def test_every_pod_of_the_train_step_has_the_gpus_memory_and_disk_of_the_plan(metaflow: Metaflow) -> None:
    metaflow.bucket("gangs")
    code, output = metaflow.run(
        *"--quiet --datastore s3 --config-value machine 8xV100-32GB".split(),
        *"--with kubernetes:image=registry.example/dolly:1 argo-workflows create --only-json".split(),
        file=NODES_FLOW,
        METAFLOW_DATASTORE_SYSROOT_S3="s3://gangs/metaflow",
    )
    assert code == 0, output
    spec, _ = json.JSONDecoder().raw_decode(output[output.index("{") :])
    templates = {entry["name"]: entry for entry in spec["spec"]["templates"]}
    # The number of workers is filled in by Argo.
    manifest = re.sub(r"replicas: \{\{.*\}\}", "replicas: -1", templates["train"]["resource"]["manifest"])
    jobs = {job["name"]: job for job in yaml.safe_load(manifest)["spec"]["replicatedJobs"]}
    assert {name: job["replicas"] for name, job in jobs.items()} == {"control": 1, "worker": -1}
    expected = pod.resources("8xV100-32GB", {})
    for job in jobs.values():
        described = job["template"]["spec"]["template"]["spec"]
        [container] = described["containers"]
        assert container["image"] == "registry.example/dolly:1"
        assert "python train_dolly_nodes_flow.py" in container["command"][-1]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
        for key, name in (("cpu", "cpu"), ("memory", "memory"), ("ephemeral-storage", "disk")):
            assert float(container["resources"]["requests"][key].removesuffix("M")) == expected[name]
        shared = next(entry for entry in described["volumes"] if entry["name"] == "dhsm")
        assert shared["emptyDir"]["sizeLimit"] == f"{expected['shared_memory']}Mi"
    for name in ("start", "join", "end"):
        assert not templates[name]["container"]["resources"]["limits"], f"{name} has GPUs"


def test_what_several_nodes_cannot_do_is_refused_with_what_to_type(metaflow: Metaflow) -> None:
    code = """
import json, sys
from types import SimpleNamespace
from flows.pod import machine_of
from train_dolly_nodes_flow import TrainDollyNodesFlow
def problems(machine, remote, **values):
    flow = SimpleNamespace(**{"num_nodes": 2, "restarts": 0, "local_training_root": None} | values)
    return TrainDollyNodesFlow._nodes_problems(flow, machine_of(machine), remote)
print(json.dumps([
    problems("cpu", False),
    problems("8xV100-32GB", True, local_training_root="/mnt/dolly"),
    problems("8xV100-32GB", True),
    problems("8xV100-32GB", False),
    problems("cpu", False, num_nodes=0, restarts=3),
]))
"""
    result = metaflow.python("-c", code)
    assert result.returncode == 0, result.stderr
    none, shared, alone, local, typed = json.loads(result.stdout)
    assert (none, shared) == ([], [])
    assert "Type --local-training-root with a folder on storage that all pods mount" in alone[0]
    assert "would use the same GPUs. Type --num-nodes 1, or --with kubernetes after run" in local[0]
    assert "--num-nodes 0: expected 2 or more. For one node type python flows/train_dolly_flow.py" in typed[0]
    assert "--restarts 3: several nodes are started again together" in typed[1]
    assert "Type --with retry:times=3 after run" in typed[1]


def node_1(folder: Path) -> list[psutil.Process]:
    """All processes of the task of node 1, which trains into this folder."""
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            of_node = " --split-index 1 " in f"{' '.join(process.cmdline())} "
            if of_node and process.environ().get("HOME") == str(folder):
                return [process, *process.children(recursive=True)]
    return []


def one_node(options: dict[str, Any], folder: Path, metaflow: Metaflow) -> bytes:
    """Weights of the same run with two ranks on one node."""
    changed = changed_options(options | {"local_output_dir": str(folder), "checkpoint_to": None})
    command = deepspeed_command(changed, 2)
    result = subprocess.run(command, cwd=ROOT, env=metaflow.environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_killed_node_ends_the_step_in_words_and_resume_gives_the_weights_of_one_node(
    metaflow: Metaflow, tmp_path: Path
) -> None:
    """Both nodes are on this machine. The checkpoints and the model are also on S3, from node 0."""
    metaflow.bucket("nodes")
    root = {"METAFLOW_DATATOOLS_S3ROOT": "s3://nodes/data"}
    process = metaflow.start("run", *TWO_RANKS, "--num-gpus", "1", "--num-nodes", "2", **root)
    assert process.stdout is not None
    output, killed = "", 0.0
    for line in process.stdout:
        output += line
        if "checkpoint-3 saved" in line and not killed:
            lost = node_1(tmp_path)
            assert len(lost) >= 4, "task, torchrun, supervisor, rank"
            for part in lost:
                part.kill()
            killed = time.monotonic()
    assert process.wait(timeout=60) == 1
    assert killed, output
    seconds = time.monotonic() - killed
    print(f"the run ended {seconds:.1f} s after the kill")
    assert seconds < 60, "it did not wait for --rank-timeout"
    assert re.search(r"Node 1 of 2 \(.*\) was lost: its process was killed, or its machine", output), output
    assert "type python flows/train_dolly_nodes_flow.py resume --origin-run-id" in output
    assert not node_1(tmp_path)

    code, output = metaflow.run("resume", file=NODES_FLOW, **root)
    assert code == 0, output
    assert "the run continues from" in output
    assert "step 2/8" not in output, "it started at step 0"
    kept = artifacts_of_the_join(metaflow)
    assert f"python flows/model_on_s3.py {kept['run']} --to" in output
    code, output = metaflow.run(kept["run"], "--to", tmp_path / "fetched", file=FETCH)
    assert code == 0, output
    weights = (tmp_path / "fetched" / "model.safetensors").read_bytes()
    assert weights == one_node(kept["options"], tmp_path / "one", metaflow), "not bit for bit"


def artifacts_of_the_join(metaflow: Metaflow) -> dict[str, Any]:
    """Checks that the join has both nodes' profiles, and a card with the devices of both."""
    code = (
        "import json; from metaflow import Flow, namespace; namespace(None)\n"
        "run = Flow('TrainDollyNodesFlow').latest_run; data = run['join'].task.data\n"
        "found = [hasattr(data, f'gpu_profile_train_{node}') for node in range(2)]\n"
        "print(json.dumps({'run': run.id, 'found': found, 'options': data.options}))"
    )
    result = metaflow.python("-c", code)
    assert result.returncode == 0, result.stderr
    kept: dict[str, Any] = json.loads(result.stdout)
    assert kept["found"] == [True, True]
    cards = metaflow.folder / ".metaflow/mf.cards/TrainDollyNodesFlow/runs" / kept["run"] / "steps"
    assert len(list(cards.glob("train/tasks/*/cards/*.html"))) == 2, "each node has its own"
    [drawn] = cards.glob("join/tasks/*/runtime/*.data.json")
    text = drawn.read_text()
    for node in range(2):
        assert f'["{node}", "{socket.gethostname()}", "CPU", "host"' in text, text
    return kept


@pytest.mark.parametrize(
    ("flow", "file"),
    [("TrainDollyFlow", "train_dolly_flow.py"), ("TrainDollyNodesFlow", "train_dolly_nodes_flow.py")],
)
def test_the_log_of_a_run_without_a_model_is_named_with_the_file_of_its_flow(
    flow: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> dict[str, Any]:
        if name != f"{flow}/7":
            raise MetaflowNotFound(f"{name} does not exist")
        return {"train": []}

    monkeypatch.setattr("metaflow.Run", run)
    monkeypatch.setattr("metaflow.namespace", lambda _: None)
    with pytest.raises(model_on_s3.StoreError, match=rf"Type python flows/{file} logs 7/train$"):
        model_on_s3.fetch("7", Path("model"))


def test_the_command_that_asks_a_fetched_model_is_quoted_and_a_folder_that_cannot_be_made_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fetch(run_id: str, folder: Path) -> None:
        if folder.name == "none":
            raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(model_on_s3, "fetch", fetch)
    folder = tmp_path / "my model"
    result = CliRunner().invoke(model_on_s3.main, ["7", "--to", str(folder)])
    assert f"--model '{folder}' " in result.output
    result = CliRunner().invoke(model_on_s3.main, ["7", "--to", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert result.output.startswith("Cannot fetch: [Errno 13] Permission denied")
