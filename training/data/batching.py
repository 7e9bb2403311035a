"""Chooses the rows of each global batch, deals them to ranks, and splits shares that are too large for a device.

A global batch depends only on the seed, the epoch, its size and the number of rows. It does not depend on the number
of ranks or accumulation steps, nor on packing or padding. These decide only how it is dealt into shares, one per rank
and accumulation step. That does not change the gradient, because the Trainer divides the summed loss by the number of
labels in the whole global batch."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from transformers.trainer_pt_utils import BatchRebalanceSampler

from training.consts import LARGEST_SHARE
from training.errors import OptionsError

Share = list[int]  # indices of rows


def deal_by_tokens(lengths: Sequence[int], shares: int) -> list[Share]:
    """Deals rows for packing into shares of nearly equal token count, largest share first.

    The largest share decides the duration of a step. For 64 rows of Alpaca in 8 shares it has 1.003 times the mean.
    With fewer rows than shares, some shares are empty.

        lengths [90, 20, 60, 50, 40], 2 shares  ->  [[0, 4], [2, 3, 1]], both of 130 tokens
    """
    dealt = _deal_longest_first(lengths, shares)
    tokens = [sum(lengths[row] for row in share) for share in dealt]
    _swap_until_even(lengths, dealt, tokens)
    order = sorted(range(shares), key=tokens.__getitem__, reverse=True)
    return [dealt[share] for share in order]


def _deal_longest_first(lengths: Sequence[int], shares: int) -> list[Share]:
    """Deals longest rows first, each to the share with the fewest tokens (LPT; Graham 1969). 1.025 times the mean."""
    heap = [(0, share) for share in range(shares)]
    dealt: list[Share] = [[] for _ in range(shares)]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        tokens, share = heap[0]
        dealt[share].append(row)
        heapq.heapreplace(heap, (tokens + lengths[row], share))
    return dealt


def _swap_until_even(lengths: Sequence[int], dealt: list[Share], tokens: list[int]) -> None:
    """Swaps rows between the largest and the smallest share, in place, until no swap narrows the gap.

    Stops early at LARGEST_SHARE: more swaps would gain 0.2% of a step and double the planning time.
    """
    target = LARGEST_SHARE * sum(tokens) / len(tokens)
    while max(tokens) > target:
        large, small = tokens.index(max(tokens)), tokens.index(min(tokens))
        gap = tokens[large] - tokens[small]
        swaps = [(abs(gap - 2 * (lengths[a] - lengths[b])), a, b) for a in dealt[large] for b in dealt[small]]
        if not swaps or min(swaps)[0] >= gap:
            return
        _, a, b = min(swaps)
        dealt[large][dealt[large].index(a)] = b
        dealt[small][dealt[small].index(b)] = a
        tokens[large] -= lengths[a] - lengths[b]
        tokens[small] += lengths[a] - lengths[b]


def deal_in_order(rows: int, shares: int) -> list[Share]:
    """Deals rows in order, as Dolly did. The sizes of the shares differ by at most one row.

    7 rows, 3 shares  ->  [[0, 1, 2], [3, 4], [5, 6]]
    """
    size, larger = divmod(rows, shares)
    ends = [(i + 1) * size + min(i + 1, larger) for i in range(shares)]
    return [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Documents:
    """Sizes of the rows in a packed row. They stay on the host: to read them from the device, a step must wait for it.

    Neither a tensor nor a collection, so it passes unchanged through everything that moves a batch to a device.

    Attributes:
        lengths: tokens of each row, in order.
        labels: number of labels of each row, in order.
    """

    lengths: tuple[int, ...]
    labels: tuple[int, ...]


def document_lengths(position_ids: torch.Tensor) -> list[int]:
    """Token counts of the rows in a packed row. A row starts wherever `position_ids (1, tokens)` is 0.

    On a GPU this waits for the device. A batch of the collator has them in its Documents.

    [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]  ->  [5, 3, 4]
    """
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], position_ids.shape[1]]
    return [end - start for start, end in zip(starts, ends, strict=True)]


def offsets(lengths: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Where each row of a packed row begins, and where the last one ends: `(rows + 1,) int32`. Waits for no device.

    [5, 3, 4]  ->  [0, 5, 8, 12]
    """
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


class GlobalBatchSampler(BatchRebalanceSampler):
    """Yields this rank's share of every micro batch. Every row occurs exactly once per epoch.

    The Trainer treats the parent class as a rank-aware batch sampler: it calls `set_epoch`, does not shard further, and
    skips the micro batches already done on resume.

    The last global batch has the remaining rows. If there are fewer rows than shares, some shares are empty, and the
    collators turn an empty share into one token without a loss. No row is dropped or repeated, and every rank runs
    every step, as ZeRO-3 requires.

    Args:
        lengths: tokens of every row.
        global_batch_size: rows of one optimizer step, over all ranks and accumulation steps.
        world_size, rank, accumulation: shares of a global batch are world_size x accumulation.
        seed: epoch e is shuffled with `seed + e`.
        deal: how a global batch is dealt into shares. "packed": by tokens. "padded": in order, as in Dolly.
            "length": rows of similar length together, which keeps padding small and equal between ranks, as in
            transformers' `batch_rebalance`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        global_batch_size: int,
        *,
        world_size: int,
        rank: int,
        accumulation: int,
        seed: int,
        deal: Literal["packed", "padded", "length"],
    ) -> None:
        super().__init__(
            lengths, global_batch_size, world_size, accumulation, seed=seed, rank=rank, drop_last=False
        )
        self.deal = deal
        self.planned: tuple[int, list[Share]] | None = None  # epoch and its global batches

    def global_batches(self) -> Iterator[Share]:
        """Yields the global batches of the epoch as row indices, in shuffled order."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.effective_batch_size):
            yield order[start : start + self.effective_batch_size]

    def shares_of_step(self, step: int) -> list[list[Share]]:
        """The shares of an optimizer step of the run, counted from 0 over all epochs: `[accumulation step][rank]`."""
        steps = math.ceil(len(self.lengths) / self.effective_batch_size)
        epoch, step = divmod(step, steps)
        if self.planned is None or self.planned[0] != epoch:
            self.set_epoch(epoch)
            self.planned = epoch, list(self.global_batches())
        return self.micro_batches(self.planned[1][step])

    def micro_batches(self, global_batch: Share) -> list[list[Share]]:
        """The shares of one global batch, `[accumulation step][rank]`. Ranks of a step have similar token counts."""
        shares = self.dp_size * self.grad_accum
        lengths = [self.lengths[row] for row in global_batch]
        if (
            self.deal == "length" and len(global_batch) >= shares
        ):  # the parent's method cannot leave shares empty
            by_rank = self._assign(global_batch, lengths)
            return [list(ranks) for ranks in zip(*by_rank, strict=True)]
        dealt = (
            deal_by_tokens(lengths, shares) if self.deal == "packed" else deal_in_order(len(lengths), shares)
        )
        rows = [[global_batch[i] for i in share] for share in dealt]
        return [rows[start : start + self.dp_size] for start in range(0, shares, self.dp_size)]

    def __iter__(self) -> Iterator[Share]:
        for global_batch in self.global_batches():
            for ranks in self.micro_batches(global_batch):
                yield ranks[self.rank]


def held_out_batches(
    lengths: Sequence[int], rows: int, world_size: int, sources: Sequence[int] | None = None
) -> list[list[Share]]:
    """Batches of held-out rows, `[step][rank]`, each with at most `rows` rows of similar length.

    Longest rows come first, so that a lack of memory shows at once. The rows of a step go to the ranks in serpentine
    order, which balances their work. Every rank has the same number of steps; in the last one, batches may be empty.
    The first batch of a step never is.

    With the source of each row in `sources`, all rows of a step are of one source, so that its loss can be summed.

        lengths [10, 80, 20, 70, 30, 60], 2 rows, 2 ranks  ->  [[[1, 4], [3, 5]], [[2], [0]]]
    """
    of_source: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        of_source.setdefault(sources[row] if sources else 0, []).append(row)
    steps = []
    for order in of_source.values():
        for start in range(0, len(order), rows * world_size):
            batches: list[Share] = [[] for _ in range(world_size)]
            for i, row in enumerate(order[start : start + rows * world_size]):
                turn, rank = divmod(i, world_size)
                batches[world_size - 1 - rank if turn % 2 else rank].append(row)
            steps.append(batches)
    return sorted(
        steps, key=lambda batches: lengths[batches[0][0]], reverse=True
    )  # keeps the order of equal ones


def check_token_budget(lengths: Sequence[int], max_tokens: int) -> None:
    """Raises OptionsError if a single row has more tokens than `--max-tokens-per-device` allows."""
    too_long = sorted((length for length in lengths if length > max_tokens), reverse=True)
    if too_long:
        longest = ", ".join(map(str, too_long[:5])) + (", ..." if len(too_long) > 5 else "")
        raise OptionsError(
            f"--max-tokens-per-device {max_tokens} is less than the length of {len(too_long)} of {len(lengths)} "
            f"rows ({longest} tokens), and a row cannot be split. "
            f"Type --max-tokens-per-device {too_long[0]} or more."
        )


def micro_steps_needed(lengths: Sequence[int], max_tokens: int) -> int:
    """Number of micro-steps in which a device can compute rows of these lengths with at most `max_tokens` each.

    `deal_by_tokens` into this many parts, or into more if another rank needs more, keeps to the budget.
    """
    check_token_budget(lengths, max_tokens)
    steps = max(1, -(-sum(lengths) // max_tokens))
    # Checked without swaps: only then can more parts never make the largest part larger.
    while any(sum(lengths[row] for row in part) > max_tokens for part in _deal_longest_first(lengths, steps)):
        steps += 1
    return steps
