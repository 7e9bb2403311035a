"""Builds a small float64 copy of a model's architecture, so that its code can be tested without loading weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
_KEY_HEADS = re.compile(r"(key_value|kv)_(n_)?heads(_kv)?$|^(encoder|decoder)_attention_heads$")
# Numbers that belong to the width: the heads of Mamba's layers have a fixed size.
_PROPORTIONAL = re.compile(r"^(mamba_n_heads|mamba_num_heads|mamba_d_ssm|num_heads)$")
_INNER = re.compile(r"(intermediate_size\w*|n_inner|ffn_dim|ffn_hidden_size|d_ff)$")
# The largest number that a key of config.json may have in the copy, by the pattern of the key. The first match counts.
_LIMITS = (
    (re.compile(r"(window|chunk|floor_scale)(?!.*(layers|pattern|feed_forward))"), WINDOW),
    (re.compile(r"(position\w*|n_ctx|seq_len\w*|seq_length|(context|model_max)_length)$"), POSITIONS),
    (re.compile(r"^vocab_size"), VOCABULARY),
    (_TOKEN, VOCABULARY - 1),
    (re.compile(r"(num|n)_(local_|routed_)?experts$"), EXPERTS),
    (re.compile(r"(encoder|decoder)_layers$"), LAYERS),
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
    weights = meta_model(small, trust_remote_code).num_parameters()
    if weights > MAX_WEIGHTS:
        raise ValueError(f"it would have {weights:,} weights")
    with torch.random.fork_rng(devices=[]), without_zero3():
        torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would seed the GPUs too
        model = AutoModelForCausalLM.from_config(small, **choices)
    model = model.to("cpu", torch.float64).eval()
    _set_random_weights(model)
    return model


def meta_model(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model of `config` without memory for its weights, built by this process alone, also under ZeRO-3."""
    with without_zero3(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)


def shrunken_config(config: PreTrainedConfig, heads: int) -> PreTrainedConfig:
    """A copy of `config` with few layers and small widths. Settings that decide which tokens attend to which are kept."""
    small = copy.deepcopy(config)
    _shrink(small, heads)
    set_cache(small, False)
    return small


def set_cache(config: PreTrainedConfig, use: bool) -> list[PreTrainedConfig]:
    """Turns the cache on or off in `config` and the configs in it. Returns those in which it was different.

    With a cache, transformers does not look for packed rows, and their documents would attend to each other.
    """
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    changed = [small for part in inner for small in set_cache(part, use)]
    if getattr(config, "use_cache", use) != use:
        config.use_cache = use
        changed.append(config)
    return changed


@dataclass(frozen=True)
class _Sizes:
    """Widths and numbers of heads of a config before and after it is shrunk; None where it has none."""

    width: int | None = None
    small_width: int | None = None
    heads: int | None = None
    few_heads: int | None = None


def _sizes(config: PreTrainedConfig, most_heads: int, outer: _Sizes) -> _Sizes:
    """The sizes of `config`; those of the `outer` config if it has no width of its own."""
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not isinstance(width, int):
        return outer
    if not isinstance(heads, int):  # recurrent, without attention
        return _Sizes(width, min(width, VOCABULARY))
    few = min(heads, most_heads)
    return _Sizes(width, few * (getattr(config, "head_dim", None) or width // heads), heads, few)


def _shrink(config: PreTrainedConfig, most_heads: int, outer: _Sizes = _Sizes()) -> None:
    """Shrinks `config` in place, and the configs in it."""
    of_layers = None
    if config.is_heterogeneous:  # its attributes can be read only without the sizes of single layers
        of_layers = copy.deepcopy(config._heterogeneity_spec.per_layer_overrides)
        config.per_layer_config = None
    layers = getattr(config, "num_hidden_layers", None)
    sizes = _sizes(config, most_heads, outer)
    kept = _kept_layers(config, layers, most_heads // HEADS)
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _shrink(value, most_heads, sizes)
        elif isinstance(value, list | tuple) and layers and len(value) == layers:
            setattr(config, name, value[:kept])
        elif isinstance(value, list) and _TOKEN.search(name):
            setattr(config, name, [min(token, VOCABULARY - 1) for token in value])
        else:
            setattr(config, name, _shrunk(name, value, sizes))
    if sizes.few_heads and sizes is not outer:
        config.num_attention_heads = sizes.few_heads
    # HRM-Text runs its stacks several times.
    if kept and (stack := getattr(config, "num_layers_per_stack", None)):
        config.num_layers_per_stack, kept = 1, layers // stack
    if kept:
        with suppress(NotImplementedError):  # ProphetNet computes it
            config.num_hidden_layers = kept
        if getattr(config, "num_kv_shared_layers", 0):
            config.num_kv_shared_layers = kept // 2
        if of_layers is not None:
            config.per_layer_config = {
                number: {name: _shrunk(name, value, sizes) for name, value in changes.items()}
                for number, changes in of_layers.items()
                if number < kept
            }


def _shrunk(name: str, value: Any, sizes: _Sizes) -> Any:
    """The value that the key `name` of a config has in the copy."""
    if name == "n_inner" and value is None:  # GPT-2 and GPT-J: 4 times the width
        return sizes.small_width
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if limits := [limit for pattern, limit in _LIMITS if pattern.search(name)]:
        return min(value, limits[0])
    if _KEY_HEADS.search(name) and sizes.few_heads:
        return sizes.few_heads if value == sizes.heads else max(1, sizes.few_heads // 2)
    if sizes.small_width and sizes.width:
        if value == sizes.width or _INNER.search(name):
            return sizes.small_width
        if _PROPORTIONAL.search(name):
            return max(1, value * sizes.small_width // sizes.width)
    return value


def _kept_layers(config: PreTrainedConfig, layers: Any, times: int) -> Any:
    """Number of layers of the copy: at least LAYERS, and enough to have each kind of layer `times` times, if it has."""
    if not isinstance(layers, int):
        return None
    types = getattr(config, "layer_types", None)  # some compute it
    lists = [
        value
        for value in [*vars(config).values(), types]
        if isinstance(value, list | tuple) and len(value) == layers
        if len(set(map(repr, value))) <= MAX_KINDS
    ]
    kinds = [repr(kind) for kind in zip(*lists, strict=True)]  # of each layer
    least = [LAYERS * times]
    for kind in set(kinds):
        least.append([number for number, other in enumerate(kinds, start=1) if other == kind][:times][-1])
    if getattr(config, "num_kv_shared_layers", 0) and types:
        # The last layers use keys and values of the last layer of their type before them.
        least += [2 * (types.index(kind) + 1) for kind in types]
    return min(layers, max(least))


def small_random_rows(lengths: Sequence[int], tokens: int = VOCABULARY) -> list[torch.Tensor]:
    """Rows `(1, length) int64` of random tokens, the same in every process. The last token of each is the last id."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, tokens, (1, length), generator=generator) for length in lengths]
    for row in rows:
        row[:, -1] = tokens - 1
    return rows


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
def without_zero3() -> Iterator[None]:
    """Hides DeepSpeed's config from transformers, which would otherwise shard the copy over all ranks."""
    alive = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = alive
