"""Reads what a model is asked: the prompts of a file, or the messages of one conversation."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from training.data.columns import REQUIRED, Columns, texts_of
from training.data.conversations import (
    ASSISTANT,
    SYSTEM,
    ConversationError,
    Prompt,
    history_of,
    messages_of,
    prompts_of,
)
from training.data.rows import columns_with_turns, read_table
from training.data.table import CONVERSATIONS, HISTORY, SYSTEM_PROMPT, Table, and_more, short_repr
from training.errors import DataError

PROMPT_KINDS = (".txt", ".json", ".jsonl")


def read_prompts(file: str, unique: bool = True) -> list[Prompt]:
    """Reads prompts from a .txt file with one instruction per line, or from the rows of a .json or .jsonl file.

    A row has an instruction, and possibly an input and a history, or it has `messages`: their last question is asked,
    after the turns before it. Answers to what is asked are not read. With `unique`, duplicates are removed. Raises
    DataError with file, row and turn.
    """
    table = _read_typed(file, PROMPT_KINDS)
    if not table.count:
        raise DataError(f"{file}: has no instructions")
    columns = columns_with_turns([table], file, required=("instruction",))
    _refuse_unusable(columns, file)
    if HISTORY in table.names:
        for number, value in enumerate(table.values(HISTORY), start=1):
            if value != "" and not isinstance(value, list | None):
                found = short_repr(value)
                raise DataError(f"{file}, row {number}: history is {found}, expected a list of messages")
    empty = [number for number, text in enumerate(columns.instruction, start=1) if not text.strip()]
    if empty:
        raise DataError(f"{file}, row {empty[0]}: the instruction is empty{and_more(empty, 'rows')}")
    prompts = prompts_of(columns)
    return list(dict.fromkeys(prompts)) if unique else prompts


def read_history(file: str) -> list[Any]:
    """Reads the messages of one conversation, after which an instruction is asked.

    The file is .json or .jsonl. It has the messages, an object with `messages` and possibly `system`, or a row with an
    answer, as `training.generate --output` writes it. Raises DataError with file and turn.
    """
    table = _read_typed(file, PROMPT_KINDS[1:])
    if {"role", "content"} <= set(table.names) or {"from", "value"} <= set(table.names):  # a row is a message
        columns = {name: table.values(name) for name in table.names}
        messages = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    elif not table.count:
        messages = []
    elif table.count > 1:
        raise DataError(f"{file}: holds {table.count:,} rows, expected the messages of one conversation")
    elif name := next((name for name in CONVERSATIONS if name in table.names), None):
        [messages] = table.values(name)
        system = [
            {"role": SYSTEM, "content": text} for text in texts_of([table], SYSTEM_PROMPT) if text.strip()
        ]
        if isinstance(messages, list) and messages and system != messages[:1]:
            messages = system + messages
    else:
        row = columns_with_turns([table], file, REQUIRED)
        _refuse_unusable(row, file)
        [answered] = prompts_of(row)
        messages = [*messages_of(answered), {"role": ASSISTANT, "content": row.output[0]}]
    if not messages:
        raise DataError(f"{file}: has no messages")
    try:
        history_of(messages)
    except ConversationError as error:
        raise DataError(f"{file}{error.place}: {error}") from error
    return messages


def _refuse_unusable(columns: Columns, file: str) -> None:
    """Raises DataError with file, row and turn of the first conversation that cannot be used."""
    if columns.unusable:
        places = sorted(columns.unusable)
        error = columns.unusable[places[0]]
        more = and_more([place + 1 for place in places], "conversations")
        raise DataError(f"{file}, row {places[0] + 1}{error.place}: {error}{more}") from error


def _read_typed(file: str, kinds: Collection[str]) -> Table:
    """Reads a file whose name was typed. Raises DataError, also for a name that no file can have."""
    try:
        return read_table(Path(file).expanduser(), kinds)
    except DataError:
        raise
    except (RuntimeError, ValueError) as error:  # an unknown ~user, a null byte
        raise DataError(f"{file}: cannot be read ({error})") from error
