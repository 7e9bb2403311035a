"""The proof that a model keeps packed rows apart, and the choice of batching that follows from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from training.data.collator import DataCollatorForPackedRows
from training.model.attention import use_packed_attention
from training.model.loss import use_response_loss

logger = logging.getLogger(__name__)

Batching = Literal["packed", "padded", "length"]

# How far a document's logits in a packed row may be from its logits alone, as a share of the largest logit:
# matrix products of other shapes add in another order.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def packs_cleanly(model: PreTrainedModel) -> tuple[bool, str]:
    """Whether the model keeps packed documents apart and puts the loss in its place, and if not, why.

    Runs the loaded model as training will: two documents in one row, positions restarting, no attention mask.
    Each document must give the logits it gives alone, a change in the other must not move them, and the loss
    must be that of the responses. Set `model.config.use_cache = False` before: with a cache
    transformers does not look for packed rows.

    Every rank must call this at the same time; under ZeRO-3 it gathers one module after the other, so it may
    run before the DeepSpeed engine exists.
    """
    tokens = list(range(37))
    first, second, other = tokens[:9], tokens[9:23], tokens[23:]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _gathered_module_by_module(model):
            return _prove_packing(model, first, second, other)
    finally:
        model.train(was_training)


def _prove_packing(
    model: PreTrainedModel, first: list[int], second: list[int], other: list[int]
) -> tuple[bool, str]:
    """The checks of `packs_cleanly`; `other` has the length of `second`, and a beginning for `first`."""
    device = next(model.parameters()).device
    collate = DataCollatorForPackedRows(pad_token_id=0)

    def batch(*documents: list[int]) -> dict[str, torch.Tensor]:
        rows = [{"input_ids": document, "response_start": len(document) // 2} for document in documents]
        return {name: tensor.to(device) for name, tensor in collate(rows).items()}

    def logits(*documents: list[int]) -> torch.Tensor:
        packed = batch(*documents)
        return model(input_ids=packed["input_ids"], position_ids=packed["position_ids"]).logits[0].float()

    n = len(first)
    together = logits(first, second)
    # To the bit: the same shapes are computed in the same way, and a masked token counts exactly nothing.
    if not torch.equal(logits(other[:n], second)[n:], together[n:]):
        return False, "a change in one document moves the logits of the document after it"
    if not torch.equal(logits(first, other)[:n], together[:n]):
        return False, "a change in one document moves the logits of the document before it"

    alone = torch.cat([logits(first), logits(second)])
    if not (together - alone).abs().max() <= ROUNDING[model.dtype] * alone.abs().max():
        return False, "a document has other logits in a packed row than alone"

    packed = batch(first, second)
    try:
        loss = model(**packed).loss.float()
    except TypeError as error:
        return False, f"its forward does not take a packed batch ({error})"
    expected = F.cross_entropy(alone[packed["logits_to_keep"]], packed["shift_labels"][0])
    if not (loss - expected).abs() <= ROUNDING[model.dtype] * expected:
        return False, f"the loss of a packed row is {loss:.4f}, and {expected:.4f} from its documents' logits"
    return True, "documents in a packed row do not feel one another"


@contextmanager
def _gathered_module_by_module(model: nn.Module) -> Iterator[None]:
    """Lets a model sharded by ZeRO-3 run before the DeepSpeed engine exists, at one module's memory."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    from deepspeed import zero

    with ExitStack() as hooks:
        for module in model.modules():
            gathered = zero.GatheredParameters(list(module.parameters(recurse=False)))
            before = module.register_forward_pre_hook(lambda *_, g=gathered: g.__enter__())
            after = module.register_forward_hook(lambda *_, g=gathered: g.__exit__(None, None, None))
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        yield


def choose_batching(model: PreTrainedModel, requested: str) -> Batching:
    """How this model's rows are batched: "packed" only where the loaded model is proved to keep rows apart."""
    if requested == "padded":
        return "padded"
    if model.config.model_type == "gptj":
        use_packed_attention(model)
        use_response_loss(model)
    clean, reason = packs_cleanly(model)
    if clean:
        return "packed"
    logger.info("rows are padded, and dealt by length, because this model cannot pack: %s", reason)
    return "length"
