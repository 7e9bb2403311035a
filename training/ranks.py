"""Who this process is among the ranks, and what the ranks tell each other."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from training.errors import DataError, OptionsError, TrainingError


def world_size() -> int:
    """Ranks of this run, as its launcher wrote it into the environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """RANK, not LOCAL_RANK: Spark's launcher gives every rank the local rank 0."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    return rank() == 0


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank; all of them call it."""
    if world_size() == 1:
        return value
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value by rank, on every rank; all of them call it."""
    if world_size() == 1:
        return [value]
    import torch

    values = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def on_rank_0(function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, on every rank; or its problems there, on every rank, as an OptionsError."""
    result, problems = None, None
    if is_main_process():
        try:
            result = function()
        except OptionsError as error:
            problems = error.problems
        except DataError as error:
            problems = [str(error)]
    result, problems = broadcast((result, problems))
    if problems is not None:
        raise OptionsError(*problems)
    return result


def raise_together(problem: str | None) -> None:
    """Raises rank 0's problem, if it has one, as a TrainingError on every rank."""
    if problem := broadcast(problem):
        raise TrainingError(problem)


def on_this_host() -> int:
    """Ranks that share this host's memory. All ranks call it: Spark starts a launcher for each, and none of them knows."""
    return gather(socket.gethostname()).count(socket.gethostname())


def leave() -> None:
    """Ends the process group. What remains is rank 0's alone, and no model that it loads may be sharded over the others."""
    if "torch" not in sys.modules:  # nothing was begun
        return
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
