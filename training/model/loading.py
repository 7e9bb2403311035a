"""Loads config and weights of any causal LM, in shards under ZeRO-3, and grows the embedding for new tokens."""

from __future__ import annotations

import ctypes
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from training.consts import LORA_FILE, MOST_TOKENS, WEIGHTS
from training.errors import ModelError, OptionsError, first_line, offline_note, own_code_problem
from training.model.adapter_files import find_adapter, merge_into
from training.model.demo_model import model_folder
from training.model.twin import set_cache

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_POSITIONS = 1024  # for a config without a maximum
# The maximum under the names of older configs; transformers maps most of them to the first.
_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions", "context_length")
MOST_LAYERS = 1000  # a larger number is a mistake, and would be built for hours


def load_config(name: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """Loads the config without the weights; of an adapter that of its base.

    Raises ModelError if it is missing, broken or not of a causal LM.
    """
    if adapter := find_adapter(name):
        try:
            return load_config(adapter.base, trust_remote_code, adapter.revision)
        except ModelError as error:
            raise ModelError(f"{name}: it is a LoRA adapter, and its base cannot be used: {error}") from error
    name = model_folder(name)
    _refuse_shards(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
    except Exception as error:
        reason = (
            f"no model could be found ({first_line(error)}). Expected a folder with config.json, or a model's name on the Hub"
            f"{'' if Path(name).exists() else offline_note()}"
        )
        if (Path(name) / "config.json").is_file():
            reason = (
                f"its config.json cannot be used ({first_line(error)}). Correct it, or name another model"
            )
        raise ModelError(own_code_problem(name, error) or f"{name}: {reason}") from error
    try:
        problem = _size_problem(config)
        architectures = [str(kind) for kind in config.architectures or []]
    except Exception as error:  # values of the wrong type
        raise ModelError(
            f"{name}: its config.json is broken ({first_line(error)}). Correct it, or download the model again"
        ) from error
    if problem:
        raise ModelError(
            f"{name}: its config.json is broken ({problem}). Correct it, or download the model again"
        )
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ModelError(
            f"{name}: its weights are quantized ({method}), and such weights cannot be trained. "
            "Name the model from which they were made"
        )
    own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not own_code:
        raise ModelError(
            f"{name}: a {config.model_type} model is not a causal language model. Name another one"
        )
    # transformers would load an encoder as a causal LM, and every token would attend to later ones.
    if any(kind.endswith(("ForMaskedLM", "ForPreTraining")) for kind in architectures):
        raise ModelError(
            f"{name}: a {architectures[0]} is an encoder, not a causal language model. Name another one"
        )
    return config


def _refuse_shards(name: str) -> None:
    """Raises ModelError for a checkpoint of a run, whose weights are in DeepSpeed's shards or without their base."""
    folder = Path(name)
    divided = any(folder.glob("global_step*/*_states.pt")) and not any(folder.glob(f"*{WEIGHTS}"))
    if not divided and not (folder / LORA_FILE).is_file():
        return
    command = shlex.join(["python", "-m", "training.export", "--checkpoint", name, "--to"])
    where = "divided among the ranks' files" if divided else "those of an adapter, without the base"
    raise ModelError(
        f"{name}: it is a checkpoint, and its weights are {where}. Type {command} FOLDER, and name FOLDER"
    )


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the language model that answers, for a config that may also describe other parts."""
    return config.get_text_config(decoder=True)


def _size_problem(config: PreTrainedConfig) -> str | None:
    """Describes a size that no model has; None if there is none."""
    text = text_config(config)
    sizes = [
        (key, getattr(text, key, None), most)
        for key, most in (
            ("num_hidden_layers", MOST_LAYERS),
            ("hidden_size", 2**20),
            ("vocab_size", MOST_TOKENS),
        )
    ]
    for key, value, most in sizes:
        if isinstance(value, int) and not 1 <= value <= most:
            return f"{key} is {value}, expected 1 to {most:,}"
    max_positions(config)  # raises for a value that is no number
    return None


def max_positions(config: PreTrainedConfig) -> int:
    """Maximum number of tokens per row."""
    text = text_config(config)
    numbers = [int(getattr(text, key, None) or 0) for key in _POSITIONS]
    return next((number for number in numbers if number > 0), DEFAULT_POSITIONS)


def load_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    seed: int,
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantize: str | None = None,
) -> PreTrainedModel:
    """Loads the model and grows its embedding to hold every token of `tokenizer`.

    An adapter is merged into its base. `revision` is a commit, branch or tag on the Hub; None: the newest. With
    `quantize` "nf4" the linear layers are in 4 bits and compute in `dtype`. Head and embedding keep that precision.

    Under DeepSpeed ZeRO-3, transformers loads rank 0's copy module by module into every rank's shard. This requires a
    live `TrainingArguments(deepspeed=...)`, so create it before this call.

    Raises ModelError if weights are missing: from_pretrained would initialise them at random and only warn.
    """
    if adapter := find_adapter(name):
        _refuse_4_bits(name, quantize)
        logger.info("%s is a LoRA adapter: it is merged into its base %s", name, adapter.base)
        model = load_model(adapter.base, tokenizer, dtype, seed, trust_remote_code, adapter.revision)
        merge_into(model, adapter)
        return model
    name = model_folder(name)
    _refuse_shards(name)
    try:
        with _return_freed_memory():
            model, loading_info = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                revision=revision,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below by name
                **_quantization(quantize, dtype),
            )
            _check_shapes(name, loading_info["mismatched_keys"])
            _check_vocabulary(name, tokenizer, embedding_rows(model))
            grow_embedding(model, rows_needed(tokenizer), seed)
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
    set_cache(model.config, False)  # useless in training; saving turns it on again
    _keep_4_bit_layout(model)
    return model


def _quantization(quantize: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of from_pretrained for weights in 4 bits, as in QLoRA: the scales of their blocks are quantized too."""
    if quantize is None:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config}


def _refuse_4_bits(adapter: str, quantize: str | None) -> None:
    if quantize:
        raise ModelError(
            f"{adapter}: it is a LoRA adapter, which cannot be merged into weights in 4 bits. Leave out --quantize, or name "
            "the folder of a merged model"
        )


def _keep_4_bit_layout(model: PreTrainedModel) -> None:
    """Stops bitsandbytes from changing the layout of weights in the first evaluation on some CPUs, to one without a backward."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_quantization(quantize: str, device: torch.device) -> None:
    """Raises OptionsError if bitsandbytes cannot compute on weights in 4 bits on this device."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        dequantize_4bit(*quantize_4bit(torch.ones(64, 64, device=device), quant_type=quantize))
    except Exception as error:  # a missing library, an unknown device, or an operator that it does not have
        raise OptionsError(
            f"--quantize {quantize}: bitsandbytes cannot compute in 4 bits on this {device.type} device "
            f"({first_line(error)}). Leave out --quantize"
        ) from error


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


def rows_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for every token. The ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding, also under ZeRO-3."""
    return int(model.get_input_embeddings().num_embeddings)


def grow_embedding(model: PreTrainedModel, tokens: int, seed: int) -> None:
    """Grows the embedding to `tokens` rows. Never shrinks it: GPT-J has more rows than its base vocabulary.

    The new rows come from the model's own initialiser, as Dolly's did. Each rank draws them before sharding, so all
    ranks use the same seed.
    """
    rows = embedding_rows(model)
    if tokens <= rows:
        return
    logger.info("embedding grows from %d to %d rows", rows, tokens)
    set_seed(seed)
    model.resize_token_embeddings(tokens, mean_resizing=False)
