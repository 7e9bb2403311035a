"""A new learning-rate schedule needs one edit; bad options are reported without importing torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.trees import ROOT, edited_copy, run_in

DEMO = ["--input-model", "demo", "--training-dataset", "demo", "--test-size", "50", "--eval-steps", "9"]
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "pyarrow")


def test_a_new_decaying_schedule_trains_and_cannot_be_resumed_with_other_max_steps(tmp_path: Path) -> None:
    line = '    "cosine": Schedule(warms_up=True, decays=True),\n'
    new = '    "polynomial": Schedule(warms_up=True, decays=True),\n'
    tree = edited_copy(tmp_path / "tree", "training/options/trainer_options.py", (line, line + new))
    options = [*DEMO, "--local-output-dir", str(tmp_path / "out"), "--lr-scheduler-type", "polynomial"]
    trained = run_in(tree, "training.trainer", *options, "--max-steps", "2", "--logging-steps", "1")
    assert trained.returncode == 0, trained.stdout
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    rates = [entry["learning_rate"] for entry in map(json.loads, metrics) if "learning_rate" in entry]
    assert len(rates) == 2
    assert rates[1] < rates[0] <= 1e-5
    longer = run_in(tree, "training.trainer", *options, "--max-steps", "4", "--resume", "auto")
    assert longer.returncode == 2
    assert "--max-steps was 2, but is now 4" in longer.stdout


def test_all_bad_options_are_reported_together_without_importing_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from click.testing import CliRunner
from training import trainer

wrong = ["--lr", "abc", "--epochs", "-1", "--deepspeed", "none.json", "--warmup-steps", "5", "--max-shard-size", "big",
         "--local-output-dir", "/proc/out"]
result = CliRunner().invoke(trainer.main, wrong)
print(result.exit_code, result.output)
print(CliRunner().invoke(trainer.main, ["--help"]).exit_code)
print([name for name in {HEAVY} if name in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = answer.stdout.splitlines()
    assert lines[0] == "2 Cannot train:", answer.stdout + answer.stderr
    assert lines[-2:] == ["0", "[]"]
    for wrong in (
        "'--lr'",
        "'--epochs'",
        "none.json: No such file",
        "--warmup-steps 5",
        "--max-shard-size big",
        "/proc/out",
    ):
        assert sum(wrong in line for line in lines) == 1, wrong
