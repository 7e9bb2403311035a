"""Builds the Trainer and runs its steps."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from training.consts import METRICS_FILE, SAMPLES_FILE
from training.data.collator import DataCollatorForCompletionOnlyLM, DataCollatorForPackedRows
from training.data.rows import read_prompts
from training.errors import ModelError, OptionsError
from training.machine.flops import peak_flops
from training.model.loading import DTYPES, load_model, max_positions
from training.model.packing import choose_batching
from training.options.trainer_options import TrainingOptions, precision_of, steps_between_samples
from training.ranks import on_rank_0
from training.run.completion_trainer import CompletionTrainer
from training.run.ending import StopRequest, lost_peer, out_of_memory
from training.run.identity import global_batch
from training.run.prepare import Prepared
from training.run.resume import Continued
from training.run.start import Start, remove_newer
from training.run.step_guard import AT_MINIMUM
from training.storage.metrics import forget_after
from training.tracking.callbacks import Curves, MetricsLog
from training.tracking.mlflow import tracked
from training.tracking.progress import ProgressLog
from training.tracking.samples import Samples

logger = logging.getLogger(__name__)


def planned_steps(options: TrainingOptions, rows: int, world_size: int) -> int:
    """Optimizer steps of the whole run, as the Trainer counts them."""
    return options.max_steps or math.ceil(options.epochs * steps_per_epoch(options, rows, world_size))


def steps_per_epoch(options: TrainingOptions, rows: int, world_size: int) -> int:
    return math.ceil(rows / global_batch(options, world_size))


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
            f"--max-tokens-per-device {options.max_tokens_per_device} splits packed rows, and this model cannot "
            "pack. Lower --per-device-train-batch-size and raise --gradient-accumulation-steps instead"
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
        asked = on_rank_0(args, partial(read_prompts, options.sample_prompts))
        every = steps_between_samples(
            options, steps_per_epoch(options, len(prepared.train_rows), args.world_size)
        )
        try:
            trainer.add_callback(Samples(trainer, asked, every, output / SAMPLES_FILE, curves))
        except ValueError as error:  # not even an empty prompt fits beside an answer
            few = (
                f"the model's {max_positions(trainer.model.config)} positions hold no prompt beside an answer"
            )
            raise OptionsError(f"--sample-prompts {options.sample_prompts}: {few}. Leave it out") from error
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
