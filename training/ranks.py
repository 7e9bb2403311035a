"""Who this process is among the ranks, and what rank 0 tells the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainingArguments

from training.errors import DataError, OptionsError


def world_size() -> int:
    """Ranks of this run, as its launcher wrote it into the environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """RANK, not LOCAL_RANK: Spark's launcher gives every rank the local rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def on_rank_0(args: TrainingArguments, function: Callable[[], Any]) -> Any:
    """What `function` gives on rank 0, or as an OptionsError what is wrong there, on every rank."""
    outcome: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = function()
        except OptionsError as error:
            outcome[1] = error.problems
        except DataError as error:
            outcome[1] = [str(error)]
    if args.world_size > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise OptionsError(*outcome[1])
    return outcome[0]


def ranks_of_this_host(args: TrainingArguments) -> int:
    """Ranks that share this host's memory. All ranks call it: Spark starts a launcher for each, and none of them knows."""
    hosts = [socket.gethostname()] * args.world_size
    if args.world_size > 1:
        torch.distributed.all_gather_object(hosts, socket.gethostname())
    return hosts.count(socket.gethostname())
