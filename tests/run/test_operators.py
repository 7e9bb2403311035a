"""DeepSpeed's operators are compiled early, without endless waiting, and missing tools are reported."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import filelock._unix
import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.ops.op_builder.builder import OpBuilder
from filelock import FileLock
from torch.utils import cpp_extension
from torch.utils.cpp_extension import _get_build_directory

from training.errors import OptionsError
from training.run import operators
from training.run.operators import _builders, compile_operators, compiler_problems

ROOT = Path(__file__).parents[2]
OFFLOADED = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
COMPILE = "from training.run.operators import compile_operators; compile_operators({})"
FUSED = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, variables = [sys.executable, "-c", code], os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)


def test_a_lock_file_left_by_a_killed_rank_does_not_hang_the_next_run():
    lock_file = Path(_get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    lock_file.touch()
    result = python(COMPILE)
    assert result.returncode == 0, result.stderr
    assert not lock_file.exists()


def test_a_process_that_hangs_while_compiling_is_waited_for_only_until_the_timeout():
    folder = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
    with (
        FileLock(folder / "one-rank-at-a-time.lock"),
        pytest.raises(OptionsError, match=r"for 1 s \(--rank-timeout\) and hangs. Find it \(fuser '?/"),
    ):
        compile_operators({}, timeout=1)


def test_a_compilation_is_announced_and_a_compiled_operator_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    builders = [
        SimpleNamespace(name="slow", load=lambda: time.sleep(0.5)),
        SimpleNamespace(name="quick", load=int),
    ]
    monkeypatch.setattr(operators, "_builders", lambda config: builders)
    monkeypatch.setattr(operators, "NOTICE_AFTER", 0.2)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with caplog.at_level("INFO"):
        compile_operators({})
    [message] = caplog.messages
    assert message.startswith("compiling DeepSpeed's operator slow, which takes a minute or two, once")
    assert message.endswith("/slow")


@pytest.mark.parametrize("reason", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_causes_one_warning_and_torchs_lock_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
):
    loaded = []
    builders = [SimpleNamespace(name=name, load=partial(loaded.append, name)) for name in ("comm", "adam")]
    monkeypatch.setattr(operators, "_builders", lambda config: builders)
    refusal = OSError(getattr(errno, reason), reason)
    monkeypatch.setattr(filelock._unix.fcntl, "flock", Mock(side_effect=refusal))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock_file = Path(_get_build_directory("comm", verbose=False)) / "lock"
    lock_file.touch()
    compile_operators({})
    assert loaded == ["comm", "adam"]
    assert lock_file.exists(), "its rank may still be running"
    [warning] = caplog.messages
    assert warning.startswith(f"{tmp_path}: its file system has no locks")
    assert f"rm {tmp_path}/*/lock" in warning


@pytest.mark.slow
def test_compiled_operators_need_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    compiled = python(COMPILE)
    assert compiled.returncode == 0, compiled.stderr
    for program in ("ninja", "lscpu", "bash"):  # ninja checks whether anything must be compiled
        if found := shutil.which(program):
            (tmp_path / program).symlink_to(found)
    ask = "from training.run.operators import compiler_problems; print(compiler_problems({}))"
    result = python(ask, PATH=str(tmp_path))
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stderr
    result = python(ask, PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path / "empty"))
    assert "a C++ compiler, c++, is not on PATH" in result.stdout.splitlines()[-1], result.stderr


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("g++", "c++: error: unrecognized option -std=c++20. It needs"),
        ("wrapper", "'--version']' returned non-zero exit status 1"),  # torch runs it with --version
    ],
)
def test_a_failing_compiler_is_reported_with_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
):
    compiler = tmp_path / name
    compiler.write_text("#!/bin/sh\necho 'c++: error: unrecognized option -std=c++20' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    with pytest.raises(OptionsError) as refusal:
        compile_operators({})
    (problem,) = refusal.value.problems
    assert problem.startswith("DeepSpeed's operator deepspeed_shm_comm could not be compiled or loaded: ")
    assert reason in problem
    assert f"rm -r {tmp_path / 'extensions' / 'deepspeed_shm_comm'}" in problem


def test_an_operator_is_linked_if_the_path_of_torch_has_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "with  spaces"
    folder.mkdir()
    libraries, source = folder / "lib", folder / "nothing.cpp"
    libraries.symlink_to(cpp_extension.TORCH_LIB_PATH)
    source.write_text("int nothing() { return 0; }\n")
    load = partial(cpp_extension.load, "nothing", [str(source)], is_python_module=False)
    monkeypatch.setattr(operators, "_builders", lambda config: [SimpleNamespace(name="nothing", load=load)])
    monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", str(libraries))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
    compile_operators({})


def test_a_folder_for_operators_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "extensions"))
    (problem,) = compiler_problems({})
    assert str(tmp_path / "file") in problem
    assert "Type export TORCH_EXTENSIONS_DIR=/a/folder/of/yours" in problem


@pytest.mark.parametrize(
    ("config", "adam"),
    [
        ({}, []),
        (OFFLOADED, ["cpu_adam"]),
        (FUSED, ["fused_adam"]),
        (OFFLOADED | FUSED, ["cpu_adam"]),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, []),
        ({"optimizer": {"type": "SGD"}}, []),
        ({"optimizer": "AdamW"}, []),
    ],
)
def test_the_operators_follow_from_the_configuration(config: dict[str, Any], adam: list[str]):
    assert [builder.name for builder in _builders(config)] == ["deepspeed_shm_comm", *adam]


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A machine with torch for CUDA 12.6 and a GPU, but no CUDA toolkit."""
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: CUDA_Accelerator())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))


def test_on_a_gpu_only_an_optimizer_in_the_json_needs_the_cuda_toolkit(gpu_machine):
    assert _builders({}) == []
    assert compiler_problems({}) == []
    (problem,) = compiler_problems(FUSED)
    assert "nvcc was not found (CUDA_HOME is not set)" in problem
    assert "remove the 'optimizer' from the DeepSpeed JSON" in problem


def test_an_offloaded_optimizer_needs_a_compiler_but_no_cuda_toolkit(
    gpu_machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (builder,) = _builders(OFFLOADED)
    for source in builder.sources():
        text = Path(builder.deepspeed_src_path(source)).read_text()
        assert source.endswith(".cpp")
        assert "cuda" not in text.lower()
    assert compiler_problems(OFFLOADED) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert any("a C++ compiler" in problem for problem in compiler_problems(OFFLOADED))
