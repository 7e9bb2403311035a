"""Copies a finished model to DBFS, a Volume, S3, the Hub or any folder.

python -m training.publish --model /local_disk0/dolly --to /dbfs/dolly"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from training.console import set_up_console
from training.errors import PublishError
from training.options.command_line import CheckedCommand, CollectedOption, PathName
from training.storage.copy import publish


@click.command(cls=CheckedCommand)
@click.option(
    "--model",
    "folder",
    cls=CollectedOption,
    required=True,
    type=PathName("folder"),
    metavar="FOLDER",
    help="The --local-output-dir of a finished run.",
)
@click.option(
    "--to",
    "target",
    cls=CollectedOption,
    required=True,
    type=PathName("target"),
    metavar="TARGET",
    help="A new local folder, /dbfs/..., /Volumes/..., s3://bucket/folder, or hf://OWNER/MODEL on the Hub.",
)
def main(folder: str, target: str) -> None:
    """Copy a finished model to TARGET, or continue an interrupted copy."""
    set_up_console(logging.INFO)
    try:
        publish(Path(folder), target)
    except PublishError as error:
        print(f"Cannot publish: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
