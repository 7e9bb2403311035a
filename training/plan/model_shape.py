"""Shapes of models: the sizes that memory and time depend on, and the built-in GPT-J and Pythias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block: a matrix (outputs, inputs)."""

    name: str
    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model.

    Attributes:
        kind: transformers' model_type; "gptj" uses the attention of attention.py.
        layer_parameters: parameters of all layers and the final norm, without embedding and head.
        inner: hidden width of the MLP, which has two matrices, or three if `gated`.
        file_bytes: size of the weight files.
        downloaded: whether the weight files are first downloaded into the cache.
        obstacle: why rows cannot be packed; None if they can (model/packing.py).
        response_loss: whether the chunked loss of loss.py can be used.
        checkpointing: whether transformers has gradient checkpointing for it.
        block: parameters of its largest block, or 0 if ZeRO-3 may not handle a block as a whole (model/blocks.py).
        linears: the linear layers of the blocks.
        tied: whether the head's weight is the embedding's.
        head_bias: whether the head has a bias.
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
    obstacle: str | None = None
    response_loss: bool = True
    checkpointing: bool = True
    block: int = 0
    linears: tuple[Linear, ...] = ()
    tied: bool = False
    head_bias: bool = False


def _shape(
    kind: str,
    block_layers: Sequence[tuple[str, int, int]],
    layer_biases: int,
    head_bias: bool,
    number_bytes: int,
    name: str,
    layers: int,
    width: int,
    heads: int,
    vocabulary: int,
    positions: int = 2048,
    downloaded: bool = False,
) -> ModelShape:
    """Shape of a model whose layers have four square matrices and an MLP, four times as wide, with biases.

    Args:
        block_layers: name, inputs and outputs of a block's linear layers, the sizes in units of the width.
        layer_biases: biases and layer norms of a layer in units of its width, without the MLP's first bias.
        head_bias: whether the head has a bias.
        number_bytes: bytes per parameter in the file on the Hub.
    """
    inner = 4 * width
    stack = layers * (4 * width**2 + 2 * width * inner + inner + layer_biases * width) + 2 * width
    parameters = stack + 2 * vocabulary * width + head_bias * vocabulary
    return ModelShape(
        name=name,
        kind=kind,
        parameters=parameters,
        layer_parameters=stack,
        layers=layers,
        width=width,
        heads=heads,
        inner=inner,
        vocabulary=vocabulary,
        positions=positions,
        file_bytes=number_bytes * parameters,
        downloaded=downloaded,
        block=(stack - 2 * width) // layers,
        linears=tuple(
            Linear(layer.format(block), inputs * width, outputs * width)
            for block in range(layers)
            for layer, inputs, outputs in block_layers
        ),
        head_bias=head_bias,
    )


# A GPT-J has one layer norm (2) and the MLP's second bias (1). GPT-J-6B: 28 x (4 x 4096^2 + 2 x 4096 x 16384 + 16384
# + 3 x 4096) + 2 x 4096 + 2 x 50400 x 4096 + 50400 = 6,050,882,784 parameters. Its file on the Hub is float32.
_GPTJ_BLOCK = (
    *((f"transformer.h.{{}}.attn.{name}_proj", 1, 1) for name in ("k", "v", "q", "out")),
    ("transformer.h.{}.mlp.fc_in", 1, 4),
    ("transformer.h.{}.mlp.fc_out", 4, 1),
)
gptj_shape = partial(_shape, "gptj", _GPTJ_BLOCK, 3, True, 4)

# A GPT-NeoX (the Pythias) has two layer norms (4), biases of the four square matrices (4) and the MLP's second bias
# (1). The files on the Hub are float16.
_NEOX_BLOCK = (
    ("gpt_neox.layers.{}.attention.query_key_value", 1, 3),
    ("gpt_neox.layers.{}.attention.dense", 1, 1),
    ("gpt_neox.layers.{}.mlp.dense_h_to_4h", 1, 4),
    ("gpt_neox.layers.{}.mlp.dense_4h_to_h", 4, 1),
)
neox_shape = partial(_shape, "gpt_neox", _NEOX_BLOCK, 9, False, 2)

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
    model.name.lower(): model
    for model in (
        gptj_shape("EleutherAI/gpt-j-6B", 28, 4096, 16, 50400, downloaded=True),
        *(
            neox_shape(f"EleutherAI/pythia-{size}{suffix}", *shape, downloaded=True)
            for size, shape in _PYTHIAS.items()
            for suffix in ("", "-deduped")
        ),
    )
}
