"""The one command: options, checks, data, model, `transformers.Trainer`, the finished folder.

    deepspeed --num_gpus 8 --module training.trainer --deepspeed config/ds_z3_bf16_config.json \\
        --epochs 1 --local-output-dir /local_disk0/dolly

The same module runs under torchrun, Spark's DeepSpeed distributor, and on one device without any launcher.
"""

from __future__ import annotations

import logging

from training.supervisor import remove_shared_buffer, supervise

if __name__ == "__main__":
    supervise()  # before the imports below: it is a small process that never needs them
    # DeepSpeed's launcher says it once for all; each rank would say it again while it imports DeepSpeed.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.msg)

import errno
import io
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import datasets
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from training import checkpoint
from training.attention import packs_cleanly, use_packed_attention
from training.batching import check_token_budget
from training.callbacks import Curves, MetricsLog, ProgressLog, duration
from training.checks import FolderBusyError, disk_faults, kernel_faults, version_faults, writing
from training.collator import DataCollatorForCompletionOnlyLM, DataCollatorForPackedRows
from training.consts import RUN_FILE
from training.data import Ledger, marked_sample, prepare_dataset, split_held_out
from training.exits import ENDED, INTERRUPTED, LOST_PEER, REFUSED, end_with
from training.faults import find_faults, output_faults
from training.finished import LEDGER_FILE, place_model, verify_model, write_model_card
from training.flops import peak_flops
from training.loop import Batching, CompletionTrainer, Continued
from training.loss import use_response_loss
from training.machines import GIB, this_machine
from training.metrics import METRICS_FILE, SAMPLES_FILE, forget_after
from training.model import DTYPES, ModelError, load_config, load_model, load_tokenizer, max_positions
from training.operators import compile_operators, compiler_faults
from training.options import (
    GroupedCommand,
    OptionsError,
    TrainingOptions,
    click_options,
    is_main_process,
    precision_of,
    read_deepspeed_json,
    steps_between_samples,
    value_faults,
    world_size,
)
from training.publish import PublishError, local_path, publish, target_faults
from training.record import global_batch, rows_digest, start_record, write_run_record
from training.resume import RESHARDED, Start, find_start, remove_newer, reshard
from training.rows import DataError, read_prompts
from training.samples import Samples
from training.stopping import (
    AT_MINIMUM,
    Interrupted,
    StopRequest,
    TrainingError,
    lost_peer,
    mortal,
    out_of_memory,
    timed_out,
)
from training.tracking import log_or_tell, tracked
from training.verdict import Plan, plan_run
from training.workload import lengths_of, model_facts

logger = logging.getLogger("training")

# What a disk says that is no fault of ours.
FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
# Seconds that launchers need to end the ranks of a run that another rank has refused; Spark about 6.
REFUSAL_GRACE = 12
PEER_GRACE = 3  # seconds that a launcher, which looks every second, has to see which rank ended first


def training_arguments(options: TrainingOptions) -> TrainingArguments:
    """The Trainer's arguments. While they live, `from_pretrained` loads in shards under ZeRO-3."""
    precision = precision_of(options)
    return TrainingArguments(
        output_dir=str(Path(options.local_output_dir).expanduser()),
        seed=options.seed,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=options.lr,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        per_device_train_batch_size=options.per_device_train_batch_size,
        per_device_eval_batch_size=options.per_device_eval_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        deepspeed=options.deepspeed_json,
        use_cpu=not _accelerator(),
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,  # the default replaces a NaN loss in the log by an older one
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        eval_on_start=True,
        save_steps=options.save_steps,
        ddp_timeout=options.rank_timeout,
        log_on_each_node=False,
        log_level="error",
        log_level_replica="error",
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _accelerator() -> bool:
    return torch.cuda.is_available() or (world_size() == 1 and torch.backends.mps.is_available())


def choose_batching(model: PreTrainedModel, asked: str) -> Batching:
    """How this model's rows are batched: "packed" only where the loaded model is proved to keep rows apart."""
    if asked == "padded":
        return "padded"
    if model.config.model_type == "gptj":
        use_packed_attention(model)
        use_response_loss(model)
    clean, reason = packs_cleanly(model)
    if clean:
        return "packed"
    logger.info("rows are padded, and dealt by length, because this model cannot pack: %s", reason)
    return "length"


@dataclass
class Prepared:
    """What training starts from, alike on all ranks."""

    args: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    train_rows: datasets.Dataset
    held_out_rows: datasets.Dataset
    ledger: Ledger


def train(options: TrainingOptions, request: StopRequest | None = None) -> dict[str, Any]:
    """Fine-tunes and returns the run's record. Raises OptionsError, DataError or ModelError before any step.

    The finished folder is `options.local_output_dir`; it is copied to `options.dbfs_output_dir` if given. The
    record's status is "finished", or "stopped" where `request` asked for that.
    """
    faults = find_faults(options) + machine_faults(options)
    if faults:
        raise OptionsError(faults)
    _quiet_libraries()
    prepared = prepare(options)
    with ExitStack() as held:
        if prepared.args.process_index == 0:
            held.enter_context(writing(Path(prepared.args.output_dir)))
        return _train_prepared(options, prepared, request or StopRequest())


def machine_faults(options: TrainingOptions) -> list[str]:
    """What this machine lacks: versions, kernels of its GPUs, a compiler. Not what depends on model and data."""
    faults = version_faults() + kernel_faults()
    if options.deepspeed_json and not faults:
        with suppress(OptionsError):  # an unreadable file is told by find_faults
            faults += compiler_faults(read_deepspeed_json(options.deepspeed_json))
    return faults


def _train_prepared(options: TrainingOptions, prepared: Prepared, request: StopRequest) -> dict[str, Any]:
    args = prepared.args
    output, main = Path(args.output_dir), args.process_index == 0
    digest = rows_digest(prepared.train_rows, prepared.held_out_rows) if main else None
    record = start_record(options, args.world_size, digest)
    steps = planned_steps(options, len(prepared.train_rows), args.world_size)
    start = _on_rank_0(args, lambda: _begin(output, options, record, steps))
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
    check = partial(check_plan, options, prepared, _ranks_of_this_host(args), decided)
    record["decided"] = _on_rank_0(args, check)
    folder = start.folder
    if folder and start.step < steps and options.deepspeed_json and start.saved_ranks != args.world_size:
        folder = _on_rank_0(args, partial(reshard, folder, output))
    if main:
        # The first file of all: a folder that has others and not this one is refused.
        write_run_record(output, record)
        prepared.ledger.save(output / LEDGER_FILE)
    if start.step < steps and run_steps(options, prepared, record, start, folder, request):
        record["status"] = "stopped"
        if main:
            write_run_record(output, record)
        return record
    _leave_ranks()
    if not main:
        return record
    if request.asked:  # after the last step
        raise Interrupted
    last = start.folder if start.folder and start.step == steps else output / f"checkpoint-{steps}"
    return finish(options, prepared.ledger, record, last)


def _begin(output: Path, options: TrainingOptions, record: dict[str, Any], steps: int) -> Start:
    """Where the run begins. Raises OptionsError also for what was told of its places before, and has changed since."""
    if faults := output_faults(options):  # another run may have come to its end while this one waited
        raise OptionsError(faults)
    start = find_start(output, options, record, steps)
    # The copy of the finished run that this one goes on from is another model's.
    if options.dbfs_output_dir and not start.finished and (faults := target_faults(options.dbfs_output_dir)):
        raise OptionsError([f"--dbfs-output-dir {fault}" for fault in faults])
    return start


def planned_steps(options: TrainingOptions, rows: int, world_size: int) -> int:
    """Optimizer steps of the whole run, as the Trainer counts them."""
    return options.max_steps or math.ceil(options.epochs * steps_per_epoch(options, rows, world_size))


def steps_per_epoch(options: TrainingOptions, rows: int, world_size: int) -> int:
    return math.ceil(rows / global_batch(options, world_size))


def _on_rank_0(args: TrainingArguments, function: Callable[[], Any]) -> Any:
    """What `function` gives on rank 0, or as an OptionsError what is wrong there, on every rank."""
    outcome: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = function()
        except OptionsError as error:
            outcome[1] = error.faults
        except DataError as error:
            outcome[1] = [str(error)]
    if args.world_size > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise OptionsError(outcome[1])
    return outcome[0]


def _ranks_of_this_host(args: TrainingArguments) -> int:
    """Ranks that share this host's memory. All ranks call it: Spark starts a launcher for each, and none of them knows."""
    hosts = [socket.gethostname()] * args.world_size
    if args.world_size > 1:
        torch.distributed.all_gather_object(hosts, socket.gethostname())
    return hosts.count(socket.gethostname())


def check_plan(
    options: TrainingOptions,
    prepared: Prepared,
    ranks_here: int,
    decided: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What "auto" comes to on this machine, by the plan. Raises OptionsError where the run does not fit.

    `ranks_here` is how many of the run's ranks share this machine, also where each of them sees its own GPU alone.

    A run that goes on keeps what was `decided` for it where "auto" is asked, or its numbers would change in their last
    digits; what a person types instead, because memory did not suffice, is done.
    """
    if decided and options.gradient_checkpointing == "auto":
        kept = "on" if decided["gradient_checkpointing"] else "off"
        options = replace(options, gradient_checkpointing=kept)
    if decided and options.max_tokens_per_device == "auto":
        options = replace(options, max_tokens_per_device=decided["max_tokens_per_device"])
    world = prepared.args.world_size
    # Each disk is asked for itself below.
    machine = replace(this_machine(prepared.args.output_dir), count=ranks_here, disk_gib=math.inf)
    lengths = lengths_of(
        options.training_dataset,
        *(prepared.train_rows[c][:] + prepared.held_out_rows[c][:] for c in ("length", "response_start")),
    )
    plan = plan_run(options, world, lengths, model_facts(options.input_model), machine)
    faults = plan.faults + _disk_faults(options, plan)
    if faults and not options.force:
        raise OptionsError([*faults, "--force trains all the same: the plan may err by a tenth or more"])
    for fault in faults:
        logger.warning("trained by --force, though the plan says %s", fault)
    logger.info(
        "the plan: %.2f GiB a device, checkpointing %s; an epoch in %s to %s, the run in %s to %s",
        sum(plan.gpu_memory_gib.values()),
        "on" if plan.settings.checkpointing else "off",
        *(
            duration(3600 * hours[bound])
            for hours in (plan.hours_per_epoch, plan.hours)
            for bound in ("low", "high")
        ),
    )
    return {
        "gradient_checkpointing": plan.settings.checkpointing,
        "max_tokens_per_device": plan.settings.max_tokens,
    }


def _disk_faults(options: TrainingOptions, plan: Plan) -> list[str]:
    """Which disks have too little free for what the plan says will be written on each; the rows are there already."""
    output = local_path(options.local_output_dir)
    there = sum(file.stat().st_size for file in output.glob("checkpoint-*/**/*") if file.is_file())
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    download = plan.model.downloaded and not any(
        isinstance(try_to_load_from_cache(options.input_model, file), str) for file in files
    )
    needs = {
        Path(HF_HOME): plan.model.file_bytes if download else 0,
        output / "checkpoints": max(0, int(plan.disk_gib["checkpoints"] * GIB) - there),
        output / "model": int(plan.disk_gib["model"] * GIB),
    }
    labels = dict(zip(needs, ("the base model", "checkpoints", "the model"), strict=True))
    if options.dbfs_output_dir and "://" not in options.dbfs_output_dir:
        published = local_path(options.dbfs_output_dir)
        needs[published], labels[published] = needs[output / "model"], "its copy"
    return disk_faults(needs, labels)


def run_steps(
    options: TrainingOptions,
    prepared: Prepared,
    record: dict[str, Any],
    start: Start,
    folder: Path | None,
    request: StopRequest,
) -> bool:
    """Trains from `start` to the last step, which leaves a checkpoint. Returns whether it was stopped before.

    `folder` is the checkpoint to load: that of `start`, or what `reshard` has made of it.
    """
    args, output = prepared.args, Path(prepared.args.output_dir)
    if start.folder is not None:
        args.eval_on_start = False  # measured before the first step of all
        logger.info("the run goes on from %s", start.folder)
    if folder != start.folder:
        args.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}
    trainer = build_trainer(options, prepared, record["decided"], request)
    if args.process_index == 0:
        remove_newer(output, start.step)
        for name in (METRICS_FILE, SAMPLES_FILE):
            if start.folder is None:  # what a run told that was killed before its first checkpoint
                (output / name).unlink(missing_ok=True)
            else:
                forget_after(output / name, start.step, start.folder.parent / name)
    if start.folder is not None:
        trainer.add_callback(Continued(trainer, start.folder))
    try:
        with tracked(options.logs_to_mlflow and args.process_index == 0, record, output) as callbacks:
            for callback in callbacks:
                trainer.add_callback(callback)
            trainer.train(resume_from_checkpoint=None if folder is None else str(folder))
    except Exception as error:
        if AT_MINIMUM not in str(error):
            raise
        raise trainer.guard.overflowed(trainer.state.global_step + 1) from error
    return trainer.guard.stopped


def _leave_ranks() -> None:
    """What remains is rank 0's alone, and no model that it loads may be sharded over the others."""
    unset_hf_deepspeed_config()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def finish(options: TrainingOptions, ledger: Ledger, record: dict[str, Any], last: Path) -> dict[str, Any]:
    """Makes the last or the best checkpoint's model the run's, verifies, describes and publishes it. Rank 0 alone.

    It reads files only, so it can be done again by a later command if this one is killed.
    """
    output = Path(options.local_output_dir).expanduser()
    chosen = (checkpoint.best(output) or last) if options.final_model == "best" else last
    faults = checkpoint.faults_of(chosen, model_only=True)
    if faults:
        raise TrainingError(
            f"its last step: the model in {chosen} cannot be used, because {faults[0]}. Remove that folder, and type the "
            "same command with --resume auto"
        )
    record |= _outcome(chosen, last)
    try:
        place_model(chosen, output)
        verify_model(output, options.trust_remote_code)
        shutil.copyfile(last / "trainer_state.json", output / "trainer_state.json")
        write_model_card(output, record, ledger)
        write_run_record(output, record)
    except OSError as error:
        raise TrainingError(
            f"its last step: the model of {chosen} could not be placed in {output} ({error}). Make room, and type the "
            "same command with --resume auto"
        ) from error
    except ModelError as error:
        raise TrainingError(f"its last step, {checkpoint.step_of(last)}: {error}") from error
    logger.info(
        "held-out loss %.4f before, %.4f after; %s of training; the model is in %s",
        record["held_out_loss"]["before"],
        record["held_out_loss"]["after"],
        duration(record["seconds"]["training"]),
        output,
    )
    if options.dbfs_output_dir:
        publish(output, options.dbfs_output_dir)
    if options.logs_to_mlflow:
        log_or_tell(output, options.mlflow_model_name)
    return record


def _outcome(chosen: Path, last: Path) -> dict[str, Any]:
    """What run.json says of a finished run, from its last checkpoint and from that whose model it takes."""
    manifest = checkpoint.read_manifest(chosen)
    assert manifest is not None
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    held_out = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    progress = json.loads((last / checkpoint.PROGRESS_FILE).read_text())
    loss_sum = progress["loss_total"] + fmean(progress["loss_sums"])
    return {
        "status": "finished",
        "steps": checkpoint.step_of(last),
        "model_of_step": checkpoint.step_of(chosen),
        "train_loss": loss_sum / checkpoint.step_of(last),
        "held_out_loss": {"before": held_out[min(held_out)], "after": manifest["eval_loss"]},
        "seconds": {"training": progress["seconds"]},
        "batching": progress["batching"],
        "weights": {
            name: told
            for name, told in manifest["files"].items()
            if name in manifest["model"] and name.endswith(".safetensors")
        },
    }


def prepare(options: TrainingOptions) -> Prepared:
    """Ranks, tokenizer and rows: everything but the model, so that bad data costs no loading."""
    if options.deepspeed_json:
        compile_operators(read_deepspeed_json(options.deepspeed_json), options.rank_timeout)
    with mortal():
        if options.deepspeed_json and not torch.cuda.is_available():
            import deepspeed

            with redirect_stdout(io.StringIO()):  # it prints which operators it has loaded, once a rank
                deepspeed.init_distributed(
                    dist_backend="gloo",
                    auto_mpi_discovery=False,
                    timeout=timedelta(seconds=options.rank_timeout),
                )
            torch.distributed.barrier()  # every rank has the others' buffers open, and needs their names no more
            remove_shared_buffer()  # now, as a run that is killed with its supervisors removes nothing later
        args = training_arguments(options)
    with args.main_process_first(desc="data and tokenizer"):  # rank 0 fills the caches, the others read them
        tokenizer, rows, ledger = tokenised_rows(options)
        train_rows, held_out_rows = split_held_out(rows, options.test_size, options.seed)
    if isinstance(options.max_tokens_per_device, int):
        try:
            check_token_budget(train_rows["length"][:], options.max_tokens_per_device)
        except ValueError as error:
            raise OptionsError([str(error)]) from error
    row = train_rows[0]
    sample = marked_sample(tokenizer, row["input_ids"], row["response_start"])
    logger.info("%s", ledger)
    logger.info("a row as the model sees it, the supervised tokens between « and »:\n%s", sample)
    return Prepared(args, tokenizer, train_rows, held_out_rows, ledger)


def tokenised_rows(
    options: TrainingOptions,
) -> tuple[PreTrainedTokenizerBase, datasets.Dataset, Ledger]:
    """(tokenizer, rows, ledger) of a run, the rows as long as its model and options allow; see `prepare_dataset`."""
    positions = max_positions(load_config(options.input_model, options.trust_remote_code))
    tokenizer = load_tokenizer(options.input_model, options.trust_remote_code)
    rows, ledger = prepare_dataset(
        options.training_dataset,
        tokenizer,
        min(options.max_length or positions, positions),
        options.keep_truncated,
        options.max_dropped_fraction,
    )
    return tokenizer, rows, ledger


def build_trainer(
    options: TrainingOptions, prepared: Prepared, decided: dict[str, Any], request: StopRequest
) -> CompletionTrainer:
    """Loads the model and puts the Trainer around it. `decided` is what `check_plan` came to."""
    args, tokenizer, precision = prepared.args, prepared.tokenizer, precision_of(options)
    if decided["gradient_checkpointing"]:
        args.activation_checkpointing, args.activation_checkpointing_kwargs = True, {"use_reentrant": False}
    max_tokens = decided["max_tokens_per_device"]
    # ZeRO-3 keeps float32 master weights beside 16-bit ones; without DeepSpeed the weights are the masters.
    dtype = DTYPES[precision] if options.deepspeed_json else torch.float32
    set_seed(options.seed)
    try:
        model = load_model(options.input_model, tokenizer, dtype, options.seed, options.trust_remote_code)
    except ModelError as error:
        cause = error.__cause__
        if isinstance(cause, RuntimeError | MemoryError) and (out_of_memory(cause) or lost_peer(cause)):
            raise cause from None  # no fault of the model's: a rank that was lost, or too little memory
        raise
    batching = choose_batching(model, options.batching)
    if batching != "packed" and options.max_tokens_per_device != "auto":
        raise OptionsError(
            [
                f"--max-tokens-per-device {options.max_tokens_per_device} splits packed rows, and this model cannot "
                "pack. Lower --per-device-train-batch-size and raise --gradient-accumulation-steps instead"
            ]
        )
    collator = DataCollatorForPackedRows if batching == "packed" else DataCollatorForCompletionOnlyLM
    trainer = CompletionTrainer(
        model=model,
        args=args,
        train_dataset=prepared.train_rows,
        eval_dataset=prepared.held_out_rows,
        data_collator=collator(pad_token_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        batching=batching,
        max_tokens=max_tokens if batching == "packed" else None,
        peak_flops=peak_flops(args.device, DTYPES[precision]),
        max_shard_size=options.max_shard_size,
        keep_checkpoints=options.save_total_limit,
        request=request,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressLog())
    output = Path(args.output_dir)
    curves = Curves(output / "runs") if args.process_index == 0 else None
    if curves:
        trainer.add_callback(curves)
        trainer.add_callback(MetricsLog(output / METRICS_FILE, trainer.seconds))
    if options.sample_prompts:
        asked = _on_rank_0(args, partial(read_prompts, options.sample_prompts))
        every = steps_between_samples(
            options, steps_per_epoch(options, len(prepared.train_rows), args.world_size)
        )
        try:
            trainer.add_callback(Samples(trainer, asked, every, output / SAMPLES_FILE, curves))
        except ValueError as error:  # not even an empty prompt fits beside an answer
            few = (
                f"the model's {max_positions(trainer.model.config)} positions hold no prompt beside an answer"
            )
            raise OptionsError([f"--sample-prompts {options.sample_prompts}: {few}. Leave it out"]) from error
    logger.info(
        "%s rows to train on, %s held out; %s rows a step, %s, on %s %s in %s%s; %s rate %g",
        f"{len(prepared.train_rows):,}",
        f"{len(prepared.held_out_rows):,}",
        f"{args.train_batch_size * args.gradient_accumulation_steps * args.world_size:,}",
        batching,
        args.world_size,
        args.device.type.upper() + ("s" if args.world_size > 1 else ""),
        precision,
        ", DeepSpeed ZeRO-3" if options.deepspeed_json else "",
        options.lr_scheduler_type,
        options.lr,
    )
    return trainer


def _quiet_libraries() -> None:
    """Rank 0 tells what happens in its own words; libraries speak up only when something is wrong."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # That DeepSpeed accumulates and accelerate does not, which is as the Trainer wants it.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


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
        if value_faults(ctx):
            raise OptionsError(value_faults(ctx) + find_faults(options) + machine_faults(options))
        record = train(options, request)
        if record["status"] == "stopped":
            raise Interrupted
    except PublishError as error:
        _say(f"Cannot publish:\n{error}")
        sys.exit(1)
    except (OptionsError, DataError, ModelError, FolderBusyError) as error:
        # Most faults are found by every rank. One tells them, and the launcher ends the others while they wait; what is
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
        _leave_ranks()


if __name__ == "__main__":
    end_with(main)
