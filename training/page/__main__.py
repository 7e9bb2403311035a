"""Opens a page in the browser that asks a trained model and its base, and collects blind votes.

python -m training.page --model OUT
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from training.console import set_up_console
from training.consts import RUN_FILE
from training.errors import (
    DataError,
    MachineError,
    ModelError,
    UnfinishedRunError,
    first_line,
    install_extra,
    printable,
)
from training.files import expanded, path_problem, writable
from training.options.command_line import CollectedOption, CollectingCommand, PathName, value_problems
from training.page.guard import is_loopback
from training.storage.record import finished_run, read_run_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from training.page.state import Page
    from training.page.votes import Question


@dataclass(frozen=True)
class Options:
    """What was typed. `folders` are the values of --model."""

    folders: tuple[str, ...]
    base: str | None
    no_base: bool
    rows: str | None
    votes: str
    port: int
    host: str
    password: str | None
    trust_remote_code: bool

    @property
    def chosen_base(self) -> str | None:
        """The model to compare with: that of --base, or the one from which the first run started."""
        if self.base is not None or self.no_base or not self.folders:
            return self.base
        return base_of(self.folders[0])


PASSWORD_VARIABLE = "DOLLY_PAGE_PASSWORD"
VOTES_FILE = "~/dolly_training/votes.jsonl"


@click.command(cls=CollectingCommand)
@click.option(
    "--model",
    "folders",
    cls=CollectedOption,
    multiple=True,
    metavar="FOLDER",
    help="Output folder of a run, or a model on the Hub. Repeat it to compare several.",
)
@click.option(
    "--base",
    cls=CollectedOption,
    type=PathName("model"),
    metavar="MODEL",
    help="Model to compare with.  [default: the model from which the first run started]",
)
@click.option("--no-base", is_flag=True, help="Load only the models of --model.")
@click.option(
    "--rows",
    cls=CollectedOption,
    type=PathName("source"),
    metavar="FILE",
    help="Vote on the questions in this file.  [default: the held-out rows of the first run]",
)
@click.option(
    "--votes",
    cls=CollectedOption,
    type=PathName("file"),
    default=VOTES_FILE,
    show_default=True,
    metavar="FILE.jsonl",
    help="Append the votes to this file.",
)
@click.option("--port", cls=CollectedOption, type=click.IntRange(1, 65535), default=7860, show_default=True)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Any other than this machine's own needs --password.",
)
@click.option(
    "--password",
    envvar=PASSWORD_VARIABLE,
    help=f"Ask for this password. Set it as {PASSWORD_VARIABLE}, so that it is not in the history of the shell.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the models' repositories.")
@click.pass_context
def main(ctx: click.Context, **typed: Any) -> None:
    """Open a page that asks --model and its base side by side, and collects blind votes. Ctrl-C ends it."""
    set_up_console()
    options = Options(**typed | {"folders": tuple(map(expanded, typed["folders"] or ()))})
    if problems := [*value_problems(ctx), *_problems(options)]:
        raise click.UsageError("\n".join(problems))
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    try:
        _serve(options)
    except (ModelError, DataError, MachineError) as error:
        print(f"Cannot open the page: {printable(error)}", file=sys.stderr)
        sys.exit(2)


def _problems(options: Options) -> list[str]:
    """Everything that is wrong with the options, before gradio is imported or a model is loaded."""
    problems = []
    if find_spec("gradio") is None:
        problems.append(f"gradio is not installed. Type {install_extra('page')}")
    if not options.folders:
        problems.append("--model is missing. Name the output folder of a run")
    if options.base is not None and options.no_base:
        problems.append(f"--base {options.base}: contradicts --no-base. Leave one of them out")
    named = [("--model", folder) for folder in options.folders]
    named += [("--base", options.base)] if options.base is not None else []
    places: list[str] = []
    for flag, name in named:
        if not name.strip():
            problems.append(f"{flag} is empty. Give a value, or leave the option out")
            continue
        place = str(Path(name).resolve()) if os.path.isdir(name) else name
        if place in places:
            problems.append(f"{flag} {name}: is named twice. Name it once")
        places.append(place)
        if flag == "--model" and (problem := path_problem(name, "model")):
            problems.append(f"--model {name}: {problem}")
        elif os.path.isfile(Path(name) / RUN_FILE):
            try:
                finished_run(Path(name))
            except UnfinishedRunError as error:
                problems.append(f"{flag} {error}")
    if options.base is None and (base := options.chosen_base):
        places.append(base)
        if problem := path_problem(base, "model"):
            problems.append(
                f"--base is missing, and {base}, from which the run started, cannot be used: {problem}. "
                "Or type --no-base"
            )
    if options.rows is not None and not options.rows.strip():
        problems.append("--rows is empty. Give a value, or leave the option out")
    votes, address = _votes_problems(options.votes, places), _address_problems(options)
    return [*problems, *votes, *address]


def base_of(folder: str) -> str | None:
    """The model from which the run in `folder` started; None if the folder has no finished run."""
    try:
        return str(finished_run(Path(folder))["options"]["input_model"])
    except (UnfinishedRunError, KeyError, TypeError):
        return None


def _votes_problems(votes: str, models: list[str]) -> list[str]:
    from training.page.votes import file_problem

    if not votes.strip():
        return ["--votes is empty. Give a value, or leave the option out"]
    file = Path(os.path.expanduser(votes))
    if problem := file_problem(file, models):
        return [f"--votes {votes}: {problem}"]
    if not (os.access(file, os.W_OK) if file.exists() else writable(file.parent)):
        return [f"--votes {votes}: cannot be written. Name a file in a folder of your own"]
    return []


def _address_problems(options: Options) -> list[str]:
    host, port, problems = options.host, options.port, []
    if options.password is not None and not options.password.strip():
        problems.append("--password is empty. Give a value, or leave the option out")
    if not is_loopback(host) and options.password is None:
        problems.append(
            f"--host {host}: everybody who reaches this machine could use the page. Ask for a password: "
            f"export {PASSWORD_VARIABLE}=..., or leave --host out"
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            trial.bind(address)
    except (socket.gaierror, UnicodeError):
        problems.append(f"--host {host}: is no address of this machine. Type 127.0.0.1, or leave it out")
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        reason = "another program uses it, perhaps another page" if in_use else error.strerror
        problems.append(
            f"--port {port}: cannot be opened on {host} ({reason}). Type another --port or --host"
        )
    return problems


def _serve(options: Options) -> None:
    """Loads rows and models, and serves the page until Ctrl-C. Raises ModelError, DataError and MachineError."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    page = _load(options)
    address = f"[{options.host}]" if ":" in options.host else options.host
    # gradio is slow to import, and optional.
    from training.page.ask import ask_tab
    from training.page.blind import blind_tab
    from training.page.interface import build, launch

    tabs = {"Ask": ask_tab, "Blind": blind_tab}
    try:
        blocks = launch(build(page, tabs), options.host, options.port, options.password)
    except OSError as error:  # the port was taken while the models were loaded
        raise MachineError(
            f"--port {options.port}: cannot be opened ({first_line(error)}). Type another --port"
        ) from error
    print(f"The votes go to {page.votes.file}")
    print(f"Open http://{address}:{options.port} in a browser. Ctrl-C ends the page.", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("The page is closed.")
        blocks.close(verbose=False)


def _load(options: Options) -> Page:
    """Loads what the page shows: the base first, then the models in the order of the command line."""
    import torch

    from training.page.models import load_models
    from training.page.questions import examples, rows_of_file, saved_answers
    from training.page.state import Page
    from training.page.votes import Votes

    first, base = Path(options.folders[0]), options.chosen_base
    typed_rows = rows_of_file(options.rows) if options.rows else None  # before the models take their time
    try:
        models = load_models(base, options.folders, options.trust_remote_code)
    except torch.OutOfMemoryError as error:
        raise MachineError(
            "the GPU's memory does not hold all models. Type --no-base, or name fewer models"
        ) from error
    if typed_rows is None:
        rows, problem = _held_out_rows(first, models[-len(options.folders)].tokenizer)
    else:
        rows, problem = typed_rows, ""
    saved = [saved_answers(Path(folder)) for folder in options.folders]
    if base and base == base_of(options.folders[0]):
        saved.insert(0, saved_answers(first, step=0))  # a run begins with the answers of its base
    elif base:
        saved.insert(0, {})
    return Page(models, Votes.open(Path(options.votes)), rows, problem, examples(first), saved)


def _held_out_rows(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Question], str]:
    """(the rows that the run in `folder` held out, "") or ([], why there are none)."""
    from training.page.questions import held_out_rows

    record = read_run_record(folder)
    if record is None:
        return [], (
            f"{folder.name} is not the folder of a run, so there are no held-out rows. --rows FILE names others"
        )
    try:
        return held_out_rows(folder, record, tokenizer), ""
    except DataError as error:
        print(f"There are no held-out rows to vote on: {printable(error)}", file=sys.stderr)
        return [], str(error)


if __name__ == "__main__":
    main()
