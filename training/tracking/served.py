"""The MLflow pyfunc model: maps a table of instructions, inputs and histories to a table of responses.

MLflow imports this module from the package copy that is logged with the model, and calls `_load_pyfunc`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.data.conversations import Prompt, prompt_of
from training.data.table import short_repr
from training.errors import DataError
from training.model.generation import (
    answer_prompts,
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
        """Returns column `response` for the columns `instruction` and, optionally, `input` and `history`.

        A history is a list of OpenAI's messages, or this list as JSON text: a column of Spark or of a CSV file may hold
        text only. Raises DataError with the row of a history that cannot be used.
        """
        import pandas

        if len(data) == 1 and isinstance(data["instruction"].iloc[0], list):
            # MLflow puts a dict of lists of text, {"instruction": ["a", "b"]}, into one row.
            data = pandas.DataFrame(data.iloc[0].to_dict())
        none = [None] * len(data)
        prompts = _prompts(data["instruction"], data.get("input", none), data.get("history", none))
        responses = answer_prompts(
            list(prompts),
            model=self.model,
            tokenizer=self.tokenizer,
            **sampling_arguments(params or {}),
        )
        return pandas.DataFrame({"response": responses}, index=data.index)


def _prompts(
    instructions: Iterable[str], inputs: Iterable[Any], histories: Iterable[Any]
) -> Iterator[Prompt]:
    """The prompt of each row. pandas uses NaN for what is missing."""
    rows = zip(instructions, inputs, histories, strict=True)
    for number, (instruction, context, history) in enumerate(rows, start=1):
        try:
            yield prompt_of(instruction, context if isinstance(context, str) else None, _messages(history))
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error


def _messages(history: Any) -> list[Any]:
    """A value of the column `history` as a list. Raises DataError if it is none."""
    import pandas

    if isinstance(history, str):
        try:
            history = json.loads(history) if history.strip() else None
        except (ValueError, RecursionError) as error:
            raise DataError(f"history is not JSON ({error}). Send a list of messages") from error
    if pandas.api.types.is_scalar(history) and pandas.isna(history):
        return []
    if hasattr(history, "tolist"):  # an array, as Spark and MLflow pass lists
        history = history.tolist()
    if not isinstance(history, Sequence):
        raise DataError(
            f"history is {short_repr(history)}, expected a list of messages such as "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        )
    return list(history)


def _load_pyfunc(path: str) -> Served:
    return Served(*load_model_tokenizer_for_generate(path))
