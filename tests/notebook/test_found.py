"""The notebook says what it finds on a cluster, on a serverless node and elsewhere, and chooses folders by it."""

from __future__ import annotations

import subprocess
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from notebooks import found
from tests.notebook.test_notebook import NOTEBOOK, ROOT, run_cell, widgets
from training import errors, notebook

Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes this machine look like a node with these things, and no others."""

    def look_like(runtime: str = "", local_disk: bool = False, dbfs: bool = False, gpus: str = "") -> None:
        monkeypatch.delenv(found.RUNTIME, raising=False)
        if runtime:
            monkeypatch.setenv(found.RUNTIME, runtime)
        for name, present in (("LOCAL_DISK", local_disk), ("DBFS", dbfs), ("DATABRICKS", False)):
            folder = tmp_path / name.lower()
            if present:
                folder.mkdir()
            monkeypatch.setattr(found, name, str(folder))

        def run(words: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
            assert words[0] == "nvidia-smi"
            if not gpus:
                raise FileNotFoundError("nvidia-smi")
            return subprocess.CompletedProcess(words, 0, stdout=gpus)

        monkeypatch.setattr(found.subprocess, "run", run)

    return look_like


def test_a_cluster_trains_on_its_local_disk_and_publishes_to_dbfs(machine: Machine) -> None:
    machine("17.3", local_disk=True, dbfs=True, gpus="NVIDIA A100-SXM4-40GB\n" * 8)
    assert found.default_training_root() == f"{found.LOCAL_DISK}/dolly_training"
    assert found.default_output_root() == f"{found.DBFS}/dolly_training"
    text = found.description()
    assert "Databricks 17.3, Python 3." in text
    assert "8 x NVIDIA A100-SXM4-40GB; gpu_family a100" in text
    assert f"models go to {found.DBFS}/dolly_training" in text
    assert "missing" not in text
    assert found.lost_model_problem("", "") is None


def test_a_serverless_node_trains_in_its_temporary_folder_and_asks_for_a_volume(machine: Machine) -> None:
    machine("client.5.1", gpus="NVIDIA A10\n")
    assert found.default_training_root() == f"{tempfile.gettempdir()}/dolly_training"
    assert found.default_output_root() == ""
    text = found.description()
    assert "1 x NVIDIA A10; gpu_family a10" in text
    assert f"({found.LOCAL_DISK} is missing)" in text
    assert "DBFS            missing. Name a folder of a Volume in dbfs_output_root" in text
    with pytest.raises(errors.RunRefusedError, match="Name a folder of a Volume, such as /Volumes/main/"):
        cells_read(dbfs_output_root="")
    assert cells_read(dbfs_output_root="/Volumes/a/b/c").startswith("/Volumes/a/b/c/dolly__")
    assert cells_read(dbfs_output_root="", mlflow_model_name="main.models.dolly") is None


def cells_read(**values: str) -> str | None:
    from notebooks.cells import read_widgets

    return read_widgets(widgets(**values)).published


def test_another_machine_uses_the_home_folder(machine: Machine) -> None:
    machine()
    assert found.default_training_root() == "~/dolly_training"
    assert found.default_output_root() == "~/dolly_published"
    assert "not on Databricks" in found.description()
    assert "GPUs            none; gpu_family a100" in found.description()
    assert found.lost_model_problem("", "") is None


@pytest.mark.parametrize(
    ("name", "family"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("Tesla V100-SXM2-32GB", "v100"), ("Tesla T4", "t4")],
)
def test_the_gpus_choose_the_family(name: str, family: str, machine: Machine) -> None:
    machine(gpus=f"{name}\n")
    assert found.default_family() == family


def test_the_first_python_cell_prints_what_was_found_and_chooses_by_it(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine("client.5.1", gpus="NVIDIA H100 80GB HBM3\n")
    names = run_cell("found.description(")
    assert "1 x NVIDIA H100 80GB HBM3; gpu_family h100" in capsys.readouterr().out
    chosen = names["dbutils"].widgets
    assert chosen.get("gpu_family") == "h100"
    assert chosen.get("local_training_root") == f"{tempfile.gettempdir()}/dolly_training"
    assert chosen.get("dbfs_output_root") == ""
    with pytest.raises(errors.RunRefusedError, match="dbfs_output_root is empty, and this node has no DBFS"):
        run_cell("cells.read_widgets(", **{key: names[key] for key in ("dbutils", "cells")})


def test_the_notebook_installs_the_pins_of_the_lora_extra() -> None:
    [line] = [
        cell.source for cell in notebook.read_source(NOTEBOOK.read_text()).cells if "%pip" in cell.source
    ]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [word for word in line.split() if "==" in word] == extras["lora"]
