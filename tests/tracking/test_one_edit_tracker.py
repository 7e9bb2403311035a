"""Adding a tracker takes one edit in one file."""

from __future__ import annotations

import json
from pathlib import Path

from tests.trees import edited_copy, run_in

NEW = """class Lines(TrainerCallback):
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        with open(self.file, "a") as file:
            file.write(f"{state.global_step} {sorted(logs)}\\n")


class TensorBoardLog("""
DEMO = ["--input-model", "demo", "--training-dataset", "demo", "--max-steps", "2", "--test-size", "100"]


def test_a_new_tracker_receives_every_log_entry_of_a_run(tmp_path: Path) -> None:
    tree = edited_copy(
        tmp_path / "tree",
        "training/tracking/callbacks.py",
        ("class TensorBoardLog(", NEW),
        (
            "            ProgressLog(),\n",
            '            Lines(output / "lines.txt"),\n            ProgressLog(),\n',
        ),
    )
    output = tmp_path / "out"
    words = [*DEMO, "--eval-steps", "10", "--logging-steps", "1", "--local-output-dir", str(output)]
    trained = run_in(tree, "training.trainer", *words)
    assert trained.returncode == 0, trained.stdout
    lines = (output / "lines.txt").read_text().splitlines()
    logged = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [int(line.split()[0]) for line in lines[: len(logged)]] == [entry["step"] for entry in logged]
    assert sum("'loss'" in line for line in lines) == 2
    assert sum("'eval_loss'" in line for line in lines) == 2, "before the first step, and after the last"
