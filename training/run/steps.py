"""Builds the Trainer and runs its steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from training.consts import METRICS_FILE, SAMPLES_FILE
from training.data.collator import DataCollatorForCompletionOnlyLM, DataCollatorForPackedRows
from training.data.prompt_files import read_prompts
from training.errors import ModelError, OptionsError
from training.machine.flops import adapter_parameters, peak_flops
from training.model.adapter import add_adapter, lora_of, row_ids
from training.model.blocks import block_parameters, use_whole_blocks
from training.model.loading import DTYPES, load_config, load_model, max_positions, text_config
from training.model.loss import use_padded_loss
from training.options.deepspeed import fill_bucket_sizes
from training.options.intervals import steps_between_samples
from training.options.settings import Settings
from training.options.trainer_options import TrainingOptions
from training.ranks import on_rank_0
from training.run.adapter_checkpoint import use_adapter_checkpoints
from training.run.completion_trainer import CompletionTrainer
from training.run.failures import StopRequest, lost_peer, out_of_memory
from training.run.resume import RestoreOnResume
from training.run.save_interval import SaveInterval
from training.run.step_guard import AT_MINIMUM
from training.storage import checkpoint
from training.storage.metrics import drop_entries_after
from training.storage.record import write_run_record
from training.tracking.callbacks import trackers
from training.tracking.samples import Samples

if TYPE_CHECKING:
    from training.run.mirror import Mirror
    from training.run.prepare import Prepared
    from training.run.start import Start

logger = logging.getLogger(__name__)


def planned_steps(settings: Settings, rows: int) -> int:
    """Optimizer steps of the complete run on `rows` rows, counted as the Trainer does."""
    options = settings.options
    return options.max_steps or math.ceil(options.epochs * steps_per_epoch(settings, rows))


def steps_per_epoch(settings: Settings, rows: int) -> int:
    return math.ceil(rows / settings.global_batch)


def run_steps(
    settings: Settings,
    prepared: Prepared,
    start: Start,
    record: dict[str, Any],
    request: StopRequest,
    copies: Mirror | None = None,
) -> bool:
    """Trains from `start` to the last step and its checkpoint. Returns True if a signal stopped it earlier.

    `copies` copies each checkpoint to --checkpoint-to.
    """
    args = prepared.args
    if start.folder is not None:
        args.eval_on_start = False  # it was measured before step 1
        logger.info("the run continues from %s", start.folder)
    if start.loaded != start.folder:
        args.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}
    trainer = build_trainer(settings, prepared, request)
    if settings.lora:
        use_adapter_checkpoints(trainer, _adapter_facts(settings, record["base"], trainer.model))
    if copies is not None:
        trainer.on_checkpoint_complete, trainer.is_being_copied = copies.wake, copies.is_copying
    samples = _samples(trainer, settings)
    intervals = _save_interval(settings, args, record)
    if args.process_index == 0:
        forget_later_steps(settings.output, start)
    resume_callbacks = [] if start.folder is None else [RestoreOnResume(trainer, start.folder)]
    try:
        with trackers(settings, record, trainer.seconds) as callbacks:
            for callback in [*callbacks, *samples, *intervals, *resume_callbacks]:
                trainer.add_callback(callback)
            trainer.train(resume_from_checkpoint=None if start.loaded is None else str(start.loaded))
    except Exception as error:
        if AT_MINIMUM not in str(error):
            raise
        raise trainer.guard.overflowed(trainer.state.global_step + 1) from error
    return trainer.guard.stopped


def forget_later_steps(output: Path, start: Start) -> None:
    """Removes incomplete and skipped checkpoints after `start`, and log lines of the steps that run again."""
    for folder in checkpoint.checkpoints(output):
        if checkpoint.step_of(folder) > start.step:
            checkpoint.remove(folder)
    for name in (METRICS_FILE, SAMPLES_FILE):
        if start.folder is None:  # left by a run that was killed before its first checkpoint
            (output / name).unlink(missing_ok=True)
        else:
            drop_entries_after(output / name, start.step, start.folder.parent / name)


def build_trainer(
    settings: Settings,
    prepared: Prepared,
    request: StopRequest,
    load: Callable[[Settings, Prepared], PreTrainedModel] | None = None,
) -> CompletionTrainer:
    """Loads the model and builds the Trainer, without transformers' own log output.

    `load` makes the model in place of the files of --input-model: the check of a GPU trains random weights.
    """
    args, options, pad = prepared.args, settings.options, prepared.tokenizer.pad_token_id
    if settings.checkpointing:
        args.activation_checkpointing, args.activation_checkpointing_kwargs = True, {"use_reentrant": False}
    model = (load or _load)(settings, prepared)
    if settings.packed:
        prepared.packing.prepare(model)
    elif prepared.packing.padded_loss:
        use_padded_loss(model)
    if settings.lora:
        _add_adapter(model, options, prepared)
    if settings.whole_blocks is True:
        if settings.zero.stage == 3:
            use_whole_blocks(model)
        fill_bucket_sizes(args.hf_deepspeed_config.config["zero_optimization"], block_parameters(model))
    collator = DataCollatorForPackedRows if settings.packed else DataCollatorForCompletionOnlyLM
    trainer = CompletionTrainer(
        model=model,
        args=args,
        train_dataset=prepared.train_rows,
        eval_dataset=prepared.held_out_rows,
        data_collator=collator(pad_token_id=pad),
        processing_class=prepared.tokenizer,
        ledger=prepared.ledger,
        batching=settings.batching,
        max_tokens=settings.max_tokens if isinstance(settings.max_tokens, int) else None,
        peak_flops=peak_flops(args.device, DTYPES[settings.precision]),
        max_shard_size=options.max_shard_size,
        keep_checkpoints=options.save_total_limit,
        checkpoint_bytes=settings.checkpoint_bytes,
        background_saves=settings.background_saves,
        save_seconds=settings.checkpoint_seconds,
        request=request,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    logger.info(
        "%s rows to train on, %s held out; %s rows a step, %s, on %s %s in %s%s; %s rate %g",
        f"{len(prepared.train_rows):,}",
        f"{len(prepared.held_out_rows):,}",
        f"{settings.global_batch:,}",
        settings.batching,
        settings.ranks,
        args.device.type.upper() + ("s" if settings.ranks > 1 else ""),
        settings.precision,
        f", DeepSpeed ZeRO-{settings.zero.stage}" if settings.deepspeed is not None else "",
        options.lr_scheduler_type,
        options.lr,
    )
    return trainer


def _add_adapter(model: PreTrainedModel, options: TrainingOptions, prepared: Prepared) -> None:
    """Freezes the model and adds the adapter of the run, with the rows that the base model lacks."""
    config = load_config(options.input_model, options.trust_remote_code)  # the model's own has grown
    rows = row_ids(prepared.tokenizer, text_config(config).vocab_size)
    add_adapter(model, lora_of(options), rows, options.seed)
    logger.info(
        "LoRA of rank %d: %s parameters are trained, with %d rows of embedding and head; the base is frozen%s",
        options.lora,
        f"{adapter_parameters(model):,}",
        len(rows),
        " and in 4 bits" if options.quantize else "",
    )


def _load(settings: Settings, prepared: Prepared) -> PreTrainedModel:
    options = settings.options
    # ZeRO-3 keeps float32 master weights beside 16-bit ones; without DeepSpeed the weights are the masters. A frozen base
    # needs none.
    masters = settings.deepspeed is None and not settings.lora
    dtype = torch.float32 if masters else DTYPES[settings.precision]
    set_seed(options.seed)
    try:
        return load_model(
            options.input_model,
            prepared.tokenizer,
            dtype,
            options.seed,
            options.trust_remote_code,
            quantize=options.quantize,
        )
    except ModelError as error:
        cause = error.__cause__
        if isinstance(cause, RuntimeError | MemoryError) and (out_of_memory(cause) or lost_peer(cause)):
            raise cause from None  # not the model's fault: a lost rank or too little memory
        raise


def _adapter_facts(settings: Settings, base: dict[str, Any], model: Any) -> dict[str, Any]:
    """What lora.json says of a run, besides its weights: with it and the `base`, a checkpoint becomes a model."""
    options = settings.options
    return {
        "rank": options.lora,
        "alpha": options.lora_alpha,
        "dropout": options.lora_dropout,
        "rows": model.get_input_embeddings().row_ids.tolist(),
        "base": base,
        "precision": settings.precision,
    }


def _save_interval(settings: Settings, args: TrainingArguments, record: dict[str, Any]) -> list[SaveInterval]:
    """The callback that turns the time between checkpoints into steps, if no steps are known. Records them in run.json."""
    if settings.options.save_steps is not None:
        args.save_steps = settings.options.save_steps
        return []

    def decided(steps: int) -> None:
        record["decided"] |= {"save_steps": steps}
        if args.process_index == 0:
            write_run_record(settings.output, record)

    return [SaveInterval(settings.save_seconds, settings.options.save_every is None, decided)]


def _samples(trainer: CompletionTrainer, settings: Settings) -> list[Samples]:
    """The callback that answers the prompts of --sample-prompts, if there are any."""
    options = settings.options
    if not options.sample_prompts:
        return []
    prompts = on_rank_0(lambda: read_prompts(str(options.sample_prompts)))
    every = steps_between_samples(options, steps_per_epoch(settings, len(trainer.train_dataset)))
    try:
        return [Samples(trainer, prompts, every, settings.output / SAMPLES_FILE)]
    except ValueError as error:  # even an empty prompt leaves no positions for an answer
        reason = f"the model has {max_positions(trainer.model.config)} positions, too few for a prompt and an answer"
        raise OptionsError(f"--sample-prompts {options.sample_prompts}: {reason}. Leave it out") from error
