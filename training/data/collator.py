"""Collates rows into a batch: padded to the longest row (as in Dolly), or packed into one row without padding.

A row is `{"input_ids": list[int], "response_spans": [[start, end], ...]}`. The loss covers `input_ids[start:end]`, including the
end key, and nothing else. Both collators give the same labels to the same tokens. The Trainer divides by the number of
labels over all ranks and accumulation steps, so it normalises both alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import DataCollatorWithFlattening

from training.consts import IGNORE_INDEX, PAD_TO_MULTIPLE_OF
from training.data.batching import Documents, deal_by_tokens, offsets

Row = dict[str, Any]
Batch = dict[str, Any]


def completion_labels(row: Row) -> list[int]:
    """The row's token ids as labels, with everything outside the responses set to IGNORE_INDEX.

    The first token is always ignored: no token of its own row predicts it, and in a packed row the token before it
    belongs to another row.
    """
    labels = [IGNORE_INDEX] * len(row["input_ids"])
    for start, end in row["response_spans"]:
        labels[max(start, 1) : end] = row["input_ids"][max(start, 1) : end]
    return labels


def _placeholder_rows(pad_token_id: int) -> list[Row]:
    """One token without a loss, for a rank whose share is empty.

    Under ZeRO-3 every rank must run every forward and backward pass, or the other ranks hang.
    """
    return [{"input_ids": [pad_token_id], "response_spans": []}]


@dataclass
class DataCollatorForCompletionOnlyLM:
    """Pads a share of rows on the right to its longest row, rounded up to a multiple of 8.

    Padding is marked by the attention mask, not by the pad token's id: GPT-J pads with its end-of-text token, which a
    text may contain.

    With pad token 0, these three rows:

        {"input_ids": [11, 12, 13, 14, 15], "response_spans": [[3, 5]]}
        {"input_ids": [21, 22, 23],         "response_spans": [[2, 3]]}
        {"input_ids": [31, 32, 33, 34],     "response_spans": [[1, 2], [3, 4]]}

    become three int64 tensors `(rows, tokens)`:

        input_ids       11   12   13   14   15    0    0    0
                        21   22   23    0    0    0    0    0
                        31   32   33   34    0    0    0    0
        attention_mask   1    1    1    1    1    0    0    0
                         1    1    1    0    0    0    0    0
                         1    1    1    1    0    0    0    0
        labels        -100 -100 -100   14   15 -100 -100 -100
                      -100 -100   23 -100 -100 -100 -100 -100
                      -100   32 -100   34 -100 -100 -100 -100
    """

    pad_token_id: int

    def __call__(self, rows: list[Row]) -> Batch:
        rows = rows or _placeholder_rows(self.pad_token_id)
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF

        input_ids = torch.full((len(rows), width), self.pad_token_id)
        attention_mask = torch.zeros(len(rows), width, dtype=torch.int64)
        labels = torch.full((len(rows), width), IGNORE_INDEX)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[i, :length] = torch.tensor(row["input_ids"])
            attention_mask[i, :length] = 1
            labels[i, :length] = torch.tensor(completion_labels(row))
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass
class DataCollatorForPackedRows:
    """Concatenates a share of rows into one row without padding, and marks where logits are needed.

    There is no attention mask: a row starts where `position_ids` restarts at 0, and the attention must respect that
    (`training/model/attention.py`). `logits_to_keep` are the positions whose next token has a label, and `shift_labels`
    are these labels. The names are those of transformers. `cu_seq_lens_q` are the offsets of the rows, for attention on
    the device; `documents` has the same on the host. A model that `training/model/packing.py` has prepared accepts them.

    These three rows:

        {"input_ids": [11, 12, 13, 14, 15], "response_spans": [[3, 5]]}
        {"input_ids": [21, 22, 23],         "response_spans": [[2, 3]]}
        {"input_ids": [31, 32, 33, 34],     "response_spans": [[1, 2], [3, 4]]}

    become int64 tensors, here with 12 tokens and 5 labels:

        input_ids     (1, tokens)    11   12   13   14   15   21   22   23   31   32   33   34
        position_ids  (1, tokens)     0    1    2    3    4    0    1    2    0    1    2    3
        labels        (1, tokens)  -100 -100 -100   14   15 -100 -100   23 -100   32 -100   34
        logits_to_keep  (labels,)               2    3              6         8        10
        shift_labels  (1, labels)              14   15             23        32        34

    and, beside them,

        cu_seq_lens_q  (rows + 1,) int32   0 5 8 12
        documents                          Documents(lengths=(5, 3, 4), labels=(2, 1, 2))
    """

    pad_token_id: int  # used only if the share is empty

    def __call__(self, rows: list[Row]) -> Batch:
        rows = rows or _placeholder_rows(self.pad_token_id)
        of_rows = [completion_labels(row) for row in rows]
        batch = DataCollatorWithFlattening()(
            [{"input_ids": row["input_ids"], "labels": own} for row, own in zip(rows, of_rows, strict=True)]
        )
        targets = (batch["labels"][0] != IGNORE_INDEX).nonzero()[:, 0]
        lengths = [len(row["input_ids"]) for row in rows]
        labels = [len(own) - own.count(IGNORE_INDEX) for own in of_rows]
        return batch | {
            "logits_to_keep": targets - 1,
            "shift_labels": batch["labels"][:, targets],
            "cu_seq_lens_q": offsets(lengths, "cpu"),
            "documents": Documents(tuple(lengths), tuple(labels)),
        }


def split_packed_batch(batch: Batch, micro_steps: int) -> list[Batch]:
    """Splits a packed batch by rows into `micro_steps` packed batches of nearly equal token count. Waits for no device.

    Every label is in exactly one part, so losses and gradients of the parts sum to those of the batch. A part without
    rows is the batch's first token, which has no loss.
    """
    documents = batch["documents"]
    tokens, targets = _slices(documents.lengths), _slices(documents.labels)
    parts = []
    for share in deal_by_tokens(documents.lengths, micro_steps):
        if share:
            parts.append(_part(batch, [tokens[row] for row in share], [targets[row] for row in share]))
        else:
            parts.append(_part(batch, [slice(0, 1)], [slice(0, 0)]))
    return parts


def _slices(sizes: Sequence[int]) -> list[slice]:
    """[5, 3]  ->  [slice(0, 5), slice(5, 8)]"""
    return [slice(start, stop) for start, stop in pairwise([0, *accumulate(sizes)])]


def _part(batch: Batch, tokens: list[slice], targets: list[slice]) -> Batch:
    """The packed batch of some rows of `batch`, given the slices of their tokens and of their labels."""
    lengths = [row.stop - row.start for row in tokens]
    part = {
        name: torch.cat([batch[name][:, row] for row in tokens], dim=1)
        for name in ("input_ids", "position_ids", "labels")
    }
    part["shift_labels"] = torch.cat([batch["shift_labels"][:, row] for row in targets], dim=1)
    starts = accumulate(lengths, initial=0)
    moves = [start - row.start for start, row in zip(starts, tokens, strict=False)]
    keep = [batch["logits_to_keep"][row] + move for row, move in zip(targets, moves, strict=True)]
    return part | {
        "logits_to_keep": torch.cat(keep),
        "cu_seq_lens_q": offsets(lengths, batch["input_ids"].device),
        "documents": Documents(tuple(lengths), tuple(row.stop - row.start for row in targets)),
    }


def count_labels(batch: Batch) -> torch.Tensor:
    """Number of tokens with a loss in a batch, an int64 scalar."""
    labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
    return (labels != IGNORE_INDEX).sum()
