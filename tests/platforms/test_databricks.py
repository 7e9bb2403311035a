"""The files of config/databricks: what Databricks documents, real paths and options, and a script that really trains."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from tests.test_docs import rows_of_table
from training import notebook
from training.launch.restart import DEFAULT_RESTARTS
from training.machine.catalogue import MACHINES, find_machine
from training.options.command_line import parse_words
from training.options.trainer_options import TrainingOptions
from training.plan.__main__ import main as plan_command
from training.plan.presets import preset_options
from training.plan.request import plan_options
from training.storage.record import read_run_record

jobs = pytest.importorskip("databricks.bundles.jobs")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "config" / "databricks"
BUNDLE = yaml.safe_load((FOLDER / "databricks.yml").read_text())
ACCELERATORS = {"GPU_1xA10": ("1xA10", 1), "GPU_1xH100": ("p5.4xlarge", 1), "GPU_8xH100": ("8xH100", 8)}
EACH_ACCELERATOR = pytest.mark.parametrize("accelerator", ACCELERATORS)
# https://docs.databricks.com/aws/en/machine-learning/ai-runtime/connecting/cli/yaml-config
WORKLOAD_FIELDS = {
    "experiment_name": str,
    "compute": {"accelerator_type": str, "num_accelerators": int},
    "environment": {"version": str},
    "env_variables": {"DOLLY_VOLUME": str},
    "code_source": {"root_path": str},
    "command": str,
}
# https://docs.databricks.com/aws/en/machine-learning/ai-runtime/configure-bundle-tasks
NODE_VARIABLES = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1"}


def job(name: str, target: str) -> Any:
    """A job of the bundle with the variables of a target, as the package's class, which refuses unknown fields."""
    values = {key: variable["default"] for key, variable in BUNDLE["variables"].items()}
    values |= BUNDLE["targets"][target].get("variables", {})

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        if whole := isinstance(value, str) and re.fullmatch(r"\$\{var\.(\w+)\}", value):
            return values[whole[1]]
        return (
            re.sub(r"\$\{var\.(\w+)\}", lambda m: str(values[m[1]]), value)
            if isinstance(value, str)
            else value
        )

    return jobs.Job.from_dict(filled(BUNDLE["resources"]["jobs"][name]))


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """The code as a node finds it: packed by the bundle's own build command, and unpacked elsewhere."""
    repository, node = tmp_path / "a repository", tmp_path / "code_source"
    for name in ("training", "config"):
        leave = shutil.ignore_patterns("__pycache__", "dist")
        shutil.copytree(ROOT / name, repository / name, ignore=leave)
    shutil.copy(ROOT / "requirements.txt", repository)
    code = BUNDLE["artifacts"]["code"]
    assert (FOLDER / code["path"]).resolve() == ROOT, "the build command runs here"
    build = code["build"].replace("${var.volume}", str(tmp_path / "volume"))
    subprocess.run(["bash", "-c", build], cwd=repository, check=True)
    [built] = code["files"]
    with tarfile.open(repository / "config" / "databricks" / built["source"]) as archive:
        assert {name.split("/")[0] for name in archive.getnames()} == {repository.name}, (
            "one folder at the top"
        )
        archive.extractall(node, filter="data")
    return node / repository.name


def node_environment(code: Path, path: Path, **others: str) -> dict[str, str]:
    """The variables of a node: `path` is first on PATH, and the disk is beside the code."""
    disk = code.parent / "disk"
    disk.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("DOLLY_VOLUME", "HF_HOME")}
    node = {"CODE_SOURCE_PATH": str(code), "TMPDIR": str(disk), "PATH": f"{path}:{os.environ['PATH']}"}
    return kept | NODE_VARIABLES | node | others


def commands(accelerator: str, code: Path, *words: str, **variables: str) -> list[list[str]]:
    """The Python commands that a GPU_*.sh runs, with `words` behind it, read with a stand-in for Python."""
    stand_in = code.parent / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(
        "#!/bin/bash\n"
        "for name in WORLD_SIZE LOCAL_WORLD_SIZE NODE_RANK MASTER_ADDR; do\n"
        '  [ "$3" = install ] || [ -z "${!name}" ] || { echo "$name is set" >&2; exit 1; }\n'
        'done\necho "$PWD"; printf "%s\\n" "$@" END\n'
    )
    stand_in.chmod(0o755)
    script = [bash_script(accelerator, code), *words]
    result = subprocess.run(
        ["bash", *script],
        env=node_environment(code, stand_in.parent, **variables),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    parts = [part.splitlines() for part in result.stdout.split("END\n") if part]
    assert {part[0] for part in parts} == {str(code)}
    return [part[1:] for part in parts]


def bash_script(accelerator: str, code: Path) -> str:
    """The script that the workload file of this accelerator runs."""
    workload = yaml.safe_load((FOLDER / f"{accelerator}.yaml").read_text())
    program, file = shlex.split(workload["command"].replace("$CODE_SOURCE_PATH", str(code)))
    assert program == "bash"
    return file


# --- the bundle ---------------------------------------------------------------------------------------


def test_the_bundle_has_documented_sections_and_no_variable_without_a_value() -> None:
    assert BUNDLE.keys() == {"bundle", "variables", "targets", "sync", "artifacts", "resources"}
    used = set(re.findall(r"\$\{var\.(\w+)\}", (FOLDER / "databricks.yml").read_text()))
    assert used == BUNDLE["variables"].keys()
    assert all(variable.keys() == {"description", "default"} for variable in BUNDLE["variables"].values())
    others = set(re.findall(r"\$\{([\w.]+)\}", (FOLDER / "databricks.yml").read_text()))
    assert {name for name in others if not name.startswith("var.")} == {"workspace.file_path"}
    assert BUNDLE["artifacts"]["code"].keys() == {"path", "build", "files"}
    for target in BUNDLE["targets"].values():
        assert target.keys() <= {"default", "mode", "variables"}
        assert target.get("variables", {}).keys() <= BUNDLE["variables"].keys()
    assert [(FOLDER / path).resolve() for path in BUNDLE["sync"]["paths"]] == [ROOT]


def test_a_field_that_jobs_do_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="Unexpected field 'widgets'"):
        jobs.Job.from_dict({"tasks": [{"task_key": "a", "notebook_task": {"widgets": {}}}]})


def test_the_notebook_job_runs_the_notebook_on_one_gpu_node_and_sets_every_widget() -> None:
    [task] = job("notebook", "a10").tasks
    [cluster] = job("notebook", "a10").job_clusters
    assert task.job_cluster_key == cluster.job_cluster_key
    assert cluster.new_cluster.num_workers == 0
    assert "-gpu-ml-" in cluster.new_cluster.spark_version
    source = (FOLDER / task.notebook_task.notebook_path).resolve()
    widgets = notebook.widget_names(notebook.read_source(source.read_text()))
    values = task.notebook_task.base_parameters
    assert list(values) == widgets
    assert MACHINES[cluster.new_cluster.node_type_id].family == values["gpu_family"]
    assert values["restarts"] == str(DEFAULT_RESTARTS)


@pytest.mark.parametrize("target", BUNDLE["targets"])
def test_the_trainer_job_runs_the_script_of_its_accelerator_on_one_node(target: str) -> None:
    trainer_job = job("trainer", target)
    [task], [environment] = trainer_job.tasks, trainer_job.environments
    assert task.environment_key == environment.environment_key
    [deployment] = task.ai_runtime_task.deployments
    accelerator, count = deployment.compute.accelerator_type.value, deployment.compute.accelerator_count
    assert count == int(re.match(r"GPU_(\d+)x", accelerator)[1]), "the script starts the ranks of one node"
    script = deployment.command_path.replace("${workspace.file_path}", str(ROOT))
    assert Path(script) == FOLDER / f"{accelerator}.sh"
    assert Path(script).stat().st_mode & 0o111
    [built] = BUNDLE["artifacts"]["code"]["files"]
    assert Path(task.ai_runtime_task.code_source_path) == Path(built["source"])


def test_the_targets_and_the_workload_files_are_those_of_the_three_accelerators() -> None:
    chosen = [
        job("trainer", target).tasks[0].ai_runtime_task.deployments[0].compute.accelerator_type.value
        for target in BUNDLE["targets"]
    ]
    assert chosen == list(ACCELERATORS)
    assert {file.stem for file in FOLDER.glob("GPU_*.*")} == set(ACCELERATORS)


# --- the workload files -------------------------------------------------------------------------------


@EACH_ACCELERATOR
def test_a_workload_file_has_documented_fields_alone(accelerator: str) -> None:
    def compare(value: Any, expected: Any) -> None:
        if isinstance(expected, dict):
            assert value.keys() == expected.keys()
            for key, inner in expected.items():
                compare(value[key], inner)
        else:
            assert type(value) is expected, value

    workload = yaml.safe_load((FOLDER / f"{accelerator}.yaml").read_text())
    compare(workload, WORKLOAD_FIELDS)
    assert workload["compute"]["accelerator_type"] == accelerator
    assert workload["compute"]["num_accelerators"] == ACCELERATORS[accelerator][1]
    assert (FOLDER / workload["code_source"]["root_path"]).resolve() == ROOT
    assert Path(bash_script(accelerator, ROOT)) == FOLDER / f"{accelerator}.sh"


def test_the_minutes_of_the_docs_are_those_of_the_plan() -> None:
    rows = rows_of_table("databricks", "file | GPUs")
    assert [name.strip("`") for name, *_ in rows] == [f"{accelerator}.yaml" for accelerator in ACCELERATORS]
    for (machine, ranks), (*_, minutes) in zip(ACCELERATORS.values(), rows, strict=True):
        words = ["--machine", machine, "--json", *([] if ranks > 1 else ["--lora", "16"])]
        answer = json.loads(CliRunner().invoke(plan_command, words).stdout)
        assert round(60 * answer["hours"]["expected"]) == int(minutes), machine


# --- the scripts --------------------------------------------------------------------------------------


@EACH_ACCELERATOR
def test_a_script_installs_our_pins_and_trains_with_options_that_fit_its_gpus(
    accelerator: str, code: Path
) -> None:
    machine, ranks = find_machine(ACCELERATORS[accelerator][0]), ACCELERATORS[accelerator][1]
    install, train = commands(accelerator, code)
    assert install[:3] == ["-m", "pip", "install"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert install[install.index("-r") :][:2] == ["-r", "requirements.txt"]
    [peft] = [word for word in install if "==" in word]
    assert peft in extras["lora"]
    if ranks > 1:
        assert train[:5] == ["-m", "training.launch", "--num-gpus", str(ranks), "--"]
    else:
        assert train[:2] == ["-m", "training.trainer"]
    values, problems = parse_words(train[5:] if ranks > 1 else train[2:])
    assert not problems
    volume = code.parents[1] / "volume"
    assert values["dbfs_output_dir"] == f"{volume}/model"
    assert values["checkpoint_to"] == f"{volume}/checkpoints"
    assert values["resume"] == "auto"
    own = {"dbfs_output_dir": None, "checkpoint_to": None, "resume": "never"}
    options = TrainingOptions(**values | own)
    recipe = preset_options(machine.family, ranks, lora=ranks == 1)
    assert {name: getattr(options, name) for name in recipe} == recipe
    plan = plan_options(options, ranks, machine)
    assert plan.fits, plan.problems


def test_the_variable_of_a_workload_file_counts_more_than_the_volume_of_the_bundle(code: Path) -> None:
    _, train = commands("GPU_1xA10", code, DOLLY_VOLUME="/Volumes/a/b/c")
    assert train[train.index("--dbfs-output-dir") + 1] == "/Volumes/a/b/c/model"


def test_a_run_whose_model_would_be_lost_with_the_node_is_refused(code: Path) -> None:
    (code / "config" / "databricks" / "dist" / "volume.txt").unlink()
    variables = node_environment(code, code)
    for volume, problem in (("", "DOLLY_VOLUME is not set"), ("dolly/first", "DOLLY_VOLUME dolly/first: ")):
        result = subprocess.run(
            ["bash", bash_script("GPU_1xA10", code)],
            env=variables | {"DOLLY_VOLUME": volume},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2, result.stdout + result.stderr
        assert result.stderr.startswith(problem)
        assert "/Volumes/main/default/dolly/first" in result.stderr


@EACH_ACCELERATOR
def test_an_option_behind_a_script_counts_more_than_its_recipe(accelerator: str, code: Path) -> None:
    _, train = commands(accelerator, code, "--epochs", "3", "--per-device-train-batch-size", "2")
    values, problems = parse_words(train[5:] if "training.launch" in train else train[2:])
    assert not problems
    assert (values["epochs"], values["per_device_train_batch_size"]) == (3, 2)


@pytest.mark.slow
def test_the_script_of_one_gpu_trains_the_demo_and_a_retry_on_another_node_continues(code: Path) -> None:
    """The command of the workload file in bash, with the documented variables; the options behind it choose the demo."""
    demo = "--input-model demo --training-dataset demo --test-size 20 --save-steps 2 --max-steps"
    variables = node_environment(code, Path(sys.executable).parent, OMP_NUM_THREADS="1")

    def train(steps: int) -> str:
        script = ["bash", bash_script("GPU_1xA10", code), *demo.split(), str(steps)]
        result = subprocess.run(script, env=variables, capture_output=True, text=True, cwd="/")
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    volume = code.parents[1] / "volume"
    assert f"published to {volume}/model: " in train(2)
    assert read_run_record(volume / "model")["options"]["lora"] == 16
    assert (volume / "model" / "adapter" / "adapter_model.safetensors").is_file()
    shutil.rmtree(code.parent / "disk")
    (code.parent / "disk").mkdir()
    shutil.rmtree(volume / "model")
    assert "checkpoint-2 fetched in " in train(2)
    assert (volume / "model" / "manifest.json").is_file()
