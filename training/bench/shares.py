"""The recipes of the benchmark, and how each of them deals the rows of an epoch to the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from training.consts import DEFAULT_SEED
from training.data.batching import GlobalBatchSampler
from training.plan.epoch import padded_length


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        deal: how a global batch becomes the shares of the ranks (data/batching.py).
        packed: our attention, loss and collator.
        checkpointed: every layer is computed again in the backward pass.
        real_only: no padding is computed.
    """

    deal: Literal["packed", "padded", "length"]
    packed: bool = False
    checkpointed: bool = False
    real_only: bool = False


RECIPES = {
    # padded to the longest row of a random batch
    "dolly": Recipe("padded", checkpointed=True),
    # the best of transformers' own Trainer: padded, dealt by `batch_rebalance`
    "stock": Recipe("length"),
    "packed": Recipe("packed", packed=True, real_only=True),
    # to compare like with like
    "packed_checkpointed": Recipe("packed", packed=True, checkpointed=True, real_only=True),
}
# The SFTTrainer of the `trl` package where it is installed: padding-free on eager attention, the fastest of its
# settings that keeps GPT-J's documents apart.
TRL = "trl"
ALL_RECIPES = RECIPES | {TRL: Recipe("padded", real_only=True)}


def computed_tokens(lengths: Sequence[int], packed: bool) -> int:
    """Tokens that a share costs: its own if packed, else every row padded to the longest."""
    if packed or not lengths:
        return sum(lengths)
    return len(lengths) * padded_length(max(lengths))


def global_shares(name: str, lengths: Sequence[int], rows: int, world_size: int) -> list[list[list[int]]]:
    """The full global batches of an epoch, `[step][rank]`, as the recipe deals them. All have the same batches."""
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
    """The share that its step waits for."""
    return max(shares, key=lambda share: computed_tokens([lengths[row] for row in share], packed))


def typical_steps(shares: list[list[list[int]]], lengths: Sequence[int], steps: int) -> list[int]:
    """Steps that stand for the epoch: spread evenly from the one that padding costs least to the costliest."""
    order = sorted(
        range(len(shares)), key=lambda i: real_share(shares[i], lengths, packed=False), reverse=True
    )
    steps = min(steps, len(order))
    return [order[int((i + 0.5) * len(order) / steps)] for i in range(steps)]


def real_share(shares: Sequence[Sequence[int]], lengths: Sequence[int], packed: bool) -> float:
    """The real tokens of a step, as a share of what its ranks could compute while they wait for the slowest."""
    costs = [computed_tokens([lengths[row] for row in share], packed) for share in shares]
    return sum(lengths[row] for share in shares for row in share) / (max(costs) * len(shares))


def real_token_shares(name: str, lengths: Sequence[int], rows: int, world_size: int) -> list[float]:
    """`real_share` of every step of an epoch."""
    steps = global_shares(name, lengths, rows, world_size)
    return [real_share(shares, lengths, ALL_RECIPES[name].real_only) for shares in steps]
