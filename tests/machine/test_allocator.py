"""torch's CUDA allocator uses expandable segments where the GPUs have them, unless the user chose otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.machine.allocator import VARIABLES

ROOT = Path(__file__).parents[2]

# Stands for NVIDIA's driver: CUDA_ANSWERS has a 1 or 0 for each GPU, or is "broken".
DRIVER = r"""
#include <stdlib.h>
#include <string.h>
static const char *answers(void) { return getenv("CUDA_ANSWERS"); }
int cuInit(unsigned flags) { return strcmp(answers(), "broken") ? 0 : 999; }
int cuDeviceGetCount(int *count) { *count = (int)strlen(answers()); return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 100; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 102 && answers()[device - 100] == '1';
    return 0;
}
"""


@pytest.fixture(scope="module")
def driver_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "cuda.c").write_text(DRIVER)
    words = ["c++", "-x", "c", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "cuda.c"]
    subprocess.run(words, check=True)
    return folder


def settings_of(code: str, folder: Path | None, answers: str, **user: str) -> str:
    """The allocator's variables after `code` in a new process, with this driver."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment = clean | {"CUDA_ANSWERS": answers, "LD_LIBRARY_PATH": str(folder)} | user
    show = f"import os; print([n + '=' + os.environ[n] for n in {VARIABLES} if n in os.environ])"
    words = [sys.executable, "-c", f"{code}\n{show}"]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


USE = "from training.machine.allocator import use_expandable_segments as use; use()"
EXPANDABLE = "['PYTORCH_ALLOC_CONF=expandable_segments:True']"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [("1", EXPANDABLE), ("11", EXPANDABLE), ("10", "[]"), ("0", "[]"), ("", "[]"), ("broken", "[]")],
    ids=["a GPU", "two GPUs", "one of two is virtual", "a virtual GPU", "no GPU", "a driver that fails"],
)
def test_segments_are_expandable_if_every_gpu_maps_memory(
    driver_folder: Path, answers: str, expected: str
) -> None:
    assert settings_of(USE, driver_folder, answers) == expected


def test_without_cuda_or_on_wsl_nothing_is_set(driver_folder: Path, tmp_path: Path) -> None:
    assert settings_of(USE, tmp_path, "1") == "[]"
    wsl = "import os, types; os.uname = lambda: types.SimpleNamespace(release='6.6-microsoft-standard-WSL2')"
    assert settings_of(f"{wsl}\n{USE}", driver_folder, "1") == "[]"


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", ["backend:cudaMallocAsync", ""])
def test_what_the_user_set_under_any_name_is_kept(driver_folder: Path, name: str, value: str) -> None:
    assert settings_of(USE, driver_folder, "1", **{name: value}) == f"['{name}={value}']"


def test_a_rank_sets_it_before_torch_is_imported_and_torch_reads_it(driver_folder: Path) -> None:
    """Runs the trainer's module as a rank does, except for the training."""
    rank = (
        "import runpy, sys, training.launch.exits\n"
        "training.launch.exits.run_and_exit = lambda main: None\n"
        "runpy.run_module('training.trainer', run_name='__main__')\n"
        "assert 'torch' not in sys.modules\n"
        "import torch; assert torch._C._accelerator_getAllocatorSettings() == 'expandable_segments:True'"
    )
    assert settings_of(rank, driver_folder, "1", DOLLY_SUPERVISED="log") == EXPANDABLE
