"""Saves checkpoints: each rank writes its files in the background, and a manifest with their hashes comes last.

All ranks call these functions at the same step; `trainer` is the CompletionTrainer.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from transformers import TrainerState, modeling_utils

from training.consts import LORA_FILE, STOP_SECONDS
from training.errors import TrainingError
from training.files import duration, free_bytes, size_in_words, write_json
from training.machine.flops import parameter_size
from training.model.new_rows import trainable_state
from training.model.tokenizer import generation_config
from training.model.verify import not_finite, save_model
from training.ranks import broadcast, gather, raise_together
from training.run.adapter_checkpoint import TRAINED_FILE, save_config
from training.run.background import FAILED, WRITTEN, Writer, deepspeed_checkpoint_engine
from training.run.failures import lost_peer
from training.storage import checkpoint
from training.tracking.progress import print_line


@dataclass
class Save:
    """A checkpoint that is being written.

    Attributes:
        state: the Trainer's state when it began.
        model: names of the files of a model that stock transformers loads; on rank 0.
        blocked: seconds that training has waited for this save so far.
    """

    folder: Path
    step: int
    state: TrainerState
    eval_loss: float | None = None
    model: list[str] | None = None
    blocked: float = 0.0


def save_checkpoint(trainer: Any, write_files: Callable[[], None]) -> None:
    """Starts a checkpoint: copies what it holds, and lets a thread of each rank write it. `complete` ends it.

    `write_files` is transformers' own save, which calls `save_model_files`. If host memory is too small for the copies, the
    checkpoint is complete when this returns.
    """
    output, step = Path(trainer.args.output_dir), trainer.state.global_step
    folder = output / f"checkpoint-{step}"
    if checkpoint.read_manifest(folder) is not None:  # a resumed run was stopped before its first step
        return
    finish(trainer)
    main = trainer.is_world_process_zero()
    begin = time.monotonic()
    problem = _name_taken(folder, step) if main else None
    if main and problem is None:
        checkpoint.remove(folder)  # left by a killed save
        problem = _lack_of_space(trainer, output)
    raise_together(problem)
    trainer.save = Save(folder, step, copy.copy(trainer.state))
    if main and trainer.guard.stopped:
        print_line(_stopping(trainer, output, step))
    with _reported(folder, step):
        trainer.writer.begin(folder)
        _write_files(trainer, folder, write_files)
        trainer.writer.start()
    trainer.save.blocked = time.monotonic() - begin
    if not trainer.writer.background:
        finish(trainer)


def _write_files(trainer: Any, folder: Path, write_files: Callable[[], None]) -> None:
    state = trainer.state
    # Each rank's loss since the last log line; a resumed run needs it for the next one.
    summed = trainer.accelerator.gather(trainer._tr_loss.detach().reshape(1)).double().tolist()
    if trainer.is_deepspeed_enabled:
        engine, trained = trainer.model_wrapped, None
        if trainer.lora is not None:
            trained = trainable_state(trainer.model).keys()
            engine.save_checkpoint = partial(
                type(engine).save_checkpoint, engine, exclude_frozen_parameters=True
            )
        engine.checkpoint_engine = deepspeed_checkpoint_engine(trainer.writer, trained)
    write_files()
    losses = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    trainer.save.eval_loss = losses.get(state.global_step)
    if trainer.is_world_process_zero():
        progress = {
            "loss_sums": summed,
            "logged_step": trainer._globalstep_last_logged,
            "loss_total": trainer._total_loss_scalar,
            "seconds": trainer.seconds(),
            "batching": trainer.batching,
        }
        write_json(folder / checkpoint.PROGRESS_FILE, progress)


def complete_if_written(trainer: Any, reports: list[int]) -> None:
    """Completes the save in flight if its files are written on all ranks. Raises TrainingError if one has failed.

    `reports` holds each rank's `writer.status`, the same on all ranks.
    """
    if FAILED in reports or set(reports) == {WRITTEN}:
        _complete(trainer)


def finish(trainer: Any) -> None:
    """Waits for the save in flight, if there is one, and completes it."""
    save, begin = trainer.save, time.monotonic()
    if save is not None:
        trainer.writer.join()
        save.blocked += time.monotonic() - begin
        _complete(trainer)
    if trainer.rotation is not None:
        trainer.rotation.join()
        trainer.rotation = None


def _complete(trainer: Any) -> None:
    """Writes the manifest of the save in flight, and only then removes older checkpoints.

    Raises TrainingError on all ranks if one rank could not write its files.
    """
    save, begin = trainer.save, time.monotonic()
    trainer.save = None
    ranks = gather(trainer.writer.take())
    for written in ranks:
        if written.problem is not None:
            raise TrainingError(_not_written(save.folder, save.step, written.problem, written.full))
    main = trainer.is_world_process_zero()
    if main:
        files = {name: digest for written in ranks for name, digest in written.files.items()}
        with _reported(save.folder, save.step):
            # Small files, which transformers and DeepSpeed have written themselves.
            small = [name for name in checkpoint.files_of(save.folder) if name not in files]
            files |= checkpoint.digests(save.folder, small, flush=True)
            model = save.model or []
            checkpoint.write_manifest(save.folder, save.eval_loss, model, dict(sorted(files.items())))
        trainer.saved_bytes = sum(file["size"] for file in files.values())
    trainer.saved_bytes = broadcast(trainer.saved_bytes)
    trainer.save_seconds = seconds = max(written.seconds for written in ranks)
    save.blocked += time.monotonic() - begin
    logs = {"blocked_seconds": save.blocked, "written_bytes": trainer.saved_bytes}
    # With its own control: this call clears should_log, and this step's own log line may be due.
    trainer.callback_handler.on_log(trainer.args, save.state, copy.copy(trainer.control), logs)
    if main:
        print_line(
            f"{save.folder} saved: training waited {save.blocked:.1f} s; "
            f"{size_in_words(trainer.saved_bytes)} in {seconds:.1f} s"
        )
        trainer.on_checkpoint_complete(save.folder)
        # In a thread, as removing large files takes seconds.
        trainer.rotation = threading.Thread(target=_rotate, args=(trainer, save.folder.parent), daemon=True)
        trainer.rotation.start()


def _rotate(trainer: Any, output: Path) -> None:
    checkpoint.rotate(output, trainer.keep_checkpoints, trainer.is_being_copied)


def save_model_files(trainer: Any, folder: Path) -> list[str]:
    """Writes what the finished model needs besides DeepSpeed's shards: config, generation config and tokenizer.

    Without DeepSpeed there are no shards, and the weights are written as well: all of them, or of a LoRA run those that
    are trained. Returns the names of the files that the finished model takes over, on rank 0.
    """
    names: list[str] = []
    raise_together(_bad_weights(trainer))
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        tokenizer = trainer.processing_class
        if trainer.lora is None:
            weights = {} if trainer.is_deepspeed_enabled else model.state_dict()
            # transformers divides the weights into files; the writer writes them.
            with patch.object(modeling_utils, "safe_save_file", _write_weights(trainer.writer)):
                save_model(model, weights, generation_config(tokenizer), folder, trainer.max_shard_size)
        else:
            save_config(model, generation_config(tokenizer), folder)
        tokenizer.save_pretrained(folder)
        names = sorted({*checkpoint.files_of(folder), *trainer.writer.names})
        if trainer.lora is not None:  # what the model is made from
            write_json(folder / LORA_FILE, trainer.lora)
            if not trainer.is_deepspeed_enabled:
                trainer.writer.save_weights(trainable_state(model), folder / TRAINED_FILE, {"format": "pt"})
    trainer.accelerator.wait_for_everyone()  # files that other ranks write later are not the model's
    return names


def _write_weights(writer: Writer) -> Callable[..., None]:
    """A stand-in for safetensors.torch.save_file."""
    return lambda tensors, file, metadata=None: writer.save_weights(tensors, Path(file), metadata or {})


def _bad_weights(trainer: Any) -> str | None:
    """Why the model must not be saved, or None. Each rank looks at its share of the weights."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    of_ranks = gather(
        not_finite(
            own_share(model, trainer.args.process_index, trainer.args.world_size, trainer.lora is None), model
        )
    )
    names = sorted({name for found in of_ranks for name in found}, key=list(model.state_dict()).index)
    if not names:
        return None
    return (
        f"step {trainer.state.global_step}: {len(names)} tensors of the model hold NaN or infinite numbers, the first is "
        f"{names[0]}. Look at the base model; if it is correct, lower --lr. This step is not saved. "
        f"{older_checkpoint(trainer.args.output_dir)}"
    )


def own_share(
    model: torch.nn.Module, rank: int, ranks: int, all_weights: bool = True
) -> dict[str, torch.Tensor]:
    """This rank's part of the weights, or of those that are trained: its partition of each tensor under ZeRO-3, else every
    `ranks`-th tensor.
    """
    share = {}
    tensors = model.state_dict(keep_vars=True) if all_weights else trainable_state(model)
    for number, (name, tensor) in enumerate(tensors.items()):
        if hasattr(tensor, "ds_tensor"):
            # The last partitions may end in padding, which is never written.
            begin = rank * tensor.ds_tensor.ds_numel
            share[name] = tensor.ds_tensor.flatten()[: max(0, tensor.ds_numel - begin)]
        elif number % ranks == rank:
            share[name] = tensor
    return share


def _stopping(trainer: Any, output: Path, step: int) -> str:
    """What a run stopped by a signal is doing, and what is lost if it is killed meanwhile."""
    expected = trainer.save_seconds
    message = f"stopped at step {step:,}: saving takes about {expected:.0f} s"
    if expected <= STOP_SECONDS:
        return message
    newest = checkpoint.newest_complete(output)
    lost = step - (checkpoint.step_of(newest) if newest else 0)
    kept = f"{newest.name} is complete, so" if newest else "no checkpoint is complete, so"
    return (
        f"{message}, and launchers kill a run {STOP_SECONDS:.0f} s after the signal. {kept} {lost:,} "
        f"step{'s' * (lost != 1)} would be lost, {duration(lost * trainer.seconds() / step)} of training"
    )


def _name_taken(folder: Path, step: int) -> str | None:
    """Why the folder of a checkpoint cannot be created, or None."""
    if not checkpoint.stands_in_the_way(folder):
        return None
    return (
        f"step {step}: {folder} is not a folder, but this checkpoint needs one of that name. Move it away. "
        f"{older_checkpoint(folder.parent)}"
    )


def _lack_of_space(trainer: Any, output: Path) -> str | None:
    """Why the next checkpoint would not fit, or None."""
    parameters = sum(map(parameter_size, trainable_state(trainer.model).values()))
    need, free = trainer.saved_bytes or trainer.checkpoint_bytes * parameters, free_bytes(output)
    if free is None or free >= need:
        return None
    return (
        f"step {trainer.state.global_step}: a checkpoint needs {size_in_words(need)}, and "
        f"{size_in_words(free)} are free in {output}. Make room. {older_checkpoint(output)}"
    )


@contextmanager
def _reported(folder: Path, step: int) -> Iterator[None]:
    """Raises TrainingError for a failed write. safetensors and torch.save raise their own errors for a full disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, TrainingError) or lost_peer(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainingError(_not_written(folder, step, reason), alone=True) from error


def _not_written(folder: Path, step: int, reason: str, room: bool = True) -> str:
    """Message of a failed write; `room`: more room may help."""
    free = f"; {size_in_words(free_bytes(folder.parent) or 0)} are free there. Make room" if room else ""
    return f"step {step}: {folder} could not be written ({reason}){free}. {older_checkpoint(folder.parent)}"


def older_checkpoint(output: str | Path) -> str:
    """The part of a message that names the checkpoint to resume from."""
    newest = checkpoint.newest_complete(Path(output))
    if newest is None:
        return (
            "No checkpoint has been written yet: type the same command with --resume auto to start at step 0"
        )
    return f"{newest.name} is complete: type the same command with --resume auto to continue from it"
