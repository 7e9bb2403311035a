"""The blocks of a model: which they are, how large, and whether ZeRO-3 may reduce the gradients of each at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

from tests.model.test_attention import tied_llama
from training.model.attention import PackingGPTJBlock, use_packed_attention
from training.model.blocks import block_parameters, blocks_are_units, blocks_of
from training.options.deepspeed import LARGEST_BUCKET
from training.plan.model_shape import BUILT_IN, gptj_shape, neox_shape

IDS = torch.arange(1, 9)[None]
BATCH = {"input_ids": IDS, "labels": IDS}


def small_gptj() -> GPTJForCausalLM:
    torch.manual_seed(0)
    return GPTJForCausalLM(
        GPTJConfig(vocab_size=50, n_positions=32, n_embd=16, n_layer=3, n_head=2, rotary_dim=8)
    )


def test_the_blocks_of_a_gptj_are_its_layers_also_with_our_attention():
    model = small_gptj()
    assert blocks_of(model) == list(model.transformer.h)
    use_packed_attention(model)
    assert blocks_of(model) == list(model.transformer.h)
    assert all(type(block) is PackingGPTJBlock for block in blocks_of(model))
    assert (blocks_of(nn.Linear(2, 2)), block_parameters(nn.Linear(2, 2))) == ([], 0)


def test_the_plan_knows_the_size_of_a_block():
    assert gptj_shape("small", 3, 16, 2, 50).block == block_parameters(small_gptj())
    config = GPTNeoXConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    assert neox_shape("small", 3, 16, 2, 50).block == block_parameters(GPTNeoXForCausalLM(config))
    assert BUILT_IN["eleutherai/gpt-j-6b"].block == 4 * 4096**2 + 2 * 4096 * 16384 + 16384 + 3 * 4096
    assert all(0 < model.block <= LARGEST_BUCKET for model in BUILT_IN.values())


@pytest.mark.parametrize("make", [small_gptj, tied_llama])
def test_blocks_of_usual_models_are_units_and_their_gradients_are_cleared(make):
    model = make()
    assert blocks_are_units(model, BATCH)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(block._backward_hooks for block in blocks_of(model))


def by_keyword(model: LlamaForCausalLM) -> None:
    """Blocks get their hidden states by keyword, so their backward hooks run before their gradients exist."""
    for block in blocks_of(model):
        block.__class__ = type("ByKeyword", (type(block),), {"__call__": _call_by_keyword})


def _call_by_keyword(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    return nn.Module.__call__(self, hidden_states=hidden_states, **kwargs)


def sharing(model: LlamaForCausalLM) -> None:
    first, second, *_ = blocks_of(model)
    second.input_layernorm.weight = first.input_layernorm.weight


def outside(model: LlamaForCausalLM) -> None:
    """A weight of the last block is also used before the first one, so its gradient is complete only later."""
    weight = blocks_of(model)[-1].input_layernorm.weight
    model.model.embed_tokens.register_forward_hook(lambda _, __, embedded: embedded * weight)


def unused(model: LlamaForCausalLM) -> None:
    """A block that no row passes, like those of a part that looks at pictures."""
    model.pictures = type(blocks_of(model)[0])(model.config, 0)


@pytest.mark.parametrize("change", [by_keyword, sharing, outside, unused])
def test_blocks_whose_gradients_would_be_reduced_too_early_are_no_units(change):
    model = tied_llama()
    change(model)
    assert not blocks_are_units(model, BATCH)
