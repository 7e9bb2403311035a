"""Makes a model from a checkpoint, also of a run that was stopped.

python -m training.export --checkpoint OUT/checkpoint-400 --to MODEL"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from training.console import set_up_console
from training.errors import ModelError, OptionsError
from training.options.command_line import CheckedCommand, CollectedOption, PathName


@click.command(cls=CheckedCommand)
@click.option(
    "--checkpoint",
    "folder",
    cls=CollectedOption,
    required=True,
    type=PathName("folder"),
    metavar="FOLDER",
    help="A checkpoint of a run: OUT/checkpoint-STEP.",
)
@click.option(
    "--to",
    "target",
    cls=CollectedOption,
    required=True,
    type=PathName("output"),
    metavar="FOLDER",
    help="A new folder for the model.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model's repository.")
def main(folder: str, target: str, trust_remote_code: bool) -> None:
    """Make a model that stock transformers loads from a checkpoint. The run need not be finished."""
    set_up_console(logging.INFO)
    # DeepSpeed reports that it found no GPU. It is imported for its checkpoints alone.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.msg)
    import transformers

    from training.run.exporting import export

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        export(Path(folder), Path(target), trust_remote_code)
    except (OptionsError, ModelError) as error:
        print(f"Cannot export:\n{error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
