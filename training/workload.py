"""What is to be trained: a model's shape, the lengths of the rows, and what an epoch of them asks of the devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.consts import DEFAULT_TRAINING_DATASET, DEMO
from training.settings import Settings

if TYPE_CHECKING:  # numpy is imported where it is used: `--help` needs none
    import numpy as np

PAD_TO_MULTIPLE_OF = 8  # collator.PAD_TO_MULTIPLE_OF, which only comes with torch
LARGEST_SHARE = 1.005  # of the mean: where batching.deal_by_tokens stops swapping


# --- models ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """What memory and time depend on.

    Attributes:
        kind: transformers' model_type; "gptj" has the attention and loss of attention.py and loss.py.
        layer_parameters: of all layers and the last norm together, without embedding and head.
        inner: width between the two matrices of the MLP; `gated` MLPs have three.
        file_bytes: of the weight files as they are read.
        downloaded: whether these files come over the network into the cache first.
    """

    name: str
    kind: str
    parameters: int
    layer_parameters: int
    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    positions: int
    file_bytes: int
    downloaded: bool
    gated: bool = False


def gptj_facts(
    name: str,
    layers: int,
    width: int,
    heads: int,
    vocabulary: int,
    positions: int = 2048,
    downloaded: bool = False,
) -> ModelFacts:
    """Facts of a GPT-J: per layer four square matrices, an MLP with biases, one layer norm; a head with bias.

    GPT-J-6B: 28 x (4 x 4096^2 + 2 x 4096 x 16384 + 16384 + 3 x 4096) + 2 x 4096 + 2 x 50400 x 4096 + 50400
    = 6,050,882,784 parameters. Its file on the Hub is float32.
    """
    inner = 4 * width
    layer = 4 * width**2 + 2 * width * inner + inner + 3 * width
    parameters = layers * layer + 2 * width + 2 * vocabulary * width + vocabulary
    return ModelFacts(
        name=name,
        kind="gptj",
        parameters=parameters,
        layer_parameters=layers * layer + 2 * width,
        layers=layers,
        width=width,
        heads=heads,
        inner=inner,
        vocabulary=vocabulary,
        positions=positions,
        file_bytes=4 * parameters,
        downloaded=downloaded,
    )


def neox_facts(
    name: str, layers: int, width: int, heads: int, vocabulary: int, downloaded: bool = False
) -> ModelFacts:
    """Facts of a GPT-NeoX (the Pythias): as GPT-J's, but with biases everywhere and two layer norms; the head has
    none. Their files on the Hub are float16."""
    inner = 4 * width
    layer = 4 * width**2 + 4 * width + 2 * width * inner + inner + width + 4 * width
    parameters = layers * layer + 2 * width + 2 * vocabulary * width
    return ModelFacts(
        name=name,
        kind="gpt_neox",
        parameters=parameters,
        layer_parameters=layers * layer + 2 * width,
        layers=layers,
        width=width,
        heads=heads,
        inner=inner,
        vocabulary=vocabulary,
        positions=2048,
        file_bytes=2 * parameters,
        downloaded=downloaded,
    )


# (layers, width, heads, vocabulary), from the config.json of each on the Hub.
_PYTHIAS = {
    "70m": (6, 512, 8, 50304),
    "160m": (12, 768, 12, 50304),
    "410m": (24, 1024, 16, 50304),
    "1b": (16, 2048, 8, 50304),
    "1.4b": (24, 2048, 16, 50304),
    "2.8b": (32, 2560, 32, 50304),
    "6.9b": (32, 4096, 32, 50432),
    "12b": (36, 5120, 40, 50688),
}
BUILT_IN = {
    facts.name.lower(): facts
    for facts in (
        gptj_facts("EleutherAI/gpt-j-6B", 28, 4096, 16, 50400, downloaded=True),
        *(
            neox_facts(f"EleutherAI/pythia-{size}{suffix}", *shape, downloaded=True)
            for size, shape in _PYTHIAS.items()
            for suffix in ("", "-deduped")
        ),
    )
}


def model_facts(name: str) -> ModelFacts:
    """Facts of a built-in model, the demo's, a folder with a config.json, or a model on the Hub (config only).

    Only the last two import torch. Raises ModelError (training.model) for what cannot be found or is no causal
    language model.
    """
    if name.lower() in BUILT_IN:
        return BUILT_IN[name.lower()]
    if name == DEMO:
        from training.demo import SHAPE, VOCAB_SIZE

        vocabulary = VOCAB_SIZE + 3  # the control tokens
        return gptj_facts(
            DEMO, SHAPE["n_layer"], SHAPE["n_embd"], SHAPE["n_head"], vocabulary, SHAPE["n_positions"]
        )
    return _facts_of_config(name)


def _facts_of_config(name: str) -> ModelFacts:
    """Facts by transformers: the config, and the parameters of a model without memory behind it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.auto_factory import _get_model_class

    from training.flops import model_parameters
    from training.model import load_config, max_positions

    config = load_config(name)
    with torch.device("meta"):
        # Not by from_config: under ZeRO-3 it would ask all ranks to share the parameters, and one alone plans.
        model = _get_model_class(config, AutoModelForCausalLM._model_mapping)(config)
    text, folder = config.get_text_config(), Path(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    inner = next(
        (
            getattr(text, key)
            for key in ("intermediate_size", "n_inner", "ffn_dim")
            if getattr(text, key, None)
        ),
        4 * text.hidden_size,
    )
    files = (
        [file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)] if folder.is_dir() else []
    )
    return ModelFacts(
        name=name,
        kind=config.model_type,
        parameters=parameters,
        layer_parameters=model_parameters(model)[0],
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        heads=text.num_attention_heads,
        inner=inner,
        vocabulary=model.get_input_embeddings().num_embeddings,
        positions=max_positions(config),
        file_bytes=sum(file.stat().st_size for file in files) or 2 * parameters,
        downloaded=not folder.is_dir(),
        gated=any("gate_proj" in part for part, _ in model.named_modules()),
    )


# --- rows --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """The rows of a dataset: `tokens (rows,) int64`, and the share of all tokens that are response tokens."""

    source: str
    tokens: np.ndarray
    response_share: float


ALPACA_ROWS = 52_002
ALPACA_RESPONSE_SHARE = 0.569
# Rows of lengths 1-8, 9-16, ... tokens among 1,500 rows of Alpaca drawn at random, tokenised by training.data with
# GPT-2's BPE, the control tokens being one token each: mean 106.7, median 91, 99% at 307, longest 603. Other
# tokenizers make some percent more or fewer of the same text.
# fmt: off
ALPACA_HISTOGRAM = (
    0, 0, 0, 1, 27, 69, 110, 144, 166, 108, 94, 80, 75, 77, 73, 59, 57, 76, 44, 29, 39, 21, 22, 24, 15, 8, 13, 7, 6,
    5, 7, 4, 5, 5, 4, 7, 2, 0, 4, 3, 0, 1, 2, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1,
    0, 0, 0, 0, 0, 0, 0, 0, 1,
)
# fmt: on


def alpaca_lengths() -> Lengths:
    """Alpaca's 52,002 rows, spread over the middles of the histogram's bins in its proportions."""
    import numpy as np

    counts = np.array(ALPACA_HISTOGRAM)
    ends = np.round(np.cumsum(counts) / counts.sum() * ALPACA_ROWS).astype(int)
    tokens = np.repeat(8 * np.arange(len(counts)) + 5, np.diff(ends, prepend=0))
    return Lengths(DEFAULT_TRAINING_DATASET, tokens, ALPACA_RESPONSE_SHARE)


def dataset_lengths(dataset: str, model: ModelFacts) -> Lengths:
    """Lengths of a dataset's rows: Alpaca's are built in, any other is tokenised with the model's tokenizer.

    Raises DataError or ModelError (training.rows, training.model) where either cannot be loaded.
    """
    if dataset == DEFAULT_TRAINING_DATASET:
        return alpaca_lengths()
    import datasets
    import transformers

    from training.data import prepare_dataset
    from training.model import load_tokenizer

    datasets.disable_progress_bars()  # the answer is a table
    transformers.utils.logging.disable_progress_bar()
    rows, _ = prepare_dataset(dataset, load_tokenizer(model.name), model.positions)
    return lengths_of(dataset, rows["length"][:], rows["response_start"][:])


def lengths_of(source: str, tokens: Sequence[int], response_starts: Sequence[int]) -> Lengths:
    """Lengths of rows that are tokenised already: tokens of each, and where its response starts."""
    import numpy as np

    counts = np.array(tokens, dtype=np.int64)
    total = max(int(counts.sum()), 1)
    return Lengths(source, counts, (total - sum(response_starts)) / total)


# --- an epoch ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What an epoch of these rows asks of the devices. The slowest device of each micro-step sets the pace.

    Attributes:
        steps: optimizer steps of an epoch; each has `accumulation` micro-steps.
        real_tokens, computed_tokens: of an epoch, over all devices.
        paced_tokens: what all devices could compute in the time that the slowest of each micro-step takes.
        slowest_tokens: mean over micro-steps of the tokens computed by the slowest device.
        slowest_scores: the same of its attention scores, one head's: the sum of row length^2, half if causal.
        peak_tokens: the most tokens a device ever computes at once.
        peak_row: the longest row, padded where rows are.
    """

    steps: int
    real_tokens: int
    computed_tokens: int
    paced_tokens: int
    slowest_tokens: float
    slowest_scores: float
    peak_tokens: int
    peak_row: int


def epoch_load(lengths: Lengths, settings: Settings, seed: int = 0) -> Load:
    """Goes through one epoch in random order, and counts.

    Padded: a device pads its rows to the longest, rounded up to 8 (collator.py). Packed: a global batch is dealt
    in shares of equal token count, the largest 0.5% above the mean (batching.py), or the batch's longest row.
    That a model packs is taken for granted; the trainer proves it, and pads rows of like length otherwise.
    """
    import numpy as np

    ranks, rows = settings.ranks, settings.rows
    held_out = min(settings.test_size, len(lengths.tokens) // 2)
    tokens = np.random.default_rng(seed).permutation(lengths.tokens)[held_out:]
    batch = settings.global_batch
    # Whole batches; the last, smaller one of an epoch counts for little.
    whole = np.resize(tokens, max(1, len(tokens) // batch) * batch)
    longest = int(tokens.max())
    if settings.packed:
        batches = whole.reshape(-1, batch)
        shares = ranks * settings.accumulation
        largest = np.maximum(LARGEST_SHARE * batches.sum(axis=1) / shares, batches.max(axis=1))
        slowest = float(largest.mean())
        scores = slowest * float((whole.astype(float) ** 2).sum() / whole.sum()) / 2
        peak, peak_row, computed = math.ceil(largest.max()), longest, int(tokens.sum())
    else:
        padded = _padded(whole.reshape(-1, ranks, rows).max(axis=2))  # (micro-steps, ranks)
        slow = padded.max(axis=1)
        slowest, scores = float(rows * slow.mean()), float(rows * (slow.astype(float) ** 2).mean())
        peak_row = int(_padded(longest))
        peak, computed = rows * peak_row, int(rows * padded.sum() * len(tokens) / len(whole))
    return Load(
        steps=math.ceil(len(tokens) / batch),
        real_tokens=int(tokens.sum()),
        computed_tokens=computed,
        paced_tokens=int(slowest * len(tokens) / rows),
        slowest_tokens=slowest,
        slowest_scores=scores,
        peak_tokens=peak,
        peak_row=peak_row,
    )


def _padded(length: Any) -> Any:
    """Of a number, or of each in an array."""
    return -(-length // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
