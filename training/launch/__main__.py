"""Trains on this machine's devices, and starts the run again when something ends it.

python -m training.launch --num-gpus 8 --restarts 5 -- --deepspeed config/ds_z3_bf16_config.json \
    --local-output-dir /local_disk0/dolly"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click

from training.console import set_up_console
from training.errors import TrainingFailedError
from training.launch.exits import INTERRUPTED
from training.launch.local import launcher_words, shell_command
from training.launch.restart import DEFAULT_RESTARTS, launch
from training.machine.local import this_machine
from training.options.command_line import parse_words
from training.options.trainer_options import TrainingOptions


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--num-gpus",
    required=True,
    type=click.IntRange(1),
    metavar="NUMBER",
    help="GPUs of this machine, or CPU ranks where it has none.",
)
@click.option(
    "--restarts",
    default=DEFAULT_RESTARTS,
    show_default=True,
    type=click.IntRange(0),
    metavar="NUMBER",
    help="Most times that the run is started again.",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="TRAINER_OPTIONS")
def main(num_gpus: int, restarts: int, words: tuple[str, ...]) -> None:
    """Train with the options of training.trainer, and start the run again if it is killed or hangs."""
    set_up_console()
    # SIGTERM ends the run with a checkpoint, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    values, problems = parse_words(words)
    if problems:
        raise click.UsageError("\n".join(problems))
    options = TrainingOptions(**values)
    command = [*launcher_words(num_gpus, options.deepspeed_json), *words]
    cpu_ranks = num_gpus if this_machine().is_cpu else 0
    if cpu_ranks:  # otherwise DeepSpeed warns in every process that it found no accelerator
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    print(shell_command(command), flush=True)
    try:
        launch(command, cpu_ranks, restarts=restarts, folder=Path.cwd())
    except TrainingFailedError as error:
        if error.code != INTERRUPTED:  # the ranks have said what to type
            print(error, file=sys.stderr)
        sys.exit((error.code or 1) & 0xFF)
    except KeyboardInterrupt:  # in the pause before a start
        print("Stopped. To continue, type the same command with --resume auto", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
