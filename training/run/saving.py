"""Saves checkpoints: what a resume and the finished model need, and last a manifest with the hash of every file.

All ranks call these functions at the same step; `trainer` is the CompletionTrainer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from training.errors import TrainingError
from training.files import free_bytes, size_in_words, write_json
from training.model.tokenizer import generation_config
from training.model.verify import not_finite, save_model
from training.ranks import broadcast, gather, raise_together
from training.run.failures import lost_peer
from training.storage import checkpoint
from training.tracking.progress import print_line


def save_checkpoint(trainer: Any, write_files: Callable[[], None]) -> None:
    """Writes a checkpoint, then its manifest, and only then removes older checkpoints.

    `write_files` is transformers' own save, which calls `save_model_files`.
    """
    output, step = Path(trainer.args.output_dir), trainer.state.global_step
    folder = output / f"checkpoint-{step}"
    if checkpoint.read_manifest(folder) is not None:  # a resumed run was stopped before its first step
        return
    main = trainer.is_world_process_zero()
    if main:
        checkpoint.remove(folder)  # left by a killed save
    raise_together(_lack_of_space(trainer, output) if main else None)
    begin = time.monotonic()
    with _reported(folder, step):
        _write_checkpoint(trainer, folder, write_files)
    if main:
        seconds = time.monotonic() - begin
        print_line(f"{folder} saved: {size_in_words(trainer.saved_bytes)} in {seconds:.1f} s")
        checkpoint.rotate(output, trainer.keep_checkpoints)
    trainer.accelerator.wait_for_everyone()


def _write_checkpoint(trainer: Any, folder: Path, write_files: Callable[[], None]) -> None:
    main, state = trainer.is_world_process_zero(), trainer.state
    # Each rank's loss since the last log line; a resumed run needs it for the next one.
    summed = trainer.accelerator.gather(trainer._tr_loss.detach().reshape(1)).double().tolist()
    write_files()
    if main:
        progress = {
            "loss_sums": summed,
            "logged_step": trainer._globalstep_last_logged,
            "loss_total": trainer._total_loss_scalar,
            "seconds": trainer.seconds(),
            "batching": trainer.batching,
        }
        write_json(folder / checkpoint.PROGRESS_FILE, progress)
    trainer.accelerator.wait_for_everyone()
    # Rank 0 divides the files: on shared storage the ranks may see other sizes for a while.
    shares = broadcast(checkpoint.equal_shares(folder, trainer.args.world_size) if main else None)
    digests = gather(checkpoint.digests(folder, shares[trainer.args.process_index], flush=True))
    if main:
        losses = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
        files = {name: of_rank[name] for of_rank in digests for name in of_rank}
        loss = losses.get(state.global_step)
        checkpoint.write_manifest(folder, loss, trainer.model_files, dict(sorted(files.items())))
        trainer.saved_bytes = sum(file["size"] for file in files.values())


def save_model_files(trainer: Any, folder: Path) -> list[str]:
    """Writes what the finished model needs besides DeepSpeed's shards: config, generation config and tokenizer.

    Without DeepSpeed there are no shards, and the weights are written as well. Returns the files' names on rank 0.
    """
    names: list[str] = []
    raise_together(_bad_weights(trainer))
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        tokenizer = trainer.processing_class
        weights = {} if trainer.is_deepspeed_enabled else model.state_dict()
        save_model(model, weights, generation_config(tokenizer), folder, trainer.max_shard_size)
        tokenizer.save_pretrained(folder)
        names = checkpoint.files_of(folder)
    trainer.accelerator.wait_for_everyone()  # files that other ranks write later are not the model's
    return names


def _bad_weights(trainer: Any) -> str | None:
    """Why the model must not be saved, or None. Each rank looks at its share of the weights."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    of_ranks = gather(
        not_finite(own_share(model, trainer.args.process_index, trainer.args.world_size), model)
    )
    names = sorted({name for found in of_ranks for name in found}, key=list(model.state_dict()).index)
    if not names:
        return None
    return (
        f"step {trainer.state.global_step}: {len(names)} tensors of the model hold NaN or infinite numbers, the first is "
        f"{names[0]}. Look at the base model; if it is correct, lower --lr. This step is not saved. "
        f"{older_checkpoint(trainer.args.output_dir)}"
    )


def own_share(model: torch.nn.Module, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """This rank's part of the weights: its partition of each tensor under ZeRO-3, else every `ranks`-th tensor."""
    share = {}
    for number, (name, tensor) in enumerate(model.state_dict(keep_vars=True).items()):
        if hasattr(tensor, "ds_tensor"):
            begin = (
                rank * tensor.ds_tensor.ds_numel
            )  # the last partitions may end in padding, which is never written
            share[name] = tensor.ds_tensor.flatten()[: max(0, tensor.ds_numel - begin)]
        elif number % ranks == rank:
            share[name] = tensor
    return share


def _lack_of_space(trainer: Any, output: Path) -> str | None:
    """Why the next checkpoint would not fit, or None."""
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
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
        raise TrainingError(
            f"step {step}: {folder} could not be written ({reason}); "
            f"{size_in_words(free_bytes(folder.parent) or 0)} are free there. Make room. "
            f"{older_checkpoint(folder.parent)}",
            alone=True,
        ) from error


def older_checkpoint(output: str | Path) -> str:
    """The part of a message that names the checkpoint to resume from."""
    complete = [folder for folder in checkpoint.checkpoints(Path(output)) if checkpoint.read_manifest(folder)]
    if not complete:
        return (
            "No checkpoint has been written yet: type the same command with --resume auto to start at step 0"
        )
    return f"{complete[-1].name} is complete: type the same command with --resume auto to continue from it"
