"""Config and weights of any causal LM, with the control tokens' rows added; in shards under ZeRO-3."""

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
DEFAULT_POSITIONS = 1024  # for a config that states no limit


def load_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config, without its weights. Raises ModelError for what is no causal LM."""
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
    except Exception as error:  # numbers that are none, a list that is none
        raise ModelError(f"{name}: its config.json is broken ({first_line(error)})") from error
    if type(config) not in AutoModelForCausalLM._model_mapping and not trust_remote_code:
        raise ModelError(f"{name}: a {config.model_type} model is no causal language model")
    # transformers would load an encoder as a causal model, and each token would see those that follow it.
    if any(kind.endswith(("ForMaskedLM", "ForPreTraining")) for kind in architectures):
        raise ModelError(f"{name}: a {architectures[0]} is an encoder, no causal language model")
    return config


def max_positions(config: PreTrainedConfig) -> int:
    """How many tokens a row may have at most."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_POSITIONS)


def load_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    seed: int,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model, its embedding grown to hold every token of `tokenizer`.

    Under DeepSpeed ZeRO-3 transformers reads rank 0's copy module by module into every rank's shard, but
    only if a `TrainingArguments(deepspeed=...)` is alive before this call: make it first.

    Raises ModelError where the files lack weights that the architecture has: from_pretrained would make
    them up at random and only warn.
    """
    name = model_folder(name)
    try:
        with _freed_memory_returned():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name; from_pretrained only points to its log
            )
            _check_shapes(name, loaded["mismatched_keys"])
            _check_vocabulary(name, tokenizer, model.config.get_text_config().vocab_size)
            grow_embedding(model, max(tokenizer.get_vocab().values()) + 1, seed)  # the ids may have gaps
    except ModelError:
        raise
    except Exception as error:  # of torch, safetensors, pickle, or a config that makes no model
        raise ModelError(f"{name}: the weights could not be loaded ({first_line(error)})") from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ModelError(
            f"{name}: {len(missing)} tensors are missing from the weight files, the first: "
            f"{', '.join(missing[:3])}. Download the model again, or compare its config.json with the weights"
        )
    model.config.use_cache = False  # of no use in training; the saved config has it on again
    return model


def _check_shapes(name: str, mismatched: set[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> None:
    """`mismatched` are tensors with their shapes in the files and in the model that config.json describes."""
    if mismatched:
        key, found, expected = min(mismatched)
        raise ModelError(
            f"{name}: {len(mismatched)} tensors of the weight files have other shapes than config.json asks for, "
            f"the first: {key} {list(found)}, expected {list(expected)}. Download the model again, or mend config.json"
        )


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuses another model's tokenizer: more than a hundredth of its words have no embedding.

    Added tokens may lack theirs, and a few words where ids have gaps.
    """
    added = tokenizer.get_added_vocab()
    beyond = {word: id for word, id in tokenizer.get_vocab().items() if id >= rows and word not in added}
    if 100 * len(beyond) > len(tokenizer):
        raise ModelError(
            f"{name}: {len(beyond):,} words of its tokenizer, as {min(beyond, key=beyond.__getitem__)!r}, lie beyond the "
            f"{rows:,} rows of its embedding, and would begin as noise. Use the tokenizer that the model was trained with"
        )


@contextmanager
def _freed_memory_returned() -> Iterator[None]:
    """Makes glibc give freed blocks back to the system at once, while shards are cut.

    ZeRO-3 gathers and frees every layer once. glibc keeps blocks of up to 32 MiB for reuse, and held twice the
    model's size at the peak (1.5 GiB for a model of 0.9, against 0.75 so). Afterwards the limits are set to
    those that glibc itself moves to (mallopt(3)), because training reuses its blocks.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
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
    """Makes room for `tokens` ids; never shrinks, as GPT-J has more rows than its base vocabulary.

    The new rows are drawn from the model's own initializer, as Dolly's were. Each rank draws them for
    itself before the shards are cut, so all ranks draw from the same seed.
    """
    if tokens <= model.config.get_text_config().vocab_size:
        return
    logger.info("embedding grows from %d to %d rows", model.config.get_text_config().vocab_size, tokens)
    set_seed(seed)
    model.resize_token_embeddings(tokens, mean_resizing=False)
