"""transformers' Trainer with our batches, held-out loss per token, speed figures and checkpoints."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import AutocastKwargs
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from training.data.batching import GlobalBatchSampler, held_out_batches, micro_steps_needed
from training.data.collator import Batch, count_labels, split_packed_batch
from training.data.held_out import source_of_each
from training.data.ledger import Ledger
from training.data.source_labels import source_labels
from training.errors import TrainingError
from training.machine.flops import adapter_parameters, layer_tokens, model_parameters, training_flops
from training.machine.local import peak_memory_gib
from training.options.settings import Batching
from training.run import saving
from training.run.adapter_checkpoint import load_trained
from training.run.background import Writer
from training.run.failures import StopRequest
from training.run.step_guard import StepGuard, describe_bad_base


class CompletionTrainer(Trainer):
    """transformers' Trainer with our batches, held-out loss per token and speed figures.

    Args:
        ledger: of the rows; it names them, and has the sources whose held-out losses are measured.
        batching: "packed", "padded", or "length" (padded, rows of a global batch dealt by length).
        max_tokens: limit of tokens a device computes at once; larger packed batches are split. None: no limit.
        peak_flops: floating point operations a second of one device, for the MFU.
        max_shard_size: largest weight file, as in "5GB".
        keep_checkpoints: number to keep; the newest and the best by held-out loss are always kept.
        checkpoint_bytes: estimated bytes of a checkpoint per parameter, used until one has been saved.
        background_saves: write checkpoints in the background, from copies in host memory.
        save_seconds: estimated seconds until a checkpoint is written, used until one has been saved.
        request: whether SIGTERM or Ctrl-C was received.

    Two attributes may be replaced by functions that know where else a checkpoint goes. `on_checkpoint_complete(folder)`
    is called on rank 0, in the main thread, after a manifest was written. `is_being_copied(folder)` tells whether a
    checkpoint must stay for now; the next save asks again. Both get the folder `checkpoint-<step>`.
    """

    def __init__(
        self,
        *args: Any,
        ledger: Ledger,
        batching: Batching,
        max_tokens: int | None,
        peak_flops: float,
        max_shard_size: str,
        keep_checkpoints: int,
        checkpoint_bytes: int,
        background_saves: bool,
        save_seconds: float,
        request: StopRequest,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        config = self.model.config.get_text_config()
        self.parameters, self.adapters = model_parameters(self.model), adapter_parameters(self.model)
        if self.adapters is not None:
            # A frozen base is in the run's precision already. Autocast would copy activations to float32.
            self.accelerator.autocast_handler = AutocastKwargs(enabled=False)
        self.shape = config.hidden_size, config.num_hidden_layers
        self.ledger = ledger
        self.labels = source_labels([source.source for source in ledger.sources])
        self.sources_of_steps: list[int] = []  # of an evaluation
        self.batching = batching
        self.max_tokens = max_tokens
        self.peak_flops = peak_flops
        self.counter = StepCounter()
        self.max_shard_size = max_shard_size
        self.keep_checkpoints = keep_checkpoints
        self.checkpoint_bytes = checkpoint_bytes
        self.saved_bytes = 0  # of the last checkpoint
        self.lora: dict[str, Any] | None = None  # content of lora.json (use_adapter_checkpoints)
        self.writer, self.save_seconds = Writer(background_saves), save_seconds
        self.save: saving.Save | None = None  # in flight
        self.rotation: threading.Thread | None = None
        self.on_checkpoint_complete: Callable[[Path], None] = lambda folder: None
        self.is_being_copied: Callable[[Path], bool] = lambda folder: False
        self.begin, self.seconds_before = time.monotonic(), 0.0
        # Not the sampler that the Trainer iterates: this one says which rows a step has on all ranks.
        self.sampler = self._get_train_sampler()
        self.guard = StepGuard(self, request)
        self.add_callback(self.guard)

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
        sources = source_of_each(rows)
        steps = held_out_batches(rows["length"][:], self.args.eval_batch_size, self.args.world_size, sources)
        self.sources_of_steps = [sources[ranks[0][0]] for ranks in steps]
        return DataLoader(
            rows,
            batch_sampler=[ranks[self.args.process_index] for ranks in steps],
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # the default one is dropout's, and its draws must not change
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss of the held-out response tokens, in nats; with several sources also that of each one's tokens.

        transformers averages the means of batches, so its figure depends on how the rows are batched.
        """
        model = self._wrap_model(self.model, training=False)
        model.eval()
        # A Mac's GPU has no float64.
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        # Loss and tokens of each source.
        summed = torch.zeros(max(1, len(self.labels)), 2, dtype=dtype, device=self.args.device)
        for source, inputs in zip(self.sources_of_steps, dataloader, strict=True):
            with torch.no_grad(), self.compute_loss_context_manager():
                inputs = self._prepare_inputs(inputs)
                tokens = count_labels(inputs)
                loss = model(**inputs, num_items_in_batch=tokens.clamp(min=1)).loss
            summed[source] += torch.stack([loss.to(dtype) * tokens.clamp(min=1), tokens.to(dtype)])
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        summed = self.accelerator.reduce(summed)
        losses, tokens = summed.sum(dim=0)
        loss = (losses / tokens).item()
        of_sources = {
            label: (losses / tokens).item()
            for label, (losses, tokens) in zip(self.labels, summed, strict=False)
            if tokens > 0  # a small source may hold out no rows
        }
        if not math.isfinite(loss):
            self._refuse_held_out_loss(of_sources)
        metrics = {f"{metric_key_prefix}_loss": loss}
        metrics |= {f"{metric_key_prefix}_loss_{label}": value for label, value in of_sources.items()}
        return EvalLoopOutput(None, None, metrics, len(self.eval_dataset))

    def _refuse_held_out_loss(self, of_sources: dict[str, float]) -> None:
        """Raises TrainingError for a held-out loss that is NaN or infinite."""
        if self.state.global_step == 0:
            raise TrainingError(describe_bad_base(self.model, self.args.fp16))
        self.finish_save()
        bad = [label for label, value in of_sources.items() if not math.isfinite(value)]
        of = f" of {' and '.join(bad)}" if bad else ""
        raise TrainingError(
            f"step {self.state.global_step}: the held-out loss{of} is NaN or infinite. Look at the held-out rows "
            "and at the base model; if they are correct, lower --lr. This step is not saved. "
            f"{saving.older_checkpoint(self.args.output_dir)}"
        )

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of a micro-batch, in several parts if its packed rows exceed `max_tokens`.

        The parts add up to the same gradient. All ranks use the same number of parts, because ZeRO-3 needs every rank
        in every forward. Only the last part ends the accumulation.
        """
        self.counter.add(inputs)
        parts = self._parts(inputs)
        last_of_batch = self.accelerator.sync_gradients
        loss = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts, start=1):
            self.accelerator.gradient_state._set_sync_gradients(last_of_batch and number == len(parts))
            loss = loss + super().training_step(model, part, num_items_in_batch)
        self.guard.note_loss(loss)
        return loss

    def _parts(self, inputs: Any) -> list[Any]:
        if self.max_tokens is None:
            return [inputs]
        # Each rank computes the need of all ranks from the lengths of their rows. So none waits for another.
        lengths = self.sampler.lengths
        needed = max(
            micro_steps_needed([lengths[row] for row in share], self.max_tokens)
            for share in self.sampler.shares_of_step(self.state.global_step)[self.guard.micro_step]
        )
        return split_packed_batch(inputs, needed) if needed > 1 else [inputs]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds speed, MFU and memory to the Trainer's training log. All ranks call it."""
        if "loss" in logs:
            sums, seconds = self.counter.take()
            sums = sums.to(self.args.device, non_blocking=True)
            real, computed, labels, squares = self.accelerator.reduce(sums).tolist()
            devices = self.args.world_size
            tokens = layer_tokens(real, labels, self.shape[1])
            flops = training_flops(
                *self.parameters, *self.shape, tokens, labels, squares / 2, adapters=self.adapters
            )
            logs["tokens_per_second"] = real / seconds
            logs["tokens_per_second_per_device"] = real / seconds / devices
            logs["real_token_share"] = real / max(computed, 1)
            logs["mfu"] = flops / seconds / devices / self.peak_flops
            logs["peak_memory_gib"] = peak_memory_gib(torch.cuda.is_available())
            if self.guard.overflows:
                logs["fp16_overflows"] = self.guard.overflows
        super().log(logs, start_time)

    def seconds(self) -> float:
        """Seconds of training so far, including those before a resume."""
        return self.seconds_before + time.monotonic() - self.begin

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.counter.skip(time.perf_counter() - begin)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes config, generation config and tokenizer, and without DeepSpeed the weights. All ranks call it."""
        assert self.save is not None  # _save_checkpoint calls it
        self.save.model = saving.save_model_files(self, Path(output_dir or self.args.output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:  # it writes through its own checkpoint engine
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            self.writer.save(self.optimizer.state_dict(), Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Without DeepSpeed. A LoRA run's checkpoint holds adapter and new rows only."""
        if self.lora is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        saving.save_checkpoint(self, lambda: super(CompletionTrainer, self)._save_checkpoint(model, trial))

    def check_save(self, reports: list[int]) -> None:
        """Completes the save in flight if it has ended; `reports` holds every rank's `writer.status`."""
        saving.complete_if_written(self, reports)

    def finish_save(self) -> None:
        """Waits for the save in flight, if there is one, and completes it."""
        saving.finish(self)

    def describe_bad_loss(self, rank: int, micro_step: int) -> str:
        """Message that names the rows of the micro-step whose loss is NaN or infinite."""
        # With a token budget a share is computed in parts; all rows of the share are named.
        share = self.sampler.shares_of_step(self.state.global_step - 1)[micro_step][rank]
        rows = self.train_dataset.select(share)
        places = self.ledger.places(list(zip(source_of_each(rows), rows["row"][:], strict=True)))
        return (
            f"step {self.state.global_step}: the loss of rank {rank} is NaN or infinite. It was computing {places}. "
            f"Look at them; if they are correct, lower --lr. This step is not saved. {saving.older_checkpoint(self.args.output_dir)}"
        )


class StepCounter:
    """Counts what this rank computed since the last log line. No step waits for the device to learn it.

    Packed batches bring their sizes on the host. Those of padded batches are summed on the device.
    """

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None
        self.begin = time.perf_counter()
        self.started = False

    def add(self, batch: Batch) -> None:
        """Counts a batch: real tokens, computed tokens, labels, and the squared lengths of its rows.

        The first batch starts the clock, so loading, the first evaluation and sample answers do not count.
        """
        if not self.started:
            self.started, self.begin = True, time.perf_counter()
        computed = batch["input_ids"].numel()
        if "documents" in batch:
            documents = batch["documents"]
            squares = sum(length**2 for length in documents.lengths)
            counts = torch.tensor([computed, computed, sum(documents.labels), squares])
        else:
            lengths = batch["attention_mask"].sum(dim=1)
            numbers = [lengths.sum(), lengths.new_full((), computed), count_labels(batch), (lengths**2).sum()]
            counts = torch.stack(numbers)
        self.sums = counts if self.sums is None else self.sums + counts

    def skip(self, seconds: float) -> None:
        """Excludes the seconds of an evaluation or a save from the speed."""
        self.begin += seconds

    def take(self) -> tuple[torch.Tensor, float]:
        """(the four sums `(4,)` int64, seconds) since the last call."""
        now = time.perf_counter()
        sums, seconds = self.sums, now - self.begin
        self.sums, self.begin = None, now
        return (torch.zeros(4, dtype=torch.int64) if sums is None else sums), seconds
