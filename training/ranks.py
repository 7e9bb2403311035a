"""Rank and world size of this process, and communication between ranks."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from training.errors import DataError, ModelError, OptionsError, TrainingError, first_line

SIGN_OF_LIFE_SECONDS = 5.0  # --rank-timeout is at least 10


def world_size() -> int:
    """Number of ranks, from the launcher's environment variable; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The global rank. Not LOCAL_RANK, which is 0 on every rank under Spark's launcher."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    return rank() == 0


def broadcast(value: Any) -> Any:
    """Returns rank 0's value on every rank. All ranks must call it."""
    if world_size() == 1:
        return value
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Any) -> list[Any]:
    """Returns the values of all ranks, in order, on every rank. All ranks must call it."""
    if world_size() == 1:
        return [value]
    import torch

    values = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def on_rank_0(function: Callable[[], Any]) -> Any:
    """Runs `function` on rank 0 and returns its result on every rank. Raises its problems as OptionsError on every rank.

    The function may take longer than --rank-timeout. Every few seconds rank 0 tells the waiting ranks that it is alive.
    """

    def attempt() -> tuple[Any, list[str] | None]:
        try:
            return function(), None
        except OptionsError as error:
            return None, error.problems
        except (DataError, ModelError) as error:
            return None, [str(error)]

    result, problems = attempt() if world_size() == 1 else _broadcast_outcome(attempt)
    if problems is not None:
        raise OptionsError(*problems)
    return result


def _broadcast_outcome(attempt: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """The outcome of rank 0's attempt, on every rank. None is broadcast until it is there."""
    outcome = None
    if is_main_process():
        attempted = ThreadPoolExecutor(1).submit(attempt)
        while not wait([attempted], SIGN_OF_LIFE_SECONDS).done:
            broadcast(None)
        outcome = attempted.result()
    while (received := broadcast(outcome)) is None:
        pass
    return received


def together(function: Callable[[], Any]) -> Any:
    """Runs `function` on every rank and returns this rank's result. If it fails on one rank, it fails on all.

    So no rank waits for a failed one in the next collective. All ranks must call it. Raises this rank's own error. If it
    has none, raises that of the first rank that failed: OptionsError if a person can mend it, otherwise TrainingError.
    """
    result: Any = None
    failure: Exception | None = None
    problems: list[str] | str | None = None
    try:
        result = function()
    except OptionsError as error:
        failure, problems = error, error.problems
    except (DataError, ModelError) as error:
        failure, problems = error, [str(error)]
    except Exception as error:
        failure, problems = error, f"rank {rank()} failed: {first_line(error)}"
    of_ranks = gather(problems)
    if failure is not None:
        raise failure
    for problems in of_ranks:
        if problems is not None:
            raise TrainingError(problems) if isinstance(problems, str) else OptionsError(*problems)
    return result


def in_parallel(function: Callable[[], Any]) -> list[Any]:
    """Runs `function` on every rank and returns all results, in order, on every rank. If it fails on one, it fails on all.

    The function may take longer than --rank-timeout. Every few seconds all ranks tell each other that they are alive.
    """
    attempted = ThreadPoolExecutor(1).submit(function)
    while not all(gather(bool(wait([attempted], SIGN_OF_LIFE_SECONDS).done))):
        pass
    return gather(together(attempted.result))


def raise_together(problem: str | None) -> None:
    """Raises rank 0's problem, if any, as TrainingError on every rank."""
    if problem := broadcast(problem):
        raise TrainingError(problem)


def ranks_on_this_host() -> int:
    """Number of ranks that share this host's memory. All ranks must call it: Spark's launchers do not know the number."""
    return gather(socket.gethostname()).count(socket.gethostname())


def end_process_group() -> None:
    """Ends the process group, so that models which rank 0 loads afterwards are not sharded over the other ranks."""
    if "torch" not in sys.modules:  # no process group was started
        return
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
