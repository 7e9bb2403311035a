"""Tests on a small copy of an architecture whether it can be trained on packed rows, before any weight is loaded.

The result depends only on the architecture's code and config. With the loaded weights it would depend on rounding: in a
trained model with large activations, bfloat16 changes logits by a third of the largest one (docs/packing.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from training.consts import PAD_TO_MULTIPLE_OF
from training.data.collator import DataCollatorForPackedRows
from training.errors import first_line
from training.model.attention import use_packed_attention
from training.model.loss import use_own_loss, use_response_loss
from training.model.twin import HEADS, POSITIONS, VOCABULARY, WINDOW, shrunken_twin

# Tokens of each document in the test row. Some documents are longer than each window of the small copy, and one fills
# all of its positions. The row is several times as long as that, as real rows are.
DOCUMENT_LENGTHS = (5, 3 * WINDOW, 1, POSITIONS, 9, 1, 2, 2 * WINDOW + 1, 33, POSITIONS // 2)
LONGEST = 3  # index of the longest document

# Largest difference that counts as rounding, relative to the largest logit, the loss, or the gradient's norm. Some
# architectures compute norms and softmax in float32. The largest difference of 18 architectures that can be packed was
# 2e-7, and the smallest of 75 that cannot was 0.1.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Packing:
    """What an architecture supports.

    Attributes:
        obstacle: why its rows cannot be packed; None if they can be packed.
        response_loss: whether the chunked loss of loss.py equals the architecture's own.
        padded_loss: whether padded rows need the loss of loss.py, because its own is not that of the next tokens.
        lost_positions: positions of its config that no row can use (RoBERTa's table begins after its padding).
        whole_blocks: whether ZeRO-3 may reduce the gradients of a block at once (blocks.py).
    """

    obstacle: str | None = None
    response_loss: bool = False
    padded_loss: bool = False
    lost_positions: int = 0
    whole_blocks: bool = False

    def row_limit(self, positions: int) -> int:
        """Tokens of the longest row for a config with that many positions. A padded row's width is a multiple of 8."""
        usable = positions - self.lost_positions
        return usable if self.obstacle is None else usable // PAD_TO_MULTIPLE_OF * PAD_TO_MULTIPLE_OF

    def prepare(self, model: PreTrainedModel) -> None:
        """Switches a loaded model, in place, to the attention and loss for packed rows. Works under ZeRO-3."""
        use_packed_attention(model)
        if self.response_loss:
            use_response_loss(model)
        else:
            use_own_loss(model)


def packing_of(config: PreTrainedConfig, trust_remote_code: bool = False) -> Packing:
    """What this architecture and its attention implementation support. The same in every process and precision.

    If the small copy cannot be built or run with few attention heads, more heads are tried.
    """
    obstacle = ""
    for heads in (HEADS, 2 * HEADS):
        try:
            twin = shrunken_twin(config, heads, trust_remote_code)
        except Exception as error:
            obstacle = f"no small copy of it can be built to find out ({first_line(error)})"
            continue
        try:
            return compare_packed_with_alone(twin)
        except Exception as error:  # whatever an architecture's code raises
            obstacle = f"its code fails on a packed row ({first_line(error)})"
    return Packing(obstacle)


def compare_packed_with_alone(model: PreTrainedModel) -> Packing:
    """Compares packed documents with the same documents alone. `model` must be float64 and in evaluation mode.

    Each document must have the same logits in both cases. Loss and gradient of the packed row must be those of the
    response tokens. Changes the model's classes. Raises whatever the model raises for a packed row.
    """
    use_packed_attention(model)
    use_own_loss(model)
    generator = torch.Generator().manual_seed(1)
    documents = [
        torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in DOCUMENT_LENGTHS
    ]
    rows = [
        {"input_ids": document, "response_spans": [[n // 4, n // 2], [3 * n // 4, n]]}  # two turns
        for document in documents
        if (n := len(document))
    ]
    collate = DataCollatorForPackedRows(pad_token_id=0)
    batch = collate(rows)
    packed_logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0].double()
    if obstacle := _logits_problem(model, documents, packed_logits.detach()):
        return Packing(obstacle)
    # The shapes that a rank can get: many rows, one row, and no row.
    batches = [batch, collate([rows[LONGEST]]), collate([])]
    refusal = None
    try:
        if obstacle := _loss_problem(model, batches):
            return Packing(obstacle)
    except TypeError as error:  # its forward has no `shift_labels` and `logits_to_keep`
        refusal = f"its forward does not take a packed batch ({first_line(error)})"
    try:
        if use_response_loss(model) and _loss_problem(model, batches) is None:
            return Packing(response_loss=True)
    except Exception as error:  # the architecture is not built as the chunked loss expects
        if refusal:
            refusal += f", and the chunked loss fails ({first_line(error)})"
    return Packing(refusal)


def _loss_problem(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> str | None:
    """Describes a packed batch whose loss or gradient is not that of its response tokens; None if there is none."""
    for batch in batches:
        items = batch["shift_labels"].numel() + 3  # the Trainer counts the labels of all ranks
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0].double()
        kept, labels = logits[batch["logits_to_keep"]], batch["shift_labels"][0]
        expected_loss = F.cross_entropy(kept, labels, reduction="sum") / items
        expected_loss.backward()
        expected = _gradient(model)
        loss = model(**batch, num_items_in_batch=torch.tensor(items)).loss
        if not abs(loss.item() - expected_loss.item()) <= TOLERANCE * expected_loss.item():
            return f"its loss of a packed row is {loss.item():.6f}, but its logits give {expected_loss.item():.6f}"
        loss.backward()
        wrong, size = (_gradient(model) - expected).norm(), expected.norm()
        if not wrong <= TOLERANCE * size:
            return f"its gradient of a packed row is wrong by {wrong / size:.0e}"
    return None


def _logits_problem(
    model: PreTrainedModel, documents: list[list[int]], packed_logits: torch.Tensor
) -> str | None:
    """Describes the first document whose logits in the packed row differ from its logits alone; None if none does."""
    parts = packed_logits.split(DOCUMENT_LENGTHS)
    for number, (ids, packed) in enumerate(zip(documents, parts, strict=True), start=1):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids])).logits[0]  # without positions, as for padded rows
        if not torch.isfinite(alone).all():
            return "its logits are not finite, even with small random weights"
        difference = ((packed - alone).abs().max() / alone.abs().max()).item()
        if not difference <= TOLERANCE:  # also if the packed row alone has NaN
            return (
                f"its attention crosses documents: the logits of document {number} in a packed row differ from its "
                f"logits alone by {difference:.1g} of the largest one"
            )
    return None


def _gradient(model: PreTrainedModel) -> torch.Tensor:
    """The model's gradients as one vector. Clears them in the model."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return torch.cat([gradient.flatten() for gradient in gradients])
