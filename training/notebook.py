"""Runs a Databricks notebook where there is no Databricks, and what its cells ask of us wherever they run.

    python -m training.notebook notebooks/train_dolly.py --set gpu_family=cpu --out executed.ipynb

The file is Databricks' source format, valid Python: `# COMMAND ----------` between cells, `# MAGIC` before what is none.
It is turned into a Jupyter notebook and run cell by cell; `dbutils` is a stand-in. Imports no torch at its top.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import gc
import html
import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from training.consts import (
    DEFAULT_INPUT_MODEL,
    DEFAULT_SEED,
    DEFAULT_TRAINING_DATASET,
    DEMO,
    RUN_FILE,
)
from training.demo import RECIPE
from training.faults import target_faults_of
from training.launch import TrainingFailedError
from training.machines import Machine, MachineError
from training.options import OptionsError, TrainingOptions
from training.publish import local_path
from training.settings import PRESETS, preset_options

if TYPE_CHECKING:
    import datasets
    from nbformat import NotebookNode

HEADER = "# Databricks notebook source"
BETWEEN_CELLS = re.compile(r"^# COMMAND -+\s*$", re.MULTILINE)
MAGIC = re.compile(r"^# MAGIC ?")
MAGICS = ("pip", "load_ext", "tensorboard")  # those that mean the same in Databricks and in Jupyter
GIVEN = "DOLLY_WIDGETS"  # environment variable with the widgets' values, as JSON
EXTRA = "Type pip install '.[notebook]'"
START = 600  # seconds that a kernel may take to start on a busy machine

# --- Databricks source to Jupyter ---------------------------------------------------------------------


class SourceError(ValueError):
    """The file is no Databricks notebook, or has a cell that cannot run elsewhere. The message names the cell."""


def read_source(text: str) -> NotebookNode:
    """The notebook of a source file's text, one Jupyter cell for each of its cells."""
    import nbformat

    if not text.startswith(HEADER):
        raise SourceError(f"expected a Databricks notebook, whose first line is {HEADER!r}")
    sources = BETWEEN_CELLS.split(text.removeprefix(HEADER))
    cells = [_cell(source.strip("\n"), number) for number, source in enumerate(sources, 1) if source.strip()]
    language = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=language)


def _cell(source: str, number: int) -> NotebookNode:
    from nbformat.v4 import new_code_cell, new_markdown_cell

    lines = [line for line in source.splitlines() if not line.startswith("# DBTITLE")]
    if not any(map(MAGIC.match, lines)):
        return new_code_cell("\n".join(lines).strip())
    if not all(MAGIC.match(line) or not line.strip() for line in lines):
        raise SourceError(f"cell {number}: '# MAGIC' stands beside plain lines. Give each a cell of its own")
    body = [MAGIC.sub("", line) for line in lines if line.strip()]
    if body[0].split() and body[0].split()[0] == "%md":
        return new_markdown_cell("\n".join([body[0].removeprefix("%md"), *body[1:]]).strip())
    for line in body:
        if not re.match(rf"%({'|'.join(MAGICS)})\b", line):
            raise SourceError(f"cell {number}: {line.split(' ')[0]!r} cannot run outside Databricks")
    return new_code_cell("\n".join(body))


def widget_names(notebook: NotebookNode) -> list[str]:
    """The widgets that its cells make, in order, read from their source."""
    names = []
    for cell in notebook.cells:
        if cell.cell_type != "code" or cell.source.startswith("%"):
            continue
        try:
            tree = ast.parse(cell.source)
        except SyntaxError as error:
            raise SourceError(
                f"line {error.lineno} of a cell is no Python ({error.msg}): {error.text}"
            ) from error
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.match(
                r"dbutils\.widgets\.(text|dropdown|combobox)$", ast.unparse(node.func)
            ):
                names.append(str(ast.literal_eval(node.args[0])))
    return names


def give(notebook: NotebookNode, values: Mapping[str, str]) -> None:
    """Puts a cell before all others that sets the widgets, so that the notebook says itself what was chosen."""
    from nbformat.v4 import new_code_cell

    if values:
        said = f"import os\n\nos.environ[{GIVEN!r}] = {json.dumps(dict(values))!r}  # chosen with --set"
        notebook.cells.insert(0, new_code_cell(said))


# --- what stands in for dbutils -----------------------------------------------------------------------


class Widgets:
    """`dbutils.widgets` without a page to show them on: the default, or what was given by GIVEN."""

    def __init__(self) -> None:
        self._given: dict[str, str] = json.loads(os.environ.get(GIVEN, "{}"))
        self._values: dict[str, str] = {}

    # Databricks' own parameter names.
    def text(self, name: str, defaultValue: str, label: str | None = None) -> None:  # noqa: N803
        self._values[name] = str(self._given.get(name, defaultValue))

    def combobox(
        self,
        name: str,
        defaultValue: str,  # noqa: N803
        choices: Sequence[str],
        label: str | None = None,
    ) -> None:
        self.text(name, defaultValue)

    def dropdown(
        self,
        name: str,
        defaultValue: str,  # noqa: N803
        choices: Sequence[str],
        label: str | None = None,
    ) -> None:
        """Raises RunRefusedError for a value that is none of the choices, which Databricks' page does not offer."""
        self.text(name, defaultValue)
        if self._values[name] not in choices:
            raise RunRefusedError(f"{name} {self._values[name]}: expected one of {', '.join(choices)}")

    def get(self, name: str) -> str:
        return self._values[name]

    def getAll(self) -> dict[str, str]:  # noqa: N802
        return dict(self._values)

    def remove(self, name: str) -> None:
        self._values.pop(name, None)

    def removeAll(self) -> None:  # noqa: N802
        self._values.clear()


class Library:
    """`dbutils.library`."""

    def restartPython(self) -> None:  # noqa: N802
        """Nothing: a Jupyter kernel that has imported none of it finds what %pip installed."""


class StandIn:
    """`dbutils`, as far as a notebook that trains needs it."""

    def __init__(self) -> None:
        self.widgets, self.library = Widgets(), Library()
        warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where ipywidgets are not


# --- what the cells ask -------------------------------------------------------------------------------


class RunRefusedError(RuntimeError):
    """A cell cannot go on; the message says why and what to choose instead."""

    _render_traceback_ = TrainingFailedError._render_traceback_


@dataclass(frozen=True)
class Choices:
    """What the widgets say, defaults put in.

    Attributes:
        num_gpus: of each node; None for all that there are.
        name: of the run, which is the last part of both folders.
        published: where the finished model is copied; None for nowhere.
        resume: whether `name` is that of a run that was begun before.
    """

    num_gpus: int | None
    num_nodes: int
    gpu_family: str
    input_model: str
    training_dataset: str
    epochs: float
    name: str
    output: Path
    published: str | None
    resume: bool
    mlflow_model_name: str | None

    @property
    def is_demo(self) -> bool:
        return self.input_model == DEMO


def default_training_root() -> str:
    """Databricks' local disk where there is one."""
    return "/local_disk0/dolly_training" if Path("/local_disk0").is_dir() else "~/dolly_training"


def default_output_root() -> str:
    """DBFS where it is mounted; elsewhere a folder beside that of the runs."""
    return "/dbfs/dolly_training" if Path("/dbfs").is_dir() else "~/dolly_published"


def read_widgets(widgets: Any) -> Choices:
    """What was chosen. Raises RunRefusedError with everything that is wrong with it."""
    faults: list[str] = []
    said = {name: value.strip() for name, value in widgets.getAll().items()}

    def number(name: str, kind: type, default: Any) -> Any:
        if not said[name]:
            return default
        with contextlib.suppress(ValueError):
            if kind(said[name]) > 0:
                return kind(said[name])
        faults.append(f"{name} {said[name]}: expected {'a whole ' if kind is int else 'a '}number above 0")
        return default

    demo = said["gpu_family"] == "cpu"
    model = _name(said["input_model"]) or (DEMO if demo else DEFAULT_INPUT_MODEL)
    root, name, target = local_path(said["local_training_root"]).absolute(), said["resume"], None
    if not said["local_training_root"]:
        faults.append(f"local_training_root is empty. Name a folder, such as {default_training_root()}")
    elif name and not (root / name / RUN_FILE).is_file():
        runs = sorted(file.parent.name for file in root.glob(f"*/{RUN_FILE}"))
        there = f"There are: {', '.join(runs)}" if runs else "There is none"
        faults.append(f"resume {name}: no such run in {root}. {there}. Leave it empty for a new run")
    nodes = number("num_nodes", int, 1)
    if nodes > 1 and root.is_relative_to("/local_disk0"):
        faults.append(
            f"local_training_root {root}: is each node's own. Name a folder that all {nodes} nodes share"
        )
    name = name or time.strftime("dolly__%Y-%m-%dT%H-%M-%S")
    if said["dbfs_output_root"]:
        folder = said["dbfs_output_root"].rstrip("/")
        target = f"{folder}/{name}" if "://" in folder else str(local_path(folder).absolute() / name)
    choices = Choices(
        num_gpus=number("num_gpus", int, None),
        num_nodes=nodes,
        gpu_family=said["gpu_family"],
        input_model=model,
        training_dataset=_name(said["training_dataset"]) or (DEMO if demo else DEFAULT_TRAINING_DATASET),
        epochs=number("epochs", float, RECIPE["epochs"] if model == DEMO else 1.0),
        name=name,
        output=root / name,
        published=target,
        resume=bool(said["resume"]),
        mlflow_model_name=said["mlflow_model_name"] or None,
    )
    if faults:
        raise RunRefusedError("\n".join(faults))
    return choices


def _name(said: str) -> str:
    """A model or dataset; one that is a file or folder here as the command finds it, which runs in another folder."""
    path = Path(said).expanduser()
    return str(path.resolve()) if said not in ("", DEMO) and path.exists() else said


def find_machine(choices: Choices) -> Machine:
    """This machine, which each node is taken to be like. Raises RunRefusedError where the run cannot use it."""
    from training.checks import kernel_faults, version_faults
    from training.machines import this_machine

    faults = version_faults() or kernel_faults()
    if faults:
        raise RunRefusedError("\n".join(faults))
    try:
        machine = this_machine(choices.output, choices.num_gpus)
    except MachineError as error:
        raise RunRefusedError(f"num_gpus {choices.num_gpus}: {error}. Leave it empty for all") from error
    if machine.is_cpu and choices.gpu_family != "cpu":
        raise RunRefusedError(
            f"gpu_family {choices.gpu_family}: there is no GPU here. Attach the notebook to a machine with GPUs (of a "
            "cluster the driver needs them as well), or choose cpu, which trains the demo"
        )
    if machine.is_cpu:
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # or DeepSpeed warns in every process that it found no other
    return machine


def check_plan(
    options: Mapping[str, Any], recipe: Mapping[str, Any], ranks: int, machine: Machine, family: str
) -> str:
    """The plan of a run by its options and the recipe of its GPU family, as a table.

    Raises RunRefusedError where the run does not fit, with the numbers and what to choose.
    """
    from training.model import ModelError
    from training.plan import as_table, plan_options
    from training.rows import DataError

    def faults_of(recipe: Mapping[str, Any]) -> tuple[str, list[str]]:
        asked = TrainingOptions(**options, **recipe)
        targets = target_faults_of(asked)
        try:
            plan = plan_options(asked, ranks, machine)
        except OptionsError as error:
            return "", targets + error.faults
        table = as_table(plan, None).removesuffix(f"\n  {plan.command}")  # started below, and shown there
        return table, targets + plan.faults

    try:
        table, faults = faults_of(recipe)
        if not faults:
            return table
        if not machine.is_cpu:
            others = [name for name in PRESETS if name not in (family, "cpu")]
            fitting = [name for name in others if not faults_of(preset_options(name, ranks))[1]]
            faults += (
                [f"In this notebook: choose gpu_family {fitting[0]}, with which it fits"] if fitting else []
            )
    except (DataError, ModelError) as error:
        raise RunRefusedError(str(error)) from error
    raise RunRefusedError("\n".join([table, "", *faults]).strip())


def how_to_go_on(choices: Choices) -> str:
    """What to type after a run that ended before its time."""
    if (choices.output / RUN_FILE).is_file():
        return f"To go on with this run, type {choices.name} into the widget resume, and run all cells again."
    return "Nothing was trained. When the cause is mended, run all cells again."


def finished_record(choices: Choices) -> dict[str, Any]:
    """The record of the run (training/record.py). Raises RunRefusedError unless it has finished."""
    from training.record import read_run_record

    record = read_run_record(choices.output)
    if record is None or record["status"] != "finished":
        raise RunRefusedError(f"{choices.name} has not finished training. {how_to_go_on(choices)}")
    return record


def held_out_rows(dataset: str, rows: datasets.Dataset, test_size: int, count: int) -> list[dict[str, str]]:
    """Some rows that the run does not train on, `{instruction, input, output}`; `rows` as `prepare_dataset` gives them."""
    from training.data import split_held_out
    from training.rows import read_columns

    columns = read_columns(dataset)
    numbers = split_held_out(rows, test_size, DEFAULT_SEED)[1]["row"][:count]
    return [
        {key: getattr(columns, key)[number - 1] for key in ("instruction", "input", "output")}
        for number in numbers
    ]


def write_prompts(choices: Choices, rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as a file for --sample-prompts, beside the run's folder, which the trainer wants empty. Returns its name."""
    file = choices.output.with_name(f"{choices.name}.prompts.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({key: row[key] for key in ("instruction", "input")}) for row in rows)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def answers(model: str, rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A model's answers to rows with `instruction` and perhaps `input`. It is loaded for them, and its memory given back."""
    import torch
    import transformers

    from training.generate import generate_responses, load_model_tokenizer_for_generate, printable

    transformers.utils.logging.disable_progress_bar()
    loaded, tokenizer = load_model_tokenizer_for_generate(model)
    transformers.set_seed(DEFAULT_SEED)
    instructions, inputs = [row["instruction"] for row in rows], [row.get("input") for row in rows]
    given = generate_responses(instructions, inputs, model=loaded, tokenizer=tokenizer)
    given = [printable(answer) for answer in given]
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return given


@dataclass(frozen=True)
class Table:
    """Texts side by side: as HTML in a notebook, below each other on a console."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def _repr_html_(self) -> str:
        style = "text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere"

        def line(kind: str, texts: Sequence[str]) -> str:
            cells = (f'<{kind} style="{style}">{html.escape(text)}</{kind}>' for text in texts)
            return f"<tr>{''.join(cells)}</tr>"

        body = "".join(line("td", row) for row in self.rows)
        return f'<table style="width: 100%">{line("th", self.headings)}{body}</table>'

    def __repr__(self) -> str:
        width = max(map(len, self.headings[1:]), default=0)
        lines = []
        for first, *others in self.rows:
            lines.append(f"{first}")
            for heading, text in zip(self.headings[1:], others, strict=True):
                lines.append(f"  {heading:<{width}}  {' '.join(text.split())}")
        return "\n".join(lines)


def answer_stages(samples: Sequence[Mapping[str, Any]]) -> Table:
    """The entries of samples.jsonl (training/metrics.py): a row for each instruction, a column for each stage."""
    steps = sorted({entry["step"] for entry in samples})
    given: dict[str, dict[int, str]] = {}
    for entry in samples:
        question = f"{entry['instruction']}\n{entry['input']}".strip()
        given.setdefault(question, {})[entry["step"]] = entry["response"]
    rows = [[question, *(stages.get(step, "") for step in steps)] for question, stages in given.items()]
    return Table(["instruction", *(f"step {step:,}" for step in steps)], rows)


# --- running it ---------------------------------------------------------------------------------------


class NotebookFailedError(RuntimeError):
    """A cell failed, or the run was stopped; the console has shown why."""


def run(notebook: NotebookNode, folder: Path, out: Path) -> None:
    """Runs every cell in `folder`, showing what they print as it comes, and keeps `out` up to date cell by cell.

    Ctrl-C and SIGTERM interrupt the cell that runs, which lets training save. Raises NotebookFailedError where a cell
    failed: those after it have not run.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from nbclient.util import ensure_async

    stopped = False

    class Client(NotebookClient):
        def output(self, outs: Any, msg: Any, display_id: Any, cell_index: int) -> Any:
            _show(msg["msg_type"], msg["content"])
            return super().output(outs, msg, display_id, cell_index)

    def listen(notebook: NotebookNode) -> None:
        loop = asyncio.get_running_loop()
        for each in (signal.SIGINT, signal.SIGTERM):  # instead of nbclient's, which end the kernel at once
            loop.add_signal_handler(each, stop, loop)

    def stop(loop: asyncio.AbstractEventLoop) -> None:
        nonlocal stopped
        stopped = True
        interrupting.append(loop.create_task(interrupt()))

    async def interrupt() -> None:
        if client.km is not None:
            await ensure_async(client.km.interrupt_kernel())

    def begin(cell: NotebookNode, cell_index: int) -> None:
        if stopped:
            raise NotebookFailedError("stopped")

    def save(**of_the_hook: Any) -> None:
        write(notebook, out)

    interrupting: list[asyncio.Task[None]] = []  # the loop itself holds no task
    client = Client(
        notebook,
        timeout=None,
        startup_timeout=START,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # the kernel's own warnings are about itself
        resources={"metadata": {"path": str(folder)}},
        on_notebook_start=listen,
        on_cell_start=begin,
        on_cell_executed=save,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise NotebookFailedError("a cell failed, and those after it did not run") from error
    except DeadKernelError as error:
        raise NotebookFailedError(
            "its kernel died, most likely because host memory ran out, and no further cell ran"
        ) from error
    finally:
        write(notebook, out)


def _show(kind: str, content: Mapping[str, Any]) -> None:
    """What a cell gives, as text on the console."""
    if kind == "stream":
        stream = sys.stderr if content["name"] == "stderr" else sys.stdout
        print(content["text"], end="", file=stream, flush=True)
    elif kind == "error":
        print("\n".join(content["traceback"]), file=sys.stderr, flush=True)
    elif kind in ("display_data", "execute_result"):
        data = content["data"]
        pictures = [name for name in data if name.startswith("image/")]
        print(f"[{pictures[0]}]" if pictures else data.get("text/plain", ""), flush=True)


def write(notebook: NotebookNode, out: Path) -> None:
    """Replaces the file in one rename, without what died with the kernel: TensorBoard's frame."""
    import nbformat

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "tensorboard-frame" in output.get("data", {}).get("text/html", ""):
                output.data = {"text/plain": "TensorBoard was here while the notebook ran."}
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(nbformat.writes(notebook), encoding="utf-8")
    os.replace(partial, out)


@click.command(context_settings={"max_content_width": 110})
@click.argument("notebook", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--set", "given", multiple=True, metavar="WIDGET=VALUE", help="Choose as on the notebook's page."
)
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.ipynb",
    help="The notebook with what its cells gave, for Jupyter; written after each cell.",
)
@click.option("--no-run", is_flag=True, help="Write the notebook for Jupyter, and run no cell of it.")
def main(notebook: Path, given: tuple[str, ...], out: Path, no_run: bool) -> None:
    """Run every cell of NOTEBOOK, a file in Databricks' source format. Ends with 1 where one of them failed."""
    try:
        import nbclient  # noqa: F401
        import nbformat
    except ImportError as error:
        raise click.ClickException(f"{error.name} is not installed. {EXTRA}") from error
    if out.suffix != ".ipynb":  # the notebook itself must not be written over
        raise click.UsageError(f"--out {out}: expected a name that ends with .ipynb")
    try:
        cells = read_source(notebook.read_text(encoding="utf-8"))
        known = widget_names(cells)
    except (SourceError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{notebook}: {error}") from error
    values = dict(each.partition("=")[::2] for each in given)
    unknown = [each for each in given if "=" not in each or each.partition("=")[0] not in known]
    if unknown:
        raise click.UsageError(
            f"--set {', '.join(unknown)}: expected WIDGET=VALUE. The widgets are: {', '.join(known)}"
        )
    give(cells, values)
    nbformat.validate(cells)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        write(cells, out)
    except OSError as error:
        raise click.UsageError(
            f"--out {out}: cannot be written ({error.strerror}). Name a file in a folder of your own"
        ) from error
    if no_run:
        return
    try:
        run(cells, notebook.absolute().parent, out)
    except NotebookFailedError as error:
        print(f"{notebook}: {error}. What they gave is in {out}", file=sys.stderr)
        sys.exit(1)
    print(f"all cells ran; what they gave is in {out}")


if __name__ == "__main__":
    main()
