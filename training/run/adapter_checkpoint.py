"""Saves what a LoRA run trains, and restores it into a model that holds the base. No checkpoint holds the base.

checkpoint-200/
  lora.json              rank, alpha, dropout, the trained rows of the embedding, the base and the precision
  config.json ...        config and tokenizer of the merged model
  trained.safetensors    adapter and new rows of a run without DeepSpeed, whose shards hold them otherwise"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedModel

from training.consts import LORA_FILE
from training.errors import ModelError, TrainingError, first_line
from training.model.new_rows import trainable_state
from training.model.stored_weights import StoredTensor, in_memory, stored_weights

TRAINED_FILE = "trained.safetensors"


def read_facts(checkpoint: Path) -> dict[str, Any] | None:
    """Content of lora.json; None for a checkpoint that holds all weights."""
    if not (checkpoint / LORA_FILE).is_file():
        return None
    return json.loads((checkpoint / LORA_FILE).read_text())


def save_config(model: PreTrainedModel, generation: GenerationConfig, folder: Path) -> None:
    """Writes the model's configs, from which the tokenizer is loaded again. The merged model writes its own."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    config.save_pretrained(folder)
    generation.save_pretrained(folder)


def use_adapter_checkpoints(trainer: Any, lora: dict[str, Any]) -> None:
    """Lets a CompletionTrainer, which has the adapter in its model, save and load checkpoints without the base.

    torch's load_state_dict, which DeepSpeed calls, then accepts that frozen weights are missing; a trained one must be
    there. `lora` is the content of lora.json.
    """
    trainer.lora = lora
    trained = trainable_state(trainer.model)

    def forget_frozen(module: torch.nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name in trained]

    trainer.model.register_load_state_dict_post_hook(forget_frozen)


def load_trained(model: torch.nn.Module, checkpoint: Path) -> None:
    """Restores adapter and new rows from a checkpoint of a run without DeepSpeed. Raises TrainingError."""
    parameters = trainable_state(model)
    try:
        stored = load_file(checkpoint / TRAINED_FILE)
        if stored.keys() != parameters.keys():
            raise ValueError(f"it holds other tensors than {next(iter(stored.keys() ^ parameters.keys()))}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored[name])
    except Exception as error:  # safetensors has an error of its own
        raise TrainingError(
            f"{checkpoint / TRAINED_FILE}: cannot be loaded ({first_line(error)}). Start a new run"
        ) from error


def stored_trained(checkpoint: Path) -> Mapping[str, StoredTensor]:
    """{name: tensor} of adapter and new rows in a checkpoint, as the run computed with them. Raises ModelError."""
    try:
        if not (checkpoint / TRAINED_FILE).is_file():
            return stored_weights(checkpoint)
        tensors = load_file(checkpoint / TRAINED_FILE)
    except Exception as error:
        raise ModelError(f"{checkpoint}: its adapter cannot be read ({first_line(error)})") from error
    return in_memory(tensors)
