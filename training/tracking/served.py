"""The MLflow pyfunc model: maps a table of instructions and inputs to a table of responses.

MLflow imports this module from the package copy that is logged with the model, and calls `_load_pyfunc`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.model.generation import (
    generate_responses,
    load_model_tokenizer_for_generate,
    sampling_arguments,
)

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass
class Served:
    """A trained model with MLflow's `predict` interface."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def predict(self, data: DataFrame, params: dict[str, Any] | None = None) -> DataFrame:
        """Returns column `response` for the columns `instruction` and, optionally, `input`."""
        import pandas

        inputs = data["input"] if "input" in data else [None] * len(data)
        responses = generate_responses(
            list(data["instruction"]),
            [text if isinstance(text, str) else None for text in inputs],  # pandas uses NaN for missing text
            model=self.model,
            tokenizer=self.tokenizer,
            **sampling_arguments(params or {}),
        )
        return pandas.DataFrame({"response": responses}, index=data.index)


def _load_pyfunc(path: str) -> Served:
    return Served(*load_model_tokenizer_for_generate(path))
