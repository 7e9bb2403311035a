"""The callbacks that write a run's figures: console, metrics.jsonl, and the trackers of --report-to."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback

from training.consts import METRICS_FILE
from training.data.conversations import prompt_of_row, prompt_text
from training.errors import printable
from training.options.reporting import TENSORBOARD, trackers_of
from training.options.settings import Settings
from training.ranks import is_main_process
from training.storage import metrics
from training.tracking.background import AnswersLog, background_logs
from training.tracking.progress import ProgressLog
from training.tracking.tracker import tracker_modules

logger = logging.getLogger(__name__)


@contextmanager
def trackers(
    settings: Settings, record: dict[str, Any], seconds: Callable[[], float]
) -> Iterator[list[TrainerCallback]]:
    """Yields the callbacks that write metrics during training. Only rank 0 has any.

    training/tracking/tracker.py says how to add a tracker.

    Args:
        record: the run's record (run.json), including the choices of the plan.
        seconds: returns the seconds of training so far, including those before a resume.
    """
    if not is_main_process():
        yield []
        return
    output = settings.output
    names = trackers_of(settings.options)
    tensorboard = [TensorBoardLog(output / "runs")] if TENSORBOARD in names else []
    services = [module.service(record, output) for module in tracker_modules(names)]
    with background_logs(services, output) as logs:
        yield [ProgressLog(), *tensorboard, MetricsLog(output / METRICS_FILE, seconds), *logs]


class TensorBoardLog(TensorBoardCallback, AnswersLog):
    """Writes metrics and texts for TensorBoard. If writing fails, it stops writing and training continues."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir, self.disabled = str(folder), False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_log, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._try(super().on_train_end, *args, **kwargs)

    def log_answers(self, step: int, answers: Sequence[dict[str, Any]]) -> None:
        """One text for each prompt."""
        for number, answer in enumerate(answers):
            # Indented text is code in Markdown, which is shown unchanged.
            texts = printable(prompt_text(prompt_of_row(answer))), printable(answer["response"])
            blocks = (textwrap.indent(text or "(nothing)", "    ") for text in texts)
            self._add_text(f"answers/{number:03}", "\n\nanswer:\n\n".join(blocks), step)

    def _add_text(self, tag: str, text: str, step: int) -> None:
        self._try(lambda: self.tb_writer.add_text(tag, text, step))

    def _try(self, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self.disabled:
            return
        try:
            write(*args, **kwargs)
        except Exception as error:  # OSError, or TensorFlow's errors where it is installed
            self.disabled = True
            folder = self.logging_dir
            logger.warning("%s: no more TensorBoard logs (%s); training continues", folder, error)


class MetricsLog(TrainerCallback):
    """Appends the Trainer's logs to metrics.jsonl.

    Args:
        seconds: returns the seconds of training so far, including those before a resume.
    """

    def __init__(self, file: Path, seconds: Callable[[], float]) -> None:
        self.file = file
        self.seconds = seconds
        self.written: set[tuple[int, str]] = set()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        # A held-out loss measured at a resume is in no checkpoint, so the next resume measures it again.
        self.written = {(entry["step"], _kind(entry)) for entry in metrics.read(self.file)}

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        kind = _kind(logs)
        event = (state.global_step, kind)
        if event in self.written or not kind:
            return
        self.written.add(event)
        values = logs
        if kind == "eval_loss":  # without what transformers measures of the evaluation
            values = {name: value for name, value in logs.items() if name.startswith(kind)}
        position = {"step": state.global_step, "max_steps": state.max_steps, "epoch": state.epoch or 0.0}
        metrics.append(self.file, position | {"seconds": self.seconds()} | values)


def _kind(entry: dict[str, Any]) -> str:
    """The name of the figure that tells held-out losses, saves and training logs apart; "" for anything else."""
    return next((name for name in ("eval_loss", "blocked_seconds", "loss") if name in entry), "")
