"""transformers' Trainer with our batches, a loss per held-out token, the figures of a step, and whole checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from training import checkpoint
from training.batching import GlobalBatchSampler, held_out_batches, micro_steps_needed
from training.callbacks import StepCounter, count_labels, peak_memory_gib, write
from training.checks import free_bytes, size_in_words
from training.collator import document_lengths, split_packed_batch
from training.finished import not_finite, save_model
from training.flops import model_flops, model_parameters
from training.resume import RESHARDED, own_steps, take_rates
from training.stopping import StepGuard, StopRequest, TrainingError, lost_peer

Batching = Literal["packed", "padded", "length"]


class CompletionTrainer(Trainer):
    """transformers' Trainer with our batches, a loss per held-out token, and the figures of a step.

    Args:
        batching: "packed", "padded", or "length" (padded, rows of a global batch dealt by length).
        max_tokens: tokens a device computes at once; a larger packed batch is split. None: never.
        peak_flops: floating point operations a second of one device, for the MFU.
        max_shard_size: largest weight file of a checkpoint's model, as in "5GB".
        keep_checkpoints: how many; the newest, and the best by held-out loss, are always kept.
        request: tells that the process is asked to end.
    """

    def __init__(
        self,
        *args: Any,
        batching: Batching,
        max_tokens: int | None,
        peak_flops: float,
        max_shard_size: str,
        keep_checkpoints: int,
        request: StopRequest,
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
        self.max_shard_size = max_shard_size
        self.keep_checkpoints = keep_checkpoints
        self.saved_bytes = 0  # of the last checkpoint
        self.begin, self.seconds_before = time.monotonic(), 0.0
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
        steps = held_out_batches(rows["length"][:], self.args.eval_batch_size, self.args.world_size)
        return DataLoader(
            rows,
            batch_sampler=[ranks[self.args.process_index] for ranks in steps],
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # else it draws from the one that dropout draws from
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
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {self.state.global_step}: the held-out loss is NaN or infinite. Look at the held-out rows and at "
                f"the base model; if they are sound, lower --lr. Nothing of this step is saved. {self._older()}"
            )
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
        self.guard.see(loss)
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
            if self.guard.overflows:
                logs["fp16_overflows"] = self.guard.overflows
        super().log(logs, start_time)

    def seconds(self) -> float:
        """Of training so far, those before a resume included."""
        return self.seconds_before + time.monotonic() - self.begin

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.counter.skip(time.perf_counter() - begin)

    # --- checkpoints ---------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The checkpoint's model, as complete as the finished one. All ranks call it."""
        folder = Path(output_dir or self.args.output_dir)
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        main = self.is_world_process_zero()
        self._agree(self._bad_weights(weights) if main else None)
        if main:
            model = self.accelerator.unwrap_model(self.model_wrapped)
            save_model(model, weights, self.processing_class, folder, self.max_shard_size)
            self.model_files = checkpoint.files_of(folder)
        self.accelerator.wait_for_everyone()  # what the other ranks write into the folder is not the model's

    def _bad_weights(self, weights: dict[str, torch.Tensor]) -> str | None:
        bad = not_finite(weights)
        if not bad:
            return None
        return (
            f"step {self.state.global_step}: {len(bad)} tensors of the model hold NaN or infinite numbers, the first: "
            f"{bad[0]}. Look at the base model; if it is sound, lower --lr. Nothing of this step is saved. "
            f"{self._older()}"
        )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Writes a checkpoint, completes it by its manifest, and only then removes older ones. All ranks call it."""
        output, step = Path(self.args.output_dir), self.state.global_step
        folder = output / f"checkpoint-{step}"
        if checkpoint.read_manifest(folder) is not None:  # stopped again before the first new step
            return
        main = self.is_world_process_zero()
        if main:
            checkpoint.remove(folder)  # what a killed save left
        self._agree(self._lacks_space(output) if main else None)
        begin = time.monotonic()
        with self._told(folder):
            self._write_checkpoint(folder, model, trial)
        if main:
            seconds = time.monotonic() - begin
            write(f"{folder} saved: {size_in_words(self.saved_bytes)} in {seconds:.1f} s")
            checkpoint.rotate(output, self.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _told(self, folder: Path) -> Iterator[None]:
        """Tells a failure to write in words. safetensors and torch.save have errors of their own for a full disk."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, TrainingError) or lost_peer(error):
                raise
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TrainingError(
                f"step {self.state.global_step}: {folder} could not be written ({why}); "
                f"{size_in_words(free_bytes(folder.parent) or 0)} are free there. Make room. {self._older()}",
                alone=True,
            ) from error

    def _write_checkpoint(self, folder: Path, model: torch.nn.Module, trial: Any) -> None:
        main, step = self.is_world_process_zero(), self.state.global_step
        # The loss since the last line of the log, of each rank: the next line must not forget it.
        summed = self.accelerator.gather(self._tr_loss.detach().reshape(1)).double().tolist()
        super()._save_checkpoint(model, trial)
        if main:
            progress = {
                "loss_sums": summed,
                "logged_step": self._globalstep_last_logged,
                "loss_total": self._total_loss_scalar,
                "seconds": self.seconds(),
                "batching": self.batching,
            }
            checkpoint.write_json(folder / checkpoint.PROGRESS_FILE, progress)
        self.accelerator.wait_for_everyone()
        names = checkpoint.files_of(folder)
        mine = checkpoint.digests(
            folder, names[self.args.process_index :: self.args.world_size], written_now=True
        )
        digests = [mine]
        if self.args.world_size > 1:
            digests = [{} for _ in range(self.args.world_size)]
            torch.distributed.all_gather_object(digests, mine)
        if main:
            losses = {
                entry["step"]: entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry
            }
            files = {name: each[name] for each in digests for name in each}
            checkpoint.write_manifest(folder, losses.get(step), self.model_files, dict(sorted(files.items())))
            self.saved_bytes = sum(file["size"] for file in files.values())

    def _lacks_space(self, output: Path) -> str | None:
        """Why the next checkpoint would not fit, or None."""
        # 12 bytes a parameter for float32 weights and AdamW's two moments, and the gathered model again.
        need = self.saved_bytes or 16 * sum(
            getattr(p, "ds_numel", p.numel()) for p in self.model.parameters()
        )
        free = free_bytes(output)
        if free is None or free >= need:
            return None
        return (
            f"step {self.state.global_step}: a checkpoint needs {size_in_words(need)}, and {size_in_words(free)} are free in {output}. "
            f"Make room. {self._older()}"
        )

    def _older(self) -> str:
        output = Path(self.args.output_dir)
        complete = [folder for folder in checkpoint.checkpoints(output) if checkpoint.read_manifest(folder)]
        if not complete:
            return (
                "No checkpoint has been written yet: type the same command with --resume auto to begin anew"
            )
        return f"{complete[-1].name} is good: type the same command with --resume auto to go on from it"

    def _agree(self, fault: str | None) -> None:
        """Raises TrainingError on every rank if rank 0 has a fault to tell."""
        told = [fault]
        if self.args.world_size > 1:
            torch.distributed.broadcast_object_list(told, src=0)
        if told[0]:
            raise TrainingError(str(told[0]))

    def describe_bad_loss(self, rank: int, micro_step: int) -> str:
        """Which rows made a loss that is no number: those of a rank's micro-step of the step just computed."""
        done = self.state.global_step - 1
        sampler = self._get_train_sampler()
        per_epoch = -(-len(self.train_dataset) // sampler.effective_batch_size)
        sampler.set_epoch(done // per_epoch)
        batch = list(sampler.global_batches())[done % per_epoch]
        # A rank with a token budget computes a share in several parts; which of them it was is not told.
        share = sampler.micro_batches(batch)[min(micro_step, self.args.gradient_accumulation_steps - 1)][rank]
        rows = sorted(self.train_dataset["row"][row] for row in share)
        return (
            f"step {self.state.global_step}: the loss of rank {rank} is NaN or infinite. It was computing rows "
            f"{', '.join(map(str, rows))} of the dataset. Look at them; if they are sound, lower --lr. "
            f"Nothing of this step is saved. {self._older()}"
        )


class Continued(TrainerCallback):
    """What transformers forgets at a resume: the loss since the last line of the log, a due held-out loss, the epoch,
    a rate that was changed by `--force`.

    Args:
        saved: the checkpoint that the run goes on from, as it was written.
    """

    def __init__(self, trainer: CompletionTrainer, saved: Path) -> None:
        self.trainer = trainer
        self.saved = saved

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        progress = json.loads((self.saved / checkpoint.PROGRESS_FILE).read_text())
        sums = progress["loss_sums"]
        mean = sum(sums) / len(sums)
        same_ranks = len(sums) == args.world_size
        trainer._tr_loss.fill_(sums[args.process_index] if same_ranks else mean)
        trainer._globalstep_last_logged = progress["logged_step"]
        trainer._total_loss_scalar = progress["loss_total"]
        trainer._initial_global_step = 0  # the mean loss is that of all steps, not of those since this start
        trainer.seconds_before = progress["seconds"]
        if not same_ranks and trainer.is_deepspeed_enabled:
            own_steps(trainer.model_wrapped.optimizer.optimizer)
        take_rates(trainer.lr_scheduler, args.learning_rate, args.weight_decay)
        trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            shutil.rmtree(Path(args.output_dir) / RESHARDED, ignore_errors=True)
        measured = {entry["step"] for entry in state.log_history if "eval_loss" in entry}
        due = state.global_step % args.eval_steps == 0 or state.global_step % args.save_steps == 0
        if due and state.global_step not in measured:
            loss = trainer.evaluate()["eval_loss"]
            manifest = checkpoint.read_manifest(self.saved)
            ours = self.saved.parent.resolve() == Path(args.output_dir).resolve()
            if state.is_world_process_zero and ours and manifest is not None:
                checkpoint.write_manifest(self.saved, loss, manifest["model"], manifest["files"])

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        train_dataloader: DataLoader,
        **kwargs: Any,
    ) -> None:
        """Tells the sampler its epoch, or several ranks would be dealt the first epoch's rows again.

        They have it in a wrapper of accelerate's; a resume within an epoch puts a second one around that; and the
        Trainer looks into one alone.
        """
        sampler: Any = train_dataloader.batch_sampler
        sampler = getattr(sampler, "batch_sampler", sampler)
        sampler.set_epoch(state.global_step * args.gradient_accumulation_steps // len(sampler))
