"""Conversations as rows: the same ids as the chat template, the loss on each answer, and words for what cannot be used."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.conftest import jsonl
from training.data.collator import completion_labels
from training.data.columns import Columns
from training.data.conversations import (
    Conversation,
    ConversationError,
    Prompt,
    Turn,
    conversation_of,
    messages_of,
    prompt_of,
    without_first_turns,
)
from training.data.ledger import Ledger
from training.data.prompt import INTRO, INTRO_WITH_INPUT
from training.data.rows import read_columns
from training.data.tokens import encode_rows, marked_sample, prepare_dataset
from training.errors import DataError
from training.model.tokenizer import load_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Red."},
]
SHARE_GPT = [
    {"from": {"system": "system", "user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
    for m in CHAT
]
FIRST = Turn("Hi", "Hello.", "Be brief.\n\n")


@pytest.fixture(scope="module")
def by_line(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A tokenizer with one token for each line and for each line break, so that ids can be checked by eye."""
    words = [
        INTRO,
        "\n\n",
        "\n",
        "Be brief.",
        "Hi",
        "Hello.",
        "Name a colour.",
        "Red.",
        "<unk>",
        "<|endoftext|>",
    ]
    backend = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    folder = tmp_path_factory.mktemp("by_line")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="<unk>"
    ).save_pretrained(folder)
    return load_tokenizer(str(folder))


def encoded(tokenizer: PreTrainedTokenizerBase, path: str, ledger: Ledger | None = None, **how: bool) -> list:
    return list(encode_rows(tokenizer, read_columns(path), ledger or Ledger(path, 10_000), **how))


# --- ids and masks -------------------------------------------------------------------------------------


def test_ids_and_labels_of_a_conversation_are_these(by_line: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    end, instruction, response = 10, 11, 12
    assert by_line.convert_tokens_to_ids(["### End", "### Instruction:", "### Response:\n"]) == [10, 11, 12]
    intro, gap, newline, be_brief, hi, hello, name_a_colour, red = range(8)
    expected = [
        intro, gap, instruction, newline, be_brief, gap, hi, gap, response, hello, gap, end,
        intro, gap, instruction, newline, name_a_colour, gap, response, red, gap, end,
    ]  # fmt: skip
    no = -100
    labels = [
        no, no, no, no, no, no, no, no, no, hello, gap, end,
        no, no, no, no, no, no, no, red, gap, end,
    ]  # fmt: skip
    [(number, ids, spans)] = encoded(by_line, jsonl(tmp_path / "x.jsonl", [{"messages": CHAT}]))
    assert (number, ids, spans) == (1, expected, [(9, 12), (19, 22)])
    assert completion_labels({"input_ids": ids, "response_spans": spans}) == labels


def test_the_marked_sample_shows_each_turn(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows, _ = prepare_dataset(
        jsonl(tmp_path / "x.jsonl", [{"messages": CHAT}]), tokenizer, 1000, cache_root=tmp_path
    )
    assert rows[0]["response_spans"] == [list(span) for span in rows[0]["response_spans"]]
    assert marked_sample(tokenizer, rows[0]["input_ids"], rows[0]["response_spans"]) == (
        f"{INTRO}\n\n### Instruction:\nBe brief.\n\nHi\n\n### Response:\n«Hello.\n\n### End»"
        f"{INTRO}\n\n### Instruction:\nName a colour.\n\n### Response:\n«Red.\n\n### End»"
    )


FORMS: dict[str, dict[str, Any]] = {
    "OpenAI": {"messages": CHAT},
    "ShareGPT": {"conversations": SHARE_GPT},
    "the other way round": {"conversation": CHAT},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, *CHAT[1:]]},
    "text parts": {
        "messages": [
            *CHAT[:1],
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "input_text", "text": "i"}]},
            *CHAT[2:],
        ]
    },
    "a blank system message": {"messages": [{"role": "system", "content": " "}, *CHAT]},
    "null keys": {"messages": [message | {"tool_calls": None, "name": None} for message in CHAT]},
    "a history of messages": {"instruction": "Name a colour.", "output": "Red.", "history": CHAT[:3]},
    "a history of pairs": {
        "instruction": "Name a colour.",
        "output": "Red.",
        "history": [["Be brief.\n\nHi", "Hello."]],
    },
    "a column system": {"messages": CHAT[1:], "system": "Be brief."},
    "a column system, and the same message": {"messages": CHAT, "system": "Be brief."},
    "a column system beside a history": {
        "instruction": "Name a colour.",
        "output": "Red.",
        "history": [["Hi", "Hello."]],
        "system": "Be brief.",
    },
}


def test_a_column_system_stands_before_the_first_question_of_any_row(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Hi", "output": "Hello.", "system": "Be brief."},
        {"instruction": "Hi", "output": "Hello.", "system": " "},
        {"instruction": " ", "output": "Hello.", "system": "Be brief."},
        {"messages": CHAT, "system": "Be kind."},
        {"messages": CHAT[:1], "system": "Be brief."},
    ]
    columns = read_columns(jsonl(tmp_path / "x.jsonl", rows))
    assert columns.instruction == ["Be brief.\n\nHi", "Hi", " ", "Name a colour.", ""]
    assert columns.history[3] == (Turn("Hi", "Hello.", "Be kind.\n\nBe brief.\n\n"),)
    assert [error.reason for error in columns.unusable.values()] == ["no assistant turn"]
    assert not columns.not_read
    columns = read_columns(jsonl(tmp_path / "y.jsonl", [rows[0] | {"system": ["Be brief."]}]))
    assert (columns.instruction, columns.not_read) == (["Hi"], ["the column 'system'"])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_ids_of_the_chat_template(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, form: str
) -> None:
    [(_, ids, _)] = encoded(tokenizer, jsonl(tmp_path / "x.jsonl", [FORMS[form]]))
    assert ids == tokenizer.apply_chat_template(CHAT)["input_ids"]


def test_a_conversation_of_one_turn_is_an_alpaca_row(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    question = "Name one.\n\n### Input:\nred, blue"
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Red."}]},
        {"instruction": "Name one.", "input": "red, blue", "output": "Red."},
    ]
    [(_, chat, _), (_, alpaca, _)] = encoded(tokenizer, jsonl(tmp_path / "x.jsonl", rows))
    assert chat == alpaca
    assert tokenizer.decode(chat).startswith(INTRO_WITH_INPUT)


def test_files_of_any_kind_hold_conversations(tmp_path: Path) -> None:
    rows = [{"messages": CHAT, "id": 1}, {"messages": CHAT[1:3], "id": 2}]
    expected = Columns(["Name a colour.", "Hi"], ["", ""], ["Red.", "Hello."], history=[(FIRST,), ()])
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "columns.json").write_text(json.dumps({"messages": [row["messages"] for row in rows]}))
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, row in enumerate(rows):
        jsonl(folder / f"part-{number}.jsonl", [row])
    for name in ("x.parquet", "x.json", "columns.json", "folder"):
        columns = read_columns(str(tmp_path / name))
        assert columns == expected, name
        assert columns.not_read == ([] if name == "columns.json" else ["the column 'id'"])
    (tmp_path / "one.json").write_text(json.dumps({"messages": CHAT}))
    assert read_columns(str(tmp_path / "one.json")).history == [(FIRST,)]


def test_conversations_and_alpaca_rows_may_be_mixed_and_nothing_is_left_out_in_silence(
    tmp_path: Path,
) -> None:
    rows = [
        {"instruction": "a", "input": "b", "output": "c"},
        {"messages": [CHAT[1], CHAT[2] | {"name": "Eve"}, CHAT[3]]},
        {"instruction": "d", "output": "e", "history": []},
    ]
    columns = read_columns(jsonl(tmp_path / "x.jsonl", rows))
    assert columns == Columns(["a", "Hi", "d"], ["b", "", ""], ["c", "Hello.", "e"])
    assert columns.not_read == ["the key 'name' of messages"]
    assert columns.unanswered == [2]
    both = [{"instruction": "a", "output": "c", "messages": CHAT}]
    columns = read_columns(jsonl(tmp_path / "x.jsonl", both))
    assert (columns, columns.not_read) == (Columns(["a"], [""], ["c"]), ["the column 'messages'"])
    partly = [{"instruction": "a", "messages": CHAT}]
    columns = read_columns(jsonl(tmp_path / "x.jsonl", partly))
    assert (columns.instruction, columns.not_read) == (["Name a colour."], ["the column 'instruction'"])
    text = [{"instruction": "a", "output": "b", "history": "of the file"}]
    assert read_columns(jsonl(tmp_path / "x.jsonl", text)).not_read == ["the column 'history'"]


# --- conversations that are too long -------------------------------------------------------------------


def test_a_conversation_that_is_too_long_keeps_whole_turns(
    by_line: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "x.jsonl", [{"messages": CHAT}])
    [(_, whole, [first, _])] = encoded(by_line, path, Ledger("", 22))
    for longest in range(12, 22):
        ledger = Ledger("", longest)
        for keep in (False, True):
            assert encoded(by_line, path, ledger, keep_truncated=keep) == [(1, whole[:12], [first])]
        assert (ledger.rows_shortened, ledger.turns_left_out, ledger.rows_truncated) == (2, 2, 0)
        assert "2 conversations are longer" in str(ledger)
    ledger = Ledger("", 11)
    assert encoded(by_line, path, ledger) == []
    assert ledger.dropped == {"response would be cut at max_length": 1}
    assert encoded(by_line, path, Ledger("", 11), keep_truncated=True) == [(1, whole[:11], [(9, 11)])]
    assert encoded(by_line, path, ledger := Ledger("", 9), keep_truncated=True) == []
    assert ledger.dropped == {"prompt alone fills max_length": 1}


def test_the_ledger_counts_turns(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [
        {"messages": CHAT},
        {"messages": CHAT[1:4]},
        {"messages": [*CHAT[:2], CHAT[2] | {"content": " "}]},
    ]
    path = jsonl(tmp_path / "x.jsonl", rows)
    prepared, ledger = prepare_dataset(path, tokenizer, 1000, False, 0.5, tmp_path)
    assert (ledger.rows_kept, ledger.turns, ledger.unanswered) == (2, 3, 1)
    assert ledger.dropped == {"empty response": 1}
    spans = [span for row in prepared["response_spans"] for span in row]
    assert ledger.response_tokens == sum(end - start for start, end in spans)
    assert "1 conversations end with a question" in str(ledger)


# --- conversations that cannot be used -------------------------------------------------------------------

USER, ANSWER = CHAT[1], CHAT[2]
UNUSABLE: dict[str, tuple[Any, str, str]] = {
    "text": ("Hi", "", "str 'Hi' is not a list of messages"),
    "no message": (["Hi"], ", turn 1", "str 'Hi' is not a message with role and content"),
    "an empty list": ([], "", "no assistant turn"),
    "no answer": ([USER], "", "no assistant turn, so there is nothing to learn"),
    "unknown role": ([USER, {"role": "critic", "content": "a"}], ", turn 2", "the role is 'critic', expected"),
    "no role": ([{"content": "a"}], ", turn 1", "the role is missing, expected system, user or assistant"),
    "two questions": ([USER, USER, ANSWER], ", turn 2", "two user messages in a row. Join them into one"),
    "two answers": ([USER, ANSWER, ANSWER], ", turn 3", "two assistant messages in a row"),
    "answer first": ([ANSWER, USER, ANSWER], ", turn 1", "the assistant speaks before the user"),
    "system between": ([USER, CHAT[0], ANSWER], ", turn 2", "a system message stands between a question and"),
    "an image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER],
        ", turn 1",
        "the content is a part of type 'image_url', expected text",
    ),
    "a number in a list": ([{"role": "user", "content": [[1]]}, ANSWER], ", turn 1", "the content is list [1], expected"),
    "no content": ([USER, {"role": "assistant", "content": None}], ", turn 2", "the content is missing, expected text"),
    "half a pair": ([{"role": "user", "content": "\ud83d"}, ANSWER], ", turn 1", "half of a surrogate pair"),
    "tool role": ([USER, {"role": "tool", "content": "4"}], ", turn 2", "a tool call, but Dolly's prompt has no tools"),
    "tool call": (
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
        ", turn 2",
        "a tool call, but",
    ),
    "train false": ([USER, ANSWER | {"train": False}], ", turn 2", "has train false, but the loss is on every"),
    "weight 0": ([USER, ANSWER | {"weight": 0}], ", turn 2", "has weight 0, but the loss is on every assistant message"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_conversation_that_cannot_be_used_is_named_with_file_row_and_turn_or_dropped_if_asked(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, case: str
) -> None:
    messages, turn, reason = UNUSABLE[case]
    good = {"messages": CHAT}
    path = jsonl(tmp_path / "x.jsonl", [good, {"messages": messages}, good])
    with pytest.raises(DataError) as refusal:
        prepare_dataset(path, tokenizer, 1000, False, 0.5, tmp_path)
    assert str(refusal.value).startswith(f"{path}, row 2{turn}: ")
    assert reason in str(refusal.value)
    assert "type --drop-unusable" in str(refusal.value)
    rows, ledger = prepare_dataset(path, tokenizer, 1000, False, 0.5, tmp_path, drop_unusable=True)
    assert rows["row"][:] == [1, 3]
    assert sum(ledger.dropped.values()) == 1
    assert next(iter(ledger.first_dropped_rows.values())) == [2]
    with pytest.raises(DataError, match="--max-dropped-fraction"):
        prepare_dataset(path, tokenizer, 1000, False, 0.3, tmp_path, drop_unusable=True)


def test_all_unusable_conversations_of_a_folder_are_in_one_message(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "a.jsonl", [{"messages": CHAT}, {"messages": [USER]}])
    jsonl(folder / "b.jsonl", [{"messages": [USER, USER]}])
    with pytest.raises(DataError) as refusal:
        prepare_dataset(str(folder), tokenizer, 1000, cache_root=tmp_path)
    first, second, _ = str(refusal.value).splitlines()
    assert first == f"{folder}, a.jsonl row 2: no assistant turn, so there is nothing to learn"
    assert second == "  b.jsonl row 1, turn 2: two user messages in a row. Join them into one"


# --- prompts ---------------------------------------------------------------------------------------------


def test_a_prompt_and_its_messages_are_the_same_conversation() -> None:
    prompt = prompt_of("Name a colour.", None, CHAT[:3])
    assert prompt == Prompt("Name a colour.", "", (FIRST,))
    assert messages_of(prompt) == CHAT[:4]
    assert prompt_of("Hi", "", CHAT[:1]) == Prompt("Be brief.\n\nHi")
    assert prompt_of("Hi", "a", None) == Prompt("Hi", "a")
    with pytest.raises(DataError, match=r"history, turn 2: the last question has no answer"):
        prompt_of("Hi", "", CHAT[:2])
    with pytest.raises(DataError, match=r"history, turn 1: has 1 texts, expected a pair"):
        prompt_of("Hi", "", [["a"]])
    with pytest.raises(
        DataError, match=r"instruction: list .*, expected text. Earlier turns go into history"
    ):
        prompt_of(CHAT[:4])


def test_a_prompt_without_its_first_turns_keeps_their_system_message() -> None:
    prompt = Prompt("c", "", (FIRST, Turn("a", "b")))
    assert without_first_turns(prompt, 1) == Prompt("c", "", (Turn("a", "b", "Be brief.\n\n"),))
    assert without_first_turns(prompt, 2) == Prompt("Be brief.\n\nc")


# --- fuzzed ------------------------------------------------------------------------------------------------

texts = st.text(st.sampled_from("ab #\n") | st.characters(codec="utf-8"), max_size=12)
answers = texts.filter(str.strip)
turns = st.lists(st.tuples(texts.filter(lambda text: text.strip() == ""), answers, answers), min_size=1, max_size=4)  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(CHAT),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "from", "content", "value", "weight", "type"]), inner)
    ),
    max_leaves=12,
)


@given(rows=st.lists(turns, min_size=1, max_size=4), longest=st.integers(8, 400))
@settings(max_examples=150, deadline=None)
def test_every_token_of_a_kept_answer_is_supervised_exactly_once(
    tokenizer: PreTrainedTokenizerBase, rows: list[list[tuple[str, str, str]]], longest: int
) -> None:
    keys = tokenizer.convert_tokens_to_ids(["### Response:\n", "### End"])
    conversations = [
        [
            {"role": role, "content": text}
            for turn in row
            for role, text in zip(("system", "user", "assistant"), turn, strict=True)
        ]
        for row in rows
    ]
    read = [conversation_of(messages) for messages in conversations]
    columns = Columns(
        [one.turns[-1].question for one in read], [""] * len(read), [one.turns[-1].answer for one in read],
        history=[one.turns[:-1] for one in read],
    )  # fmt: skip
    ledger = Ledger("", longest)
    kept = {number: (ids, spans) for number, ids, spans in encode_rows(tokenizer, columns, ledger)}
    assert ledger.rows_read == len(rows) == len(kept) + sum(ledger.dropped.values())
    for number, (row, messages) in enumerate(zip(rows, conversations, strict=True), start=1):
        whole = [tokenizer(f"{answer}\n\n", split_special_tokens=True)["input_ids"] for *_, answer in row]
        if number not in kept:
            continue
        ids, spans = kept[number]
        labels = completion_labels({"input_ids": ids, "response_spans": spans})
        supervised = [id for id in labels if id != -100]
        assert supervised == [id for answer in whole[: len(spans)] for id in (*answer, keys[1])]
        assert [ids[start - 1] for start, _ in spans] == [keys[0]] * len(spans)
        assert len(ids) <= longest
        guarded = any(key in str(message) for message in messages for key in ("###", "<|"))
        if not guarded:
            assert ids == tokenizer.apply_chat_template(messages[: 3 * len(spans)])["input_ids"]


@given(anything)
@settings(max_examples=300, deadline=None)
def test_whatever_stands_in_messages_is_read_or_refused_in_words(messages: Any) -> None:
    with suppress(ConversationError):
        assert isinstance(conversation_of(messages), Conversation)
