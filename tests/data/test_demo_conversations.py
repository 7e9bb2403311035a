"""The demo's rows of two turns: true, rendered as conversations, and not held out in a form that is trained on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from training.consts import DEFAULT_SEED, DEMO
from training.data import demo_rows as tasks
from training.data.conversations import messages_of, prompt_of
from training.data.demo_rows import Row, demo_rows, first_question, rows_by_task
from training.data.held_out import split_held_out
from training.data.ledger import Ledger
from training.data.rows import read_columns
from training.data.tokens import encode_rows, prepare_dataset
from training.model.tokenizer import load_tokenizer
from training.plan.presets import DEMO_RECIPE

NEXT = dict(pairwise(tasks.DAYS + tasks.DAYS[:1])) | dict(pairwise(tasks.MONTHS + tasks.MONTHS[:1]))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return demo_rows()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(DEMO)


def test_one_kind_of_row_is_partly_a_conversation_of_two_turns() -> None:
    conversations = {
        name: sum("history" in row for row in rows)
        for name, rows in rows_by_task().items()
        if any("history" in row for row in rows)
    }
    assert conversations == {"what_comes_next": 114}
    assert len(rows_by_task()["what_comes_next"]) == 309


@pytest.mark.parametrize(
    ("first", "answer", "follow_up", "output"),
    [
        ("Which day follows Monday?", "Tuesday", "And after that?", "Wednesday"),
        ("Which day is the next one after Saturday?", "Sunday", "And after that?", "Monday"),
        ("What month comes after November?", "December", "And then?", "January"),
        ("What month comes after December?", "January", "What comes next?", "February"),
    ],
)
def test_a_follow_up_goes_on_where_the_first_turn_ended(
    rows: list[Row], first: str, answer: str, follow_up: str, output: str
) -> None:
    [row] = [row for row in rows if first_question(row) == (first, "")]
    assert row == {
        "instruction": follow_up,
        "input": "",
        "output": output,
        "history": [[first, answer]],
    }


def test_every_answer_follows_the_one_before_it_and_only_the_first_turn_says_which(rows: list[Row]) -> None:
    for row in rows:
        if "history" not in row:
            continue
        [[question, answer]] = row["history"]
        [asked] = [word for word in question.strip(".?").split() if word in NEXT]
        assert (NEXT[asked], NEXT[answer]) == (answer, row["output"])
        assert not row["input"]
        assert not set(row["instruction"].strip("?").split()) & {*NEXT, "day", "month"}
    # each follow-up has every answer, so a guess without the first turn is seldom right
    for follow_up in tasks.FOLLOW_UPS:
        assert {row["output"] for row in rows if row["instruction"] == follow_up} == set(NEXT)


def test_a_conversation_has_its_text_and_its_loss_on_both_answers(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    columns = read_columns(DEMO)
    place = columns.history.index(prompt_of("", "", [["Which day follows Monday?", "Tuesday"]]).history)
    intro = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
    )
    encoded = {
        number: (ids, spans) for number, ids, spans in encode_rows(tokenizer, columns, Ledger(DEMO, 512))
    }
    ids, spans = encoded[place + 1]
    assert tokenizer.decode(ids) == (
        f"{intro}\n\n### Instruction:\nWhich day follows Monday?\n\n### Response:\nTuesday\n\n### End"
        f"{intro}\n\n### Instruction:\nAnd after that?\n\n### Response:\nWednesday\n\n### End"
    )
    assert [tokenizer.decode(ids[start:end]) for start, end in spans] == [
        "Tuesday\n\n### End",
        "Wednesday\n\n### End",
    ]


def test_every_conversation_is_tokenised_as_its_chat_template_is(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase
) -> None:
    encoded = encode_rows(tokenizer, read_columns(DEMO), Ledger(DEMO, 512))
    for row, (_, ids, spans) in zip(rows, encoded, strict=True):
        history = row.get("history", [])
        assert len(spans) == len(history) + 1
        if history:
            messages = messages_of(prompt_of(row["instruction"], row["input"], history))
            messages.append({"role": "assistant", "content": row["output"]})
            assert ids == tokenizer.apply_chat_template(messages, return_dict=False)


def test_no_held_out_row_begins_like_one_that_is_trained_on_and_every_held_out_fact_is_trained_on(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    prepared, _ = prepare_dataset(DEMO, tokenizer, 512, cache_root=tmp_path)
    parts = split_held_out(prepared, DEMO_RECIPE["test_size"], DEFAULT_SEED)
    trained, held_out = ([rows[number - 1] for number in part["row"]] for part in parts)
    assert not set(map(first_question, trained)) & set(map(first_question, held_out))
    follow_ups = [row for row in held_out if "history" in row]
    assert follow_ups
    known = {(row["history"][0][1], row["output"]) for row in trained if "history" in row}
    assert {(row["history"][0][1], row["output"]) for row in follow_ups} <= known
