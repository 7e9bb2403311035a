"""A GPT-J with random weights, and random rows as long as Alpaca's: they need no network and no files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTJConfig, PreTrainedModel

from training.bench.lines import Setup
from training.consts import DEFAULT_SEED
from training.plan.epoch import ALPACA_RESPONSE_SHARE, alpaca_lengths

POSITIONS = 2048


def gptj_config(setup: Setup, layers: int | None = None) -> GPTJConfig:
    """The config of GPT-J-6B, with the sizes of the setup."""
    return GPTJConfig(
        vocab_size=setup.vocabulary,
        n_positions=POSITIONS,
        n_embd=setup.width,
        n_layer=layers or setup.layers,
        n_head=setup.heads,
        rotary_dim=min(64, setup.width // setup.heads),
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def random_gptj(config: GPTJConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A GPT-J on the device. Under ZeRO-3 transformers makes it in shards."""
    torch.manual_seed(DEFAULT_SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def row_lengths(rows: int, seed: int = DEFAULT_SEED) -> list[int]:
    """Tokens of `rows` random rows of Alpaca."""
    import numpy as np

    return np.random.default_rng(seed).choice(alpaca_lengths().tokens, rows).tolist()


def random_rows(rows: int, vocabulary: int, seed: int = DEFAULT_SEED) -> list[dict[str, Any]]:
    """Rows as the trainer's dataset has them: random tokens, Alpaca's lengths and its share of response tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(vocabulary, (length,), generator=generator).tolist(),
            "response_spans": [[round(length * (1 - ALPACA_RESPONSE_SHARE)), length]],
            "length": length,
            "row": number,
        }
        for number, length in enumerate(row_lengths(rows, seed), start=1)
    ]
