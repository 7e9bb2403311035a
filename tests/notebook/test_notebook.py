"""The notebook runs without Databricks, stops at a cell that fails, and only sets the trainer's options."""

from __future__ import annotations

import ast
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from click.testing import CliRunner, Result

from notebooks import cells as cell_functions
from tests.conftest import jsonl, rows_of
from tests.run.test_resume import make_run
from training import errors, notebook, trainer
from training.consts import DEMO
from training.data.conversations import prompt_of_row
from training.data.prompt_files import read_prompts
from training.errors import TrainingFailedError
from training.launch.local import deepspeed_command
from training.launch.restart import launch
from training.machine.catalogue import find_machine
from training.options.command_line import option_words
from training.options.trainer_options import TrainingOptions
from training.plan.presets import DEMO_RECIPE, method_options, preset_options
from training.run.mirror import Mirror
from training.storage.record import read_run_record

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "train_dolly.py"
HEAD = "# Databricks notebook source\n"
NEXT = "\n# COMMAND ----------\n\n"
TIMEOUT = 900  # seconds; runs take a minute or two, longer on a busy machine


def source(*cells: str) -> str:
    return HEAD + NEXT.join(cells)


def command(file: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "training.notebook", str(file), "--out", str(out), *options]


def invoke(file: object, out: object, *options: object) -> Result:
    return CliRunner().invoke(notebook.main, [str(file), "--out", str(out), *map(str, options)])


def outputs(cell: nbformat.NotebookNode) -> str:
    """The printed text of a code cell."""
    return "".join(output.get("text", "") for output in cell.outputs)


def code_cells(out: Path) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(out, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def cell_with(cells: list[nbformat.NotebookNode], text: str) -> int:
    (number,) = [number for number, cell in enumerate(cells) if text in cell.source]
    return number


def widgets(**values: str) -> notebook.Widgets:
    """The notebook's widgets with their default values, except for `values`."""
    filled = notebook.Widgets()
    for name in notebook.widget_names(notebook.read_source(NOTEBOOK.read_text())):
        filled.text(
            name, {"gpu_family": "a100", "local_training_root": "/local", "num_nodes": "1"}.get(name, "")
        )
    for name, value in values.items():
        filled.text(name, value)
    return filled


def run_cell(text: str, **names: Any) -> dict[str, Any]:
    """Runs the notebook's cell that contains `text`, and returns its variables."""
    cells = notebook.read_source(NOTEBOOK.read_text()).cells
    names |= {"cells": cell_functions, "preset_options": preset_options}
    exec(cells[cell_with(cells, text)].source, names)
    return names


def folder_with_stopped_run(root: Path) -> str:
    (root / "dolly__a").mkdir()
    (root / "dolly__a" / "run.json").write_text("{}")
    return str(root)


def launching_notebook(folder: Path, rank: str) -> Path:
    """A notebook whose second cell launches the Python code `rank`."""
    file = folder / "n.py"
    file.write_text(
        source(
            f"import sys\n\nsys.path.insert(0, {str(ROOT)!r})\nprint('started', flush=True)",
            f"from training.launch.restart import launch\n\nlaunch([sys.executable, '-c', {rank!r}])",
            "print('never')",
        )
    )
    return file


# --- Databricks source to Jupyter ---------------------------------------------------------------------


def test_each_kind_of_databricks_cell_is_converted_to_a_jupyter_cell() -> None:
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
    ("text", "message"),
    [
        ("x = 1\n", "whose first line is '# Databricks notebook source'"),
        (source("x = 1", "# MAGIC %md\ny = 1"), "cell 2: has lines with and without '# MAGIC'"),
        (source("# MAGIC %sh ls"), "cell 1: '%sh' cannot run outside Databricks"),
        (source("# MAGIC !ls"), "cell 1: '!ls' cannot run outside Databricks"),
        (source("x = 1", "y = 2\nfor in"), "cell 2: line 2 is not Python (invalid syntax): for in"),
    ],
)
def test_cells_that_need_databricks_are_refused_with_their_number(text: str, message: str) -> None:
    with pytest.raises(errors.NotebookSourceError, match=re.escape(message)):
        notebook.read_source(text)


def test_the_notebook_is_valid_python_under_250_lines_without_training_logic() -> None:
    text = NOTEBOOK.read_text()
    parsed = ast.parse(text)
    cells = notebook.read_source(text).cells
    assert text.count("\n") < 250
    kinds = [cell.cell_type for cell in cells]
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


def test_the_docs_list_exactly_the_widgets_of_the_notebook() -> None:
    section = (ROOT / "docs" / "databricks.md").read_text().split("\n## Widgets\n")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert named == notebook.widget_names(notebook.read_source(NOTEBOOK.read_text()))
    assert set(named) == {*"num_gpus gpu_family input_model training_dataset test_size epochs local_training_root".split(),
                          *"dataset_config dataset_split dataset_revision dbfs_output_root num_nodes resume".split(),
                          "checkpoint_root", "restarts", "mlflow_model_name", "method"}  # fmt: skip


# --- the replacement of dbutils -----------------------------------------------------------------------


def test_the_replacement_of_dbutils_returns_defaults_and_set_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notebook.WIDGET_VALUES, json.dumps({"family": "cpu", "count": "3"}))
    dbutils = notebook.DbutilsStandIn()
    dbutils.widgets.text("count", "1", "How many")
    dbutils.widgets.text("name", "x")
    dbutils.widgets.dropdown("family", "a100", ["a100", "cpu"], "Family")
    dbutils.library.restartPython()
    assert dbutils.widgets.getAll() == {"count": "3", "name": "x", "family": "cpu"}
    assert dbutils.widgets.get("count") == "3"
    with pytest.raises(errors.RunRefusedError, match="family cpu: expected one of a, b"):
        dbutils.widgets.dropdown("family", "a", ["a", "b"])


# --- functions of the cells ---------------------------------------------------------------------------


def test_default_widgets_are_dollys_run_and_gpu_family_cpu_is_the_demo(tmp_path: Path) -> None:
    dolly = cell_functions.read_widgets(widgets())
    assert (dolly.input_model, dolly.training_dataset) == ("EleutherAI/gpt-j-6B", ("tatsu-lab/alpaca",))
    assert (dolly.epochs, dolly.num_gpus, dolly.num_nodes, dolly.published) == (1.0, None, 1, None)
    assert re.fullmatch(r"dolly__\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d", dolly.name)
    assert dolly.output == Path("/local") / dolly.name
    demo = cell_functions.read_widgets(widgets(gpu_family="cpu", dbfs_output_root="dbfs:/models/"))
    assert (demo.input_model, demo.training_dataset, demo.epochs) == (DEMO, (DEMO,), DEMO_RECIPE["epochs"])
    assert demo.published == f"/dbfs/models/{demo.name}"
    for root in ("s3://b/f", "/"):
        chosen = cell_functions.read_widgets(widgets(dbfs_output_root=root))
        assert chosen.published == f"{root.rstrip('/')}/{chosen.name}"


def test_a_run_is_continued_from_the_copies_of_its_checkpoints_if_its_folder_is_gone(tmp_path: Path) -> None:
    copies, output = tmp_path / "copies" / "dolly", tmp_path / "runs" / "dolly"
    chosen = {"local_training_root": str(output.parent), "checkpoint_root": f"{copies.parent}/"}
    assert cell_functions.read_widgets(widgets()).checkpoint_to is None
    new = cell_functions.read_widgets(widgets(**chosen))
    assert new.checkpoint_to == str(copies.with_name(new.name))
    with pytest.raises(
        errors.RunRefusedError, match=rf"and no copy of its checkpoints in {copies}\. It has no"
    ):
        cell_functions.read_widgets(widgets(**chosen, resume="dolly"))
    output.parent.mkdir()
    make_run(output, 3, id="of-the-run")
    Mirror(str(copies), output, read_run_record(output), 3, 2).close(None)
    shutil.rmtree(output)
    continued = cell_functions.read_widgets(widgets(**chosen, resume="dolly"))
    assert (continued.checkpoint_to, continued.output, continued.resume) == (str(copies), output, True)


def test_the_widgets_choose_a_part_of_a_dataset_on_the_hub() -> None:
    chosen = cell_functions.read_widgets(
        widgets(training_dataset="a/b", dataset_split=" test ", dataset_revision="v1")
    )
    part = {"dataset_split": "test", "dataset_revision": "v1"}
    assert chosen.dataset_options == {"training_dataset": ("a/b",)} | part
    options = TrainingOptions(local_output_dir="out", **chosen.dataset_options)
    assert options.dataset_selection == chosen.dataset_selection == {"split": "test", "revision": "v1"}


def test_relative_paths_of_datasets_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "rows.jsonl", rows_of(3))
    (tmp_path / "a, b.csv").write_text("instruction,output\n1,2\n")
    typed = " rows.jsonl,a, b.csv , databricks/databricks-dolly-15k,"
    assert cell_functions.read_widgets(widgets(training_dataset=typed)).training_dataset == (
        str(tmp_path / "rows.jsonl"),
        str(tmp_path / "a, b.csv"),
        "databricks/databricks-dolly-15k",
    )


def test_all_problems_of_the_widgets_are_reported_at_once(tmp_path: Path) -> None:
    wrong = {"num_gpus": "many", "epochs": "nan", "num_nodes": "0", "resume": "b"}
    wrong["training_dataset"] = "s3://b/c.csv, demo, ~nobody-here/x"
    with pytest.raises(errors.RunRefusedError) as refused:
        cell_functions.read_widgets(widgets(local_training_root=folder_with_stopped_run(tmp_path), **wrong))
    dataset = "Name a file, a folder of files, or a dataset on the Hub"
    assert str(refused.value).splitlines() == [
        f"training_dataset s3://b/c.csv: is a URL. {dataset}",
        f"training_dataset ~nobody-here/x: there is no user 'nobody-here'. {dataset}",
        f"resume b: no such run in {tmp_path}. Existing runs: dolly__a. Leave it empty for a new run",
        "num_nodes 0: expected a whole number above 0",
        "num_gpus many: expected a whole number above 0",
        "epochs nan: expected a number above 0",
    ]
    with pytest.raises(errors.RunRefusedError, match=r"^epochs inf: expected a number above 0$"):
        cell_functions.read_widgets(widgets(epochs="inf"))


def test_several_nodes_need_a_shared_training_folder() -> None:
    with pytest.raises(errors.RunRefusedError, match="/local_disk0/runs is local to each node"):
        cell_functions.read_widgets(widgets(num_nodes="2", local_training_root="/local_disk0/runs"))
    assert cell_functions.read_widgets(widgets(num_nodes="2", local_training_root="/mnt/efs")).num_nodes == 2


def test_a_stopped_run_is_resumed_by_its_name(tmp_path: Path) -> None:
    root = folder_with_stopped_run(tmp_path)
    choices = cell_functions.read_widgets(widgets(resume="dolly__a", local_training_root=root))
    assert choices.resume
    assert choices.output == tmp_path / "dolly__a"
    with pytest.raises(errors.RunRefusedError, match=r"has not finished training.* type dolly__a into"):
        cell_functions.finished_record(choices)


def dolly(**options: Any) -> dict[str, Any]:
    return {"input_model": "EleutherAI/gpt-j-6B", "training_dataset": "tatsu-lab/alpaca", "epochs": 1.0,
            "local_output_dir": "OUT", "dbfs_output_dir": None, "resume": "never"} | options  # fmt: skip


def test_dollys_run_fits_on_eight_a100s() -> None:
    table = cell_functions.check_plan(
        dolly(), preset_options("a100", 8), 8, find_machine("8xA100-40GB"), "a100"
    )
    assert "= 64 a step" in table
    assert table.splitlines()[-1].startswith("FITS, with")
    faster = 'The fastest that fits: type options["deepspeed"] = "config/ds_z2_bf16_config.json"'
    assert f'\n{faster} (options: the cell "Does it fit?")\n' in table
    line = dolly(
        per_device_train_batch_size=4
    )  # as a line of the cell, it counts more than the family's recipe
    table = cell_functions.check_plan(line, preset_options("a100", 8), 8, find_machine("8xA100-40GB"), "a100")
    assert "4 rows a device x 8 x 1 = 32 a step" in table


def test_a_gpu_family_that_does_not_fit_is_refused_with_numbers_and_one_that_fits() -> None:
    with pytest.raises(errors.RunRefusedError) as refused:
        cell_functions.check_plan(dolly(), preset_options("a100", 4), 4, find_machine("4xA10"), "a100")
    last = str(refused.value).splitlines()[-2:]
    assert re.search(r"GPU memory: [\d.]+ GiB are needed on each A10G, [\d.]+ more than its 22\.0", last[0])
    assert last[1] == "In this notebook: choose gpu_family a10, which fits"
    with pytest.raises(errors.RunRefusedError, match=r"cannot compute in bf16.*\n.*choose gpu_family v100"):
        cell_functions.check_plan(
            dolly(), preset_options("a100", 8), 8, find_machine("p3dn.24xlarge"), "a100"
        )


@pytest.mark.parametrize(
    ("machine", "family", "widget", "expected"),
    [
        ("g5.2xlarge", "a10", "auto", "lora"),
        ("1xRTX-4090", "a10", "", "lora"),
        ("a2-highgpu-1g", "a100", "auto", "lora"),
        ("g5.2xlarge", "a10", "full", "full"),
        ("g5.2xlarge", "a10", "qlora", "qlora"),
        ("Standard_NV36ads_A10_v5", "a10", "auto", "full"),
        ("8xA100-40GB", "a100", "auto", "full"),
        ("8xA100-40GB", "a100", "lora", "lora"),
    ],
)
def test_the_plan_chooses_the_method_on_one_gpu_and_a_chosen_one_counts(
    machine: str, family: str, widget: str, expected: str, tmp_path: Path
) -> None:
    choices = cell_functions.read_widgets(
        widgets(method=widget, gpu_family=family, local_training_root=str(tmp_path))
    )
    place = find_machine(machine)
    options = dolly(local_output_dir=str(choices.output))
    recipe = cell_functions.choose_recipe(choices, options, place.count, place)
    assert recipe == method_options(family, place.count, expected)
    if expected == "full" and place.count == 1 and widget == "full":
        with pytest.raises(errors.RunRefusedError, match="In this notebook: choose method lora, which fits"):
            cell_functions.check_plan(options, recipe, 1, place, family)
        return
    table = cell_functions.check_plan(options, recipe, place.count, place, family)
    assert ("adapters of rank 16" in table, "FITS" in table) == (expected != "full", True)
    words = deepspeed_command(recipe | options, place.count)
    assert ("env" in words, "--deepspeed" in words) == (
        (True, False) if place.count == 1 and expected != "full" else (False, True)
    )


def test_a_base_in_4_bits_is_refused_on_several_gpus_in_the_notebooks_words() -> None:
    recipe = method_options("a10", 4, "qlora")
    with pytest.raises(errors.RunRefusedError, match=r"this run has 4\. Type 1 in the widget num_gpus, or"):
        cell_functions.check_plan(dolly(), recipe, 4, find_machine("4xA10"), "a10")


@pytest.mark.parametrize(
    ("options", "method"),
    [({}, "full"), ({"lora": 8}, "lora"), ({"lora": 8, "quantize": "nf4"}, "qlora")],
)
def test_a_resumed_run_keeps_its_method(options: dict[str, Any], method: str, tmp_path: Path) -> None:
    (tmp_path / "dolly__a").mkdir()
    record = {"status": "stopped", "options": options}
    (tmp_path / "dolly__a" / "run.json").write_text(json.dumps(record))
    values = {"gpu_family": "a10", "resume": "dolly__a", "local_training_root": str(tmp_path)}
    choices = cell_functions.read_widgets(widgets(**values))
    recipe = cell_functions.choose_recipe(choices, dolly(), 1, find_machine("g5.2xlarge"))
    assert recipe == method_options("a10", 1, method)


def test_problems_of_output_folder_and_mlflow_are_reported_with_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    wrong = dolly(local_output_dir="/dbfs/x/dolly__a", mlflow_model_name="a/b")
    with pytest.raises(errors.RunRefusedError) as refused:
        cell_functions.check_plan(wrong, preset_options("a100", 8), 8, find_machine("8xA100-40GB"), "a100")
    message = (
        "/dbfs/x/dolly__a in the widget local_training_root: DBFS and Volumes do not support random writes"
    )
    assert message in str(refused.value)
    assert "'a/b' in the widget mlflow_model_name: expected one word" in str(refused.value)


def test_a_gpu_family_is_refused_on_a_machine_without_gpus(tmp_path: Path) -> None:
    with pytest.raises(errors.RunRefusedError, match="gpu_family h100: this machine has no GPU"):
        cell_functions.find_machine(cell_functions.read_widgets(widgets(gpu_family="h100")))
    machine = cell_functions.find_machine(cell_functions.read_widgets(widgets(gpu_family="cpu")))
    assert (machine.family, machine.count) == ("cpu", 2)


@pytest.mark.parametrize("model_name", ["", "main.models.dolly"])
def test_the_trainer_accepts_the_notebooks_options_with_and_without_an_mlflow_name(
    tmp_path: Path, model_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes the options of the cell "Does it fit?" to the trainer's command line."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    parsed = []
    monkeypatch.setattr(
        trainer, "train", lambda options, request: parsed.append(options) or {"status": "finished"}
    )
    values = {"gpu_family": "cpu", "local_training_root": str(tmp_path), "num_gpus": "4"}
    names = run_cell(
        "find_machine", choices=cell_functions.read_widgets(widgets(mlflow_model_name=model_name, **values))
    )
    with pytest.raises(SystemExit) as ended:
        trainer.main(option_words(names["options"] | names["recipe"]))
    assert ended.value.code == 0
    assert parsed[0].per_device_train_batch_size * parsed[0].gradient_accumulation_steps * 4 == 64
    assert (parsed[0].lr, parsed[0].epochs, parsed[0].resume) == (
        DEMO_RECIPE["lr"],
        DEMO_RECIPE["epochs"],
        "never",
    )
    assert parsed[0].mlflow_model_name == (model_name or None)


def test_rows_are_held_out_by_the_trainers_rule_by_the_widget_or_as_before_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepared(**more: str) -> tuple[dict[str, Any], int]:
        values = {"gpu_family": "cpu", "local_training_root": str(tmp_path)} | more
        names = run_cell("find_machine", choices=cell_functions.read_widgets(widgets(**values)))
        held_out = cell_functions.prepare_rows(names["recipe"] | names["options"], 9999)
        return names["options"], len(held_out)

    own = jsonl(tmp_path / "own.jsonl", rows_of(300))
    options, held_out = prepared(training_dataset=own)
    assert (options.get("test_size"), held_out) == (None, 30)
    assert "30 of 300 rows are held out" in capsys.readouterr().out
    assert prepared()[1] == DEMO_RECIPE["test_size"]
    assert prepared(training_dataset=own, test_size="50")[1] == 50
    with pytest.raises(
        errors.RunRefusedError, match="200 in the widget test_size is more than half of the 300 rows"
    ):
        prepared(training_dataset=own, test_size="200")
    (tmp_path / "dolly__a").mkdir()
    record = {"status": "finished", "options": {"test_size": 200}}
    (tmp_path / "dolly__a" / "run.json").write_text(json.dumps(record))
    assert prepared(training_dataset=own, resume="dolly__a")[1] == 200


def test_held_out_conversations_are_asked_with_the_turns_before_the_last_question(tmp_path: Path) -> None:
    turns = [
        {"instruction": "And then?", "output": f"{n + 1}", "history": [[f"Say {n}.", f"{n}"]]}
        for n in range(80)
    ]
    own = jsonl(tmp_path / "turns.jsonl", turns)
    values = {"gpu_family": "cpu", "local_training_root": str(tmp_path), "training_dataset": own}
    choices = cell_functions.read_widgets(widgets(**values))
    names = run_cell("find_machine", choices=choices)
    rows = cell_functions.prepare_rows(names["recipe"] | names["options"], 2)
    assert len(rows) == 2
    for row in rows:
        number = int(row["output"]) - 1
        assert (
            cell_functions.shown_prompt(row) == f"user: Say {number}.\nassistant: {number}\nuser: And then?"
        )
    prompts = read_prompts(cell_functions.write_prompts(choices, rows))
    assert prompts == [prompt_of_row(row) for row in rows]


def test_several_nodes_use_spark_and_a_cluster_that_cannot_train_is_refused(
    tmp_path: Path,
) -> None:
    choices = cell_functions.read_widgets(
        widgets(gpu_family="cpu", num_nodes="2", local_training_root=str(tmp_path))
    )
    names = {"choices": choices, "machine": cell_functions.find_machine(choices), "num_gpus": 2,
             "options": {"local_output_dir": str(choices.output)}, "recipe": preset_options("cpu", 4)}  # fmt: skip
    with pytest.raises(errors.RunRefusedError, match=r"Cannot train:\n  - .*[Ss]park"):
        run_cell("launch(command", **names)


def test_two_runs_on_one_machine_use_different_ports() -> None:
    ports = {
        words[words.index("--master_port") + 1] for words in (deepspeed_command({}, 2) for _ in range(2))
    }
    assert len(ports) == 2


def test_a_table_escapes_html_and_keeps_line_breaks() -> None:
    table = cell_functions.Table(["prompt", "answer"], [["a <b>?", "x\ny & z"]])
    assert "a &lt;b&gt;?" in table._repr_html_()
    assert "x\ny &amp; z" in table._repr_html_()
    assert repr(table) == "a <b>?\n  answer  x y & z"


def test_answers_of_different_steps_are_columns_of_a_table() -> None:
    samples = [
        {"step": step, "epoch": 0.0, "instruction": text, "input": "", "response": f"{text} {step}"}
        for step in (0, 1000)
        for text in ("A?", "B?")
    ]
    table = cell_functions.answers_by_step(samples)
    assert table.headings == ["instruction", "step 0", "step 1,000"]
    assert table.rows == [["A?", "A? 0", "A? 1000"], ["B?", "B? 0", "B? 1000"]]


# --- python -m training.notebook ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        (
            NOTEBOOK,
            ["--set", "gpu=cpu"],
            "--set gpu=cpu: expected WIDGET=VALUE. The widgets are: gpu_family, method, num_gpus,",
        ),
        (NOTEBOOK, ["--set", "gpu_family"], "--set gpu_family: expected WIDGET=VALUE"),
        (NOTEBOOK, ["--out", "/proc/no/such.ipynb"], "--out /proc/no/such.ipynb: cannot be written"),
        (NOTEBOOK, ["--out", NOTEBOOK], "expected a name that ends with .ipynb"),
        ("broken.py", ["--no-run"], "broken.py: cell 1: line 2 is not Python"),
        ("", [], "cannot be read (Is a directory). Name a file on this machine"),
    ],
)
def test_wrong_options_and_broken_notebooks_are_refused_before_any_cell_runs(
    tmp_path: Path, file: object, options: list[object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(source("print(1)\nfor in\n"))
    before = NOTEBOOK.read_bytes()
    result = invoke(file, "out.ipynb", *options)
    assert result.exit_code == 2
    assert NOTEBOOK.read_bytes() == before
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out.ipynb").exists()


def test_a_missing_package_is_reported_with_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nbclient", None)
    result = invoke(NOTEBOOK, tmp_path / "out.ipynb")
    assert result.exit_code == 1
    assert "nbclient is not installed. Type python -m pip install '.[notebook]'" in result.output


def test_an_unexecuted_notebook_contains_the_values_of_set(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.ipynb"
    result = invoke(NOTEBOOK, out, "--no-run", "--set", "gpu_family=cpu")
    assert result.exit_code == 0, result.output
    cells = code_cells(out)
    assert cells[0].source.endswith("""= '{"gpu_family": "cpu"}'  # chosen with --set""")
    assert all(cell.execution_count is None and not cell.outputs for cell in cells)


def test_a_failed_cell_stops_the_notebook_and_prints_only_its_message(tmp_path: Path) -> None:
    file = launching_notebook(tmp_path, "print('a rank says why'); raise SystemExit(70)")
    out = tmp_path / "out.ipynb"
    result = subprocess.run(command(file, out), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines() == ["started", "a rank says why"]
    assert result.stderr.splitlines() == [
        "Training ended with exit code 70: training could not continue: see the reason above. "
        "Continue with --resume auto",
        "Its last lines:",
        "a rank says why",
        f"{file}: a cell failed, and the cells after it did not run. The outputs are in {out}",
    ]
    cells = code_cells(out)
    assert [cell.execution_count for cell in cells] == [1, 2, None]
    assert cells[1].outputs[-1].ename == "TrainingFailedError"


@pytest.mark.parametrize("signal_sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_notebook_lets_training_save_a_checkpoint(
    tmp_path: Path, signal_sent: signal.Signals
) -> None:
    out = tmp_path / "out.ipynb"
    rank = (
        "import signal, sys, time\n"
        "def save(*_):\n    time.sleep(1); print('saved', flush=True); sys.exit(75)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "print('training', flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        command(launching_notebook(tmp_path, rank), out),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert [process.stdout.readline() for _ in range(2)] == ["started\n", "training\n"]
    process.send_signal(signal_sent)
    stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1, stderr
    assert stdout == "saved\n"
    assert "exit code 75: interrupted" in stderr
    assert [cell.execution_count for cell in code_cells(out)] == [1, 2, None]


def test_a_very_long_output_line_is_cut_in_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    wide = "import sys; print('x' * 5000); sys.exit('why')"
    with pytest.raises(TrainingFailedError) as failed:
        launch([sys.executable, "-c", wide])
    assert "x" * 5000 in capsys.readouterr().out
    assert "x" * 401 not in str(failed.value)
    assert str(failed.value).endswith(" ...\nwhy")
