"""Command that trains a model: options, checks, ranks and rows, start or resume, steps, finished folder.

    deepspeed --num_gpus 8 --module training.trainer --deepspeed config/ds_z3_bf16_config.json \\
        --epochs 1 --local-output-dir /local_disk0/dolly

It also runs under torchrun, under Spark's DeepSpeed distributor, and without a launcher on one device. `train` is the
whole recipe. This module does not import torch, so that errors in the options are reported at once; its stages do.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from training.launch.supervisor import supervise
from training.machine.allocator import use_expandable_segments

if __name__ == "__main__":
    # Before the imports below, which the small supervisor process needs only to report a rank that died.
    supervise(lambda text: importlib.import_module("training.options.wording").worded(text))
    use_expandable_segments()
    # The launcher has already logged this; every rank would log it again when it imports DeepSpeed.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.msg)

import click

from training import ranks
from training.console import set_up_console
from training.errors import Interrupted
from training.launch.exits import run_and_exit
from training.machine.local import gpu_memory_taken_gib
from training.options.command_line import GroupedCommand, click_options, value_problems
from training.options.trainer_options import TrainingOptions
from training.options.wording import worded
from training.run import preflight
from training.run.ending import exit_with_message
from training.run.failures import StopRequest

logger = logging.getLogger("training")


def train(options: TrainingOptions, request: StopRequest | None = None) -> dict[str, Any]:
    """Fine-tunes a model and returns the run's record. Raises OptionsError, DataError or ModelError before any step.

    The finished folder is `options.local_output_dir`; it is copied to `options.dbfs_output_dir` if set. The
    record's status is "finished", or "stopped" if `request` was received.
    """
    settings = preflight.check(options)  # reports all problems together, before anything expensive
    taken = gpu_memory_taken_gib()  # by other processes: this one has no CUDA context yet
    from training.run import final_model, finish, mirror, prepare, save_interval, start, steps

    request = request or StopRequest()
    settings, prepared = prepare.prepare(settings)  # connects the ranks; loads tokenizer and rows
    last = steps.planned_steps(settings, len(prepared.train_rows))
    with start.as_only_writer(settings.output):
        start_point, record = start.find(settings, prepared, last)  # step 0, or a complete checkpoint
        if start_point.finished:
            return finish.deliver_again(settings, record)
        settings = settings.with_save_steps(save_interval.save_steps(settings.options, start_point.former))
        settings = preflight.check_plan(settings, prepared, start_point.earlier_choices, taken)
        record["decided"] = settings.plan_choices
        start_point = start.write(settings, prepared, start_point, record, last)
        with mirror.copying(settings, record, start_point.step, request) as copies:
            if start_point.step < last and steps.run_steps(
                settings, prepared, start_point, record, request, copies
            ):
                return start.stopped(settings, record)
            if any(ranks.gather(request.received)):  # after the last step
                raise Interrupted
            end = start_point.last_checkpoint(settings.output, last)
            written = final_model.write_final_model(settings, end)
            ranks.end_process_group()
            if not ranks.is_main_process():
                return record
            return finish.finish(settings, prepared.ledger, record, end, *written)


@click.command(cls=GroupedCommand, context_settings={"max_content_width": 110})
@click_options
@click.pass_context
def main(ctx: click.Context, **values: Any) -> None:
    """Fine-tune a causal language model to follow instructions. The defaults are those of Dolly v1."""
    main_process = ranks.is_main_process()
    set_up_console(logging.WARNING if main_process else logging.ERROR, worded)
    if main_process:  # other loggers stay at WARNING: setuptools logs its gcc commands
        logger.setLevel(logging.INFO)
    with exit_with_message(values["local_output_dir"], values["rank_timeout"]):
        request = StopRequest()
        request.listen()
        options = TrainingOptions(**values)
        if typing_errors := value_problems(ctx):
            preflight.check(options, typing_errors)
        if train(options, request)["status"] == "stopped":
            raise Interrupted


if __name__ == "__main__":
    run_and_exit(main)
