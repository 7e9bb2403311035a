"""All errors whose message is shown to the user, and what their messages are made of: printable text, pip commands."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import unicodedata
from importlib.util import find_spec


def printable(text: object) -> str:
    """The text without characters that change a terminal or mislead its reader.

    Rows, answers, file names and messages of servers may hold anything. Control sequences, changes of the writing
    direction, invisible characters and lone surrogates become U+FFFD; special spaces become plain ones. Only what is
    shown changes, never what is stored.
    """
    return "".join(map(_printable_character, str(text)))


def _printable_character(character: str) -> str:
    if character.isprintable() or character in "\n\t":
        return character
    return " " if unicodedata.category(character) == "Zs" else "\N{REPLACEMENT CHARACTER}"


def pip_install(*packages: str) -> str:
    """The command that installs packages here: an environment of uv has no pip."""
    pip = "uv pip" if find_spec("pip") is None and shutil.which("uv") else "python -m pip"
    return " ".join([pip, "install", *packages])


def install_extra(extra: str) -> str:
    """The command that installs an extra of pyproject.toml, also where the package came from a wheel."""
    try:
        required = importlib.metadata.requires("dolly") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    of_extra = re.compile(rf"""([^;]+?)\s*;.*extra == ["']{extra}["']""")
    packages = [match[1] for line in required if (match := of_extra.match(line))]
    return pip_install(*packages or [f"'.[{extra}]'"])


def offline_note() -> str:
    """The sentence about a name that is not found while downloads are switched off; "" if they are not."""
    # As huggingface_hub reads it.
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in {"1", "ON", "YES", "TRUE"}:
        return ""
    return ". HF_HUB_OFFLINE is set, so nothing is downloaded: type unset HF_HUB_OFFLINE"


class _PrintableMessage:
    """The message is printable: it may repeat text of a row, the name of a file or the answer of a server."""

    def __str__(self) -> str:
        return printable(super().__str__())


class OptionsError(_PrintableMessage, ValueError):
    """The options contradict each other or do not suit this machine. `problems` holds every reason."""

    def __init__(self, *problems: str):
        self.problems = [printable(problem) for problem in problems]
        super().__init__("\n".join(f"  - {problem}" for problem in problems))


class DataError(_PrintableMessage, ValueError):
    """The dataset cannot be used. The message names the file, the row and the fix."""


class DuplicateKeyError(_PrintableMessage, ValueError):
    """A JSON object has the same key twice."""


class ModelError(_PrintableMessage, ValueError):
    """The model or its tokenizer cannot be used. The message says why and how to fix it."""


class MachineError(_PrintableMessage, ValueError):
    """The machine is unknown or cannot train. The message lists the known ones."""


class FolderBusyError(_PrintableMessage, RuntimeError):
    """Another process writes into the folder. The message says which one and what to do."""


class PublishError(_PrintableMessage, RuntimeError):
    """The model could not be published. The message says why and what to type. The source is unchanged."""


class SourceError(PublishError):
    """A file of the source model cannot be read, or has changed during the copy."""


class TrainingError(_PrintableMessage, RuntimeError):
    """Training cannot continue. The message names the step, the reason and what to do. The last checkpoint is valid.

    Either all ranks raise it and rank 0 prints it, or one rank raises it with `alone` and prints it.
    """

    def __init__(self, message: str, alone: bool = False) -> None:
        self.alone = alone
        super().__init__(message)


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C outside the training steps, where there is no step to finish."""


class TrackingError(_PrintableMessage, RuntimeError):
    """The finished model could not be logged. The message says why. The model is unchanged."""


class UnfinishedRunError(ModelError, PublishError, TrackingError):
    """The folder holds no finished run, so its model cannot be loaded, published or logged. The message says why."""


class TrainingFailedError(_PrintableMessage, RuntimeError):
    """The training command ended with an exit code other than 0. The message has its meaning and the last lines.

    Attributes:
        code: exit code of the launcher (subprocess's); on Spark of the first rank that failed, None if none failed.
    """

    def __init__(self, message: str, code: int | None = None):
        self.code = code
        super().__init__(message)

    def _render_traceback_(self) -> list[str]:
        """Lines that IPython shows instead of a traceback: only the message, as the frames are all internal."""
        return "\n".join([str(self), *getattr(self, "__notes__", [])]).splitlines()


class NodesError(_PrintableMessage, RuntimeError):
    """The nodes of a run did not meet, or one of them was lost or has failed. The message names it and what to do."""


class NotebookSourceError(_PrintableMessage, ValueError):
    """The file is not a Databricks notebook, or a cell cannot run elsewhere. The message names the cell."""


class RunRefusedError(_PrintableMessage, RuntimeError):
    """A cell of the notebook refuses to run. The message says why and what to choose instead."""

    _render_traceback_ = TrainingFailedError._render_traceback_


class NotebookFailedError(_PrintableMessage, RuntimeError):
    """A cell failed or the notebook was stopped. The console shows why."""


def first_line(error: Exception) -> str:
    """The type and first line of an error. If that line ends with ":", the second line as well."""
    lines = [line.strip() for line in printable(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {' '.join(lines[: 2 if lines[0].endswith(':') else 1])}"


def text_of(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters; its type if it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def own_code_problem(name: str, error: Exception) -> str | None:
    """The sentence for a model or tokenizer that transformers refuses because it brings its own code; else None."""
    if "trust_remote_code" not in str(error):
        return None
    return f"{name}: it brings its own code. Read the code, and add --trust-remote-code if you trust it"
