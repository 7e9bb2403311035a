"""The model as MLflow serves it: a table of instructions and inputs to a table of responses.

MLflow imports this module from the copy of the package that lies beside the logged model, and calls `_load_pyfunc`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.consts import GREEDY
from training.model.generation import PARAMETERS, generate_responses, load_model_tokenizer_for_generate

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass
class Served:
    """A trained model behind MLflow's `predict`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def predict(self, data: DataFrame, params: dict[str, Any] | None = None) -> DataFrame:
        """Column `response` for the columns `instruction` and, where there is one, `input`; row by row."""
        import pandas

        inputs = data["input"] if "input" in data else [None] * len(data)
        generation = {name: default for name, _, default in PARAMETERS} | (params or {})
        if generation["temperature"] <= 0:
            generation |= GREEDY | {"temperature": None}
        responses = generate_responses(
            list(data["instruction"]),
            [text if isinstance(text, str) else None for text in inputs],  # pandas has NaN for a missing text
            model=self.model,
            tokenizer=self.tokenizer,
            **generation,
        )
        return pandas.DataFrame({"response": responses}, index=data.index)


def _load_pyfunc(path: str) -> Served:
    return Served(*load_model_tokenizer_for_generate(path))
