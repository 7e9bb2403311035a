"""Whether an architecture keeps the documents of a packed row apart: tried on a small copy, before a weight is loaded.

The answer follows from the architecture's code and config alone. On the loaded weights it would depend on rounding: a
trained model's largest activations move bfloat16 logits by a third of the largest one (docs/packing.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from training.data.collator import DataCollatorForPackedRows
from training.errors import first_line
from training.model.attention import use_packed_attention
from training.model.loss import use_response_loss
from training.model.twin import HEADS, POSITIONS, VOCABULARY, WINDOW, shrunken_twin

# Tokens of the documents that are packed: some longer than each window of the small model, none longer than its
# position limit. The row is several times as long as that limit, as real rows are.
LENGTHS = (5, 3 * WINDOW, 1, POSITIONS - 1, 9, 1, 2, 2 * WINDOW + 1, 33, POSITIONS // 2)

# The largest difference that rounding may make, relative to the largest logit, the loss, or a gradient's norm. Some
# architectures compute norms and softmax in float32. Over all of transformers' architectures the largest difference of
# one that packs was 2e-7, and the smallest of one that does not 5e-3.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Packing:
    """What an architecture allows.

    Attributes:
        obstacle: why its rows cannot be packed; None if they can.
        response_loss: whether the chunked loss of loss.py equals the architecture's own.
    """

    obstacle: str | None = None
    response_loss: bool = False


def packing_of(config: PreTrainedConfig, trust_remote_code: bool = False) -> Packing:
    """What this architecture and its attention implementation allow, in every process and precision.

    Code that cannot be built or run with few attention heads is tried with more before it is refused.
    """
    obstacle = ""
    for heads in (HEADS, 2 * HEADS):
        try:
            return judge(shrunken_twin(config, heads, trust_remote_code))
        except Exception as error:  # whatever an architecture's code raises
            obstacle = f"its code fails on a packed row ({first_line(error)})"
    return Packing(obstacle)


def judge(model: PreTrainedModel) -> Packing:
    """Compares packed documents with the same documents alone. `model` is in float64 and evaluation mode, and is changed.

    Each document must have its own logits, the loss must be that of the responses, and gradients must follow.
    Raises whatever the model raises for a packed row.
    """
    use_packed_attention(model)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    rows = [{"input_ids": document, "response_start": len(document) // 2} for document in documents]
    batch = DataCollatorForPackedRows(pad_token_id=0)(rows)

    together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0].double()
    if obstacle := _crosstalk(model, documents, together.detach()):
        return Packing(obstacle)
    loss = F.cross_entropy(together[batch["logits_to_keep"]], batch["shift_labels"][0])
    loss.backward()
    expected = loss.item(), _gradient(model)

    def differs() -> str | None:
        loss = model(**batch).loss
        if not abs(loss.item() - expected[0]) <= TOLERANCE * expected[0]:
            return f"its loss of a packed row is {loss.item():.6f}, and {expected[0]:.6f} by its logits"
        loss.backward()
        error = (_gradient(model) - expected[1]).norm() / expected[1].norm()
        return None if error <= TOLERANCE else f"its gradient of a packed row is off by {error:.0e}"

    refusal = None
    try:
        if obstacle := differs():
            return Packing(obstacle)
    except TypeError as error:  # a forward without `shift_labels` and `logits_to_keep`
        refusal = f"its forward does not take a packed batch ({first_line(error)})"
    if use_response_loss(model) and differs() is None:
        return Packing(response_loss=True)
    return Packing(refusal)


def _crosstalk(model: PreTrainedModel, documents: list[list[int]], together: torch.Tensor) -> str | None:
    """The first document whose logits in the packed row are not those it has alone, in words."""
    for number, (ids, packed) in enumerate(zip(documents, together.split(LENGTHS), strict=True), start=1):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids]), position_ids=torch.arange(len(ids))[None]).logits[0]
        difference = ((packed - alone).abs().max() / alone.abs().max()).item()
        if not difference <= TOLERANCE:  # also NaN
            return (
                f"its attention crosses documents: number {number} of a packed row has other logits than alone, by "
                f"{difference:.1g} of the largest logit"
            )
    return None


def _gradient(model: PreTrainedModel) -> torch.Tensor:
    """All gradients of the model in one vector; they are taken from it."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def prepare_for_packing(model: PreTrainedModel, packing: Packing) -> None:
    """Gives a loaded model, in place, what its architecture can use for packed rows. Works under ZeRO-3."""
    use_packed_attention(model)
    if packing.response_loss:
        use_response_loss(model)
