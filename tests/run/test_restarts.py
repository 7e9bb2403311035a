"""Real runs that are started again, by `training.launch` and by torchrun, and end like an undisturbed one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.run.test_kills import assert_the_same_run, folder, rows, start, undisturbed  # noqa: F401  (fixtures)
from tests.starts import ROOT, record, torchrun, without_a_launcher
from training.launch.exits import INTERRUPTED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


def restarter(ranks: int) -> list[str]:
    return [sys.executable, "-m", "training.launch", "--num-gpus", str(ranks), "--"]


def torchrun_that_restarts(ranks: int) -> list[str]:
    words = torchrun(ranks)
    return [*words[:3], "--max-restarts=2", *words[3:]]


def test_a_killed_run_is_restarted_until_a_signal_ends_it_and_torchruns_own_restarts_go_on_from_there(
    start,  # noqa: F811
    undisturbed,  # noqa: F811
    folder,  # noqa: F811
):
    run = start(folder, 2, by=restarter)
    assert run.wait_until(run.stepping), run.output
    os.kill(run.pids("rank")[0], signal.SIGKILL)
    assert run.wait_until(lambda: "s/step" in run.output.partition("\nRestart 1 of ")[2]), run.output
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == INTERRUPTED
    assert run.output.count("\nRestart ") == 1
    assert record(folder)["status"] == "stopped"
    run = start(folder, 2, "--resume", "auto", by=torchrun_that_restarts)
    assert run.wait_until(run.stepping), run.output
    os.kill(run.pids("rank")[0], signal.SIGKILL)
    run.wait_for_exit()
    # Not in the last lines of a killed rank 0, which are repeated with a margin.
    assert len(re.findall("^the run continues from", run.output, re.MULTILINE)) == 2
    assert_the_same_run(folder, undisturbed(2))


@pytest.mark.long
def test_a_run_survives_three_kills_at_random_moments_with_the_weights_of_an_undisturbed_one():
    soak = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--kills", "3"],
        cwd=ROOT,
        env=without_a_launcher(),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert soak.returncode == 0, soak.stdout + soak.stderr
    assert "3 kills survived" in soak.stdout
    assert "bit for bit" in soak.stdout
