"""A run never waits for a compilation that a killed rank left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

ROOT = Path(__file__).parents[1]


def test_a_mark_left_by_a_killed_rank_does_not_hang_the_next_run():
    mark = Path(_get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    mark.touch()
    compile_them = "from training.operators import compile_operators; compile_operators(offload=False)"
    result = subprocess.run(
        [sys.executable, "-c", compile_them], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert not mark.exists()
