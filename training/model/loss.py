"""The loss at response positions only, without the logits of a whole share existing at once.

Float32 logits of 1,000 tokens over 50,400 entries are 200 MB, and the plain loss holds several copies. Here a
chunk of them is made, turned into its own gradient in place, used, and forgotten: three matrix products per
chunk, none of them twice."""

from __future__ import annotations

from functools import cache, wraps
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from training.consts import LOSS_CHUNK_BYTES


class _CrossEntropy(torch.autograd.Function):
    """Cross entropies of `hidden @ weight.T + bias`, summed and divided by `items`, with gradients made in the forward.

    In fp16 the gradients are those of the sum alone, and the division arrives with the backward, as the loss scale
    does: small probabilities, divided, would underflow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        items: torch.Tensor,
        wants_gradient: bool,
    ) -> torch.Tensor:
        """`hidden (labels, width)`, `weight (vocabulary, width)`, `targets (labels,)` to a float32 scalar."""
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        later = weight.dtype == torch.float16
        if wants_gradient:
            hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)
            bias_grad = weight.new_zeros(weight.shape[0], dtype=torch.float32)

        vocabulary = weight.shape[0]
        tokens = max(1, LOSS_CHUNK_BYTES // (4 * vocabulary))
        for start in range(0, hidden.shape[0], tokens):
            chunk, target = hidden[start : start + tokens], targets[start : start + tokens, None]
            product = _aligned(len(chunk), vocabulary, weight)
            if bias is None:
                torch.mm(chunk, weight.T, out=product)
            else:
                torch.addmm(bias, chunk, weight.T, out=product)
            logits = product.float()
            largest = logits.amax(dim=1, keepdim=True)
            logits -= largest
            chosen = logits.gather(1, target)
            total = logits.exp_().sum(dim=1, keepdim=True)
            loss += (total.log() - chosen).sum()
            if wants_gradient:
                # Probabilities, less one at the target, are the gradient of the logits.
                logits /= total if later else total * items
                logits.scatter_add_(1, target, torch.full_like(chosen, -1.0) / (1 if later else items))
                gradient = product.copy_(logits)  # itself in float32
                torch.mm(gradient, weight, out=hidden_grad[start : start + tokens])
                # beta=0: the first chunk overwrites what a fill with zeros would cost a pass over memory
                weight_grad.addmm_(gradient.T, chunk, beta=min(start, 1))
                bias_grad += logits.sum(dim=0)
        if wants_gradient:
            if hidden.shape[0] == 0:  # a rank without rows
                weight_grad.zero_()
            ctx.save_for_backward(
                hidden_grad, weight_grad, None if bias is None else bias_grad.to(bias.dtype)
            )
            ctx.factor = 1 / items if later else None
        return loss / items

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = ctx.saved_tensors
        factor = grad_output if ctx.factor is None else grad_output * ctx.factor
        # A pass over the head's gradient is 2% of a step on a CPU, where asking costs nothing. A GPU would wait.
        if factor.device.type != "cpu" or factor != 1:
            gradients = [None if gradient is None else gradient.mul_(factor) for gradient in gradients]
        return (*gradients, None, None, None)


def _aligned(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """An empty `(rows, columns)` matrix whose rows begin at multiples of 64 numbers, as matrix products like it.

    GPT-J with Dolly's control tokens has 50,403 entries: an odd row length, on which a CPU takes 1.4 times as long.
    """
    return like.new_empty(rows, -(-columns // 64) * 64)[:, :columns]


class ResponseLossHead(nn.Linear):
    """A language-model head that, given targets, returns their loss instead of logits.

    The loss is made inside the head's own forward because that is where ZeRO-3 gathers the head's weight.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        items: torch.Tensor | int = 1,
    ) -> torch.Tensor:
        """Logits of `hidden (..., width)`; or the loss of `hidden (labels, width)`, `targets (labels,)` over `items`."""
        if targets is None:
            return super().forward(hidden)
        # Asked here, because inside an autograd function gradients always count as switched off.
        items = torch.as_tensor(items, dtype=torch.float32, device=hidden.device)
        return _CrossEntropy.apply(hidden, self.weight, self.bias, targets, items, torch.is_grad_enabled())


@cache
def with_response_loss(architecture: Any) -> Any:
    """A subclass whose forward takes the loss of a packed batch from its head, and returns no logits then.

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
        """As the parent's; with `shift_labels (1, labels)`, those of the positions `logits_to_keep (labels,)`, a loss.

        The loss is their sum divided by `num_items_in_batch`, which the Trainer counts over all ranks and
        accumulation steps, or by the number of the batch's own labels without it.
        """
        if shift_labels is None:
            if num_items_in_batch is not None:
                kwargs["num_items_in_batch"] = num_items_in_batch
            return architecture.forward(self, input_ids, *args, **kwargs)
        keep, base = kwargs["logits_to_keep"], self.base_model
        if "keep" in signature(base.forward).parameters:  # our GPT-J computes only these in its last layer
            kept = base(input_ids, position_ids=kwargs["position_ids"], keep=keep).last_hidden_state
        else:
            kept = base(input_ids, position_ids=kwargs["position_ids"]).last_hidden_state[:, keep]
        items = shift_labels.numel() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=self.get_output_embeddings()(kept[0], shift_labels[0], items))

    return type(
        architecture.__name__, (architecture,), {"forward": forward, "__module__": architecture.__module__}
    )


def use_response_loss(model: PreTrainedModel) -> bool:
    """Gives a loaded model the loss above, in place, after its embeddings have their final size.

    Returns False, and does nothing, if the model's head is not a plain Linear. Whether the loss is the architecture's
    own is tested on a small copy (packing.py): some architectures scale or cap their logits after the head.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    head.__class__ = ResponseLossHead
    model.__class__ = with_response_loss(type(model))  # type: ignore[arg-type]
    return True
