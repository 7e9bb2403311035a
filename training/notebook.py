"""Runs a Databricks notebook outside Databricks.

    python -m training.notebook notebooks/train_dolly.py --set gpu_family=cpu --out executed.ipynb

The file has Databricks' source format, which is valid Python: `# COMMAND ----------` separates cells, `# MAGIC` precedes
lines that are not Python. It is converted to a Jupyter notebook and runs cell by cell, with a stand-in for `dbutils`.
Imports no torch."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from training.console import set_up_console
from training.errors import NotebookFailedError, NotebookSourceError, RunRefusedError, install_extra
from training.files import write_file
from training.options.command_line import PathName

if TYPE_CHECKING:
    from nbformat import NotebookNode

HEADER = "# Databricks notebook source"
BETWEEN_CELLS = re.compile(r"^# COMMAND -+\s*$", re.MULTILINE)
MAGIC = re.compile(r"^# MAGIC ?")
SAME_MAGIC = re.compile(r"%(pip|load_ext|tensorboard)\b")  # works in Databricks and in Jupyter
WIDGET = re.compile(r"dbutils\.widgets\.(?:text|dropdown)\(\s*[\"'](\w+)")
WIDGET_VALUES = "DOLLY_WIDGETS"  # environment variable with the widgets' values, as JSON
KERNEL_START_TIMEOUT = 600  # seconds; a busy machine is slow


def read_source(text: str) -> NotebookNode:
    """Converts the text of a source file to a Jupyter notebook. Raises NotebookSourceError."""
    import nbformat

    if not text.startswith(HEADER):
        raise NotebookSourceError(f"expected a Databricks notebook, whose first line is {HEADER!r}")
    sources = BETWEEN_CELLS.split(text.removeprefix(HEADER))
    cells = [_cell(source.strip("\n"), number) for number, source in enumerate(sources, 1) if source.strip()]
    language = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=language)


def _cell(source: str, number: int) -> NotebookNode:
    from nbformat.v4 import new_code_cell, new_markdown_cell

    lines = [line for line in source.splitlines() if not line.startswith("# DBTITLE")]
    if not any(map(MAGIC.match, lines)):
        code = "\n".join(lines).strip()
        try:
            ast.parse(code)
        except SyntaxError as error:
            raise NotebookSourceError(
                f"cell {number}: line {error.lineno} is not Python ({error.msg}): {error.text}"
            ) from error
        return new_code_cell(code)
    if not all(MAGIC.match(line) or not line.strip() for line in lines):
        raise NotebookSourceError(
            f"cell {number}: has lines with and without '# MAGIC'. Put each kind into its own cell"
        )
    body = [MAGIC.sub("", line) for line in lines if line.strip()]
    if body[0].split()[:1] == ["%md"]:
        return new_markdown_cell("\n".join(body).removeprefix("%md").strip())
    for line in body:
        if not SAME_MAGIC.match(line):
            raise NotebookSourceError(f"cell {number}: {line.split(' ')[0]!r} cannot run outside Databricks")
    return new_code_cell("\n".join(body))


def widget_names(notebook: NotebookNode) -> list[str]:
    """Names of the widgets that the cells create, in order, from their source."""
    return [name for cell in notebook.cells for name in WIDGET.findall(cell.source)]


def set_widgets(notebook: NotebookNode, values: Mapping[str, str]) -> None:
    """Inserts a first cell that sets the widgets, so that the notebook shows the chosen values."""
    from nbformat.v4 import new_code_cell

    if values:
        code = (
            f"import os\n\nos.environ[{WIDGET_VALUES!r}] = {json.dumps(dict(values))!r}  # chosen with --set"
        )
        notebook.cells.insert(0, new_code_cell(code))


class Widgets:
    """Stand-in for `dbutils.widgets`. A widget has its default or the value in the variable WIDGET_VALUES."""

    def __init__(self) -> None:
        self._chosen: dict[str, str] = json.loads(os.environ.get(WIDGET_VALUES, "{}"))
        self._values: dict[str, str] = {}

    def text(self, name: str, defaultValue: str, label: str | None = None) -> None:
        self._values[name] = str(self._chosen.get(name, defaultValue))

    def dropdown(
        self, name: str, defaultValue: str, choices: Sequence[str], label: str | None = None
    ) -> None:
        """Raises RunRefusedError for a value that is not one of the choices; Databricks' page offers no others."""
        self.text(name, defaultValue)
        if self._values[name] not in choices:
            raise RunRefusedError(f"{name} {self._values[name]}: expected one of {', '.join(choices)}")

    def get(self, name: str) -> str:
        return self._values[name]

    def getAll(self) -> dict[str, str]:
        return dict(self._values)


class DbutilsStandIn:
    """The parts of `dbutils` that the training notebook uses."""

    def __init__(self) -> None:
        self.widgets = Widgets()
        # No restart: a Jupyter kernel finds packages that %pip installed.
        self.library = SimpleNamespace(restartPython=lambda: None)
        warnings.filterwarnings("ignore", message="IProgress not found")  # from tqdm without ipywidgets


def run(notebook: NotebookNode, folder: Path, out: Path) -> None:
    """Runs every cell in `folder`, shows the output as it is printed, and updates `out` after each cell.

    Ctrl-C and SIGTERM interrupt the running cell, so that training can save. Raises NotebookFailedError if a cell
    failed; the cells after it do not run.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    interrupts: list[asyncio.Task[Any]] = []  # keeps a reference: the event loop holds only weak ones

    class Client(NotebookClient):
        def output(self, outs: Any, msg: Any, display_id: Any, cell_index: int) -> Any:
            _show(msg["msg_type"], msg["content"])
            return super().output(outs, msg, display_id, cell_index)

    def interrupt() -> None:
        kernel: Any = client.km
        interrupts.append(asyncio.ensure_future(kernel.interrupt_kernel()))

    def before_cell(**_: Any) -> None:
        if interrupts:
            raise NotebookFailedError("stopped")
        for number in (signal.SIGINT, signal.SIGTERM):  # nbclient's own handlers kill the kernel
            asyncio.get_running_loop().add_signal_handler(number, interrupt)

    client = Client(
        notebook,
        timeout=None,
        startup_timeout=KERNEL_START_TIMEOUT,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # hides the kernel's warnings about itself
        resources={"metadata": {"path": str(folder)}},
        on_cell_start=before_cell,
        on_cell_executed=lambda **_: write(notebook, out),
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise NotebookFailedError("a cell failed, and the cells after it did not run") from error
    except DeadKernelError as error:
        raise NotebookFailedError(
            "the kernel died, most likely because host memory ran out, and no further cell ran"
        ) from error
    finally:
        write(notebook, out)


def _show(kind: str, content: Mapping[str, Any]) -> None:
    """Prints an output of a cell as text."""
    if kind == "stream":
        stream = sys.stderr if content["name"] == "stderr" else sys.stdout
        print(content["text"], end="", file=stream, flush=True)
    elif kind == "error":
        print("\n".join(content["traceback"]), file=sys.stderr, flush=True)
    elif kind in ("display_data", "execute_result"):
        pictures = [f"[{name}]" for name in content["data"] if name.startswith("image/")]
        print(pictures[0] if pictures else content["data"].get("text/plain", ""), flush=True)


def write(notebook: NotebookNode, out: Path) -> None:
    """Writes the notebook atomically, without TensorBoard's frame, which does not work after the kernel has ended."""
    import nbformat

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "tensorboard-frame" in output.get("data", {}).get("text/html", ""):
                output.data = {"text/plain": "TensorBoard was here while the notebook ran."}
    write_file(out, nbformat.writes(notebook))


@click.command(context_settings={"max_content_width": 110})
@click.argument("notebook", type=PathName("source"))
@click.option("--set", "chosen", multiple=True, metavar="WIDGET=VALUE", help="Set a widget of the notebook.")
@click.option(
    "--out",
    required=True,
    type=PathName("file"),
    metavar="FILE.ipynb",
    help="Jupyter notebook with the outputs; written after each cell.",
)
@click.option("--no-run", is_flag=True, help="Convert the notebook to Jupyter's format without running it.")
def main(notebook: str, chosen: tuple[str, ...], out: str, no_run: bool) -> None:
    """Run every cell of NOTEBOOK, a file in Databricks' source format. Exits with 1 if a cell failed."""
    set_up_console()
    try:
        import nbclient  # noqa: F401
    except ImportError as error:
        raise click.ClickException(
            f"{error.name} is not installed. Type {install_extra('notebook')}"
        ) from error
    source, target = Path(notebook), Path(out)
    if target.suffix != ".ipynb":  # never overwrite the source
        raise click.UsageError(f"--out {out}: expected a name that ends with .ipynb")
    try:
        cells = read_source(source.read_text(encoding="utf-8"))
    except (NotebookSourceError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{notebook}: {error}") from error
    except OSError as error:
        raise click.UsageError(
            f"{notebook}: cannot be read ({error.strerror}). Name a file on this machine"
        ) from error
    known = widget_names(cells)
    unknown = [choice for choice in chosen if "=" not in choice or choice.partition("=")[0] not in known]
    if unknown:
        raise click.UsageError(
            f"--set {', '.join(unknown)}: expected WIDGET=VALUE. The widgets are: {', '.join(known)}"
        )
    set_widgets(cells, dict(choice.partition("=")[::2] for choice in chosen))
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        write(cells, target)
    except OSError as error:
        raise click.UsageError(
            f"--out {out}: cannot be written ({error.strerror}). Name a file in a folder of your own"
        ) from error
    if no_run:
        return
    try:
        run(cells, source.absolute().parent, target)
    except NotebookFailedError as error:
        print(f"{notebook}: {error}. The outputs are in {out}", file=sys.stderr)
        sys.exit(1)
    print(f"all cells ran; the outputs are in {out}")


if __name__ == "__main__":
    main()
