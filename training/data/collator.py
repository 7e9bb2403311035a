"""Collates rows into a batch: padded to the longest row (as in Dolly), or packed into one row without padding.

A row is `{"input_ids": list[int], "response_start": int}`. The loss covers `input_ids[response_start:]`, including the
end key, and nothing else. Both collators give the same labels to the same tokens. The Trainer divides by the number of
labels over all ranks and accumulation steps, so it normalises both alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DataCollatorWithFlattening

from training.consts import IGNORE_INDEX, PAD_TO_MULTIPLE_OF
from training.data.batching import deal_by_tokens, document_lengths

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]


def completion_labels(row: Row) -> list[int]:
    """The row's token ids as labels, with everything before the response set to IGNORE_INDEX.

    The first token is always ignored: no token of its own row predicts it, and in a packed row the token before it
    belongs to another row.
    """
    start = max(row["response_start"], 1)
    return [IGNORE_INDEX] * start + row["input_ids"][start:]


def _placeholder_rows(pad_token_id: int) -> list[Row]:
    """One token without a loss, for a rank whose share is empty.

    Under ZeRO-3 every rank must run every forward and backward pass, or the other ranks hang.
    """
    return [{"input_ids": [pad_token_id], "response_start": 1}]


@dataclass
class DataCollatorForCompletionOnlyLM:
    """Pads a share of rows on the right to its longest row, rounded up to a multiple of 8.

    Padding is marked by the attention mask, not by the pad token's id: GPT-J pads with its end-of-text token, which a
    text may contain.

    With pad token 0, these three rows:

        {"input_ids": [11, 12, 13, 14, 15], "response_start": 3}
        {"input_ids": [21, 22, 23],         "response_start": 2}
        {"input_ids": [31, 32, 33, 34],     "response_start": 1}

    become three int64 tensors `(rows, tokens)`:

        input_ids       11   12   13   14   15    0    0    0
                        21   22   23    0    0    0    0    0
                        31   32   33   34    0    0    0    0
        attention_mask   1    1    1    1    1    0    0    0
                         1    1    1    0    0    0    0    0
                         1    1    1    1    0    0    0    0
        labels        -100 -100 -100   14   15 -100 -100 -100
                      -100 -100   23 -100 -100 -100 -100 -100
                      -100   32   33   34 -100 -100 -100 -100
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
    are these labels. The names are those of transformers, so that any causal LM accepts the batch.

    These three rows:

        {"input_ids": [11, 12, 13, 14, 15], "response_start": 3}
        {"input_ids": [21, 22, 23],         "response_start": 2}
        {"input_ids": [31, 32, 33, 34],     "response_start": 1}

    become int64 tensors, here with 12 tokens and 6 labels:

        input_ids     (1, tokens)    11   12   13   14   15   21   22   23   31   32   33   34
        position_ids  (1, tokens)     0    1    2    3    4    0    1    2    0    1    2    3
        labels        (1, tokens)  -100 -100 -100   14   15 -100 -100   23 -100   32   33   34
        logits_to_keep  (labels,)               2    3              6         8    9   10
        shift_labels  (1, labels)              14   15             23        32   33   34
    """

    pad_token_id: int  # used only if the share is empty

    def __call__(self, rows: list[Row]) -> Batch:
        rows = rows or _placeholder_rows(self.pad_token_id)
        flatten = DataCollatorWithFlattening()
        return _with_loss_positions(
            flatten([{"input_ids": row["input_ids"], "labels": completion_labels(row)} for row in rows])
        )


def _with_loss_positions(batch: Batch) -> Batch:
    """Adds `logits_to_keep (labels,)` and `shift_labels (1, labels)` to a packed batch."""
    targets = (batch["labels"][0] != IGNORE_INDEX).nonzero()[:, 0]
    return batch | {"logits_to_keep": targets - 1, "shift_labels": batch["labels"][:, targets]}


def split_packed_batch(batch: Batch, micro_steps: int) -> list[Batch]:
    """Splits a packed batch by rows into `micro_steps` packed batches of nearly equal token count.

    Every label is in exactly one part, so losses and gradients of the parts sum to those of the batch. A part without
    rows is the batch's first token, which has no loss.
    """
    lengths = document_lengths(batch["position_ids"])
    rows = torch.arange(sum(lengths), device=batch["input_ids"].device).split(lengths)
    parts = []
    for share in deal_by_tokens(lengths, micro_steps):
        tokens = torch.cat([rows[i] for i in share]) if share else rows[0][:1]
        part = {name: batch[name][:, tokens] for name in ("input_ids", "position_ids", "labels")}
        parts.append(_with_loss_positions(part))
    return parts


def count_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Number of tokens with a loss in a batch, an int64 scalar."""
    labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
    return (labels != IGNORE_INDEX).sum()
