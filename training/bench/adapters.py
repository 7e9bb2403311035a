"""The two ways of the benchmark to train adapters: ours on packed rows, and peft's in the stock Trainer on padded rows."""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel

from training.consts import DEFAULT_SEED
from training.model.adapter import ADAPTER, Lora, add_adapter, target_layers
from training.model.new_rows import trainable_state

PEFTS_PREFIX = "base_model.model."


def our_lora(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """Adapters as the trainer adds them, to a model with packed attention and loss. They begin with random numbers.

    The last three rows of the embedding are those of the control tokens.
    """
    rows = model.get_input_embeddings().num_embeddings
    add_adapter(model, Lora(rank, 2.0 * rank), range(rows - 3, rows), DEFAULT_SEED)
    generator = torch.Generator().manual_seed(DEFAULT_SEED)
    with torch.no_grad():  # with second matrices of zero, the first ones would have no gradient to compare
        for name, tensor in trainable_state(model).items():
            if "lora_B" in name:
                tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
    return model


def pefts_lora(model: PreTrainedModel, rank: int, batch: int) -> Any:
    """The stock Trainer for peft's `get_peft_model` with the same layers. Sets no new rows: it would copy the embedding."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target_layers(model))
    row = {"input_ids": [0, 0], "labels": [0, 0]}
    return Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=batch,
            use_cpu=model.device.type == "cpu",
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list([row]),
    )


def copy_adapter(ours: PreTrainedModel, pefts: Any) -> None:
    """Gives peft's model the adapter of ours."""
    theirs = dict(pefts.named_parameters())
    with torch.no_grad():
        for name, tensor in trainable_state(ours).items():
            if f".{ADAPTER}." in name:
                theirs[PEFTS_PREFIX + name].copy_(tensor)


def adapter_gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradients of both ways under the same names, without those of our new rows, which peft's does not train."""
    return {
        name.removeprefix(PEFTS_PREFIX): tensor.grad
        for name, tensor in model.named_parameters()
        if f".{ADAPTER}." in name
    }
