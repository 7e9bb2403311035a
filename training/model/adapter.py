"""Adapters (LoRA) on a frozen base model: two small matrices for each linear layer, and the rows of the control tokens.

The model keeps its class, attention and loss: peft only replaces its linear layers. Adapter weights are float32, and
the base is in the precision of the run."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from training.consts import RUN_FILE
from training.data.prompt import CONTROL_TOKENS
from training.errors import OptionsError
from training.model.adapter_files import find_adapter
from training.model.blocks import blocks_of
from training.model.loading import rows_needed, text_config
from training.model.new_rows import add_new_rows
from training.model.sharded import is_sharded
from training.model.twin import meta_model

ADAPTER = "default"  # peft's name of a model's only adapter


@dataclass(frozen=True)
class Lora:
    """What an adapter is.

    Attributes:
        rank: inner size of the two matrices of a layer.
        alpha: their output is multiplied by alpha / rank.
        dropout: share of their inputs set to zero in training.
        targets: "all" linear layers of the blocks, or names of layers separated by commas.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str = "all"


def lora_of(options: Any) -> Lora:
    """The adapter of a run with these TrainingOptions, which have --lora."""
    return Lora(
        options.lora, options.lora_alpha or 2.0 * options.lora, options.lora_dropout, options.lora_targets
    )


def row_ids(tokenizer: PreTrainedTokenizerBase, base_rows: int) -> list[int]:
    """The tokens whose rows are trained: the control tokens, and those by which an embedding of `base_rows` rows grew."""
    control = tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))
    return sorted({*control, *range(base_rows, rows_needed(tokenizer))})


# --- the layers that get adapters ---------------------------------------------------------------------


def target_layers(model: PreTrainedModel, targets: str = "all") -> list[str]:
    """Full names of the layers that get adapters. Raises OptionsError for a name that no linear layer has.

    "all" are the linear layers of the blocks: not the head, and not the embedding. A name is that of a layer, such as
    q_proj, or the end of its full name, such as attn.q_proj.
    """
    head, blocks = model.get_output_embeddings(), blocks_of(model)
    inner = {id(module) for block in blocks for module in block.modules()}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
        if not blocks or id(module) in inner
    ]
    if targets == "all":
        return linear
    short = sorted({name.rsplit(".", 1)[-1] for name in linear})
    chosen, problems = set(), []
    for target in (name.strip() for name in targets.split(",")):
        found = {name for name in linear if name == target or name.endswith(f".{target}")}
        chosen |= found
        if not found:
            near = get_close_matches(target, short, n=2)
            fix = f"Type {' or '.join(near)}" if near else f"It has {', '.join(short)}. Type one of them"
            problems.append(
                f"--lora-targets {target}: a {model.config.model_type} model has no linear layer of that name. "
                f"{fix}, or leave it out for all linear layers"
            )
    if problems:
        raise OptionsError(*problems)
    return [name for name in linear if name in chosen]


def check_adapter(config: PreTrainedConfig, lora: Lora, trust_remote_code: bool = False) -> None:
    """Raises OptionsError if a model of this config has no such layers, or if the rank exceeds its width.

    No weight is loaded.
    """
    problems = []
    width = text_config(config).hidden_size
    if lora.rank > width:
        problems.append(
            f"--lora {lora.rank}: the model's width is {width}, so an adapter of that rank would be larger than the "
            "weights that it changes. Type --lora 16"
        )
    try:
        if not target_layers(meta_model(config, trust_remote_code), lora.targets):
            problems.append(f"--lora: a {config.model_type} model has no linear layers. Leave out --lora")
    except OptionsError as error:
        problems += error.problems
    if problems:
        raise OptionsError(*problems)


def check_base(name: str) -> None:
    """Raises OptionsError if the base is itself an adapter: peft's files cannot name the merged model as their base."""
    found = find_adapter(name)
    if found is None:
        return
    beside = found.folder.parent
    merged = "Merge it into its base (merge_and_unload of the package peft), and name the folder of the merged model"
    if (beside / RUN_FILE).is_file() and (beside / "config.json").is_file():
        merged = f"Type --input-model {shlex.quote(str(beside))}, the merged model of its run"
    raise OptionsError(
        f"--input-model {name}: it is a LoRA adapter, and peft could not load an adapter on another adapter. {merged}; or "
        "leave out --lora to train every weight"
    )


# --- injection ----------------------------------------------------------------------------------------


def add_adapter(model: PreTrainedModel, lora: Lora, row_ids: Sequence[int], seed: int) -> None:
    """Freezes a loaded model, and adds an adapter and new rows, in place. Works after ZeRO-3 has sharded the model.

    The adapter's first matrices are drawn from `seed`, alike on all ranks and in every precision; the second are zero,
    so the model computes what it did before. Raises OptionsError for a target that it does not have.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    targets = target_layers(model, lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),  # peft only divides it
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
    )
    model.requires_grad_(False)
    # On "meta", without drawing numbers.
    inject_adapter_in_model(config, model, ADAPTER, low_cpu_mem_usage=True)
    generator = torch.Generator().manual_seed(seed)
    base = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, LoraLayer):
            _draw(module, base, generator)
            module.__class__ = _lean(type(module))
    add_new_rows(model, row_ids)
    if getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = True  # the Trainer asks whether weights in 4 bits have an adapter


def _draw(layer: Any, base: torch.Tensor, generator: torch.Generator) -> None:
    """Sets the two matrices of a layer: uniform as peft draws them, and zero."""
    keeps = is_sharded(base) or base.dtype == torch.float64  # as in new_rows.trained
    dtype = base.dtype if keeps else torch.float32
    for matrices, is_first in ((layer.lora_A, True), (layer.lora_B, False)):
        matrix = matrices[ADAPTER]
        values = torch.zeros(matrix.weight.shape)
        if is_first:
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        matrix.weight = nn.Parameter(values.to(base.device, dtype))
        matrix.__class__ = _Matrix


class _Matrix(nn.Linear):
    """One of an adapter's two matrices: float32 weights that compute in the precision of their input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.to(input.dtype))


@cache
def _lean(kind: Any) -> Any:
    """A subclass of a layer of peft that keeps its input's precision and scales the small product instead of the large one.

    peft would copy each input to float32, and store that copy for the backward pass.
    """

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        small = self.lora_A[ADAPTER](self.lora_dropout[ADAPTER](x)) * self.scaling[ADAPTER]
        return result + self.lora_B[ADAPTER](small)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def merge(model: PreTrainedModel) -> None:
    """Adds the adapter to the weights of a small model, in place, and writes the new rows into embedding and head."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for name, rows in (("weight", "new_rows"), ("bias", "new_bias")):
                if rows in module._parameters:
                    tensor = module._parameters[name]
                    tensor[module.row_ids] = module._parameters[rows].to(tensor.dtype)
