"""Conversations of the page: each model goes on from its own answers; turns are shown, left out in words, and voted on."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTJForCausalLM, PreTrainedTokenizerBase

from tests.conftest import jsonl
from tests.page.conftest import RIVER, save_run
from training.data.conversations import Prompt, Turn
from training.data.prompt import render_prompt
from training.errors import DataError
from training.model.generation import prompt_ids
from training.page import ask, blind, votes
from training.page.models import PageModel, stream_answers
from training.page.questions import examples, held_out_rows, rows_of_file, saved_answers
from training.page.state import MOST_CHATS, Page, question_text
from training.page.votes import HELD_OUT, Pair, Question, Votes
from training.storage.record import finished_run

SAMPLING = (5, 0, 1, 0)  # the values of PARAMETERS: "A A A" of the base, and "AB" of the tuned model
GREEDY = {"max_new_tokens": 5, "do_sample": False, "top_p": None, "top_k": None}
TWO_TURNS = Prompt("And C?", "", (Turn("Say A.", "A"), Turn("Say B.", "B", "Be brief.\n\n")))


@pytest.fixture
def asked(page: Page, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The prompts of each model as text, in the order in which they were asked."""
    prompts: dict[str, list[str]] = {model.name: [] for model in page.models}

    def watch(model: PageModel) -> None:
        generate = model.model.generate

        def watched(ids: Any, **how: Any) -> Any:
            prompts[model.name].append(model.tokenizer.decode(ids[0]))
            return generate(ids, **how)

        monkeypatch.setattr(model.model, "generate", watched)

    for model in page.models:
        watch(model)
    return prompts


def last(page: Page, instruction: str, context: str = "", session: str = "session") -> ask.View:
    *_, view = ask.answers(page, session, instruction, context, *SAMPLING)
    return view


def test_a_follow_up_is_asked_after_the_answers_that_the_model_gave_itself(
    page: Page, asked: dict[str, list[str]]
) -> None:
    first, *_, _ = ask.answers(page, "session", "Say it.", "twice", *SAMPLING)
    assert first.fields == ("", ""), "the fields are free for the next question"
    assert first.continues
    view = last(page, "And now?")
    beginning = render_prompt("Say it.", "twice")
    assert asked["base"] == [beginning, f"{beginning}A A A\n\n### End{render_prompt('And now?')}"]
    assert asked["tuned"] == [beginning, f"{beginning}AB\n\n### End{render_prompt('And now?')}"]
    base, tuned = view.models
    assert base.conversation == "Question: Say it.\n\nInput:\ntwice\n\nAnswer: A A A\n\nQuestion: And now?"
    assert tuned.conversation == "Question: Say it.\n\nInput:\ntwice\n\nAnswer: AB\n\nQuestion: And now?"
    assert (base.answer, tuned.answer) == ("A A A", "AB")
    last(page, "Why?")
    assert asked["tuned"][2] == f"{asked['tuned'][1]}AB\n\n### End{render_prompt('Why?')}"


def test_a_new_conversation_forgets_the_former_one_and_those_of_others_go_on(
    page: Page, asked: dict[str, list[str]]
) -> None:
    last(page, "Say A.")
    last(page, "Say B.", session="other")
    view = ask.new_conversation(page, "session")
    assert view == ask.View("", [ask.Shown("", "", "")] * 2, ("", ""), False)
    last(page, "Say C.")
    last(page, "Say D.", session="other")
    assert asked["tuned"][2:] == [
        render_prompt("Say C."),
        f"{render_prompt('Say B.')}AB\n\n### End{render_prompt('Say D.')}",
    ]


def test_a_question_without_an_answer_is_no_part_of_the_conversation_and_comes_back_to_the_field(
    page: Page, asked: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(page.models[1].model, "generate", fail)
        view = last(page, "Say A.")
        assert view.models[1].note == "No answer (RuntimeError: device lost)"
        assert view.fields is None, "one model has answered"
    view = last(page, "Say B.")
    assert asked["tuned"] == [render_prompt("Say B.")]
    assert asked["base"][1] == f"{render_prompt('Say A.')}A A A\n\n### End{render_prompt('Say B.')}"
    assert view.models[1].conversation == (
        "Question: Say A.\n\nNo answer, so the model does not see this question again\n\nQuestion: Say B."
    )
    *_, view = ask.answers(page, "session", "Say C.", "x", 2**16, 0, 1, 0)
    assert "Ask for fewer new tokens" in view.models[0].note
    assert view.fields == ("Say C.", "x")
    assert (
        last(page, "Say D.")
        .models[1]
        .conversation.endswith("Question: Say B.\n\nAnswer: AB\n\nQuestion: Say D.")
    )


def test_a_stopped_answer_is_continued_from_where_it_stopped(page: Page, asked: dict[str, list[str]]) -> None:
    running = ask.answers(page, "session", "Say A.", "", 30_000, 0, 1, 0)
    while "A A A" not in next(running).models[0].answer:
        pass
    follow_up = ask.answers(page, "session", "And?", "", *SAMPLING)  # it stops the question before
    *_, view = follow_up
    [answer, _] = [exchange.answers[0] for exchange in page.chat("session").exchanges]
    assert answer.stopped
    assert asked["base"][1] == f"{render_prompt('Say A.')}{answer.text}\n\n### End{render_prompt('And?')}"
    *_, late = running
    assert late.models == view.models, "the late view of the stopped question shows the conversation as it is"


def test_a_conversation_that_is_begun_anew_meanwhile_is_not_shown_again(page: Page) -> None:
    running = ask.answers(page, "session", "Say A.", "", 30_000, 0, 1, 0)
    next(running)
    view = ask.new_conversation(page, "session")
    *_, late = running
    assert late.models == view.models == [("", "", "")] * 2
    assert late.fields is None
    assert page.chat("session").exchanges == []


def test_the_oldest_turns_of_a_long_conversation_are_left_out_and_the_page_says_so(
    brief_model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PageModel("tuned", "hub/tuned", "run-1", brief_model, tokenizer)

    def note(prompt: Prompt, positions: int) -> str:
        monkeypatch.setattr(brief_model.config, "n_positions", positions)
        *_, [answer] = stream_answers([model], [prompt], GREEDY, threading.Event())
        assert answer.text == "AB"
        return answer.note().partition(". ")[2]

    whole = len(prompt_ids(tokenizer, [TWO_TURNS], 10_000)[0]) + GREEDY["max_new_tokens"]
    last_turn = (
        len(prompt_ids(tokenizer, [Prompt("Be brief.\n\nAnd C?")], 10_000)[0]) + GREEDY["max_new_tokens"]
    )
    assert note(TWO_TURNS, whole) == ""
    assert note(TWO_TURNS, whole - 1) == (
        "The conversation is too long for the model, so its oldest turn is left out"
    )
    assert note(TWO_TURNS, last_turn) == (
        "The conversation is too long for the model, so its oldest 2 turns are left out"
    )
    assert note(TWO_TURNS, last_turn - 1) == (
        "The conversation is too long for the model, so its oldest 2 turns are left out. The prompt has "
        f"{last_turn - 5} tokens, so the end of your text was cut to fit {last_turn - 6} and leave room for the answer"
    )


def test_only_the_latest_conversations_are_kept_in_memory(page: Page) -> None:
    for number in range(MOST_CHATS + 5):
        page.new_chat(f"session {number}")
    assert len(page.chats) == MOST_CHATS
    assert "session 4" not in page.chats


def test_an_example_with_earlier_turns_shows_them_and_is_asked_after_them(
    page: Page, asked: dict[str, list[str]]
) -> None:
    page.examples = [TWO_TURNS]
    page.saved = [{}, {TWO_TURNS: (60, "C")}]
    last(page, "Say A.")
    view = ask.new_conversation(page, "session", 0)
    earlier = "Question: Say A.\n\nAnswer: A\n\nQuestion: Be brief.\n\nSay B.\n\nAnswer: B"
    assert view.fields == ("And C?", "")
    assert view.models == [
        (earlier, "", ""),
        (earlier, "C", "Saved by the training run at step 60, greedy"),
    ]
    view = last(page, "And C?")
    assert view.models[1].conversation == f"{earlier}\n\nQuestion: And C?"
    assert asked["tuned"][1] == (
        f"{render_prompt('Say A.')}A\n\n### End{render_prompt('Be brief.' + chr(10) * 2 + 'Say B.')}B\n\n### End"
        f"{render_prompt('And C?')}"
    )


# --- blind votes -------------------------------------------------------------------------------------


def test_a_row_of_several_turns_is_asked_shown_and_voted_on_with_them(
    page: Page, asked: dict[str, list[str]]
) -> None:
    page.rows = [Question(TWO_TURNS, HELD_OUT), Question(Prompt("And C?"), HELD_OUT)]
    page.votes.add(Pair(page.rows[1], (page.models[0], page.models[1]), ("one", "two"), {}), "a")
    *_, (shown, status, question, *_) = blind.ask_row(page, "session", *SAMPLING)
    assert shown.question.prompt == TWO_TURNS, "a vote on the same question without turns is another vote"
    assert question == (
        "Question: Say A.\n\nAnswer: A\n\nQuestion: Be brief.\n\nSay B.\n\nAnswer: B\n\nQuestion: And C?"
    )
    assert status == blind.VOTE
    assert asked["base"] == asked["tuned"]
    assert asked["base"][0].count("### End") == 2
    blind.vote(page, shown, "tie")
    stored = [json.loads(line) for line in page.votes.file.read_text().splitlines()]
    assert "history" not in stored[0]
    assert stored[1]["history"] == [
        {"role": "user", "content": "Say A."},
        {"role": "assistant", "content": "A"},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say B."},
        {"role": "assistant", "content": "B"},
    ]
    assert (stored[1]["instruction"], stored[1]["input"]) == ("And C?", "")
    assert votes.next_row(page.rows, page.models, Votes.open(page.votes.file)) is None


def test_turns_that_were_left_out_are_said_without_the_model(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.rows = [Question(TWO_TURNS, HELD_OUT)]
    monkeypatch.setattr(page.models[1].model.config, "n_positions", 60)
    *_, (_, status, *_) = blind.ask_row(page, "session", *SAMPLING)
    assert status == f"{blind.VOTE}. The conversation was too long, and its oldest turns were left out"


OLD_VOTE = (
    '{"time": "2026-12-01T10:00:00Z", "source": "held-out", "instruction": "Say 1.", "input": "", '
    '"a": {"name": "tuned", "id": "run-1", "answer": "1"}, "b": {"name": "base", "id": "hub/base", "answer": "2"}, '
    '"vote": "a", "generation": {"max_new_tokens": 256}}\n'
)


def test_votes_of_older_pages_count_and_a_damaged_history_is_no_vote(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "old.jsonl"
    file.write_text(OLD_VOTE)
    old = Votes.open(file)
    base, tuned = page.models
    assert old.voted(base, tuned) == {Prompt("Say 1.")}
    assert old.tally(tuned, base).wins == 1
    for history in (5, [{"role": "user", "content": "x"}], [{"role": "nobody", "content": "x"}]):
        file.write_text(json.dumps(json.loads(OLD_VOTE) | {"history": history}) + "\n")
        assert "line 1 is no vote of this page" in str(votes.file_problem(file, []))


# --- questions ---------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "user", "content": "Say A."},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "And B?"},
]
ANSWER = {"role": "assistant", "content": "B"}
EARLIER = (Turn("Say A.", "A"),)


def test_questions_of_a_file_may_have_messages_or_a_history(tmp_path: Path) -> None:
    rows = [
        {"messages": MESSAGES},
        {"messages": [*MESSAGES, ANSWER]},
        {"instruction": "And C?", "output": "C", "history": [["Say A.", "A"]]},
        {"instruction": "Say D.", "output": "D"},
    ]
    expected = [Prompt("And B?", "", EARLIER), Prompt("And C?", "", EARLIER), Prompt("Say D.")]
    file = jsonl(tmp_path / "rows.jsonl", rows)
    assert rows_of_file(file) == [Question(prompt, HELD_OUT) for prompt in expected]
    folder = tmp_path / "folder"
    folder.mkdir()
    unusable = {"messages": [{"role": "nobody", "content": "x"}]}
    jsonl(folder / "rows.jsonl", [*rows[1:], unusable, {"instruction": " ", "output": "x"}])
    assert rows_of_file(str(folder)) == [Question(prompt, HELD_OUT) for prompt in expected]
    assert question_text(Prompt("Add.", "1 2")) == "Add.\n\nInput:\n1 2"


def test_a_file_that_asks_nothing_is_refused_and_not_replaced_by_held_out_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('instruction,output\n" ",x\n')
    with pytest.raises(DataError, match=r"rows\.csv: no row asks anything"):
        rows_of_file(str(tmp_path / "rows.csv"))


def test_held_out_rows_and_saved_answers_have_their_earlier_turns(
    brief_model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    run, source = tmp_path / "run", tmp_path / "rows.jsonl"
    save_run(run, brief_model, tokenizer, "base", source)
    jsonl(
        source,
        [{"messages": [*MESSAGES[:2], {"role": "user", "content": f"Say {n}."}, ANSWER]} for n in range(40)],
    )
    found = held_out_rows(run, finished_run(run), tokenizer)
    assert len(found) == 6
    assert {question.prompt.history for question in found} == {EARLIER}
    texts = {"instruction": "And B?", "input": "", "history": MESSAGES[:2]}
    damaged = {"instruction": "x", "input": "", "history": 5}
    samples = [{"step": 60, **entry, "response": "B"} for entry in (texts, damaged)]
    jsonl(run / "samples.jsonl", samples)
    assert examples(run)[0] == Prompt("And B?", "", EARLIER)
    assert saved_answers(run) == {Prompt("And B?", "", EARLIER): (60, "B")}
    assert RIVER not in str(examples(run))
