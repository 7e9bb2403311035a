"""The complete notebook on the demo: stopped and continued through every cell; ended with the reason when a rank is killed."""

from __future__ import annotations

import base64
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest

from tests.notebook.test_notebook import NOTEBOOK, ROOT, TIMEOUT, cell_with, code_cells, command, outputs
from training.consts import METRICS_FILE, SAMPLE_INSTRUCTIONS
from training.model.generation import generate_response, load_model_tokenizer_for_generate
from training.storage.checkpoint import checkpoints
from training.storage.metrics import read
from training.storage.record import read_run_record


def displayed(cell: nbformat.NotebookNode) -> list[dict[str, str]]:
    """The displayed objects of a code cell, each as a mapping of MIME types."""
    return [output.data for output in cell.outputs if "data" in output]


class Run:
    """`python -m training.notebook notebooks/train_dolly.py` on the demo, as a user starts it."""

    def __init__(self, folder: Path, **values: str) -> None:
        self.out, self.log = folder / "executed.ipynb", folder / f"{time.monotonic_ns()}.log"
        self.root, self.models = folder / "runs", folder / "models"
        values = {"gpu_family": "cpu", "local_training_root": str(self.root)} | values
        options = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
        options += ["--set", f"dbfs_output_root={self.models}"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command(NOTEBOOK, self.out, *options), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def name(self) -> str:
        (folder,) = [path for path in self.root.iterdir() if path.is_dir()]
        return folder.name

    def wait_for(self, text: str, since: int = 0) -> None:
        end = time.monotonic() + TIMEOUT
        while text not in self.printed[since:]:
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < end, self.printed
            time.sleep(0.05)

    def end(self) -> int:
        return self.process.wait(TIMEOUT)

    def processes(self) -> list[psutil.Process]:
        """Processes with this run's folder in their command line, except the notebook's own."""
        running = [process for process in psutil.process_iter(["cmdline"]) if process.pid != self.process.pid]
        return [process for process in running if str(self.root) in " ".join(process.info["cmdline"] or [])]


def finished_cells(run: Run) -> list[nbformat.NotebookNode]:
    """The code cells of a successful run. Checks that no cell failed or wrote to stderr and no process is left."""
    assert run.end() == 0, run.printed
    cells = code_cells(run.out)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"], cell
    assert not run.processes(), "a process is left"
    return cells


def trains(test: Callable[[Path], None]) -> Callable[[Path], None]:
    """Marks a test that trains."""
    marks = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
    return pytest.mark.slow(pytest.mark.timeout(1800)(marks(test)))


def assert_shows_all_that_a_run_made(run: Run, cells: list[nbformat.NotebookNode]) -> None:
    """Output of training, picture, answers before and after, evaluation; and a published model that answers."""
    trained = outputs(cells[cell_with(cells, "launch(command")])
    assert "on 2 CPUs in fp32, DeepSpeed ZeRO-3" in trained
    assert trained in run.printed  # printed during training
    assert len(trained.splitlines()) < 100, trained
    objects = displayed(cells[cell_with(cells, "draw_run")])
    (picture,) = [data["image/png"] for data in objects if "image/png" in data]
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    table, *_ = displayed(cells[cell_with(cells, "cells.generate_answers")])
    for instruction in SAMPLE_INSTRUCTIONS:
        assert instruction in table["text/plain"]
    rows = re.findall(r"<tr>(.*?)</tr>", table["text/html"], re.DOTALL)[1:]
    answers = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)[1:3] for row in rows]
    assert len(answers) == len(SAMPLE_INSTRUCTIONS) + 3
    assert all(before != after for before, after in answers)
    (stages,) = displayed(cells[cell_with(cells, "answers_by_step")])
    published = run.models / run.name
    record = read_run_record(published)
    last = f"step {record['steps']}"
    assert re.findall(r"<th[^>]*>(.*?)</th>", stages["text/html"]) == ["instruction", "step 0", last]
    assert record["status"] == "finished"
    assert (published / "manifest.json").is_file()
    assert str(published) in outputs(cells[cell_with(cells, "results.usage")])
    (evaluation,) = displayed(cells[-1])
    for text in ("the first 100 of the 400 rows that the run held out", "exact match", "tuned - base"):
        assert text in evaluation["text/html"]
    model, tokenizer = load_model_tokenizer_for_generate(str(published))
    assert generate_response("Name three colours.", model=model, tokenizer=tokenizer, do_sample=False, top_p=None,
                             top_k=None, max_new_tokens=8) is not None  # fmt: skip


def rank_1(run: Run) -> psutil.Process:
    ranks = {process: process.environ() for process in run.processes()}
    (rank,) = [
        process
        for process, variables in ranks.items()
        if variables.get("RANK") == "1" and "DOLLY_SUPERVISED" in variables
    ]
    return rank


@trains
def test_a_killed_run_is_started_again_and_then_stops_the_notebook_at_the_training_cell_with_the_reason(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, restarts="1")
    run.wait_for("step 20/")
    rank_1(run).kill()
    run.wait_for("\nRestart 1 of 1 in 2 s, from its start: exit code")
    run.wait_for("step 20/", since=run.printed.index("\nRestart "))
    rank_1(run).kill()
    assert run.end() == 1
    cells = code_cells(run.out)
    training = cell_with(cells, "launch(command")
    error = cells[training].outputs[-1]
    assert error.ename == "TrainingFailedError"
    message = "\n".join(error.traceback)
    assert re.match(r"Training ended with exit code \d+: \w", message)
    assert "Rank 1 ended: killed" in message
    assert message.endswith(
        f"To continue this run, type {run.name} into the widget resume, and run all cells again."
    )
    assert len(message.splitlines()) < 30
    assert "Traceback" not in message
    assert message in run.printed
    later = cells[training + 1 :]
    assert later
    assert all(cell.execution_count is None and not cell.outputs for cell in later)
    assert not run.models.exists()
    assert not run.processes(), "a process is left"


@trains
def test_a_stopped_notebook_run_continues_by_its_name_through_every_cell(tmp_path: Path) -> None:
    run = Run(tmp_path, epochs="0.3")
    run.wait_for("step 20/")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 1
    assert "Stopped. To continue" in run.printed
    assert f"type {run.name} into the widget resume" in run.printed
    stopped = checkpoints(run.root / run.name)[-1]
    assert int(stopped.name.split("-")[1]) >= 20
    name = run.name
    again = Run(tmp_path, epochs="0.3", resume=name)
    cells = finished_cells(again)
    assert f"the run continues from {stopped}" in again.printed
    assert again.name == name
    record = read_run_record(again.models / name)
    steps = [entry["step"] for entry in read(again.root / name / METRICS_FILE) if "loss" in entry]
    assert steps == sorted(set(steps))
    assert steps[-1] <= record["steps"] > int(stopped.name.split("-")[1])
    assert_shows_all_that_a_run_made(again, cells)
