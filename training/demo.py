"""Trains the small GPT-J with the trainer's command, and shows its answers before and after."""

from __future__ import annotations

import shlex
import subprocess
import textwrap
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from training.console import set_up_console
from training.consts import DEMO, METRICS_FILE
from training.data.columns import Columns
from training.data.conversations import prompts_of
from training.errors import printable
from training.evaluate.answers import encode_for, greedy_answers
from training.evaluate.metrics import exact_matches
from training.evaluate.rows import Rows, file_rows, held_out_rows
from training.files import duration
from training.launch.local import deepspeed_command, launch_environment, shell_command
from training.machine.catalogue import find_family
from training.machine.environment import lora_package_problems, version_problems
from training.machine.local import this_machine
from training.model.generation import load_model_tokenizer_for_generate
from training.model.loading import max_positions
from training.model.tokenizer import load_tokenizer
from training.options.command_line import PathName, has_option
from training.pictures import PictureFile, draw_demo
from training.plan import lora_demo
from training.plan.presets import demo_options
from training.storage import metrics
from training.storage.record import finished_run

TERMINAL_EXAMPLES = 12
PICTURE_EXAMPLES = 8
MAX_NEW_TOKENS = 48


def run_trainer(values: Mapping[str, Any], ranks: int, extra: Sequence[str], title: str) -> None:
    """Prints and runs the trainer's command on `ranks` devices of this machine. Raises click.ClickException if it fails."""
    family = this_machine(values["local_output_dir"]).family
    options = {**values, "deepspeed": find_family(family).deepspeed}
    if has_option(extra, "training_dataset"):
        # It can be repeated: the typed rows would be added to the demo's, whose --test-size is not theirs.
        for name in ("training_dataset", "test_size"):
            options.pop(name, None)
    try:
        command = [*deepspeed_command(options, ranks), *extra]
    except ModuleNotFoundError as error:
        raise click.ClickException(str(error)) from error
    print(f"{title}:\n  {shell_command(command)}", flush=True)
    # The command inherits the terminal, so that its progress bar works.
    environment = launch_environment(0 if torch.cuda.device_count() else ranks)
    if code := subprocess.run(command, env=environment).returncode:
        raise click.ClickException(f"training failed with exit code {code}: see its last lines above")


def answers(name: str, rows: Rows) -> list[str]:
    """The greedy answers of a model to rows."""
    model, tokenizer = load_model_tokenizer_for_generate(name)
    _, [encoded] = encode_for(rows, [(tokenizer, max_positions(model.config))])
    return greedy_answers(model, tokenizer, encoded.prompts, MAX_NEW_TOKENS, batch_size=100).texts


def examples(columns: Columns, before: list[str], after: list[str]) -> list[tuple[str, ...]]:
    """(question, answer before, answer after, expected) of some held-out rows, conversations first.

    All are single lines, except the question of a conversation: each earlier turn has a line, and the last is indented.
    No two conversations ask with the same first word, and no two other rows.
    """
    shown: dict[tuple[bool, str], tuple[str, ...]] = {}
    rows = zip(prompts_of(columns), before, after, columns.output, strict=True)
    for (instruction, input, history), *texts in rows:
        turns = [single_line(f"{turn.question} -> {turn.answer}") for turn in history]
        question = "\n  ".join([*turns, single_line(f"{instruction} {input}")])
        shown.setdefault((bool(history), instruction.split()[0]), (question, *map(single_line, texts)))
    return sorted(shown.values(), key=lambda cells: "\n" not in cells[0])[:TERMINAL_EXAMPLES]


def single_line(text: str) -> str:
    return " ".join(text.split())


def table(shown: list[tuple[str, ...]]) -> str:
    """The examples as a text table of 100 columns. A question has as many lines as it needs; long answers are cut."""
    lines = [f"{'instruction':<54}{'before':<14}  after ('=': correct)"]
    for question, before, after, expected in shown:
        turns = (textwrap.wrap(turn, 52, subsequent_indent="  ") for turn in question.split("\n"))
        *above, last = chain.from_iterable(turns)
        lines += [*above, f"{last:<54}{before[:12]:<14}{'=' if after == expected else '!'} {after[:30]}"]
    return printable("\n".join(lines))


def how_to_ask(model: Path, columns: Columns) -> str:
    """The command that asks the model the first instruction that needs neither an input nor earlier turns."""
    prompts = prompts_of(columns)
    alone = (prompt for prompt in prompts if not prompt.input and not prompt.history)
    question = printable(next(alone, prompts[0]).instruction)
    return f"Ask it yourself: {shlex.join(['python', '-m', 'training.generate', '--model', str(model), question])}"


def show_adapter(output: Path, ranks: int, rank: int, extra: Sequence[str]) -> str:
    """Trains base and adapter, and returns the table of exact matches by task. `extra` are options of the adapter's run."""
    if problems := [*lora_package_problems(lora=True, quantize=False), *version_problems()]:
        raise click.ClickException("\n".join(problems))
    if output.exists():
        raise click.ClickException(f"--local-output-dir {output}: exists. Name a new folder")

    def run(values: dict[str, Any], title: str) -> None:
        run_trainer(values, ranks, extra if "lora" in values else (), title)

    held_out = lora_demo.train(output, ranks, rank, run)
    rows = file_rows(held_out)
    base, adapter = (
        exact_matches(rows.columns.output, answers(str(output / name), rows)).tolist()
        for name in ("base", "lora")
    )
    table_of_tasks = lora_demo.table(rows.columns.category, base, adapter)
    return f"{table_of_tasks}\n{how_to_ask(output / 'lora', rows.columns)}"


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--num-gpus",
    type=click.IntRange(1),
    default=None,
    help="Number of ranks.  [default: number of GPUs, or 2 ranks on the CPU]",
)
@click.option(
    "--local-output-dir",
    type=PathName("output"),
    default=None,
    help="[default: ~/dolly_training/demo__<timestamp>]",
)
@click.option(
    "--plot", type=PictureFile(), metavar="FILE.png", help="Draw the losses and some answers into this file."
)
@click.option(
    "--lora",
    type=click.IntRange(0),
    default=0,
    metavar="RANK",
    help="Train the model on all tasks but one, and an adapter of this rank on that one.",
)
@click.argument("trainer_options", nargs=-1, type=click.UNPROCESSED)
def main(
    num_gpus: int | None,
    local_output_dir: str | None,
    plot: Path | None,
    lora: int,
    trainer_options: tuple[str, ...],
) -> None:
    """Train the demo model and show its answers. TRAINER_OPTIONS are passed to training.trainer, with --lora to the run of the adapter."""
    if lora and plot:
        raise click.UsageError("--plot draws the demo without --lora. Leave one of them out")
    start = time.monotonic()
    set_up_console()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    ranks = num_gpus or torch.cuda.device_count() or 2
    output = local_output_dir
    if output is None:
        output = str(Path.home() / "dolly_training" / time.strftime("demo__%Y-%m-%dT%H-%M-%S"))
    if lora:
        result = show_adapter(Path(output), ranks, lora, trainer_options)
        print(f"\n{result}\n{duration(time.monotonic() - start)} in total")
        return
    values = demo_options(ranks) | {"local_output_dir": output}
    run_trainer(values, ranks, trainer_options, "Running the command that you would type for the large model")
    rows = held_out_rows(Path(output), finished_run(Path(output)), load_tokenizer(output))
    before, after = answers(DEMO, rows), answers(output, rows)
    shown = examples(rows.columns, before, after)
    shares = [exact_matches(rows.columns.output, texts).mean() for texts in (before, after)]
    result = f"exact match on all {len(rows)} held-out rows: {shares[0]:.0%} before, {shares[1]:.0%} after"
    print(f"\nHeld-out rows, which were not trained on:\n\n{table(shown)}\n")
    print(
        f"{result}; {duration(time.monotonic() - start)} in total\n{how_to_ask(Path(output), rows.columns)}"
    )
    if plot:
        draw_demo(metrics.read(Path(output) / METRICS_FILE), shown[:PICTURE_EXAMPLES], result, plot)


if __name__ == "__main__":
    main()
