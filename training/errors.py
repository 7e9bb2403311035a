"""Every error that a person sees."""

from __future__ import annotations


class OptionsError(ValueError):
    """The options cannot be used together, or not on this machine. `problems` holds every reason."""

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__("\n".join(f"  - {fault}" for fault in problems))


class DataError(ValueError):
    """The dataset cannot be used; the message names the file, the row, and what to do."""


class DuplicateKeyError(ValueError):
    """One JSON object has the same key twice, and no one can say which is meant."""


class ModelError(ValueError):
    """The model or its tokenizer cannot be used; the message says why and what to do."""


class MachineError(ValueError):
    """No such machine, or none that can train; the message names what there is."""


class FolderBusyError(RuntimeError):
    """Another process writes into the folder. The message says which, and what to do."""


class PublishError(RuntimeError):
    """The model could not be published; the message says why and what to type. The source is untouched."""


class SourceError(PublishError):
    """A file of the model itself cannot be read, or has changed while it was copied."""


class TrainingError(RuntimeError):
    """Training cannot go on. The message says at which step, why, and what to do; the last checkpoint is good.

    All ranks raise it together, and one needs to tell it; or one `alone`, which then tells it itself.
    """

    def __init__(self, message: str, alone: bool = False) -> None:
        self.alone = alone
        super().__init__(message)


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C where no step was under way that could be finished."""


class TrackingError(RuntimeError):
    """The finished model could not be logged; the message says why. The model is untouched."""


class UnfinishedRunError(ModelError, PublishError, TrackingError):
    """The folder holds no finished run, so it can be neither asked, published nor logged; the message says why."""


class TrainingFailedError(RuntimeError):
    """The command ended with an exit code other than 0. The message has its meaning and its last lines.

    Attributes:
        code: of the launcher, as subprocess gives it; on Spark of the rank that failed first, None where none did.
    """

    def __init__(self, message: str, code: int | None = None):
        self.code = code
        super().__init__(message)

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows, IPython asks for it by this name: the words alone, for the frames are all ours."""
        return "\n".join([str(self), *getattr(self, "__notes__", [])]).splitlines()


class NotebookSourceError(ValueError):
    """The file is no Databricks notebook, or has a cell that cannot run elsewhere. The message names the cell."""


class RunRefusedError(RuntimeError):
    """A cell cannot go on; the message says why and what to choose instead."""

    _render_traceback_ = TrainingFailedError._render_traceback_


class NotebookFailedError(RuntimeError):
    """A cell failed, or the run was stopped; the console has shown why."""


def first_line(error: Exception) -> str:
    """Of a message that only begins with "...:", the line after it as well."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {' '.join(lines[: 2 if lines[0].endswith(':') else 1])}"
