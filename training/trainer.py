"""The one command: options, checks, data, model, `transformers.Trainer`, the finished folder.

    deepspeed --num_gpus 8 --module training.trainer --deepspeed config/ds_z3_bf16_config.json \\
        --epochs 1 --local-output-dir /local_disk0/dolly

The same module runs under torchrun, Spark's DeepSpeed distributor, and on one device without any launcher."""

from __future__ import annotations

import logging

from training.launch.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the imports below: it is a small process that never needs them
    # DeepSpeed's launcher says it once for all; each rank would say it again while it imports DeepSpeed.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.msg)

import errno
import logging
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click

from training.consts import LEDGER_FILE, RUN_FILE
from training.errors import (
    DataError,
    FolderBusyError,
    Interrupted,
    ModelError,
    OptionsError,
    PublishError,
    TrainingError,
)
from training.files import writing
from training.launch.exits import ENDED, INTERRUPTED, LOST_PEER, REFUSED, end_with
from training.options.checks import find_problems
from training.options.command_line import GroupedCommand, click_options, value_problems
from training.options.trainer_options import TrainingOptions
from training.ranks import is_main_process, on_rank_0, ranks_of_this_host
from training.run.ending import StopRequest, leave_ranks, lost_peer, out_of_memory, timed_out
from training.run.finish import finish
from training.run.identity import rows_digest, start_record
from training.run.preflight import check_plan, machine_problems
from training.run.prepare import Prepared, prepare, quiet_libraries
from training.run.resume import RESHARDED, reshard
from training.run.start import begin
from training.run.steps import planned_steps, run_steps
from training.storage.copy import publish
from training.storage.record import write_run_record
from training.tracking.mlflow_model import log_or_tell

logger = logging.getLogger("training")


# What a disk says that is no fault of ours.
FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

# Seconds that launchers need to end the ranks of a run that another rank has refused; Spark about 6.
REFUSAL_GRACE = 12
PEER_GRACE = 3  # seconds that a launcher, which looks every second, has to see which rank ended first


def train(options: TrainingOptions, request: StopRequest | None = None) -> dict[str, Any]:
    """Fine-tunes and returns the run's record. Raises OptionsError, DataError or ModelError before any step.

    The finished folder is `options.local_output_dir`; it is copied to `options.dbfs_output_dir` if given. The
    record's status is "finished", or "stopped" where `request` asked for that.
    """
    problems = find_problems(options) + machine_problems(options)
    if problems:
        raise OptionsError(*problems)
    quiet_libraries()
    prepared = prepare(options)
    with ExitStack() as held:
        if prepared.args.process_index == 0:
            held.enter_context(writing(Path(prepared.args.output_dir)))
        return _train_prepared(options, prepared, request or StopRequest())


def _train_prepared(options: TrainingOptions, prepared: Prepared, request: StopRequest) -> dict[str, Any]:
    args = prepared.args
    output, main = Path(args.output_dir), args.process_index == 0
    digest = rows_digest(prepared.train_rows, prepared.held_out_rows) if main else None
    record = start_record(options, args.world_size, digest)
    steps = planned_steps(options, len(prepared.train_rows), args.world_size)
    start = on_rank_0(args, lambda: begin(output, options, record, steps))
    if start.finished:
        logger.info("%s is finished already", output)
        if main and options.dbfs_output_dir:
            publish(output, options.dbfs_output_dir)
        if main and options.logs_to_mlflow:
            log_or_tell(output, options.mlflow_model_name)
        return start.former
    if start.former is not None:
        record |= {name: start.former[name] for name in ("started", "id") if name in start.former}
    if start.folder is not None and start.folder.parent.resolve() != output.resolve():
        record["begun_from"] = str(start.folder)
    if main:  # a start that was killed may have left it
        shutil.rmtree(output / RESHARDED, ignore_errors=True)
    decided = start.former.get("decided") if start.former else None
    check = partial(check_plan, options, prepared, ranks_of_this_host(args), decided)
    record["decided"] = on_rank_0(args, check)
    folder = start.folder
    if folder and start.step < steps and options.deepspeed_json and start.saved_ranks != args.world_size:
        folder = on_rank_0(args, partial(reshard, folder, output))
    if main:
        # The first file of all: a folder that has others and not this one is refused.
        write_run_record(output, record)
        prepared.ledger.save(output / LEDGER_FILE)
    if start.step < steps and run_steps(options, prepared, record, start, folder, request):
        record["status"] = "stopped"
        if main:
            write_run_record(output, record)
        return record
    leave_ranks()
    if not main:
        return record
    if request.asked:  # after the last step
        raise Interrupted
    last = start.folder if start.folder and start.step == steps else output / f"checkpoint-{steps}"
    return finish(options, prepared.ledger, record, last)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


@click.command(cls=GroupedCommand, context_settings={"max_content_width": 110})
@click_options
@click.pass_context
def main(ctx: click.Context, **values: Any) -> None:
    """Fine-tune a causal language model to follow instructions. The defaults are Dolly's run."""
    logging.basicConfig(
        level=logging.WARNING if is_main_process() else logging.ERROR, format="%(message)s", stream=sys.stdout
    )
    if (
        is_main_process()
    ):  # what others tell below a warning is not for users: setuptools tells its gcc commands
        logger.setLevel(logging.INFO)
    request = StopRequest()
    try:
        request.listen()
        options = TrainingOptions(**values)
        if value_problems(ctx):
            raise OptionsError(*(value_problems(ctx) + find_problems(options) + machine_problems(options)))
        record = train(options, request)
        if record["status"] == "stopped":
            raise Interrupted
    except PublishError as error:
        _say(f"Cannot publish:\n{error}")
        sys.exit(1)
    except (OptionsError, DataError, ModelError, FolderBusyError) as error:
        # Most problems are found by every rank. One tells them, and the launcher ends the others while they wait; what is
        # wrong on one node alone its own ranks must tell.
        if not is_main_process():
            signal.signal(signal.SIGTERM, lambda *_: os._exit(REFUSED))
            time.sleep(REFUSAL_GRACE)
        _say(f"Cannot train:\n{error}")
        sys.exit(REFUSED)
    except TrainingError as error:
        if error.alone or is_main_process():
            _say(f"Training ended at {error}")
        sys.exit(ENDED)
    except Interrupted:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher may repeat it while Python shuts down
        if is_main_process():
            begun = (Path(os.path.expanduser(values["local_output_dir"] or "")) / RUN_FILE).exists()
            again = "with --resume auto" if begun else "again"  # which may name another run's checkpoint
            _say(f"Stopped. To go on, type the same command {again}")
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.errno not in FULL_OR_BROKEN:
            raise
        _say(
            f"Training ended: {error.filename2 or error.filename or options.local_output_dir} could not be written ({error.strerror}). "
            "Make room, or mend the disk, and type the same command with --resume auto"
        )
        sys.exit(ENDED)
    except (RuntimeError, MemoryError) as error:
        if lack := out_of_memory(error):
            _say(f"Rank {os.environ.get('RANK', '0')} {lack}")
            sys.exit(ENDED)
        if "EADDRINUSE" in str(error):
            port = os.environ.get("MASTER_PORT")
            _say(
                f"Cannot train:\n  - port {port}, by which the ranks meet, is taken, most likely by another run. "
                "Type deepspeed --master_port 29501 ... (torchrun: --master-port)"
            )
            sys.exit(REFUSED)
        if not lost_peer(error):
            raise
        waited = f"waited {options.rank_timeout} s (--rank-timeout) for" if timed_out(error) else "lost"
        rank = os.environ.get("RANK", "0")
        _say(f"Rank {rank} {waited} another rank: one that ended says why, one that hangs says nothing")
        time.sleep(PEER_GRACE)
        os._exit(LOST_PEER)
    finally:
        leave_ranks()


if __name__ == "__main__":
    end_with(main)
