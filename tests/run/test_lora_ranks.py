"""Adapters on several ranks: the gradients of one process, under ZeRO-3 and ZeRO-2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.starts import run, torchrun


@pytest.mark.slow
def test_two_ranks_give_adapters_and_new_rows_the_gradients_of_one_process(tmp_path: Path) -> None:
    result = run(torchrun(2, "tests.run.lora_gradients"), tmp_path, timeout=500)
    assert result.returncode == 0, result.stdout[-6000:]
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text() == "passed"
