"""Reads and changes a weight as a whole that ZeRO-3 may have divided among the ranks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ZeRO-3 has divided the tensor among the ranks."""
    return hasattr(tensor, "ds_id")


def gathered(tensor: torch.Tensor, modifier_rank: int | None = None) -> Any:
    """A context in which every rank has the whole tensor, also under ZeRO-3. All ranks enter it.

    The changes that `modifier_rank` makes are kept; with None no change is.
    """
    if not is_sharded(tensor):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=modifier_rank)
