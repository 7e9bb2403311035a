"""Questions that the page offers: the held-out rows of a run, and examples with the answers that the run saved."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from training.consts import SAMPLE_INSTRUCTIONS, SAMPLES_FILE
from training.data.columns import Columns
from training.data.conversations import Prompt, prompt_of_row, prompts_of
from training.data.prompt_files import PROMPT_KINDS, read_prompts
from training.data.rows import read_columns
from training.data.table import kind_of
from training.errors import DataError
from training.evaluate import rows
from training.page.votes import HELD_OUT, Question
from training.storage import metrics


def rows_of_file(file: str) -> list[Question]:
    """The questions in a file: rows in any format of training, or prompts as `training.generate` reads them.

    Raises DataError, also if no row asks anything.
    """
    is_text = kind_of(Path(file)) in PROMPT_KINDS
    prompts = read_prompts(file) if is_text else _questions(read_columns(file))
    if not prompts:
        raise DataError(f"{file}: no row asks anything. Name a file whose rows have an instruction")
    return [Question(prompt, HELD_OUT) for prompt in prompts]


def held_out_rows(
    folder: Path, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """The rows that a finished run held out, as the evaluation finds them. Raises DataError."""
    prompts = _questions(rows.held_out_rows(folder, record, tokenizer).columns)
    return [Question(prompt, HELD_OUT) for prompt in prompts]


def _questions(columns: Columns) -> list[Prompt]:
    """What the rows ask, each once, without rows that ask nothing and conversations that cannot be used."""
    return [prompt for prompt in dict.fromkeys(prompts_of(columns)) if prompt.instruction.strip()]


def examples(folder: Path) -> list[Prompt]:
    """The examples: those that the run in `folder` has answered, and Dolly's five."""
    answered = [prompt for prompt, _ in _samples(folder)]
    return list(dict.fromkeys([*answered, *map(Prompt, SAMPLE_INSTRUCTIONS)]))


def saved_answers(folder: Path, step: int | None = None) -> dict[Prompt, tuple[int, str]]:
    """(step, answer) for each prompt that the run in `folder` answered at `step`; without one, at its last step.

    The answers of step 0 are those of the base model.
    """
    return {
        prompt: (entry["step"], entry["response"])
        for prompt, entry in sorted(_samples(folder), key=lambda sample: sample[1]["step"])
        if step in (None, entry["step"])
    }


def _samples(folder: Path) -> list[tuple[Prompt, dict[str, Any]]]:
    """The prompts and entries of samples.jsonl. Damaged ones are left out."""
    texts = ("instruction", "input", "response")
    samples = []
    for entry in metrics.read(folder / SAMPLES_FILE):
        with suppress(DataError):
            if all(isinstance(entry.get(name), str) for name in texts):
                samples.append((prompt_of_row(entry), entry))
    return samples
