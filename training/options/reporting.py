"""The trackers of --report-to: their names, those that a run uses, and problems of the option."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.options.trainer_options import TrainingOptions

# Each but TensorBoard is a file of this name in training/tracking/.
TENSORBOARD = "tensorboard"
TRACKERS = (TENSORBOARD, "mlflow", "wandb", "trackio")
NONE = "none"


def trackers_of(options: TrainingOptions) -> tuple[str, ...]:
    """The trackers of --report-to, and mlflow if the model is registered there. Unknown names are left to the checks."""
    names = tracker_names(options.report_to) + (["mlflow"] if options.mlflow_model_name is not None else [])
    return tuple(name for name in TRACKERS if name in names)


def report_problems(options: TrainingOptions) -> list[str]:
    """Problems of --report-to: an unknown tracker, or none beside others."""
    typed, names, problems = options.report_to, tracker_names(options.report_to), []
    if not typed.strip():  # every empty text is reported elsewhere
        return []
    for name in names:
        if name not in (*TRACKERS, NONE):
            close = get_close_matches(name.lower(), (*TRACKERS, NONE), n=2)
            meant = f". Did you mean {' or '.join(close)}?" if close else "."
            problems.append(
                f"--report-to {typed}: {name!r} is no tracker{meant} Expected {', '.join(TRACKERS)}, separated by commas, "
                "or none"
            )
    others = ",".join(name for name in names if name != NONE)
    if NONE in names and others:
        problems.append(
            f"--report-to {typed}: none excludes the others. Type --report-to none, or --report-to {others}"
        )
    elif NONE in names and options.mlflow_model_name is not None:
        problems.append(
            f"--report-to none and --mlflow-model-name {options.mlflow_model_name} contradict each other. Leave one out"
        )
    return problems


def tracker_names(report_to: str) -> list[str]:
    """The names in a value of --report-to, as typed."""
    return [name.strip() for name in report_to.split(",")]
