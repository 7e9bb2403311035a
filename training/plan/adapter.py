"""Sizes of what a run trains, and of what it only holds: all weights, or an adapter (LoRA) on a frozen base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from training.data.prompt import CONTROL_TOKENS
from training.errors import OptionsError

if TYPE_CHECKING:
    from training.options.settings import Settings
    from training.plan.model_shape import Linear, ModelShape

# Bytes of a weight in NF4: 4 bits, the scale of its block of 64 in 8 bits, and a float32 scale for 256 of those
# (Dettmers et al. 2023, "double quantization").
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Adapter:
    """Sizes of a run's adapter.

    Attributes:
        rank: of each pair of matrices.
        layers: the linear layers that have a pair.
        new_rows: parameters of the control tokens' rows in embedding and head.
        dropout: whether inputs are dropped, which needs a copy of them and a mask.
    """

    rank: int
    layers: tuple[Linear, ...]
    new_rows: int
    dropout: bool

    @property
    def matrices(self) -> int:
        """Parameters of the pairs: (rank, inputs) and (outputs, rank) each."""
        return sum(self.rank * (layer.inputs + layer.outputs) for layer in self.layers)

    @property
    def parameters(self) -> int:
        return self.matrices + self.new_rows

    @property
    def largest(self) -> int:
        """Parameters of the largest tensor."""
        widest = max((max(layer.inputs, layer.outputs) for layer in self.layers), default=0)
        return max(self.rank * widest, self.new_rows)

    def kept_bytes(self, tokens: float, size: int) -> float:
        """Bytes that all its layers keep for the backward pass, with `size` bytes per number.

        A layer's input is kept in full tuning too. New are the product of rank width, and copies of the two float32
        matrices in 16 bit. With dropout each layer keeps its own input and one byte of mask per number.
        """
        copies = 0 if size == 4 else size * self.matrices
        dropped = sum(layer.inputs for layer in self.layers) * (size + 1) if self.dropout else 0
        return tokens * (len(self.layers) * self.rank * size + dropped) + copies


def adapter_of(model: ModelShape, settings: Settings) -> Adapter | None:
    """The adapter of a run; None if it trains all weights. Raises OptionsError for a layer that the model does not have."""
    options = settings.options
    if not options.lora:
        return None
    tokens, places = len(CONTROL_TOKENS), 1 if model.tied else 2
    return Adapter(
        rank=options.lora,
        layers=_chosen_layers(model, options.lora_targets),
        new_rows=tokens * (places * model.width + model.head_bias),
        dropout=options.lora_dropout > 0,
    )


def _chosen_layers(model: ModelShape, targets: str) -> tuple[Linear, ...]:
    """The layers of these names, or ends of names, separated by commas. Raises OptionsError if there are none."""
    if not model.linears:
        raise OptionsError(f"--lora: a {model.kind} model has no linear layers. Leave out --lora")
    if targets == "all":
        return model.linears
    names = [name.strip() for name in targets.split(",")]
    known = sorted({layer.name.rpartition(".")[2] for layer in model.linears})
    problems = [
        f"--lora-targets {name}: {model.name} has no linear layer of that name. Type "
        f"{' or '.join(get_close_matches(name, known, n=2) or known)}, or leave it out for all linear layers"
        for name in names
        if not any(_is_named(layer, (name,)) for layer in model.linears)
    ]
    if problems:
        raise OptionsError(*problems)
    return tuple(layer for layer in model.linears if _is_named(layer, names))


def _is_named(layer: Linear, names: Sequence[str]) -> bool:
    return any(f".{layer.name}".endswith(f".{name}") for name in names)


def trained_parameters(model: ModelShape, settings: Settings) -> int:
    """Parameters that get gradients and have an optimizer."""
    adapter = adapter_of(model, settings)
    return adapter.parameters if adapter else model.parameters


def frozen_bytes(model: ModelShape, settings: Settings) -> float:
    """Bytes of the frozen base model: in the run's precision, with --quantize its linear layers in 4 bits."""
    if not settings.lora:
        return 0.0
    quantized = quantized_parameters(model, settings)
    return settings.number_bytes * (model.parameters - quantized) + NF4_BYTES * quantized


def quantized_parameters(model: ModelShape, settings: Settings) -> int:
    """Parameters in 4 bits: the matrices of the linear layers. Embedding, head, biases and norms are not."""
    return sum(layer.parameters for layer in model.linears) if settings.options.quantize else 0
