"""Loads config and weights of any causal LM, in shards under ZeRO-3, and grows the embedding for new tokens."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from training.errors import ModelError, first_line
from training.model.demo_model import model_folder

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_POSITIONS = 1024  # for a config without max_position_embeddings


def load_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Loads the config without the weights. Raises ModelError if it is missing, broken or not of a causal LM."""
    name = model_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(
            f"{name}: no model could be found ({first_line(error)}). "
            "Expected a folder with config.json, or a model's name on the Hub"
        ) from error
    try:
        max_positions(config)
        architectures = [str(kind) for kind in config.architectures or []]
    except Exception as error:  # values of the wrong type
        raise ModelError(
            f"{name}: its config.json is broken ({first_line(error)}). Correct it, or download the model again"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping and not trust_remote_code:
        raise ModelError(
            f"{name}: a {config.model_type} model is not a causal language model. Name another one"
        )
    # transformers would load an encoder as a causal LM, and every token would attend to later ones.
    if any(kind.endswith(("ForMaskedLM", "ForPreTraining")) for kind in architectures):
        raise ModelError(
            f"{name}: a {architectures[0]} is an encoder, not a causal language model. Name another one"
        )
    return config


def max_positions(config: PreTrainedConfig) -> int:
    """Maximum number of tokens per row."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_POSITIONS)


def load_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    seed: int,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads the model and grows its embedding to hold every token of `tokenizer`.

    Under DeepSpeed ZeRO-3, transformers loads rank 0's copy module by module into every rank's shard. This requires a
    live `TrainingArguments(deepspeed=...)`, so create it before this call.

    Raises ModelError if weights are missing: from_pretrained would initialise them at random and only warn.
    """
    name = model_folder(name)
    try:
        with _return_freed_memory():
            model, loading_info = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below by name
            )
            _check_shapes(name, loading_info["mismatched_keys"])
            _check_vocabulary(name, tokenizer, model.config.get_text_config().vocab_size)
            grow_embedding(model, max(tokenizer.get_vocab().values()) + 1, seed)  # the ids may have gaps
    except ModelError:
        raise
    except Exception as error:  # from torch, safetensors, pickle or an invalid config
        raise ModelError(
            f"{name}: the weights could not be loaded ({first_line(error)}). Download the model again, or name another one"
        ) from error
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise ModelError(
            f"{name}: {len(missing)} tensors are missing from the weight files, the first: "
            f"{', '.join(missing[:3])}. Download the model again, or compare its config.json with the weights"
        )
    model.config.use_cache = False  # useless in training; saving turns it on again
    return model


def _check_shapes(name: str, mismatched: set[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> None:
    """`mismatched` holds (tensor name, shape in the files, shape according to config.json)."""
    if mismatched:
        key, found, expected = min(mismatched)
        raise ModelError(
            f"{name}: {len(mismatched)} tensors of the weight files have other shapes than config.json describes, "
            f"the first: {key} {list(found)}, expected {list(expected)}. Download the model again or fix config.json"
        )


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuses the tokenizer of another model: more than 1% of its tokens have no embedding.

    Added tokens may be without one, and so may a few others if the ids have gaps.
    """
    added = tokenizer.get_added_vocab()
    beyond = {token: id for token, id in tokenizer.get_vocab().items() if id >= rows and token not in added}
    if 100 * len(beyond) > len(tokenizer):
        raise ModelError(
            f"{name}: {len(beyond):,} tokens of its tokenizer, such as {min(beyond, key=beyond.__getitem__)!r}, "
            f"have ids beyond the {rows:,} rows of its embedding. Use the tokenizer that the model was trained with"
        )


@contextmanager
def _return_freed_memory() -> Iterator[None]:
    """Makes glibc return freed blocks to the system at once, while the model is loaded in shards.

    ZeRO-3 gathers and frees every layer once. glibc keeps blocks of up to 32 MiB for reuse, which peaked at twice the
    model's size (1.5 GiB for a model of 0.9 GiB, 0.75 GiB with this). Afterwards the limits are set to the values that
    glibc itself adapts to (mallopt(3)), because training reuses its blocks.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl does not have it
    m_trim_threshold, m_mmap_threshold, mib = -1, -3, 2**20
    if mallopt:
        mallopt(m_mmap_threshold, mib)
    try:
        yield
    finally:
        if mallopt:
            mallopt(m_mmap_threshold, 32 * mib)
            mallopt(m_trim_threshold, 64 * mib)


def grow_embedding(model: PreTrainedModel, tokens: int, seed: int) -> None:
    """Grows the embedding to `tokens` rows. Never shrinks it: GPT-J has more rows than its base vocabulary.

    The new rows come from the model's own initialiser, as Dolly's did. Each rank draws them before sharding, so all
    ranks use the same seed.
    """
    if tokens <= model.config.get_text_config().vocab_size:
        return
    logger.info("embedding grows from %d to %d rows", model.config.get_text_config().vocab_size, tokens)
    set_seed(seed)
    model.resize_token_embeddings(tokens, mean_resizing=False)
