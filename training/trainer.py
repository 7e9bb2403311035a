"""The one command: options, checks, ranks and rows, start, steps, the finished folder.

    deepspeed --num_gpus 8 --module training.trainer --deepspeed config/ds_z3_bf16_config.json \\
        --epochs 1 --local-output-dir /local_disk0/dolly

The same module runs under torchrun, Spark's DeepSpeed distributor, and on one device without any launcher. `train` is
the recipe from top to bottom. Its stages import torch; this module does not, so that a typing error is answered at once.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from training.launch.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the imports below: it is a small process that never needs them
    # DeepSpeed's launcher says it once for all; each rank would say it again while it imports DeepSpeed.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.msg)

import click

from training import ranks
from training.errors import Interrupted
from training.launch.exits import run_and_exit
from training.options.command_line import GroupedCommand, click_options, value_problems
from training.options.trainer_options import TrainingOptions
from training.run import preflight
from training.run.ending import StopRequest, exit_with_message

logger = logging.getLogger("training")


def train(options: TrainingOptions, request: StopRequest | None = None) -> dict[str, Any]:
    """Fine-tunes and returns the run's record. Raises OptionsError, DataError or ModelError before any step.

    The finished folder is `options.local_output_dir`; it is copied to `options.dbfs_output_dir` if given. The
    record's status is "finished", or "stopped" where `request` asked for that.
    """
    settings = preflight.check(options)  # every problem in one message, before anything expensive
    from training.run import finish, prepare, start, steps

    request = request or StopRequest()
    prepared = prepare.prepare(settings)  # ranks that have met, tokenizer, rows
    last = steps.planned_steps(settings, len(prepared.train_rows))
    with start.as_only_writer(settings.output):
        begin, record = start.find(settings, prepared, last)  # step 0, or a complete checkpoint
        if begin.finished:
            return finish.deliver_again(settings, record)
        settings = preflight.check_plan(settings, prepared, begin.earlier_choices)
        record["decided"] = settings.plan_choices
        begin = start.write(settings, prepared, begin, record, last)
        if begin.step < last and steps.run_steps(settings, prepared, begin, record, request):
            return start.stopped(settings, record)
        ranks.leave()
        if not ranks.is_main_process():
            return record
        if request.received:  # after the last step
            raise Interrupted
        return finish.finish(settings, prepared.ledger, record, begin.last_checkpoint(settings.output, last))


@click.command(cls=GroupedCommand, context_settings={"max_content_width": 110})
@click_options
@click.pass_context
def main(ctx: click.Context, **values: Any) -> None:
    """Fine-tune a causal language model to follow instructions. The defaults are Dolly's run."""
    main_process = ranks.is_main_process()
    logging.basicConfig(
        level=logging.WARNING if main_process else logging.ERROR, format="%(message)s", stream=sys.stdout
    )
    if main_process:  # what others log below a warning is not for users: setuptools logs its gcc commands
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
