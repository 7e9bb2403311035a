"""A model's shape: what memory and time depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class ModelShape:
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


def _shape(
    kind: str,
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
    """Counts a model whose layer has four square matrices and an MLP with biases, four times as wide.

    Args:
        layer_biases: of a layer in units of its width: other biases and layer norms; the MLP's first bias is apart.
        head_bias: whether the head has one.
        number_bytes: of a number in its file on the Hub.
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
    )


# A GPT-J has one layer norm (2) and the MLP's second bias (1). GPT-J-6B: 28 x (4 x 4096^2 + 2 x 4096 x 16384 + 16384
# + 3 x 4096) + 2 x 4096 + 2 x 50400 x 4096 + 50400 = 6,050,882,784 parameters. Its file on the Hub is float32.
gptj_shape = partial(_shape, "gptj", 3, True, 4)

# A GPT-NeoX (the Pythias) has two layer norms (4), and biases of the four square matrices as well (4 + 1). Their
# files on the Hub are float16.
neox_shape = partial(_shape, "gpt_neox", 9, False, 2)

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
        gptj_shape("EleutherAI/gpt-j-6B", 28, 4096, 16, 50400, downloaded=True),
        *(
            neox_shape(f"EleutherAI/pythia-{size}{suffix}", *shape, downloaded=True)
            for size, shape in _PYTHIAS.items()
            for suffix in ("", "-deduped")
        ),
    )
}
