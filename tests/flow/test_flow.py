"""The Metaflow flow: early refusal, resume, package, and its model on S3."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from flows import pod
from tests.conftest import python

ROOT = Path(__file__).parents[2]
FLOW = ROOT / "flows" / "train_dolly_flow.py"
FETCH = ROOT / "flows" / "model_on_s3.py"
TRIAL = ["--gpu-family", "cpu", "--max-steps", "8"]
SHORT = "--save-steps 3 --test-size 64 --logging-steps 2"


@dataclass
class Metaflow:
    """Metaflow with its own metadata and S3, isolated from the user's configuration."""

    folder: Path
    endpoint: str

    def environment(self, **more: str) -> dict[str, str]:
        cache = self.folder / ".cache"
        if not cache.is_symlink():  # DeepSpeed's operators are compiled already, in the real home
            cache.symlink_to(Path.home() / ".cache")
        users = ("METAFLOW_", "AWS_", "KUBERNETES_")
        return {name: value for name, value in os.environ.items() if not name.startswith(users)} | {
            "METAFLOW_HOME": str(self.folder / "home"),
            "METAFLOW_USER": "tester",
            "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(self.folder / "store"),
            "METAFLOW_S3_ENDPOINT_URL": self.endpoint,
            "METAFLOW_S3_RETRY_COUNT": "0",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "OMP_NUM_THREADS": "1",
            "HOME": str(self.folder),
            **more,
        }

    def python(self, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
        """Runs Python outside the repository, with the modules of flow and repository on its path."""
        path = f"{FLOW.parent}:{ROOT}"
        return python(*words, cwd=self.folder, env=self.environment(PYTHONPATH=path, **more))

    def start(self, *words: object, file: Path = FLOW, **more: str) -> subprocess.Popen[str]:
        """Starts a command of the flow outside the repository."""
        return subprocess.Popen(
            [sys.executable, str(file), *map(str, words)],
            cwd=self.folder,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: object, file: Path = FLOW, **more: str) -> tuple[int, str]:
        process = self.start(*words, file=file, **more)
        output, _ = process.communicate(timeout=800)
        return process.returncode, output

    def artifacts(self, *names: str) -> dict[str, Any]:
        """Artifacts of the train step of the latest run."""
        code = (
            "import json, sys; from metaflow import Flow, namespace; namespace(None)\n"
            "run = Flow('TrainDollyFlow').latest_run; data = run['train'].task.data\n"
            "print(json.dumps({'run': run.id} | {name: getattr(data, name) for name in sys.argv[1:]}))"
        )
        result = self.python("-c", code, *names)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def client(self, service: str) -> Any:
        keys = {"aws_access_key_id": "nobody", "aws_secret_access_key": "nothing"}
        return boto3.client(service, endpoint_url=self.endpoint, region_name="us-east-1", **keys)

    def bucket(self, name: str) -> Any:
        """A client of S3, with this bucket created."""
        client = self.client("s3")
        client.create_bucket(Bucket=name)
        return client


@pytest.fixture
def metaflow(s3_server: str, tmp_path: Path) -> Metaflow:
    return Metaflow(tmp_path, s3_server)


# --- the flow as a program ---------------------------------------------------------------------------


@pytest.mark.parametrize("file", [FLOW, FETCH], ids=lambda file: file.stem)
def test_without_metaflow_the_pip_command_is_printed(file: Path, metaflow: Metaflow) -> None:
    code = f"import sys, runpy; sys.modules['metaflow'] = None; runpy.run_path({str(file)!r}, run_name='__main__')"
    result = metaflow.python("-c", code, "1", "--to", "y")
    assert result.returncode == 1
    assert result.stderr.strip() == "Metaflow is not installed. Type pip install '.[metaflow]'"


def test_the_flow_imports_no_torch_and_relative_paths_become_absolute(
    metaflow: Metaflow, tmp_path: Path
) -> None:
    for name in ("own.csv", "more.csv", "prompts.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "demo").mkdir()
    words = (
        "--training-dataset own.csv --training-dataset more.csv --training-dataset demo "
        "--sample-prompts prompts.txt --input-model demo --dbfs-output-dir kept"
    )
    code = (
        "import sys; import train_dolly_flow as flow; torch = 'torch' in sys.modules\n"
        f"o = flow.parse_options(['--training-dataset', 'a/b', '--local-output-dir', '/out'], {words!r}, [])\n"
        "print(torch, *o.training_dataset, o.sample_prompts, o.input_model, o.dbfs_output_dir)"
    )
    result = metaflow.python("-c", code)
    paths = f"{tmp_path}/own.csv {tmp_path}/more.csv demo {tmp_path}/prompts.txt demo {tmp_path}/kept"
    assert result.stdout == f"False {paths}\n", result.stderr


@pytest.mark.slow
def test_all_problems_are_reported_together_before_training(metaflow: Metaflow, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    words = (
        "--gpu-family a10 --num-gpus 3 --training-dataset demo --epochs nan --local-training-root /proc/runs"
    )
    more = ["--training-file", rows, "--trainer-options", "--warmup-steps 5"]
    code, output = metaflow.run("run", *words.split(), *more, METAFLOW_DATATOOLS_S3ROOT="s3://nobodys/data")
    assert code == 1
    for problem in (
        "the bucket 'nobodys' cannot be reached",
        "--gpu-family a10: this machine has no GPU. Type --gpu-family cpu",
        "--training-file and --training-dataset: give only one of them",
        "--epochs nan: expected a finite number",
        "--trainer-options '--warmup-steps 5' would be ignored",
        "--local-training-root /proc/runs/",
    ):
        assert problem in output, output
    assert "Traceback" not in output
    assert not (tmp_path / "dolly_training").exists()


def test_a_store_that_does_not_answer_is_reported_after_three_tries(metaflow: Metaflow) -> None:
    tries = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with suppress(OSError):  # closed below
                while True:
                    tries.append(server.accept()[0].close())

        threading.Thread(target=hang_up, daemon=True).start()
        code = "import model_on_s3; print(*model_on_s3.root_problems())"
        silent = {"METAFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        result = metaflow.python("-c", code, METAFLOW_DATATOOLS_S3ROOT="s3://far/data", **silent)
    assert "the bucket 'far' cannot be reached" in result.stdout, result.stderr
    assert len(tries) == 3


def test_only_the_pod_of_the_train_step_has_gpus(metaflow: Metaflow) -> None:
    metaflow.bucket("pods")
    code, output = metaflow.run(
        *"--quiet --datastore s3 --config-value machine 8xV100-32GB".split(),
        *"--with kubernetes:image=registry.example/dolly:1 argo-workflows create --only-json".split(),
        METAFLOW_DATASTORE_SYSROOT_S3="s3://pods/metaflow",
    )
    assert code == 0, output
    spec, _ = json.JSONDecoder().raw_decode(output[output.index("{") :])
    pods = {entry["name"]: entry for entry in spec["spec"]["templates"]}
    expected = pod.resources("8xV100-32GB", {})
    container = pods["train"]["container"]
    assert container["image"] == "registry.example/dolly:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    for key, name in (("cpu", "cpu"), ("memory", "memory"), ("ephemeral-storage", "disk")):
        assert float(container["resources"]["requests"][key].removesuffix("M")) == expected[name]
    shared = next(entry for entry in pods["train"]["volumes"] if entry["name"] == "dhsm")
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{expected['shared_memory']}Mi"}
    assert {"/dev/shm"} <= {entry["mountPath"] for entry in container["volumeMounts"]}
    for name in ("start", "end"):
        assert not pods[name]["container"]["resources"]["limits"], f"{name} has GPUs"


@pytest.mark.slow
def test_a_batch_job_requests_the_same_resources(metaflow: Metaflow) -> None:
    metaflow.bucket("jobs")
    client = metaflow.client
    role = client("iam").create_role(RoleName="batch", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    profile = client("iam").create_instance_profile(InstanceProfileName="batch")["InstanceProfile"]["Arn"]
    environment = client("batch").create_compute_environment(
        computeEnvironmentName="machines",
        type="MANAGED",
        serviceRole=role,
        computeResources={
            "type": "EC2",
            "minvCpus": 0,
            "maxvCpus": 256,
            "instanceTypes": ["p3dn.24xlarge"],
            "instanceRole": profile,
            "subnets": [client("ec2").describe_subnets()["Subnets"][0]["SubnetId"]],
            "securityGroupIds": [client("ec2").describe_security_groups()["SecurityGroups"][0]["GroupId"]],
        },
    )["computeEnvironmentArn"]
    client("batch").create_job_queue(
        jobQueueName="queue",
        state="ENABLED",
        priority=1,
        computeEnvironmentOrder=[{"order": 1, "computeEnvironment": environment}],
    )
    code, output = metaflow.run(
        *"--quiet --datastore s3 --config-value machine p3dn.24xlarge".split(),
        *"--with batch:image=registry.example/dolly:1 step-functions create --only-json".split(),
        METAFLOW_DATASTORE_SYSROOT_S3="s3://jobs/metaflow",
        METAFLOW_BATCH_JOB_QUEUE="queue",
        METAFLOW_ECS_S3_ACCESS_IAM_ROLE=role,
        METAFLOW_SFN_IAM_ROLE=role,
    )
    assert code == 0, output
    states = json.JSONDecoder().raw_decode(output[output.index("{") :])[0]["States"]
    expected = pod.resources("p3dn.24xlarge", {})
    job = states["train"]["Parameters"]
    requested = {
        entry["Type"]: float(entry["Value"]) for entry in job["ContainerOverrides"]["ResourceRequirements"]
    }
    assert requested == {"GPU": 8, "VCPU": expected["cpu"], "MEMORY": expected["memory"]}
    definitions = client("batch").describe_job_definitions()["jobDefinitions"]
    containers = {entry["jobDefinitionArn"]: entry["containerProperties"] for entry in definitions}
    container = containers[job["JobDefinition"]]
    assert container["image"] == "registry.example/dolly:1"
    assert container["linuxParameters"]["sharedMemorySize"] == expected["shared_memory"]
    for name in ("start", "end"):
        requirements = states[name]["Parameters"]["ContainerOverrides"]["ResourceRequirements"]
        assert "GPU" not in {entry["Type"] for entry in requirements}, f"{name} has GPUs"


def test_the_package_holds_every_file_that_training_needs(metaflow: Metaflow, tmp_path: Path) -> None:
    code, output = metaflow.run("--quiet", "package", "save", tmp_path / "package.tgz")
    assert code == 0, output
    with tarfile.open(tmp_path / "package.tgz") as package:
        packed = set(package.getnames())
    files = [file for folder in ("training", "config") for file in (ROOT / folder).rglob("*.*")]
    # The jobs of Databricks, the image's recipe and the scripts of a shell are not used in a pod.
    files = [f for f in files if f.parent.name != "databricks" and not f.name.startswith("Dockerfile")]
    needed = {str(file.relative_to(ROOT)) for file in files if file.suffix not in (".pyc", ".sh")}
    assert "config/ds_z3_bf16_config.json" in needed
    assert packed >= needed | {"requirements.txt", "train_dolly_flow.py", "pod.py", "gpu_profile.py"}


def test_every_config_and_parameter_of_the_flow_has_help() -> None:
    for node in ast.walk(ast.parse(FLOW.read_text())):
        kinds = ("Config", "Parameter", "IncludeFile")
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in kinds:
            assert "help" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)


# --- real runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_a_pod(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Metaflow, str]:
    """(Metaflow, output) of a run from the unpacked package, as in a pod without GPUs."""
    metaflow = Metaflow(tmp_path_factory.mktemp("pod"), s3_server)
    metaflow.bucket("models")
    code, output = metaflow.run("--quiet", "package", "save", metaflow.folder / "package.tgz")
    assert code == 0, output
    unpacked = metaflow.folder / "unpacked"
    with tarfile.open(metaflow.folder / "package.tgz") as package:
        package.extractall(unpacked)
    code, output = metaflow.run(
        *"--config-value machine cpu run --max-steps 8 --trainer-options".split(),
        SHORT,
        file=unpacked / "train_dolly_flow.py",
        PYTHONPATH=str(unpacked / ".mf_code"),
        METAFLOW_EXTRACTED_ROOT=str(unpacked),
        METAFLOW_KUBERNETES_WORKLOAD="1",
        METAFLOW_DATATOOLS_S3ROOT="s3://models/data",
    )
    assert code == 0, output
    return metaflow, output


@pytest.mark.slow
def test_own_rows_are_read_by_file_name_and_by_content(metaflow: Metaflow, tmp_path: Path) -> None:
    """Refusals end the run in `start`, show that the rows were read, and name rows and options as they were typed."""
    (tmp_path / "own.csv").write_text("instruction,output\n" + "Say a.,a\n" * 30)
    words = ["run", "--gpu-family", "cpu", "--input-model", "demo"]
    for more, problem in (
        (
            ["--training-dataset", "own.csv", "--test-size", "40"],
            "- --test-size 40 is more than half of the 30 rows. Type --test-size 3,",
        ),
        (
            ["--training-file", "own.csv", "--trainer-options", "--max-length 9"],
            "Correct the rows, raise --trainer-options '--max-length'",
        ),
    ):
        code, output = metaflow.run(*words, *more)
        assert code == 1
        assert problem in output, output
    assert " own.csv: 30 rows read" in output, "not the name of the copy"
    kept = next((tmp_path / "dolly_training").glob("*/rows/own.csv"))
    assert kept.read_bytes() == (tmp_path / "own.csv").read_bytes()
    assert json.loads(next((tmp_path / "dolly_training").glob("*/prompts.json")).read_text())


@pytest.mark.slow
def test_a_run_from_its_package_stores_plan_ledger_model_and_versions(in_a_pod: tuple[Metaflow, str]) -> None:
    metaflow, output = in_a_pod
    assert "on this pod: 2 x CPU rank, fp32" in output
    assert "step 8/8" in output, "the training output is shown"
    kept = metaflow.artifacts("ledger", "plan", "model", "versions", "record", "metrics", "samples", "ranks")
    assert kept["ledger"]["rows_kept"] == 6218
    assert kept["plan"]["fits"]
    assert kept["plan"]["global_batch_rows"] == 64
    assert (kept["record"]["status"], kept["record"]["steps"]) == ("finished", 8)
    assert kept["versions"].keys() >= {"torch", "deepspeed", "metaflow", "python"}
    folder = Path(kept["model"]["folder"])
    assert folder.is_relative_to(metaflow.folder / "dolly_training"), "in the home of the pod's user"
    assert list(kept["model"]["files"])[-1] == "run.json"
    for name, entry in kept["model"]["files"].items():
        assert (folder / name).stat().st_size == entry["size"]
    assert kept["model"]["files"]["model.safetensors"] == kept["record"]["weights"]["model.safetensors"]


@pytest.mark.slow
def test_the_pushed_model_is_fetched_by_run_id_and_answers(
    in_a_pod: tuple[Metaflow, str], tmp_path: Path
) -> None:
    metaflow, output = in_a_pod
    kept = metaflow.artifacts("model")
    assert kept["model"]["s3"] == f"s3://models/data/TrainDollyFlow/{kept['run']}"
    assert f"python flows/model_on_s3.py {kept['run']} --to" in output
    folder = tmp_path / "fetched"
    assert metaflow.run(kept["run"], "--to", folder, file=FETCH)[0] == 0
    assert {file.name for file in folder.iterdir()} == kept["model"]["files"].keys()
    ask = ["-m", "training.generate", "--greedy", "Name the month after May.", "--model"]
    fetched, local = (metaflow.python(*ask, model) for model in (folder, kept["model"]["folder"]))
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stdout == local.stdout

    (folder / "run.json").unlink()
    (folder / "model.safetensors").write_bytes(b"cut off")
    assert metaflow.run(kept["run"], "--to", folder, file=FETCH)[0] == 0
    pushed = Path(kept["model"]["folder"]) / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == pushed.read_bytes()

    metaflow.bucket("models").put_object(
        Bucket="models", Key=f"data/TrainDollyFlow/{kept['run']}/model.safetensors", Body=b"another"
    )
    code, output = metaflow.run(kept["run"], "--to", tmp_path / "other", file=FETCH)
    assert code == 1
    assert "model.safetensors: is not the file that was pushed" in output
    assert not (tmp_path / "other" / "run.json").exists()
    code, output = metaflow.run("123", "--to", tmp_path / "none", file=FETCH)
    assert code == 1
    assert (
        "run 123: Run('TrainDollyFlow/123') does not exist. Type the run-id that the flow printed" in output
    )
    assert "Traceback" not in output


def ranks_of(folder: Path) -> list[psutil.Process]:
    """The ranks that train into a folder, without their supervisors."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            words = " ".join(process.cmdline())
            ours = "training.trainer" in words and str(folder) in words
            if ours and "DOLLY_SUPERVISED" in process.environ():
                found.append(process)
    return found


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_same_weights_and_pushed_once_a_bucket_exists(
    in_a_pod: tuple[Metaflow, str], metaflow: Metaflow, tmp_path: Path
) -> None:
    client, root = metaflow.bucket("soon-gone"), {"METAFLOW_DATATOOLS_S3ROOT": "s3://soon-gone/data"}
    # Without S3, so checkpoints stay here. It is started again once.
    process = metaflow.start("run", *TRIAL, "--restarts", "1", "--trainer-options", SHORT)
    assert process.stdout is not None
    output, kills = "", 0
    for line in process.stdout:  # lines arrive while it runs
        output += line
        # At the first checkpoint, and at the first step after the restart.
        if (not kills and "checkpoint-3 saved" in line) or (
            kills == 1 and "Restart 1" in output and "step " in line
        ):
            ranks_of(tmp_path)[-1].kill()
            kills += 1
    output += process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert re.search(r"Restart 1 of 1 in 1 s, from checkpoint-[36]: exit code", output), output
    assert "It is not started again: it has been started again as often as --restarts allows" in output
    assert "Training ended with exit code" in output
    assert re.search(r"Rank \d ended: killed.* Continue with resume instead of run", output), output
    assert "resume --origin-run-id" in output
    model = next((tmp_path / "dolly_training").glob("*/model"))
    assert (model / "checkpoint-3" / "manifest.json").exists()
    assert not (model / "model.safetensors").exists()

    client.delete_bucket(Bucket="soon-gone")
    code, output = metaflow.run("resume", **root)
    assert code == 1
    assert "the run continues from" in output
    assert "step 2/8" not in output, "it started at step 0"
    assert "files arrived" in output
    assert f"The model in {model}" in output, "the message names the local model"
    written = (model / "model.safetensors").stat().st_mtime_ns

    metaflow.bucket("soon-gone")
    code, output = metaflow.run("resume", **root)
    assert code == 0, output
    assert "is already finished" in output
    assert (model / "model.safetensors").stat().st_mtime_ns == written, "it trained again"
    kept, undisturbed = metaflow.artifacts("model"), in_a_pod[0].artifacts("model")
    assert kept["model"]["s3"] == f"s3://soon-gone/data/TrainDollyFlow/{kept['run']}"
    weights = "model.safetensors"
    assert kept["model"]["files"][weights] == undisturbed["model"]["files"][weights], "not bit for bit"
    [_] = (tmp_path / "dolly_training").iterdir()  # a resumed run has the folder of the first


@pytest.mark.slow
def test_a_pod_that_is_lost_with_its_disk_is_retried_from_the_checkpoint_on_s3(
    in_a_pod: tuple[Metaflow, str], metaflow: Metaflow, tmp_path: Path
) -> None:
    client, root = metaflow.bucket("retried"), {"METAFLOW_DATATOOLS_S3ROOT": "s3://retried/data"}
    retry = ["--with", "retry:times=1,minutes_between_retries=0"]
    process = metaflow.start("run", *retry, *TRIAL, "--trainer-options", SHORT, **root)
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if "checkpoint-3 copied to" in line:
            break
    [task] = [
        p for p in psutil.Process(process.pid).children() if "train" in p.cmdline() and "step" in p.cmdline()
    ]
    for lost in [task, *task.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            lost.kill()
    [run] = (tmp_path / "dolly_training").glob("dolly__*")
    shutil.rmtree(run)
    output += process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    target = f"s3://retried/data/TrainDollyFlow/{run.name.removeprefix('dolly__')}/checkpoints"
    assert re.search(rf"fetching checkpoint-\d from {target}", output), output
    assert "the run continues from" in output
    kept, undisturbed = metaflow.artifacts("model"), in_a_pod[0].artifacts("model")
    weights = "model.safetensors"
    assert kept["model"]["files"][weights] == undisturbed["model"]["files"][weights], "not bit for bit"
    listed = client.list_objects_v2(
        Bucket="retried", Prefix=f"data/TrainDollyFlow/{kept['run']}/checkpoints/"
    )
    assert any(entry["Key"].endswith("checkpoint-8/manifest.json") for entry in listed["Contents"])


@pytest.mark.slow
def test_an_interrupted_push_continues_with_the_missing_files(metaflow: Metaflow, tmp_path: Path) -> None:
    client = metaflow.bucket("half")
    files = {"a.bin": b"a" * 1000, "b.bin": b"b" * 2000, "run.json": b"{}"}
    (tmp_path / "model").mkdir()
    for name, content in files.items():
        (tmp_path / "model" / name).write_bytes(content)
    code = """
import hashlib, json, sys
from pathlib import Path
from metaflow import current
from metaflow.client import core
from flows import model_on_s3
class Run:
    id = "7"
    class parent: id = "TrainDollyFlow"
current._set_env(run_id="7", flow=None); current._flow_name = "TrainDollyFlow"
folder = Path(sys.argv[1])
files = {f.name: {"size": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in sorted(folder.iterdir())}
print(model_on_s3.push(folder, files, Run()))
"""

    def push() -> str:
        root = {"METAFLOW_DATATOOLS_S3ROOT": "s3://half/data"}
        result = metaflow.python("-c", code, tmp_path / "model", **root)
        return result.stdout + result.stderr

    def times() -> dict[str, Any]:
        listed = client.list_objects_v2(Bucket="half").get("Contents", [])
        return {entry["Key"].rsplit("/", 1)[-1]: entry["LastModified"] for entry in listed}

    assert push().strip() == "s3://half/data/TrainDollyFlow/7"
    first = times()
    assert first.keys() == files.keys()
    client.delete_object(Bucket="half", Key="data/TrainDollyFlow/7/b.bin")
    time.sleep(1.1)  # S3's clock has seconds
    push()
    assert times()["a.bin"] == first["a.bin"], "it was not copied again"
    assert times()["b.bin"] > first["b.bin"]


def test_a_killed_fetch_continues_and_files_of_the_user_are_kept(metaflow: Metaflow, tmp_path: Path) -> None:
    files = {"adapter/config.json": b"{}", "model.safetensors": b"a" * 1000, "run.json": b"{}"}
    client = metaflow.bucket("fetched")
    for name, content in files.items():
        client.put_object(Bucket="fetched", Key=f"7/{name}", Body=content)
    code = """
import hashlib, os, signal, sys
from pathlib import Path
from types import SimpleNamespace
import metaflow
from flows import model_on_s3
contents = {"adapter/config.json": b"{}", "model.safetensors": b"a" * 1000, "run.json": b"{}"}
files = {name: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}
data = SimpleNamespace(model={"s3": "s3://fetched/7", "files": files})
metaflow.Run = lambda name: {"train": [SimpleNamespace(data=SimpleNamespace()), SimpleNamespace(data=data)]}
if sys.argv[2:]:
    os.replace = lambda copy, file: os.kill(os.getpid(), signal.SIGKILL)
try:
    model_on_s3.fetch("7", Path(sys.argv[1]))
except model_on_s3.StoreError as error:
    sys.exit(str(error))
"""

    def fetch(*killed: str) -> tuple[int, str]:
        result = metaflow.python("-c", code, tmp_path / "model", *killed)
        return result.returncode, result.stderr

    assert fetch("killed")[0] == -signal.SIGKILL
    [left] = (tmp_path / "model").glob("metaflow.s3.*")  # Metaflow's temporary folder
    for own in ("notes", "metaflow.s3.notes", "metaflow.s3.a_file_s"):
        (tmp_path / "model" / own).touch()
        exit_code, output = fetch()
        assert (exit_code, left.exists()) == (1, True), output
        assert f"holds files of something else ({own})" in output
        (tmp_path / "model" / own).unlink()
    assert fetch() == (0, "")
    fetched = [file for file in (tmp_path / "model").rglob("*") if file.is_file()]
    assert {str(file.relative_to(tmp_path / "model")): file.read_bytes() for file in fetched} == files
