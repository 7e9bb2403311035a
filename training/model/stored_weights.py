"""Reads the model's weights from the files of a checkpoint, one tensor at a time, as the run computed with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

# The weights of all ranks are in this file at stages 0, 1 and 2. At stage 3 each rank's file has another name.
WHOLE_MODEL = "mp_rank_00_model_states.pt"
FIRST_RANK = "zero_pp_rank_0_mp_rank_00_model_states.pt"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the files of a checkpoint. `read` returns it on the CPU, contiguous, and keeps no copy."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def stored_weights(checkpoint: Path) -> dict[str, StoredTensor]:
    """{name: tensor} of the weights in a checkpoint that DeepSpeed wrote, in any stage and on any number of ranks.

    The files are mapped, so nothing but names and shapes is read yet. The shards are pickles: their checksums must have
    been compared before. Raises OSError, RuntimeError or ValueError for files that DeepSpeed did not write.
    """
    folder = checkpoint / (checkpoint / "latest").read_text().strip()
    if (folder / WHOLE_MODEL).is_file():
        return {name: _stored(tensor, tensor.dtype) for name, tensor in _module(folder / WHOLE_MODEL).items()}
    from deepspeed.utils import zero_to_fp32

    # It reports each of its steps. Redirecting stdout and stderr would also take the lines of other threads.
    silent = patch.multiple(zero_to_fp32, create=True, print=lambda *_: None, tqdm=lambda items, **_: items)
    with silent:
        masters = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(checkpoint, lazy_mode=True)
    # The file of a rank holds empty parameters and whole buffers, which tell what the run computed with. DeepSpeed casts
    # the float32 masters to it after each step, so the same cast gives the same bits.
    return {
        name: _stored(masters[name], placeholder.dtype)
        for name, placeholder in _module(folder / FIRST_RANK).items()
    }


def in_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    """Tensors that have been read already. Those of a model share its memory."""

    def stored(tensor: torch.Tensor) -> StoredTensor:
        return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().contiguous())

    return {name: stored(tensor) for name, tensor in tensors.items()}


def _module(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]


def _stored(tensor: Any, dtype: torch.dtype) -> StoredTensor:
    """`tensor` is a mapped tensor, or what DeepSpeed joins from all ranks' shards once `contiguous` is called."""
    return StoredTensor(tuple(tensor.shape), dtype, lambda: tensor.contiguous().to(dtype))
