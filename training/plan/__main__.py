"""Predicts whether a run fits on a machine, how long it takes and what it costs. Loads no weights.

    python -m training.plan --machine 8xA100-40GB                  Dolly's default run
    python -m training.plan --machine g5.24xlarge --price 8.14 --plot plan.png
    python -m training.plan                                        this machine
    python -m training.plan --gpu-memory 24 --gpu-flops 165        one's own, by two figures

Sizes are in GiB (2**30 bytes), times in hours or seconds. The trainer calls `plan_run` (training/plan/fit.py)."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from training.console import set_up_console
from training.errors import DataError, MachineError, ModelError, OptionsError
from training.machine.catalogue import GPUS, MACHINES, OWN_HOST_GIB, Machine, described_machine, find_machine
from training.machine.local import this_machine
from training.options.checks import option_problems
from training.options.command_line import (
    CollectedOption,
    CollectingCommand,
    some_click_options,
    value_problems,
)
from training.options.deepspeed import read_json
from training.options.deepspeed_checks import file_problems, precision_problems
from training.options.trainer_options import TrainingOptions, flag_of
from training.pictures import PictureFile
from training.plan.fit import Plan
from training.plan.presets import preset_options
from training.plan.report import as_json, as_table, draw
from training.plan.request import plan_options

# A bad value is reported together with all other problems.
_option = partial(click.option, cls=CollectedOption)


# The trainer's options that change its plan, or that a message about model or rows may ask for.
OPTIONS = (
    "input_model",
    "training_dataset",
    "dataset_config",
    "dataset_split",
    "dataset_revision",
    "max_length",
    "keep_truncated",
    "drop_unusable",
    "max_dropped_fraction",
    "batching",
    "max_tokens_per_device",
    "gradient_checkpointing",
    "lora",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "quantize",
    "lr",
    "max_steps",
    "test_size",
    "per_device_eval_batch_size",
    "eval_steps",
    "save_steps",
    "save_every",
    "save_total_limit",
    "dbfs_output_dir",
    "checkpoint_to",
    "trust_remote_code",
)


def _long_name(word: str) -> str:
    """Expands --model to --input-model."""
    return "input-model" if word == "model" else word


def _own_machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that describe a machine without a name."""
    options = (
        _option(
            "--gpu-memory",
            type=click.FloatRange(0, 10_000, min_open=True),
            metavar="GIB",
            help="Memory of each GPU of a machine that has no name here, with --gpu-flops; --num-gpus is 1 by default.",
        ),
        _option(
            "--gpu-flops",
            type=click.FloatRange(0, 1e6, min_open=True),
            metavar="TFLOPS",
            help="Peak of each of its GPUs in bf16, dense, from the data sheet.",
        ),
        _option(
            "--host-memory",
            type=click.FloatRange(0, 1e6, min_open=True),
            metavar="GIB",
            help=f"Host memory of that machine.  [default: {OWN_HOST_GIB:.0f} for each GPU]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(
    cls=CollectingCommand, context_settings={"max_content_width": 110, "token_normalize_func": _long_name}
)
@_option(
    "--machine",
    metavar="NAME",
    help=f"Machine to plan for: {', '.join(MACHINES)}; or COUNTxGPU, where GPU is {', '.join(GPUS)}.  "
    "[default: this machine]",
)
@_option("--num-gpus", type=int, help="Number of devices.  [default: all; 2 CPU ranks]")
@_own_machine_options
@some_click_options(
    *OPTIONS,
    # default: those of the GPU family
    deepspeed=None,
    per_device_train_batch_size=None,
    gradient_accumulation_steps=None,
    # as in Dolly's notebook
    epochs=1.0,
    local_output_dir="OUTPUT",
)
@_option("--price", type=click.FloatRange(0), help="Price of the machine per hour, in any currency.")
@_option("--json", "json_", is_flag=True, help="Print JSON instead of the table.")
@_option("--plot", type=PictureFile(), metavar="FILE.png", help="Draw memory per device and time, by part.")
@click.pass_context
def main(
    ctx: click.Context,
    machine: str | None,
    num_gpus: int | None,
    price: float | None,
    json_: bool,
    plot: Path | None,
    **typed: Any,
) -> None:
    """Predict whether a run fits on a machine, how long it takes and what it costs. The defaults are Dolly's run.

    --deepspeed, --per-device-train-batch-size and --gradient-accumulation-steps default to the values for the machine's
    GPU family. --local-output-dir is the folder that the run would write to. --model is short for --input-model.
    """
    set_up_console()
    problems = value_problems(ctx)
    if price is not None and not math.isfinite(price):
        problems.append(f"--price {price}: expected a finite number")
    own = {name: typed.pop(name) for name in ("gpu_memory", "gpu_flops", "host_memory")}
    with redirect_stdout(sys.stderr):  # DeepSpeed prints when it is imported
        plan = _plan(machine, own, num_gpus, typed, problems)
    if plan is None:
        raise click.UsageError("\n".join(problems))
    if plot:
        draw(plan, plot)
    print(json.dumps(as_json(plan, price), indent=2) if json_ else as_table(plan, price))
    if not plan.fits and not json_:
        raise SystemExit(1)  # so that `plan && train` does not train


def _own_machine_problems(name: str | None, own: dict[str, float | None]) -> list[str]:
    """Problems of --machine NAME, and of the options that describe a machine without a name."""
    if name is not None and not name.strip():  # such as an unset shell variable
        return ["--machine is empty. Give a value, or leave the option out"]
    described = {flag_of(option): value for option, value in own.items()}
    typed = [flag for flag, value in described.items() if value is not None]
    if name and typed:
        return [f"--machine {name}: has its own figures. Leave out {' and '.join(typed)}, or --machine"]
    if problems := [
        f"{flag} {value}: expected a finite number"
        for flag, value in described.items()
        if value is not None and not math.isfinite(value)  # click's ranges let nan pass
    ]:
        return problems
    missing = [flag for flag in ("--gpu-memory", "--gpu-flops") if typed and described[flag] is None]
    units = {"--gpu-memory": "GiB, such as 24", "--gpu-flops": "TFLOP/s in bf16, such as 165"}
    return [f"{typed[0]}: also type {flag}, in {units[flag]}" for flag in missing]


def _find_machine(
    name: str | None, own: dict[str, float | None], num_gpus: int | None, folder: str
) -> Machine:
    """The machine to plan for: the one of that name, one's own, or this one with the disk of `folder`.

    Args:
        own: --gpu-memory in GiB, --gpu-flops in TFLOP/s and --host-memory in GiB; None where one was not typed.

    Raises OptionsError or MachineError if there is none.
    """
    if problems := _own_machine_problems(name, own):
        raise OptionsError(*problems)
    if own["gpu_memory"] and own["gpu_flops"]:
        return described_machine(
            num_gpus or 1, own["gpu_memory"], 1e12 * own["gpu_flops"], own["host_memory"]
        )
    return find_machine(name) if name else this_machine(folder, num_gpus)


def _plan(
    name: str | None,
    own: dict[str, float | None],
    num_gpus: int | None,
    typed: dict[str, Any],
    problems: list[str],
) -> Plan | None:
    """The plan, or None if there are problems. Adds every problem it finds to `problems`.

    `name` and `own` are those of `_find_machine`, and `typed` are the trainer's options, None where one was not typed.
    """
    options = TrainingOptions(**{key: value for key, value in typed.items() if value is not None})
    problems += option_problems(options)
    if options.deepspeed is not None and not options.deepspeed.strip():
        problems.append("--deepspeed is empty. Give a value, or leave the option out")
    config: dict[str, Any] | None = None
    with _collect_errors(problems):
        config = read_json(options.deepspeed) if options.deepspeed else None
    with _collect_errors(problems):
        machine = _find_machine(name, own, num_gpus, options.local_output_dir)
        if num_gpus and num_gpus > machine.count:
            raise MachineError(
                f"--num-gpus {num_gpus}: {machine.name} has {machine.count}. Type a smaller number"
            )
        ranks = machine.count if num_gpus is None else num_gpus
        chosen = preset_options(machine.family, ranks, options.batching, options.lora > 0)
        options = replace(options, **{key: value for key, value in chosen.items() if typed[key] is None})
        if config is not None:
            problems += file_problems(options, config, ranks) + precision_problems(options, config)
        if not problems:
            return plan_options(options, ranks, machine)
    return None


@contextmanager
def _collect_errors(problems: list[str]) -> Iterator[None]:
    """Adds errors that the user can correct to `problems`."""
    try:
        yield
    except OptionsError as error:
        problems += error.problems
    except (MachineError, ModelError, DataError) as error:
        problems.append(str(error))


if __name__ == "__main__":
    main()
