"""Runs a Databricks notebook where there is no Databricks.

    python -m training.notebook notebooks/train_dolly.py --set gpu_family=cpu --out executed.ipynb

The file is Databricks' source format, valid Python: `# COMMAND ----------` between cells, `# MAGIC` before lines that
are no Python. It becomes a Jupyter notebook and runs cell by cell; `dbutils` is a stand-in. Imports no torch."""

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

from training.errors import NotebookFailedError, NotebookSourceError, RunRefusedError
from training.files import write_file

if TYPE_CHECKING:
    from nbformat import NotebookNode

HEADER = "# Databricks notebook source"
BETWEEN_CELLS = re.compile(r"^# COMMAND -+\s*$", re.MULTILINE)
MAGIC = re.compile(r"^# MAGIC ?")
SAME_MAGIC = re.compile(r"%(pip|load_ext|tensorboard)\b")  # means the same in Databricks and in Jupyter
WIDGET = re.compile(r"dbutils\.widgets\.(?:text|dropdown)\(\s*[\"'](\w+)")
CHOSEN = "DOLLY_WIDGETS"  # environment variable with the widgets' values, as JSON
EXTRA = "Type pip install '.[notebook]'"
START = 600  # seconds that a kernel may take to start on a busy machine


def read_source(text: str) -> NotebookNode:
    """The Jupyter notebook of a source file's text, cell by cell. Raises NotebookSourceError."""
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
                f"line {error.lineno} of a cell is no Python ({error.msg}): {error.text}"
            ) from error
        return new_code_cell(code)
    if not all(MAGIC.match(line) or not line.strip() for line in lines):
        raise NotebookSourceError(
            f"cell {number}: '# MAGIC' stands beside plain lines. Give each a cell of its own"
        )
    body = [MAGIC.sub("", line) for line in lines if line.strip()]
    if body[0].split()[:1] == ["%md"]:
        return new_markdown_cell("\n".join(body).removeprefix("%md").strip())
    for line in body:
        if not SAME_MAGIC.match(line):
            raise NotebookSourceError(f"cell {number}: {line.split(' ')[0]!r} cannot run outside Databricks")
    return new_code_cell("\n".join(body))


def widget_names(notebook: NotebookNode) -> list[str]:
    """The widgets that its cells make, in order, read from their source."""
    return [name for cell in notebook.cells for name in WIDGET.findall(cell.source)]


def choose(notebook: NotebookNode, values: Mapping[str, str]) -> None:
    """Puts a cell before all others that sets the widgets, so that the notebook itself shows what was chosen."""
    from nbformat.v4 import new_code_cell

    if values:
        code = f"import os\n\nos.environ[{CHOSEN!r}] = {json.dumps(dict(values))!r}  # chosen with --set"
        notebook.cells.insert(0, new_code_cell(code))


class Widgets:
    """`dbutils.widgets` without a page: each has its default, or the value in the environment variable CHOSEN."""

    def __init__(self) -> None:
        self._chosen: dict[str, str] = json.loads(os.environ.get(CHOSEN, "{}"))
        self._values: dict[str, str] = {}

    def text(self, name: str, defaultValue: str, label: str | None = None) -> None:
        self._values[name] = str(self._chosen.get(name, defaultValue))

    def dropdown(
        self, name: str, defaultValue: str, choices: Sequence[str], label: str | None = None
    ) -> None:
        """Raises RunRefusedError for a value that is none of the choices, which Databricks' page does not offer."""
        self.text(name, defaultValue)
        if self._values[name] not in choices:
            raise RunRefusedError(f"{name} {self._values[name]}: expected one of {', '.join(choices)}")

    def get(self, name: str) -> str:
        return self._values[name]

    def getAll(self) -> dict[str, str]:
        return dict(self._values)


class StandIn:
    """`dbutils`, as far as a notebook that trains needs it."""

    def __init__(self) -> None:
        self.widgets = Widgets()
        self.library = SimpleNamespace(
            restartPython=lambda: None
        )  # a Jupyter kernel finds what %pip installed
        warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where ipywidgets are not


def run(notebook: NotebookNode, folder: Path, out: Path) -> None:
    """Runs every cell in `folder`, shows what they print as it comes, and updates `out` after each.

    Ctrl-C and SIGTERM interrupt the cell that runs, which lets training save. Raises NotebookFailedError where a cell
    failed: those after it have not run.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    interrupts: list[asyncio.Task[Any]] = []  # the loop itself holds no task

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
        for number in (signal.SIGINT, signal.SIGTERM):  # nbclient's own handlers end the kernel at once
            asyncio.get_running_loop().add_signal_handler(number, interrupt)

    client = Client(
        notebook,
        timeout=None,
        startup_timeout=START,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # the kernel's own warnings are about itself
        resources={"metadata": {"path": str(folder)}},
        on_cell_start=before_cell,
        on_cell_executed=lambda **_: write(notebook, out),
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
    """Prints what a cell gives, as text on the console."""
    if kind == "stream":
        stream = sys.stderr if content["name"] == "stderr" else sys.stdout
        print(content["text"], end="", file=stream, flush=True)
    elif kind == "error":
        print("\n".join(content["traceback"]), file=sys.stderr, flush=True)
    elif kind in ("display_data", "execute_result"):
        pictures = [f"[{name}]" for name in content["data"] if name.startswith("image/")]
        print(pictures[0] if pictures else content["data"].get("text/plain", ""), flush=True)


def write(notebook: NotebookNode, out: Path) -> None:
    """Replaces the file in one rename, without TensorBoard's frame, which ends with the kernel."""
    import nbformat

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "tensorboard-frame" in output.get("data", {}).get("text/html", ""):
                output.data = {"text/plain": "TensorBoard was here while the notebook ran."}
    write_file(out, nbformat.writes(notebook))


@click.command(context_settings={"max_content_width": 110})
@click.argument("notebook", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--set", "chosen", multiple=True, metavar="WIDGET=VALUE", help="Choose as on the notebook's page."
)
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.ipynb",
    help="The notebook with what its cells gave, for Jupyter; written after each cell.",
)
@click.option("--no-run", is_flag=True, help="Write the notebook for Jupyter, and run no cell of it.")
def main(notebook: Path, chosen: tuple[str, ...], out: Path, no_run: bool) -> None:
    """Run every cell of NOTEBOOK, a file in Databricks' source format. Ends with 1 where one of them failed."""
    try:
        import nbclient  # noqa: F401
    except ImportError as error:
        raise click.ClickException(f"{error.name} is not installed. {EXTRA}") from error
    if out.suffix != ".ipynb":  # the notebook itself must not be written over
        raise click.UsageError(f"--out {out}: expected a name that ends with .ipynb")
    try:
        cells = read_source(notebook.read_text(encoding="utf-8"))
    except (NotebookSourceError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{notebook}: {error}") from error
    known = widget_names(cells)
    unknown = [each for each in chosen if "=" not in each or each.partition("=")[0] not in known]
    if unknown:
        raise click.UsageError(
            f"--set {', '.join(unknown)}: expected WIDGET=VALUE. The widgets are: {', '.join(known)}"
        )
    choose(cells, dict(each.partition("=")[::2] for each in chosen))
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
