"""Conversations as other projects and tools write them: read as they are meant, or refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from tests.conftest import jsonl, write
from tests.data.test_conversations import ANSWER, CHAT, FIRST, USER
from training.data.columns import Columns
from training.data.conversations import Turn
from training.data.ledger import Ledger
from training.data.prompt_files import read_prompts
from training.data.rows import read_columns
from training.data.tokens import encode_rows, prepare_dataset
from training.errors import DataError

READ = Columns(["Name a colour."], [""], ["Red."], history=[(FIRST,)])  # CHAT as columns


def parquet(path: Path, messages: Any, kind: pa.DataType | None = None) -> str:
    pyarrow.parquet.write_table(pa.table({"messages": pa.array([messages], kind)}), path)
    return str(path)


# --- what is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [[], [["a", "b"]], ""])
def test_a_column_history_takes_no_turns_from_a_conversation(tmp_path: Path, history: Any) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"messages": CHAT, "history": history}])
    assert read_columns(path) == READ
    assert read_columns(path).not_read == ["the column 'history'"]


def test_a_blank_instruction_and_output_leave_room_for_a_conversation(tmp_path: Path) -> None:
    row = {"instruction": " ", "output": "\n", "messages": CHAT}
    assert read_columns(jsonl(tmp_path / "x.jsonl", [row])) == READ


def test_a_history_that_is_empty_text_in_one_row_is_read_in_the_others(tmp_path: Path) -> None:
    row = {"instruction": "Name a colour.", "output": "Red."}
    pairs = [["Be brief.\n\nHi", "Hello."]]
    path = jsonl(tmp_path / "x.jsonl", [row | {"history": ""}, row | {"history": pairs}])
    turn = Turn("Be brief.\n\nHi", "Hello.")
    assert read_columns(path).history == [(), (turn,)]
    assert [prompt.history for prompt in read_prompts(path)] == [(), (turn,)]
    path = jsonl(tmp_path / "x.jsonl", [row | {"history": "Hi"}, row | {"history": pairs}])
    assert str(read_columns(path).unusable[0]) == "str 'Hi' is not a list of messages"


MAP = pa.list_(pa.map_(pa.string(), pa.string()))
LISTS = pa.struct([("role", pa.list_(pa.string())), ("content", pa.list_(pa.string()))])
PARQUET: dict[str, tuple[Any, pa.DataType]] = {
    "Spark's array of maps": ([list(message.items()) for message in CHAT], MAP),
    "a Sequence of datasets": ({key: [message[key] for message in CHAT] for key in ("role", "content")}, LISTS),
}  # fmt: skip


@pytest.mark.parametrize("form", PARQUET)
def test_messages_in_parquet_are_read_in_each_form_that_libraries_write(tmp_path: Path, form: str) -> None:
    assert read_columns(parquet(tmp_path / "x.parquet", *PARQUET[form])) == READ


def test_numbers_inside_parquet_are_text_as_in_json(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": 1}, {"role": "assistant", "content": 2}]
    expected = Columns(["1"], [""], ["2"])
    assert read_columns(parquet(tmp_path / "x.parquet", messages)) == expected
    assert read_columns(jsonl(tmp_path / "x.jsonl", [{"messages": messages}])) == expected


def test_a_role_that_is_empty_leaves_room_for_from(tmp_path: Path) -> None:
    messages = [{"role": "", "from": "human", "value": "Hi"}, {"role": "", "from": "gpt", "value": "Hello."}]
    assert read_columns(jsonl(tmp_path / "x.jsonl", [{"messages": messages}])).output == ["Hello."]


def test_the_time_for_a_conversation_grows_with_its_length(tokenizer: PreTrainedTokenizerBase) -> None:
    """20,001 turns in one row: copying the ids so far in each turn would take minutes."""
    turn = Turn("Hi", "Hello.")
    columns = Columns(["Hi"], [""], ["Hello."], history=[(turn,) * 20_000])
    [(_, _, spans)] = encode_rows(tokenizer, columns, Ledger("", 10**9))
    assert len(spans) == 20_001


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0, 0.0, False])
def test_weight_0_is_refused_in_parquet_as_in_json(tmp_path: Path, weight: Any) -> None:
    messages = [USER | {"weight": None}, ANSWER | {"weight": weight}]
    for path in (
        parquet(tmp_path / "x.parquet", messages),
        jsonl(tmp_path / "x.jsonl", [{"messages": messages}]),
    ):
        assert "has weight " in str(read_columns(path).unusable[0])
    text = json.dumps({"messages": [USER, ANSWER | {"weight": 7}]}).replace("7", "0.00")
    assert "has weight " in str(read_columns(write(tmp_path / "x.json", text)).unusable[0])


def test_a_tool_in_capitals_is_a_tool(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"messages": [USER, {"role": "Tool", "content": "4"}]}])
    assert read_columns(path).unusable[0].reason == "tool call"


def test_json_in_a_text_column_is_named_as_that(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"messages": json.dumps(CHAT)}])
    assert str(read_columns(path).unusable[0]).endswith(
        "is not a list of messages. If it is JSON text, write what json.loads gives"
    )


def test_lists_without_a_name_are_told_their_column(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", json.dumps([CHAT, CHAT]))
    with pytest.raises(DataError, match=r'Write each conversation as \{"messages": \[\.\.\.\]\}'):
        read_columns(path)


def test_a_conversation_in_two_columns_is_to_be_joined_and_not_renamed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": [USER], "completion": [ANSWER]}] * 2)
    with pytest.raises(DataError) as refusal:
        read_columns(path)
    assert str(refusal.value) == (
        f"{path}: the columns 'prompt', 'completion' hold lists of messages. "
        "Join them into one list in each row, in the column 'messages'"
    )


def test_the_refusal_says_how_many_conversations_cannot_be_used(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows: list[Any] = [{"messages": [ANSWER]}] * 24 + [{"messages": CHAT}, {"instruction": "", "output": ""}]
    path = jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError) as refusal:
        prepare_dataset(path, tokenizer, 1000, cache_root=tmp_path)
    lines = str(refusal.value).splitlines()
    assert (len(lines), lines[10]) == (12, "  and 14 more: 24 of 26 rows")
