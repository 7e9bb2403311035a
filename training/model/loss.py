"""Cross-entropy loss at response positions, computed in chunks so that the logits of a share never exist all at once.

Float32 logits of 1,000 tokens with a vocabulary of 50,400 take 200 MB, and the plain loss holds several copies. This
loss computes a chunk of logits, turns it into its gradient in place, uses it and frees it. A chunk takes three matrix
products, and none is computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, wraps
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from training.consts import IGNORE_INDEX, LOSS_CHUNK_BYTES
from training.model.new_rows import head_with_new_rows, replace_logits


class _CrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of `hidden @ weight.T + bias`, divided by `items`. The forward computes the gradients.

    In fp16 the forward computes the gradients of the undivided sum, because small probabilities divided by `items`
    would underflow. The backward divides them when it applies the loss scale. A frozen weight gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        new_rows: torch.Tensor | None,
        new_bias: torch.Tensor | None,
        row_ids: torch.Tensor | None,
        targets: torch.Tensor,
        items: torch.Tensor,
        needs_gradient: bool,
    ) -> torch.Tensor:
        """Float32 scalar from `hidden (labels, width)`, `weight (vocabulary, width)` and `targets (labels,)`.

        `new_rows (n, width)` and `new_bias (n,)` replace the weight's rows of the tokens `row_ids (n,)`.
        """
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        divide_later = weight.dtype == torch.float16
        head = _Head(weight, bias, new_rows, new_bias, row_ids)
        gradients = _Gradients(hidden, head, ctx.needs_input_grad) if needs_gradient else None
        tokens = max(1, LOSS_CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden.shape[0], tokens):
            chunk, target = hidden[start : start + tokens], targets[start : start + tokens, None]
            product = head.logits(chunk)
            logits = product.float()
            largest = logits.amax(dim=1, keepdim=True)
            logits -= largest
            chosen = logits.gather(1, target)
            total = logits.exp_().sum(dim=1, keepdim=True)
            loss += (total.log() - chosen).sum()
            if gradients:
                # The gradient of the logits is their probabilities, minus one at the target.
                logits /= total if divide_later else total * items
                logits.scatter_add_(1, target, torch.full_like(chosen, -1.0) / (1 if divide_later else items))
                gradients.add(start, chunk, product, logits)
        if gradients:
            ctx.save_for_backward(*gradients.tensors())
            ctx.factor = 1 / items if divide_later else None
        return loss / items

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = ctx.saved_tensors
        factor = grad_output if ctx.factor is None else grad_output * ctx.factor
        # On a CPU skip a factor of 1: the multiplication is 2% of a step. On a GPU the comparison would be a wait.
        if factor.device.type != "cpu" or factor != 1:
            gradients = [None if gradient is None else gradient.mul_(factor) for gradient in gradients]
        return (*gradients, None, None, None, None)


@dataclass
class _Head:
    """The tensors of a head; see `_CrossEntropy.forward`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    new_rows: torch.Tensor | None
    new_bias: torch.Tensor | None
    row_ids: Any

    def logits(self, chunk: torch.Tensor) -> torch.Tensor:
        """`(tokens, vocabulary)` of `chunk (tokens, width)`, in the weight's precision."""
        product = _aligned(len(chunk), self.weight.shape[0], self.weight)
        if self.bias is None:
            torch.mm(chunk, self.weight.T, out=product)
        else:
            torch.addmm(self.bias, chunk, self.weight.T, out=product)
        if self.new_rows is not None:
            new_bias = None if self.new_bias is None else self.new_bias.to(chunk.dtype)
            product.index_copy_(1, self.row_ids, F.linear(chunk, self.new_rows.to(chunk.dtype), new_bias))
        return product


class _Gradients:
    """Sums the gradients of the chunks: of the hidden states, and of those parts of the head that are trained."""

    def __init__(self, hidden: torch.Tensor, head: _Head, needed: Sequence[bool]) -> None:
        def zeros(tensor: torch.Tensor | None, is_needed: bool) -> torch.Tensor | None:
            return (
                tensor.new_zeros(tensor.shape, dtype=torch.float32)
                if is_needed and tensor is not None
                else None
            )

        self.head = head
        self.hidden = torch.empty_like(hidden)
        self.weight = torch.empty_like(head.weight) if needed[1] else None
        if self.weight is not None and hidden.shape[0] == 0:  # a rank without rows
            self.weight.zero_()
        self.bias = zeros(head.bias, needed[2])
        self.new_rows, self.new_bias = zeros(head.new_rows, needed[3]), zeros(head.new_bias, needed[4])

    def add(self, start: int, chunk: torch.Tensor, product: torch.Tensor, logits: torch.Tensor) -> None:
        """Adds a chunk from the gradients of its `logits`, in float32. `product` is memory in the weight's precision."""
        head, ids = self.head, self.head.row_ids
        if self.bias is not None:
            self.bias += logits.sum(dim=0)
        if self.new_bias is not None:
            self.new_bias += logits[:, ids].sum(dim=0)
        gradient = product.copy_(logits)  # in float32 both are the same tensor
        hidden = self.hidden[start : start + len(chunk)]
        if head.new_rows is None:
            torch.mm(gradient, head.weight, out=hidden)
        else:
            of_new = gradient[:, ids]
            if self.new_rows is not None:
                self.new_rows += of_new.T @ chunk
            gradient.index_fill_(1, ids, 0)  # these rows of the weight are not used
            torch.mm(gradient, head.weight, out=hidden)
            hidden.addmm_(of_new, head.new_rows.to(chunk.dtype))
        if self.weight is not None:
            # beta=0: the first chunk overwrites the uninitialised memory, which saves filling it with zeros
            self.weight.addmm_(gradient.T, chunk, beta=min(start, 1))

    def tensors(self) -> list[torch.Tensor | None]:
        """The gradients in the precision of their tensors, in the order of `_CrossEntropy.forward`."""
        head = self.head
        pairs = (self.bias, head.bias), (self.new_rows, head.new_rows), (self.new_bias, head.new_bias)
        rest = [None if sums is None or tensor is None else sums.to(tensor.dtype) for sums, tensor in pairs]
        return [self.hidden, self.weight, *rest]


def _aligned(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """An uninitialised `(rows, columns)` matrix whose rows begin at multiples of 64 numbers, for fast matrix products.

    GPT-J with Dolly's control tokens has a vocabulary of 50,403. With this odd row length a CPU takes 1.4 times as long.
    """
    return like.new_empty(rows, -(-columns // 64) * 64)[:, :columns]


class ResponseLossHead(nn.Linear):
    """A language-model head that, given targets, returns their loss instead of logits.

    The loss is computed in the head's own forward, because that is where ZeRO-3 gathers the head's weight. It knows the
    rows of new_rows.py.
    """

    response_loss = True

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        items: torch.Tensor | int = 1,
    ) -> torch.Tensor:
        """Logits of `hidden (..., width)`; or the loss of `hidden (labels, width)`, `targets (labels,)` over `items`."""
        if targets is None:
            return replace_logits(super().forward(hidden), hidden, self)
        # Read here, because inside an autograd function is_grad_enabled() is always False.
        if isinstance(items, torch.Tensor):
            items = items.to(hidden.device, torch.float32)
        else:  # as_tensor would copy it from the host, which waits for the device
            items = torch.full((), items, dtype=torch.float32, device=hidden.device)
        new = [
            self._parameters.get("new_rows"),
            self._parameters.get("new_bias"),
            self._buffers.get("row_ids"),
        ]
        return _CrossEntropy.apply(
            hidden, self.weight, self.bias, *new, targets, items, torch.is_grad_enabled()
        )


@cache
def with_response_loss(architecture: Any) -> Any:
    """A subclass that computes the loss of a packed batch in its head. It then returns no logits.

    It has its parent's name, because transformers writes the class name into the saved model's config, and its
    parent's signature, from which transformers reads what `generate` may pass.
    """

    @wraps(architecture.forward)
    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        *args: Any,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like the parent's forward, but with `shift_labels (1, labels)` it returns only the loss.

        `shift_labels` are the labels of the positions `logits_to_keep (labels,)`. The sum of their losses is divided by
        `num_items_in_batch`, which the Trainer counts over all ranks and accumulation steps, or if it is None, by the
        number of labels in this batch.
        """
        if shift_labels is None:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return architecture.forward(self, input_ids, *args, **kwargs)
        keep, base = kwargs["logits_to_keep"], self.base_model
        if "keep" in signature(base.forward).parameters:  # our GPT-J computes only these in its last layer
            names = ("position_ids", "cu_seq_lens_q", "documents")
            kept = base(input_ids, keep=keep, **{name: kwargs.get(name) for name in names}).last_hidden_state
        else:
            kept = base(input_ids, position_ids=kwargs["position_ids"]).last_hidden_state[:, keep]
        items = shift_labels.numel() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=self.get_output_embeddings()(kept[0], shift_labels[0], items))

    return _subclass(architecture, forward)


@cache
def with_own_loss(architecture: Any) -> Any:
    """A subclass that takes a packed batch and computes its parent's loss: it hands on only what transformers' models take."""

    @wraps(architecture.forward)
    def forward(
        self: PreTrainedModel, *args: Any, cu_seq_lens_q: Any = None, documents: Any = None, **kwargs: Any
    ) -> Any:
        return architecture.forward(self, *args, **kwargs)

    return type(
        architecture.__name__, (architecture,), {"forward": forward, "__module__": architecture.__module__}
    )


@cache
def with_padded_loss(architecture: Any) -> Any:
    """A subclass that computes the loss of a padded batch from its logits, for an architecture without such a loss.

    Some do not shift the labels, and some do not take the number of labels in the global batch.
    """

    @wraps(architecture.forward)
    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        *args: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Like the parent's forward, but the loss of `labels (rows, tokens)` is that of the next tokens' logits."""
        output = architecture.forward(self, input_ids, *args, **kwargs)
        if labels is None:
            return output
        logits, targets = output.logits[:, :-1].float(), labels[:, 1:]
        loss = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        items = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=loss / items)

    return _subclass(architecture, forward)


def _subclass(architecture: Any, forward: Any) -> Any:
    # Without accepts_loss_kwargs the Trainer would not pass num_items_in_batch to a parent without **kwargs.
    members = {"forward": forward, "accepts_loss_kwargs": True, "__module__": architecture.__module__}
    return type(architecture.__name__, (architecture,), members)


def use_padded_loss(model: PreTrainedModel) -> None:
    """Makes a loaded model compute the loss of padded batches from its logits, in place."""
    model.__class__ = with_padded_loss(type(model))  # type: ignore[arg-type]


def use_own_loss(model: PreTrainedModel) -> None:
    """Makes a loaded model take the collator's packed batches, with its own loss, in place."""
    model.__class__ = with_own_loss(type(model))  # type: ignore[arg-type]


def use_response_loss(model: PreTrainedModel) -> bool:
    """Makes a loaded model compute its loss in chunks, in place. Its embeddings must have their final size.

    Returns False, and does nothing, if the model's head is not a plain Linear. packing.py tests on a small copy whether
    this loss equals the architecture's own: some architectures scale or cap their logits after the head.
    """
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, head_with_new_rows(nn.Linear)):
        return False
    head.__class__ = ResponseLossHead
    model.__class__ = with_response_loss(type(model))  # type: ignore[arg-type]
    return True
