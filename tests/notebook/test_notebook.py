"""The notebook runs anywhere, cell by cell, stops where a cell fails, and chooses nothing but options."""

from __future__ import annotations

import ast
import base64
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from click.testing import CliRunner, Result

from notebooks import cells as cell_functions
from tests.conftest import jsonl, rows_of
from training import errors, notebook, trainer
from training.consts import DEMO, METRICS_FILE, SAMPLE_INSTRUCTIONS
from training.errors import TrainingFailedError
from training.launch.local import deepspeed_command, launch
from training.machine.catalogue import find_machine
from training.model.generation import generate_response, load_model_tokenizer_for_generate
from training.options.command_line import option_words
from training.plan.presets import DEMO_RECIPE, preset_options
from training.storage.metrics import read
from training.storage.record import read_run_record

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "train_dolly.py"
HEAD = "# Databricks notebook source\n"
NEXT = "\n# COMMAND ----------\n\n"
PATIENCE = 900  # seconds for what takes a minute or two, on a busy machine


def source(*cells: str) -> str:
    return HEAD + NEXT.join(cells)


def command(file: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "training.notebook", str(file), "--out", str(out), *options]


def invoke(file: object, out: object, *options: object) -> Result:
    return CliRunner().invoke(notebook.main, [str(file), "--out", str(out), *map(str, options)])


def outputs(cell: nbformat.NotebookNode) -> str:
    """What a code cell printed."""
    return "".join(output.get("text", "") for output in cell.outputs)


def displayed(cell: nbformat.NotebookNode) -> list[dict[str, str]]:
    """What a code cell displayed, each by its kinds."""
    return [output.data for output in cell.outputs if "data" in output]


def code_cells(out: Path) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(out, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def cell_with(cells: list[nbformat.NotebookNode], text: str) -> int:
    (number,) = [number for number, cell in enumerate(cells) if text in cell.source]
    return number


def widgets(**chosen: str) -> notebook.Widgets:
    """The stand-in with all widgets of the notebook at their defaults, but for those chosen."""
    filled = notebook.Widgets()
    for name in notebook.widget_names(notebook.read_source(NOTEBOOK.read_text())):
        filled.text(
            name, {"gpu_family": "a100", "local_training_root": "/local", "num_nodes": "1"}.get(name, "")
        )
    for name, value in chosen.items():
        filled.text(name, value)
    return filled


def run_cell(text: str, **known: Any) -> dict[str, Any]:
    """The names after the notebook's cell with this text."""
    cells = notebook.read_source(NOTEBOOK.read_text()).cells
    known |= {"cells": cell_functions, "preset_options": preset_options}
    exec(cells[cell_with(cells, text)].source, known)
    return known


def with_a_stopped_run(root: Path) -> str:
    (root / "dolly__a").mkdir()
    (root / "dolly__a" / "run.json").write_text("{}")
    return str(root)


def that_launches(folder: Path, rank: str) -> Path:
    """A notebook whose second cell launches Python code as a rank."""
    file = folder / "n.py"
    file.write_text(
        source(
            f"import sys\n\nsys.path.insert(0, {str(ROOT)!r})\nprint('begun', flush=True)",
            f"from training.launch.local import launch\n\nlaunch([sys.executable, '-c', {rank!r}])",
            "print('never')",
        )
    )
    return file


# --- Databricks source to Jupyter ---------------------------------------------------------------------


def test_each_kind_of_cell_becomes_its_jupyter_cell() -> None:
    read = notebook.read_source(
        source(
            "# MAGIC %md\n# MAGIC # Title\n# MAGIC\n# MAGIC words",
            "# MAGIC %pip install -r ../requirements.txt",
            "# DBTITLE 1,Named\nx = 1\n\nif x:\n    print(x)",
            '# MAGIC %load_ext tensorboard\n# MAGIC %tensorboard --logdir "$runs"',
            "",
        )
    )
    assert [(cell.cell_type, cell.source) for cell in read.cells] == [
        ("markdown", "# Title\n\nwords"),
        ("code", "%pip install -r ../requirements.txt"),
        ("code", "x = 1\n\nif x:\n    print(x)"),
        ("code", '%load_ext tensorboard\n%tensorboard --logdir "$runs"'),
    ]
    nbformat.validate(read)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\n", "whose first line is '# Databricks notebook source'"),
        (source("x = 1", "# MAGIC %md\ny = 1"), "cell 2: '# MAGIC' stands beside plain lines"),
        (source("# MAGIC %sh ls"), "cell 1: '%sh' cannot run outside Databricks"),
        (source("# MAGIC !ls"), "cell 1: '!ls' cannot run outside Databricks"),
    ],
)
def test_what_cannot_run_elsewhere_is_named_with_its_cell(text: str, told: str) -> None:
    with pytest.raises(errors.NotebookSourceError, match=re.escape(told)):
        notebook.read_source(text)


def test_the_notebook_is_valid_python_short_enough_to_read_and_holds_no_training_logic() -> None:
    text = NOTEBOOK.read_text()
    parsed = ast.parse(text)
    cells = notebook.read_source(text).cells
    assert text.count("\n") < 250
    kinds = [cell.cell_type for cell in cells]
    # Each step has words before its code.
    assert kinds.count("markdown") >= 9
    assert kinds[0] == "markdown"
    assert kinds[-1] == "code"
    imported = {
        name
        for node in ast.walk(parsed)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
    }
    assert not {name.split(".")[0] for name in imported} & {
        "torch",
        "transformers",
        "deepspeed",
        "accelerate",
    }
    assert "training.trainer" not in imported


def test_its_widgets_are_those_that_the_docs_name() -> None:
    section = (ROOT / "docs" / "databricks.md").read_text().split("\n## Widgets\n")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert named == notebook.widget_names(notebook.read_source(NOTEBOOK.read_text()))
    assert set(named) == {*"num_gpus gpu_family input_model training_dataset epochs local_training_root".split(),
                          *"dbfs_output_root num_nodes resume mlflow_model_name".split()}  # fmt: skip


# --- what stands in for dbutils -----------------------------------------------------------------------


def test_the_stand_in_gives_defaults_and_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notebook.CHOSEN, json.dumps({"family": "cpu", "count": "3"}))
    dbutils = notebook.StandIn()
    dbutils.widgets.text("count", "1", "How many")
    dbutils.widgets.text("name", "x")
    dbutils.widgets.dropdown("family", "a100", ["a100", "cpu"], "Family")
    dbutils.library.restartPython()
    assert dbutils.widgets.getAll() == {"count": "3", "name": "x", "family": "cpu"}
    assert dbutils.widgets.get("count") == "3"
    with pytest.raises(errors.RunRefusedError, match="family cpu: expected one of a, b"):
        dbutils.widgets.dropdown("family", "a", ["a", "b"])


# --- what the cells ask -------------------------------------------------------------------------------


def test_untouched_widgets_are_dollys_run_and_cpu_alone_is_the_demo(tmp_path: Path) -> None:
    dolly = cell_functions.read_widgets(widgets())
    assert (dolly.input_model, dolly.training_dataset) == ("EleutherAI/gpt-j-6B", "tatsu-lab/alpaca")
    assert (dolly.epochs, dolly.num_gpus, dolly.num_nodes, dolly.published) == (1.0, None, 1, None)
    assert re.fullmatch(r"dolly__\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d", dolly.name)
    assert dolly.output == Path("/local") / dolly.name
    demo = cell_functions.read_widgets(widgets(gpu_family="cpu", dbfs_output_root="dbfs:/models/"))
    assert (demo.input_model, demo.training_dataset, demo.epochs) == (DEMO, DEMO, DEMO_RECIPE["epochs"])
    assert demo.published == f"/dbfs/models/{demo.name}"
    assert cell_functions.read_widgets(widgets(dbfs_output_root="s3://b/f")).published.startswith(
        "s3://b/f/dolly__"
    )


def test_files_beside_the_notebook_are_found_by_the_command_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "rows.jsonl", rows_of(3))
    assert cell_functions.read_widgets(widgets(training_dataset="rows.jsonl")).training_dataset == str(
        tmp_path / "rows.jsonl"
    )


def test_all_that_is_wrong_with_the_widgets_is_told_at_once(tmp_path: Path) -> None:
    wrong = {"num_gpus": "many", "epochs": "nan", "num_nodes": "0", "resume": "b"}
    with pytest.raises(errors.RunRefusedError) as refused:
        cell_functions.read_widgets(widgets(local_training_root=with_a_stopped_run(tmp_path), **wrong))
    assert str(refused.value).splitlines() == [
        f"resume b: no such run in {tmp_path}. There are: dolly__a. Leave it empty for a new run",
        "num_nodes 0: expected a whole number above 0",
        "num_gpus many: expected a whole number above 0",
        "epochs nan: expected a number above 0",
    ]


def test_several_nodes_need_a_folder_that_they_share() -> None:
    with pytest.raises(errors.RunRefusedError, match="/local_disk0/runs: is each node's own"):
        cell_functions.read_widgets(widgets(num_nodes="2", local_training_root="/local_disk0/runs"))
    assert cell_functions.read_widgets(widgets(num_nodes="2", local_training_root="/mnt/efs")).num_nodes == 2


def test_a_stopped_run_is_named_to_go_on_with_it(tmp_path: Path) -> None:
    root = with_a_stopped_run(tmp_path)
    chosen = cell_functions.read_widgets(widgets(resume="dolly__a", local_training_root=root))
    assert chosen.resume
    assert chosen.output == tmp_path / "dolly__a"
    with pytest.raises(errors.RunRefusedError, match=r"has not finished training.* type dolly__a into"):
        cell_functions.finished_record(chosen)


def dolly(**other: Any) -> dict[str, Any]:
    return {"input_model": "EleutherAI/gpt-j-6B", "training_dataset": "tatsu-lab/alpaca", "epochs": 1.0,
            "local_output_dir": "OUT", "dbfs_output_dir": None, "resume": "never"} | other  # fmt: skip


def test_the_plan_of_dollys_run_fits_on_its_machine() -> None:
    table = cell_functions.check_plan(
        dolly(), preset_options("a100", 8), 8, find_machine("8xA100-40GB"), "a100"
    )
    assert "= 64 a step" in table
    assert table.splitlines()[-1].startswith("FITS, with")


def test_a_family_that_does_not_fit_is_refused_with_the_numbers_and_one_that_does() -> None:
    with pytest.raises(errors.RunRefusedError) as refused:
        cell_functions.check_plan(dolly(), preset_options("a100", 4), 4, find_machine("4xA10"), "a100")
    last = str(refused.value).splitlines()[-2:]
    assert re.search(r"GPU memory: [\d.]+ GiB are needed on each A10G, [\d.]+ more than its 22\.0", last[0])
    assert last[1] == "In this notebook: choose gpu_family a10, with which it fits"
    with pytest.raises(errors.RunRefusedError, match=r"cannot compute in bf16.*\n.*choose gpu_family v100"):
        cell_functions.check_plan(
            dolly(), preset_options("a100", 8), 8, find_machine("p3dn.24xlarge"), "a100"
        )


def test_what_could_not_be_written_is_told_beside_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    wrong = dolly(local_output_dir="/dbfs/x/dolly__a", mlflow_model_name="a/b")
    with pytest.raises(errors.RunRefusedError) as refused:
        cell_functions.check_plan(wrong, preset_options("a100", 8), 8, find_machine("8xA100-40GB"), "a100")
    assert "--local-output-dir /dbfs/x/dolly__a: DBFS and Volumes do not support random writes" in str(
        refused.value
    )
    assert "--mlflow-model-name 'a/b': expected one word" in str(refused.value)


def test_a_gpu_family_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.RunRefusedError, match="gpu_family h100: there is no GPU here"):
        cell_functions.find_machine(cell_functions.read_widgets(widgets(gpu_family="h100")))
    machine = cell_functions.find_machine(cell_functions.read_widgets(widgets(gpu_family="cpu")))
    assert (machine.family, machine.count) == ("cpu", 2)


@pytest.mark.parametrize("named", ["", "main.models.dolly"])
def test_the_trainer_takes_what_the_notebook_chooses_also_a_name_for_mlflow(
    tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All options of the cell "Does it fit?", by the trainer's own command line."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    taken = []
    monkeypatch.setattr(
        trainer, "train", lambda options, request: taken.append(options) or {"status": "finished"}
    )
    chosen = {"gpu_family": "cpu", "local_training_root": str(tmp_path), "num_gpus": "4"}
    known = run_cell(
        "find_machine", chosen=cell_functions.read_widgets(widgets(mlflow_model_name=named, **chosen))
    )
    with pytest.raises(SystemExit) as ended:
        trainer.main(option_words(known["options"] | known["recipe"]))
    assert ended.value.code == 0
    assert taken[0].per_device_train_batch_size * taken[0].gradient_accumulation_steps * 4 == 64
    assert (taken[0].lr, taken[0].epochs, taken[0].resume) == (
        DEMO_RECIPE["lr"],
        DEMO_RECIPE["epochs"],
        "never",
    )
    assert taken[0].mlflow_model_name == (named or None)


def test_several_nodes_go_through_spark_and_a_cluster_that_cannot_train_is_refused_shortly(
    tmp_path: Path,
) -> None:
    chosen = cell_functions.read_widgets(
        widgets(gpu_family="cpu", num_nodes="2", local_training_root=str(tmp_path))
    )
    known = {"chosen": chosen, "machine": cell_functions.find_machine(chosen), "num_gpus": 2,
             "options": {"local_output_dir": str(chosen.output)}, "recipe": preset_options("cpu", 4)}  # fmt: skip
    with pytest.raises(errors.RunRefusedError, match=r"Cannot train:\n  - .*[Ss]park"):
        run_cell("launch(command", **known)


def test_two_runs_on_one_machine_meet_at_ports_of_their_own() -> None:
    ports = {
        words[words.index("--master_port") + 1] for words in (deepspeed_command({}, 2) for _ in range(2))
    }
    assert len(ports) == 2


def test_a_table_shows_texts_as_they_are() -> None:
    table = cell_functions.Table(["asked", "told"], [["a <b>?", "x\ny & z"]])
    assert "a &lt;b&gt;?" in table._repr_html_()
    assert "x\ny &amp; z" in table._repr_html_()
    assert repr(table) == "a <b>?\n  told  x y & z"


def test_answers_over_time_stand_side_by_side() -> None:
    samples = [
        {"step": step, "epoch": 0.0, "instruction": asked, "input": "", "response": f"{asked} {step}"}
        for step in (0, 1000)
        for asked in ("A?", "B?")
    ]
    table = cell_functions.answer_stages(samples)
    assert table.headings == ["instruction", "step 0", "step 1,000"]
    assert table.rows == [["A?", "A? 0", "A? 1000"], ["B?", "B? 0", "B? 1000"]]


# --- running it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "options", "told"),
    [
        (
            NOTEBOOK,
            ["--set", "gpu=cpu"],
            "--set gpu=cpu: expected WIDGET=VALUE. The widgets are: gpu_family, num_gpus,",
        ),
        (NOTEBOOK, ["--set", "gpu_family"], "--set gpu_family: expected WIDGET=VALUE"),
        (NOTEBOOK, ["--out", "/proc/no/such.ipynb"], "--out /proc/no/such.ipynb: cannot be written"),
        (NOTEBOOK, ["--out", NOTEBOOK], "expected a name that ends with .ipynb"),
        ("broken.py", ["--no-run"], "line 2 of a cell is no Python"),
    ],
)
def test_what_cannot_be_run_is_told_before_any_cell_runs(
    tmp_path: Path, file: object, options: list[object], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(source("print(1)\nfor in\n"))
    before = NOTEBOOK.read_bytes()
    result = invoke(file, "out.ipynb", *options)
    assert result.exit_code == 2
    assert NOTEBOOK.read_bytes() == before
    assert told in " ".join(result.output.split())
    assert not (tmp_path / "out.ipynb").exists()


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbclient", None)
    result = invoke(NOTEBOOK, tmp_path / "out.ipynb")
    assert result.exit_code == 1
    assert "nbclient is not installed. Type pip install '.[notebook]'" in result.output


def test_a_notebook_for_jupyter_says_itself_what_was_chosen(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.ipynb"
    result = invoke(NOTEBOOK, out, "--no-run", "--set", "gpu_family=cpu")
    assert result.exit_code == 0, result.output
    cells = code_cells(out)
    assert cells[0].source.endswith("""= '{"gpu_family": "cpu"}'  # chosen with --set""")
    assert all(cell.execution_count is None and not cell.outputs for cell in cells)


def test_a_failed_cell_stops_the_notebook_with_its_message_alone(tmp_path: Path) -> None:
    file = that_launches(tmp_path, "print('a rank says why'); raise SystemExit(70)")
    out = tmp_path / "out.ipynb"
    result = subprocess.run(command(file, out), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines() == ["begun", "a rank says why"]
    assert result.stderr.splitlines() == [
        "Training ended with exit code 70: training could not continue: see the reason above. "
        "Continue with --resume auto",
        "Its last lines:",
        "a rank says why",
        f"{file}: a cell failed, and those after it did not run. What they gave is in {out}",
    ]
    cells = code_cells(out)
    assert [cell.execution_count for cell in cells] == [1, 2, None]
    assert cells[1].outputs[-1].ename == "TrainingFailedError"


@pytest.mark.parametrize("signal_sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_notebook_lets_training_save(tmp_path: Path, signal_sent: signal.Signals) -> None:
    out = tmp_path / "out.ipynb"
    rank = (
        "import signal, sys, time\n"
        "def save(*_):\n    time.sleep(1); print('saved', flush=True); sys.exit(75)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "print('training', flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        command(that_launches(tmp_path, rank), out),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert [process.stdout.readline() for _ in range(2)] == ["begun\n", "training\n"]
    process.send_signal(signal_sent)
    said, failed = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, failed
    assert said == "saved\n"
    assert "exit code 75: interrupted" in failed
    assert [cell.execution_count for cell in code_cells(out)] == [1, 2, None]


def test_a_line_without_end_does_not_drown_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    wide = "import sys; print('x' * 5000); sys.exit('why')"
    with pytest.raises(TrainingFailedError) as failed:
        launch([sys.executable, "-c", wide])
    assert "x" * 5000 in capsys.readouterr().out
    assert "x" * 401 not in str(failed.value)
    assert str(failed.value).endswith(" ...\nwhy")


# --- the whole notebook, really run -------------------------------------------------------------------


class Run:
    """`python -m training.notebook notebooks/train_dolly.py` on the demo, as a user starts it."""

    def __init__(self, folder: Path, **chosen: str) -> None:
        self.out, self.log = folder / "executed.ipynb", folder / f"{time.monotonic_ns()}.log"
        self.root, self.models = folder / "runs", folder / "models"
        chosen = {"gpu_family": "cpu", "local_training_root": str(self.root)} | chosen
        given = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
        given += ["--set", f"dbfs_output_root={self.models}"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command(NOTEBOOK, self.out, *given), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def name(self) -> str:
        (folder,) = [each for each in self.root.iterdir() if each.is_dir()]
        return folder.name

    def wait_for(self, words: str) -> None:
        end = time.monotonic() + PATIENCE
        while words not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.05)

    def end(self) -> int:
        return self.process.wait(PATIENCE)

    def processes(self) -> list[psutil.Process]:
        """Those that name the folder of this run, but for the notebook's own."""
        there = [each for each in psutil.process_iter(["cmdline"]) if each.pid != self.process.pid]
        return [each for each in there if str(self.root) in " ".join(each.info["cmdline"] or [])]


def whole(run: Run) -> list[nbformat.NotebookNode]:
    """The code cells of a run that went through, which are checked: nothing failed, and nothing is noise."""
    assert run.end() == 0, run.said
    cells = code_cells(run.out)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"], cell
    assert not run.processes(), "something is left of it"
    return cells


def real(test: Callable[[Path], None]) -> Callable[[Path], None]:
    """Marks a test that trains."""
    marks = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
    return pytest.mark.slow(pytest.mark.timeout(1800)(marks(test)))


@real
def test_every_cell_runs_on_the_demo_and_leaves_a_published_model_that_answers(tmp_path: Path) -> None:
    run = Run(tmp_path, epochs="0.3")
    cells = whole(run)
    trained = outputs(cells[cell_with(cells, "launch(command")])
    assert "on 2 CPUs in bf16, DeepSpeed ZeRO-3" in trained
    assert trained in run.said  # shown as it came
    assert len(trained.splitlines()) < 100, trained
    drawn = displayed(cells[cell_with(cells, "draw_run")])
    (picture,) = [data["image/png"] for data in drawn if "image/png" in data]
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    table, *_ = displayed(cells[cell_with(cells, "cells.answers")])
    for instruction in SAMPLE_INSTRUCTIONS:
        assert instruction in table["text/plain"]
    rows = re.findall(r"<tr>(.*?)</tr>", table["text/html"], re.DOTALL)[1:]
    answers = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)[1:3] for row in rows]
    assert len(answers) == len(SAMPLE_INSTRUCTIONS) + 3
    assert all(before != after for before, after in answers)
    (stages,) = displayed(cells[cell_with(cells, "answer_stages")])
    assert re.findall(r"<th[^>]*>(.*?)</th>", stages["text/html"]) == ["instruction", "step 0", "step 27"]
    published = run.models / run.name
    assert read_run_record(published)["status"] == "finished"
    assert (published / "manifest.json").is_file()
    assert str(published) in outputs(cells[-1])
    model, tokenizer = load_model_tokenizer_for_generate(str(published))
    assert generate_response("Name three colours.", model=model, tokenizer=tokenizer, do_sample=False, top_p=None,
                             top_k=None, max_new_tokens=8) is not None  # fmt: skip


@real
def test_a_rank_that_is_killed_stops_run_all_at_the_training_cell_with_the_reason(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.wait_for("step 20/")
    ranks = {each: each.environ() for each in run.processes()}
    (rank,) = [
        each for each, given in ranks.items() if given.get("RANK") == "1" and "DOLLY_SUPERVISED" in given
    ]
    rank.kill()
    assert run.end() == 1
    cells = code_cells(run.out)
    training = cell_with(cells, "launch(command")
    error = cells[training].outputs[-1]
    assert error.ename == "TrainingFailedError"
    told = "\n".join(error.traceback)
    assert re.match(r"Training ended with exit code \d+: \w", told)
    assert "Rank 1 ended: killed" in told
    assert told.endswith(
        f"To go on with this run, type {run.name} into the widget resume, and run all cells again."
    )
    assert len(told.splitlines()) < 30
    assert "Traceback" not in told
    assert told in run.said
    later = cells[training + 1 :]
    assert later
    assert all(cell.execution_count is None and not cell.outputs for cell in later)
    assert not run.models.exists()
    assert not run.processes(), "something is left of it"


@real
def test_a_stopped_run_goes_on_by_its_name(tmp_path: Path) -> None:
    run = Run(tmp_path, epochs="0.4")
    run.wait_for("step 20/36")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 1
    assert "Stopped. To go on" in run.said
    assert f"type {run.name} into the widget resume" in run.said
    (stopped,) = (run.root / run.name).glob("checkpoint-*")
    assert 20 <= int(stopped.name.split("-")[1]) < 36
    name = run.name
    again = Run(tmp_path, epochs="0.4", resume=name)
    whole(again)
    assert f"the run goes on from {stopped}" in again.said
    assert again.name == name
    assert read_run_record(again.models / name)["status"] == "finished"
    steps = [entry["step"] for entry in read(again.root / name / METRICS_FILE) if "loss" in entry]
    assert steps == sorted(set(steps))
    assert steps[-1] <= 36
