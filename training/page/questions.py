"""Questions that the page offers: the held-out rows of a run, and examples with the answers that the run saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from training.consts import SAMPLE_INSTRUCTIONS, SAMPLES_FILE
from training.data.rows import PROMPT_KINDS, read_columns, read_prompts
from training.data.table import kind_of
from training.evaluate import rows
from training.page.votes import HELD_OUT, Question
from training.storage import metrics


def rows_of_file(file: str) -> list[Question]:
    """The questions in a file: rows in any format of training, or instructions as `training.generate` reads them.

    Raises DataError.
    """
    if kind_of(Path(file)) in PROMPT_KINDS:
        prompts = [prompt[:2] for prompt in read_prompts(file)]
    else:
        columns = read_columns(file)
        prompts = list(dict.fromkeys(zip(columns.instruction, columns.input, strict=True)))
    return [Question(*prompt, HELD_OUT) for prompt in prompts]


def held_out_rows(
    folder: Path, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """The rows that a finished run held out, as the evaluation finds them. Raises DataError."""
    columns = rows.held_out_rows(folder, record, tokenizer).columns
    prompts = zip(columns.instruction, columns.input, strict=True)
    return [Question(*prompt, HELD_OUT) for prompt in dict.fromkeys(prompts)]


def examples(folder: Path) -> list[tuple[str, str]]:
    """(instruction, input) of the examples: those that the run in `folder` has answered, and Dolly's five."""
    answered = [(entry["instruction"], entry["input"]) for entry in _samples(folder)]
    return list(dict.fromkeys([*answered, *((text, "") for text in SAMPLE_INSTRUCTIONS)]))


def saved_answers(folder: Path, step: int | None = None) -> dict[tuple[str, str], tuple[int, str]]:
    """(step, answer) for each prompt that the run in `folder` answered at `step`; without one, at its last step.

    The answers of step 0 are those of the base model.
    """
    return {
        (entry["instruction"], entry["input"]): (entry["step"], entry["response"])
        for entry in sorted(_samples(folder), key=lambda entry: entry["step"])
        if step in (None, entry["step"])
    }


def _samples(folder: Path) -> list[dict[str, Any]]:
    texts = ("instruction", "input", "response")
    return [
        entry
        for entry in metrics.read(folder / SAMPLES_FILE)
        if all(isinstance(entry.get(name), str) for name in texts)
    ]
