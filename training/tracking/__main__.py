"""Logs a finished run and its model to MLflow.

python -m training.tracking --model /local_disk0/dolly --name main.models.dolly"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from training.console import set_up_console
from training.errors import TrackingError
from training.options.command_line import CheckedCommand, CollectedOption, PathName
from training.tracking.mlflow_address import tracking_problems
from training.tracking.mlflow_model import log_finished


@click.command(cls=CheckedCommand)
@click.option(
    "--model",
    "folder",
    cls=CollectedOption,
    required=True,
    type=PathName("folder"),
    metavar="FOLDER",
    help="The --local-output-dir of a finished run, or a complete copy of it.",
)
@click.option(
    "--name", default=None, help="Register the model under this name; catalog.schema.model for Unity Catalog."
)
def main(folder: str, name: str | None) -> None:
    """Log a finished model to the active MLflow tracking URI, or complete an interrupted attempt. Does not train."""
    set_up_console(logging.INFO)
    problems = tracking_problems("--name", name)
    try:
        if problems:
            raise TrackingError("\n".join(problems))
        log_finished(Path(folder), name)
    except TrackingError as error:
        print(f"Cannot log: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
