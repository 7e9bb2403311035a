"""The blocks of a model, and whether ZeRO-3 may gather, reduce and release each as a whole.

ZeRO-3 hooks every module. A GPT-J block has 12, and their hooks keep the host busy for longer than an A100 computes.
DeepSpeed calls a module whose parts it does not hook a leaf module. It then reduces the gradients of the whole module in
the module's own backward hook."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost layers that transformers can recompute, in order; empty for code that does not derive from them."""
    blocks: list[nn.Module] = []
    for child in model.children():
        blocks += [child] if isinstance(child, GradientCheckpointingLayer) else blocks_of(child)
    return blocks


def block_parameters(model: nn.Module) -> int:
    """Parameters of the largest block, also of a model that ZeRO-3 has sharded; 0 if there is none."""
    sizes = [
        sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in block.parameters())
        for block in blocks_of(model)
    ]
    return max(sizes, default=0)


def blocks_are_units(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> bool:
    """Whether all gradients of a block are complete when its backward hook runs, for each block of the model.

    DeepSpeed reduces them at that moment. It would be too early for a block that gets its hidden states by keyword, and
    for blocks that share a parameter: the gradients would be wrong without an error. `batch` has labels. Clears the
    gradients.
    """
    blocks = blocks_of(model)
    owners = Counter(id(parameter) for block in blocks for parameter in block.parameters())
    if not blocks or max(owners.values()) > 1:
        return False
    at_hook: dict[nn.Module, list[torch.Tensor | None]] = {}
    repeated = False

    def gradients(block: nn.Module) -> list[torch.Tensor | None]:
        return [
            None if parameter.grad is None else parameter.grad.clone() for parameter in block.parameters()
        ]

    def note(block: nn.Module, *_: Any) -> None:
        nonlocal repeated
        repeated |= block in at_hook
        at_hook[block] = gradients(block)

    hooks = [block.register_full_backward_hook(note) for block in blocks]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch names the block that gets its hidden states by keyword
            model(**batch).loss.backward()
        # An unused parameter has no gradient at both times. DeepSpeed gives it zeros, with and without leaf modules.
        return (
            not repeated
            and len(at_hook) == len(blocks)
            and all(
                early is final if early is None or final is None else torch.equal(early, final)
                for block in blocks
                for early, final in zip(at_hook[block], gradients(block), strict=True)
            )
        )
    except Exception:  # whatever an architecture's code raises when its output is hooked
        return False
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)


def use_whole_blocks(model: nn.Module) -> None:
    """Makes each block a leaf module of ZeRO-3, in place, before DeepSpeed's engine is built.

    Only for blocks that are units. It does not matter whether the classes of the blocks have been replaced. Losses and
    gradients stay the same, bit for bit: DeepSpeed's hook on a part adds up the gradients of its input before they join
    those of other parts, and `_join_gradients` keeps this order of additions. torch's own modules use their input once.
    """
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks_of(model):
        set_z3_leaf_module(block, True)
        for part in block.modules():
            if part is not block and not type(part).__module__.startswith("torch.nn"):
                part.register_forward_pre_hook(_join_gradients)


def _join_gradients(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gives each positional input a node of its own in the graph of the backward pass."""
    return tuple(
        value.view_as(value) if torch.is_tensor(value) and value.requires_grad else value for value in inputs
    )
