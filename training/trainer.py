"""The one command: options, checks, data, model, `transformers.Trainer`, the finished folder.

    deepspeed --num_gpus 8 --module training.trainer --deepspeed config/ds_z3_bf16_config.json \\
        --epochs 1 --local-output-dir /local_disk0/dolly

The same module runs under torchrun, Spark's DeepSpeed distributor, and on one device without any launcher.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import datasets
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from training.attention import packs_cleanly, use_packed_attention
from training.batching import GlobalBatchSampler, check_token_budget, held_out_batches, micro_steps_needed
from training.callbacks import ProgressLog, StepCounter, count_labels, duration, peak_memory_gib
from training.checkpoint import (
    LEDGER_FILE,
    save_model,
    start_record,
    write_model_card,
    write_run_record,
)
from training.collator import (
    DataCollatorForCompletionOnlyLM,
    DataCollatorForPackedRows,
    document_lengths,
    split_packed_batch,
)
from training.data import Ledger, marked_sample, prepare_dataset, split_held_out
from training.flops import model_flops, model_parameters, peak_flops
from training.loss import use_response_loss
from training.model import DTYPES, ModelError, load_config, load_model, load_tokenizer, max_positions
from training.operators import compile_operators
from training.options import (
    GroupedCommand,
    OptionsError,
    TrainingOptions,
    click_options,
    find_faults,
    is_main_process,
    offloads_optimizer,
    precision_of,
    read_deepspeed_json,
    value_faults,
    world_size,
)
from training.publish import publish
from training.rows import DataError

logger = logging.getLogger("training")

Batching = Literal["packed", "padded", "length"]


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
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
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
        save_total_limit=options.save_total_limit,
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


class CompletionTrainer(Trainer):
    """transformers' Trainer with our batches, a loss per held-out token, and the figures of a step.

    Args:
        batching: "packed", "padded", or "length" (padded, rows of a global batch dealt by length).
        max_tokens: tokens a device computes at once; a larger packed batch is split. None: never.
        peak_flops: floating point operations a second of one device, for the MFU.
    """

    def __init__(
        self,
        *args: Any,
        batching: Batching,
        max_tokens: int | None,
        peak_flops: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        config = self.model.config.get_text_config()
        self.parameters = model_parameters(self.model)
        self.shape = config.hidden_size, config.num_hidden_layers
        self.batching = batching
        self.max_tokens = max_tokens
        self.peak_flops = peak_flops
        self.counter = StepCounter()

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> GlobalBatchSampler:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        return GlobalBatchSampler(
            rows["length"][:],
            self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            accumulation=self.args.gradient_accumulation_steps,
            seed=self.args.seed,
            deal=self.batching,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        steps = held_out_batches(rows["length"][:], self.args.eval_batch_size, self.args.world_size)
        return DataLoader(
            rows,
            batch_sampler=[ranks[self.args.process_index] for ranks in steps],
            collate_fn=self.data_collator,
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss of the held-out response tokens, in nats.

        transformers averages the means of batches, which moves with how the rows are batched.
        """
        model = self._wrap_model(self.model, training=False)
        model.eval()
        dtype = (
            torch.float32 if self.args.device.type == "mps" else torch.float64
        )  # a Mac's GPU has no float64
        summed = torch.zeros(2, dtype=dtype, device=self.args.device)  # loss, tokens
        for inputs in dataloader:
            with torch.no_grad(), self.compute_loss_context_manager():
                inputs = self._prepare_inputs(inputs)
                tokens = count_labels(inputs)
                loss = model(**inputs, num_items_in_batch=tokens.clamp(min=1)).loss
            summed += torch.stack([loss.to(dtype) * tokens.clamp(min=1), tokens.to(dtype)])
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        summed = self.accelerator.reduce(summed)
        loss = (summed[0] / summed[1]).item()
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss}, len(self.eval_dataset))

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One forward and backward; or several, where the packed rows are more than `max_tokens`.

        The parts add up to the same gradient. Ranks agree on their number, as ZeRO-3 needs all of them in every
        forward, and only the last part ends the accumulation.
        """
        self.counter.add(inputs)
        parts = self._parts(inputs)
        last_of_batch = self.accelerator.sync_gradients
        loss = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts, start=1):
            self.accelerator.gradient_state._set_sync_gradients(last_of_batch and number == len(parts))
            loss = loss + super().training_step(model, part, num_items_in_batch)
        return loss

    def _parts(self, inputs: Any) -> list[Any]:
        if self.max_tokens is None:
            return [inputs]
        needed = torch.tensor(
            micro_steps_needed(document_lengths(inputs["position_ids"]), self.max_tokens),
            device=self.args.device,
        )
        if self.args.world_size > 1:
            torch.distributed.all_reduce(needed, op=torch.distributed.ReduceOp.MAX)
        return split_packed_batch(inputs, int(needed)) if needed > 1 else [inputs]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds speed and use of the devices to what transformers logs of training. All ranks call it."""
        if "loss" in logs:
            sums, seconds = self.counter.take()
            real, computed, labels, squares = self.accelerator.reduce(sums.to(self.args.device)).tolist()
            devices = self.args.world_size
            flops = model_flops(*self.parameters, *self.shape, real, labels, squares)
            logs["tokens_per_second"] = real / seconds
            logs["tokens_per_second_per_device"] = real / seconds / devices
            logs["real_token_share"] = real / max(computed, 1)
            logs["mfu"] = flops / seconds / devices / self.peak_flops
            logs["peak_memory_gib"] = peak_memory_gib()
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.counter.skip(time.perf_counter() - begin)


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


def train(options: TrainingOptions) -> dict[str, Any]:
    """Fine-tunes and returns the run's record. Raises OptionsError, DataError or ModelError before any step.

    The finished folder is `options.local_output_dir`; it is copied to `options.dbfs_output_dir` if given.
    """
    begin = time.monotonic()
    faults = find_faults(options)
    if faults:
        raise OptionsError(faults)
    _quiet_libraries()
    prepared = prepare(options)
    output, main = Path(prepared.args.output_dir), prepared.args.process_index == 0
    record = start_record(options, prepared.args.world_size, precision_of(options))
    if main:
        output.mkdir(parents=True, exist_ok=True)
        prepared.ledger.save(output / LEDGER_FILE)
        write_run_record(output, record)
    trainer = build_trainer(options, prepared)
    result = trainer.train()

    save_model(trainer, prepared.tokenizer, output, options.max_shard_size)
    trainer.save_state()  # trainer_state.json: every logged figure of every step
    held_out = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    record |= {
        "status": "finished",
        "batching": trainer.batching,
        "steps": result.global_step,
        "train_loss": result.training_loss,
        "held_out_loss": {"before": held_out[0], "after": held_out[-1]},
        "seconds": {"training": result.metrics["train_runtime"], "all": time.monotonic() - begin},
    }
    if main:
        write_model_card(output, record, prepared.ledger)
        write_run_record(output, record)
        logger.info(
            "held-out loss %.4f before, %.4f after; %s in all; the model is in %s",
            held_out[0],
            held_out[-1],
            duration(time.monotonic() - begin),
            output,
        )
        if options.dbfs_output_dir:
            publish(output, options.dbfs_output_dir)
    return record


def prepare(options: TrainingOptions) -> Prepared:
    """Ranks, tokenizer and rows: everything but the model, so that bad data costs no loading."""
    if options.deepspeed_json:
        compile_operators(offloads_optimizer(read_deepspeed_json(options.deepspeed_json)))
    if options.deepspeed_json and not torch.cuda.is_available():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    args = training_arguments(options)
    with args.main_process_first(desc="data and tokenizer"):  # rank 0 fills the caches, the others read them
        positions = max_positions(load_config(options.input_model, options.trust_remote_code))
        tokenizer = load_tokenizer(options.input_model, options.trust_remote_code)
        rows, ledger = prepare_dataset(
            options.training_dataset,
            tokenizer,
            min(options.max_length or positions, positions),
            options.keep_truncated,
            options.max_dropped_fraction,
        )
        train_rows, held_out_rows = split_held_out(rows, options.test_size, options.seed)
    if options.max_tokens_per_device:
        try:
            check_token_budget(train_rows["length"][:], options.max_tokens_per_device)
        except ValueError as error:
            raise OptionsError([str(error)]) from error
    row = train_rows[0]
    sample = marked_sample(tokenizer, row["input_ids"], row["response_start"])
    logger.info("%s", ledger)
    logger.info("a row as the model sees it, the supervised tokens between « and »:\n%s", sample)
    return Prepared(args, tokenizer, train_rows, held_out_rows, ledger)


def build_trainer(options: TrainingOptions, prepared: Prepared) -> CompletionTrainer:
    """Loads the model and puts the Trainer around it."""
    args, tokenizer, precision = prepared.args, prepared.tokenizer, precision_of(options)
    # ZeRO-3 keeps float32 master weights beside 16-bit ones; without DeepSpeed the weights are the masters.
    dtype = DTYPES[precision] if options.deepspeed_json else torch.float32
    set_seed(options.seed)
    model = load_model(options.input_model, tokenizer, dtype, options.seed, options.trust_remote_code)
    batching = choose_batching(model, options.batching)
    if batching != "packed" and options.max_tokens_per_device:
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
        max_tokens=options.max_tokens_per_device,
        peak_flops=peak_flops(args.device, DTYPES[precision]),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressLog())
    if args.process_index == 0:
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(log_dir=str(Path(args.output_dir) / "runs"))))
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
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


@click.command(cls=GroupedCommand, context_settings={"max_content_width": 110})
@click_options
@click.pass_context
def main(ctx: click.Context, **values: Any) -> None:
    """Fine-tune a causal language model to follow instructions. The defaults are Dolly's run."""
    logging.basicConfig(
        level=logging.INFO if is_main_process() else logging.ERROR, format="%(message)s", stream=sys.stdout
    )
    try:
        options = TrainingOptions(**values)
        if value_faults(ctx):
            raise OptionsError(value_faults(ctx) + find_faults(options))
        train(options)
    except (OptionsError, DataError, ModelError) as error:
        # Every rank finds the same faults; one tells them.
        if is_main_process():
            print(f"Cannot train:\n{error}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
