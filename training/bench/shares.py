"""The recipes of the benchmark, and how each splits global batches into one share of rows per rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from training.consts import DEFAULT_SEED
from training.data.batching import GlobalBatchSampler
from training.plan.epoch import padded_length


@dataclass(frozen=True)
class Recipe:
    """A training method to compare.

    Attributes:
        deal: how a global batch is split into the ranks' shares (data/batching.py).
        packed: uses our attention, loss and collator.
        checkpointed: uses gradient checkpointing.
        real_only: computes no padding.
    """

    deal: Literal["packed", "padded", "length"]
    packed: bool = False
    checkpointed: bool = False
    real_only: bool = False


RECIPES = {
    # padded to the longest row of a random batch
    "dolly": Recipe("padded", checkpointed=True),
    # the best that transformers' Trainer offers: padded, split by `batch_rebalance`
    "stock": Recipe("length"),
    "packed": Recipe("packed", packed=True, real_only=True),
    # packed, with checkpointing as in dolly
    "packed_checkpointed": Recipe("packed", packed=True, checkpointed=True, real_only=True),
}
# SFTTrainer of the `trl` package, if installed: padding-free with eager attention, its fastest setting that keeps
# GPT-J's documents apart.
TRL = "trl"
# Adapters, with --lora: ours on packed rows, and peft's in the stock Trainer on padded ones. Neither recomputes.
LORA, PEFT = "lora", "peft"
ALL_RECIPES = RECIPES | {
    TRL: Recipe("padded", real_only=True),
    LORA: Recipe("packed", packed=True, real_only=True),
    PEFT: Recipe("padded"),
}


def computed_tokens(lengths: Sequence[int], packed: bool) -> int:
    """Tokens computed for a share: its own if packed, otherwise with every row padded to the longest."""
    if packed or not lengths:
        return sum(lengths)
    return len(lengths) * padded_length(max(lengths))


def global_shares(name: str, lengths: Sequence[int], rows: int, world_size: int) -> list[list[list[int]]]:
    """Row indices `[step][rank]` of an epoch's full global batches, as the recipe splits them; same batches for all."""
    sampler = GlobalBatchSampler(
        lengths,
        rows * world_size,
        world_size=world_size,
        rank=0,
        accumulation=1,
        seed=DEFAULT_SEED,
        deal=ALL_RECIPES[name].deal,
    )
    full = len(lengths) // (rows * world_size)
    return [
        sampler.micro_batches(batch)[0]
        for batch, _ in zip(sampler.global_batches(), range(full), strict=False)
    ]


def slowest_share(shares: Sequence[Sequence[int]], lengths: Sequence[int], packed: bool) -> Sequence[int]:
    """The share with the most computed tokens, which its step waits for."""
    return max(shares, key=lambda share: computed_tokens([lengths[row] for row in share], packed))


def typical_steps(shares: list[list[list[int]]], lengths: Sequence[int], steps: int) -> list[int]:
    """Representative steps of the epoch, spread evenly over all steps sorted by the cost of padding."""
    order = sorted(
        range(len(shares)), key=lambda i: real_share(shares[i], lengths, packed=False), reverse=True
    )
    steps = min(steps, len(order))
    return [order[int((i + 0.5) * len(order) / steps)] for i in range(steps)]


def real_share(shares: Sequence[Sequence[int]], lengths: Sequence[int], packed: bool) -> float:
    """Real tokens of a step, as a share of the tokens that all ranks could compute in the time of the slowest."""
    costs = [computed_tokens([lengths[row] for row in share], packed) for share in shares]
    return sum(lengths[row] for share in shares for row in share) / (max(costs) * len(shares))


def real_token_shares(name: str, lengths: Sequence[int], rows: int, world_size: int) -> list[float]:
    """`real_share` of every step of an epoch."""
    steps = global_shares(name, lengths, rows, world_size)
    return [real_share(shares, lengths, ALL_RECIPES[name].real_only) for shares in steps]
