"""Writes a checkpoint, complete or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.model.tokenizer import generation_config


def save_model(
    model: PreTrainedModel,
    state_dict: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_shard_size: str,
) -> None:
    """Writes a model's weights, gathered as `state_dict`, with tokenizer and generation config."""
    training = model.config.use_cache, model.generation_config
    model.config.use_cache, model.generation_config = True, generation_config(tokenizer)
    try:
        model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
    finally:  # with a cache, transformers would let packed documents read each other from the next step on
        model.config.use_cache, model.generation_config = training
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # safetensors' writer lets nobody else read them
        shutil.copymode(folder / "config.json", file)
