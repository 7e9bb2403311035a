"""Adding a tracker takes one new file, and its name in one table."""

from __future__ import annotations

import json
from pathlib import Path

from tests.trees import edited_copy, run_in

NEW = '''"""Logs training to lines.txt."""

class Lines:
    title = "Lines"

    def __init__(self, output):
        self.file = output / "lines.txt"

    def attach(self):
        pass

    def send(self, entries):
        with open(self.file, "a") as file:
            for entry in entries:
                file.write(f"{entry.step} {sorted(entry.figures())}\\n")

    def end(self, status):
        with open(self.file, "a") as file:
            file.write(status)


def problems(options):
    return []


def service(record, output):
    return Lines(output)
'''
DEMO = ["--input-model", "demo", "--training-dataset", "demo", "--max-steps", "2", "--test-size", "100"]


def test_a_new_tracker_receives_every_log_entry_of_a_run(tmp_path: Path) -> None:
    tree = edited_copy(
        tmp_path / "tree", "training/options/reporting.py", ('"trackio")', '"trackio", "lines")')
    )
    (tree / "training" / "tracking" / "lines.py").write_text(NEW)
    output = tmp_path / "out"
    words = [*DEMO, "--eval-steps", "10", "--logging-steps", "1", "--local-output-dir", str(output)]
    trained = run_in(tree, "training.trainer", *words, "--report-to", "lines")
    assert trained.returncode == 0, trained.stdout
    *lines, status = (output / "lines.txt").read_text().splitlines()
    logged = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [int(line.split()[0]) for line in lines[: len(logged)]] == [entry["step"] for entry in logged]
    assert sum("'loss'" in line for line in lines) == 2
    assert sum("'eval_loss'" in line for line in lines) == 2, "before the first step, and after the last"
    assert status == "FINISHED"
    assert not (output / "runs").exists(), "TensorBoard was not named"
