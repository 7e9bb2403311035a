"""Trained rows of a frozen embedding and of a frozen head: those of tokens that the base model does not know.

Only these rows have parameters with gradients. peft's trainable tokens would copy the whole embedding in each forward,
and leave out a head's bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from training.errors import ModelError
from training.model.sharded import gathered, is_sharded


@cache
def embedding_with_new_rows(kind: Any) -> Any:
    """A subclass of an embedding whose vectors of the tokens `row_ids (n,)` come from its parameter `new_rows (n, width)`."""

    def forward(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        vectors = kind.forward(self, input_ids, *args, **kwargs)
        rows = self.new_rows
        if kind is not nn.Embedding:  # some scale or normalise their vectors
            with _as_weight(self, rows):
                rows = kind.forward(self, torch.arange(len(rows), device=input_ids.device), *args, **kwargs)
        is_new = input_ids[..., None] == self.row_ids
        # A product with ones and zeros: no wait for the number of new tokens, and its gradient is one product too.
        chosen = is_new.to(vectors.dtype) @ rows.to(vectors.dtype)
        return torch.where(is_new.any(dim=-1, keepdim=True), chosen, vectors)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


@contextmanager
def _as_weight(embedding: Any, rows: torch.Tensor) -> Iterator[None]:
    """Lets an embedding's own code compute its vectors from `rows`."""
    weight, padding = embedding._parameters["weight"], embedding.padding_idx
    embedding._parameters["weight"], embedding.padding_idx = rows, None
    try:
        yield
    finally:
        embedding._parameters["weight"], embedding.padding_idx = weight, padding


@cache
def head_with_new_rows(kind: Any) -> Any:
    """A subclass of a head whose logits of the tokens `row_ids (n,)` come from `new_rows (n, width)` and `new_bias (n,)`."""

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return replace_logits(kind.forward(self, hidden), hidden, self)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def replace_logits(logits: torch.Tensor, hidden: torch.Tensor, head: Any) -> torch.Tensor:
    """`logits (..., vocabulary)` of `hidden (..., width)`, changed in place at the columns of a head's new rows, if it has any."""
    rows, bias = head._parameters.get("new_rows"), head._parameters.get("new_bias")
    if rows is None:
        return logits
    bias = None if bias is None else bias.to(hidden.dtype)
    replacement = nn.functional.linear(hidden, rows.to(hidden.dtype), bias)
    return logits.index_copy_(-1, head.row_ids, replacement)


def add_new_rows(model: PreTrainedModel, row_ids: Sequence[int]) -> None:
    """Adds trained rows for the tokens `row_ids` to the embedding and the head, in place. They begin as the base's rows.

    A head that is tied to the embedding shares its parameter. The parameters are in the modules whose forward uses
    them, because that is where ZeRO-3 gathers them. Raises ModelError for a model without a head.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            "adapters need a model with a language-model head, and it has none. Leave out --lora"
        )
    ids = torch.tensor(row_ids, device=embedding.weight.device)
    tied = head.weight is embedding.weight
    with gathered(embedding.weight):
        embedding.new_rows = trained(embedding.weight[ids], embedding.weight)
    embedding.register_buffer("row_ids", ids, persistent=False)
    if tied:
        head.new_rows = embedding.new_rows
    else:
        with gathered(head.weight):
            head.new_rows = trained(head.weight[ids], head.weight)
    bias = getattr(head, "bias", None)
    if bias is not None:
        with gathered(bias):
            head.new_bias = trained(bias[ids], head.weight)
    head.register_buffer("row_ids", ids.clone(), persistent=False)
    kind: Any = type(embedding)
    embedding.__class__ = embedding_with_new_rows(kind)
    if not hasattr(head, "response_loss"):  # ResponseLossHead knows new rows
        kind = type(head)
        head.__class__ = head_with_new_rows(kind)


def trained(values: torch.Tensor, base: torch.Tensor) -> nn.Parameter:
    """A parameter with these values, in float32 as an optimizer needs it.

    DeepSpeed trains in the precision of the `base` tensor, beside float32 masters of its own; tests use float64.
    """
    keeps = is_sharded(base) or base.dtype == torch.float64
    return nn.Parameter(values.detach().clone().to(base.device, base.dtype if keeps else torch.float32))


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that are trained, by name: those of the adapter, and the new rows. A shared one occurs once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
