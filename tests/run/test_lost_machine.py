"""A run whose machine is gone goes on elsewhere from --checkpoint-to, here a local S3 server."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.run import test_kills
from tests.run.test_kills import Run, assert_the_same_run, drift, history
from training.storage import remote

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

# A save is slower to copy than the six steps between two saves, so copies skip some.
INTERVALS = ["--max-steps", 60, "--save-steps", 6, "--eval-steps", 60, "--logging-steps", 6]
rows, start = test_kills.rows, test_kills.start


def copied_step(target: str) -> int:
    """The step of the newest checkpoint at the target."""
    return max(remote.complete_checkpoints(*remote.open_store(target)), default=0)


def lose_the_machine(run: Run, target: str) -> int:
    """Kills every process of a run at once when a checkpoint is copied, and deletes its folder. Returns the step."""
    assert run.wait_until(lambda: copied_step(target) > 0), run.output
    run.kill()
    run.process.wait()
    shutil.rmtree(run.folder)
    return copied_step(target)


@pytest.mark.usefixtures("s3")
def test_a_lost_machine_costs_the_steps_since_the_last_copy_and_not_a_bit(
    start: Callable[..., Run],
    tmp_path: Path,
) -> None:
    """One process bit for bit; then two ranks, continued by one, with the same losses to rounding."""
    undisturbed = tmp_path / "undisturbed"
    start(undisturbed, 0, *INTERVALS).wait_for_exit()

    def words(target: str) -> list[Any]:
        return [*INTERVALS, "--checkpoint-to", target, "--resume", "auto"]

    def caches(name: str) -> dict[str, str]:
        return {"HF_HOME": str(tmp_path / name), "HF_HUB_OFFLINE": "1"}

    one = "s3://models/one"
    lose_the_machine(start(tmp_path / "first", 0, *words(one), **caches("first-cache")), one)
    shutil.rmtree(tmp_path / "first-cache", ignore_errors=True)
    output = start(tmp_path / "second", 0, *words(one), **caches("second-cache")).wait_for_exit()
    assert f"from {one}: " in output
    assert "every checksum compared" in output
    assert_the_same_run(tmp_path / "second", undisturbed)

    two = "s3://models/two"
    lost = lose_the_machine(start(tmp_path / "two", 2, *words(two)), two)
    output = start(tmp_path / "alone", 1, *words(two)).wait_for_exit()
    assert "for another number of devices" in output
    assert f"fetching checkpoint-{lost} from {two}" in output
    difference = drift(history(tmp_path / "alone"), history(undisturbed))
    print(
        f"2 ranks, lost after the copy of step {lost} -> 1: losses differ by {difference:.1e} from one process's"
    )
    assert difference < 1e-4
    assert 0 < lost < copied_step(two) == 60
