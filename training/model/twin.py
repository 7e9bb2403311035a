"""Builds a small float64 copy of a model's architecture, so that its code can be tested without loading weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed

POSITIONS = 64  # longest row of the copy, in tokens; real models have thousands
WINDOW = 8  # longest sliding window or attention chunk of the copy, in tokens
VOCABULARY = 128
HEADS = 2
# At least, if the model has that many: some architectures use a kind of layer only every few layers.
LAYERS = 4
EXPERTS = 16  # at most
# A list with more different values, one for each layer, has sizes or numbers of layers, not kinds of layers.
MAX_KINDS = 4

MAX_WEIGHTS = 2e8  # 1.6 GB in float64, on every rank; copies of the usual architectures have up to 7e7

_TOKEN = re.compile(r"_token_(id|index)$")
_KEY_HEADS = re.compile(r"(key_value|kv)_(n_)?heads(_kv)?$")
_INNER = re.compile(r"(intermediate_size\w*|n_inner|ffn_dim|ffn_hidden_size|d_ff)$")
# The largest number that a key of config.json may have in the copy, by the pattern of the key. The first match counts.
_LIMITS = (
    (re.compile(r"(window|chunk|floor_scale)(?!.*(layers|pattern|feed_forward))"), WINDOW),
    (re.compile(r"(position\w*|n_ctx|seq_len\w*|seq_length)$"), POSITIONS),
    (re.compile(r"^vocab_size"), VOCABULARY),
    (_TOKEN, VOCABULARY - 1),
    (re.compile(r"(num|n)_(local_|routed_)?experts$"), EXPERTS),
)


def shrunken_twin(
    config: PreTrainedConfig, heads: int = HEADS, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model of `config`'s architecture with few narrow layers and random weights, in float64 on the CPU.

    Code, attention implementation, kinds of layers, head size and scaling are those of `config`. Windows and position
    limits are shortened, so that short documents exceed each window and a short row exceeds the position limit. The
    same config gives the same model in every process. Raises whatever the architecture's code raises.
    """
    small = shrunken_config(config, heads)
    choices = {
        "dtype": torch.float64,
        "trust_remote_code": trust_remote_code,
        "experts_implementation": "eager",
    }
    with torch.random.fork_rng(devices=[]), _without_zero3():
        torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would seed the GPUs too
        with torch.device("meta"):
            weights = AutoModelForCausalLM.from_config(copy.deepcopy(small), **choices).num_parameters()
        if weights > MAX_WEIGHTS:
            raise ValueError(f"it would have {weights:,} weights")
        model = AutoModelForCausalLM.from_config(small, **choices)
    model = model.to("cpu", torch.float64).eval()
    _set_random_weights(model)
    return model


def shrunken_config(config: PreTrainedConfig, heads: int) -> PreTrainedConfig:
    """A copy of `config` with few layers and small widths. Settings that decide which tokens attend to which are kept."""
    small = copy.deepcopy(config)
    _shrink(small, heads)
    small.use_cache = False  # with a cache transformers does not look for packed rows
    return small


def _shrink(config: PreTrainedConfig, most_heads: int, widths: tuple[Any, Any] = (None, None)) -> None:
    """Shrinks `config` in place, and the configs in it. `widths` are the outer config's width before and after."""
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    few_heads, small_width = None, None
    if not isinstance(width, int):
        width, small_width = widths
    elif isinstance(heads, int):
        few_heads = min(heads, most_heads)
        small_width = few_heads * (getattr(config, "head_dim", None) or width // heads)
    else:  # recurrent, without attention
        small_width = min(width, VOCABULARY)
    kept = _kept_layers(config, layers)
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _shrink(value, most_heads, (width, small_width))
        elif isinstance(value, list | tuple) and layers and len(value) == layers:
            setattr(config, name, value[:kept])
        elif isinstance(value, list) and _TOKEN.search(name):
            setattr(config, name, [min(token, VOCABULARY - 1) for token in value])
        elif isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            continue
        elif limits := [limit for pattern, limit in _LIMITS if pattern.search(name)]:
            setattr(config, name, min(value, limits[0]))
        elif _KEY_HEADS.search(name) and few_heads:
            setattr(config, name, few_heads if value == heads else 1)
        elif small_width and (value == width or _INNER.search(name)):
            setattr(config, name, small_width)
    if few_heads:
        config.num_attention_heads = few_heads
    if kept:
        config.num_hidden_layers = kept


def _kept_layers(config: PreTrainedConfig, layers: Any) -> Any:
    """Number of layers of the copy: at least LAYERS, and enough to have each kind of layer once."""
    if not isinstance(layers, int):
        return None
    lists = [
        value
        for value in [*vars(config).values(), getattr(config, "layer_types", None)]  # some compute it
        if isinstance(value, list | tuple) and len(value) == layers
        if len(set(map(repr, value))) <= MAX_KINDS
    ]
    kinds = [repr(kind) for kind in zip(*lists, strict=True)]  # of each layer
    return min(layers, max([LAYERS, *(kinds.index(kind) + 1 for kind in kinds)]))


def _set_random_weights(model: PreTrainedModel) -> None:
    """Sets random weights large enough that every part of a layer affects its output. An initializer's are too small."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Hides DeepSpeed's config from transformers, which would otherwise shard the copy over all ranks."""
    alive = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = alive
