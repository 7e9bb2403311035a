"""Blind votes: nothing says whose an answer is before the vote, and no vote is lost or counted twice."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import Counter
from pathlib import Path

import pytest

from training.data.conversations import Prompt
from training.errors import DataError
from training.page import blind, votes
from training.page.models import PageModel
from training.page.state import Page
from training.page.votes import HELD_OUT, OWN, Pair, Question, Tally, Votes

GREEDY = (8, 0, 1, 0)  # the values of PARAMETERS


def pair(page: Page, number: int = 0, swapped: bool = False, source: str = HELD_OUT) -> Pair:
    models = page.models[::-1] if swapped else page.models
    return Pair(Question(Prompt(f"Say {number}."), source), (models[0], models[1]), ("one", "two"), {})


def test_the_wilson_interval_has_the_published_values() -> None:
    # R: binom::binom.confint(8, 10, methods = "wilson"), and (0, 10)
    assert votes.wilson_interval(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert votes.wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)


def test_a_tie_is_half_a_win_for_each() -> None:
    tally = Tally(wins=3, ties=2, losses=1)
    assert tally.rate == 4 / 6
    assert tally.interval() == votes.wilson_interval(4 / 6, 6)
    low, high = Tally(wins=1, ties=2, losses=3).interval()
    assert tally.interval() == pytest.approx((1 - high, 1 - low))


def test_votes_are_counted_for_the_model_and_not_for_the_side(page: Page) -> None:
    base, tuned = page.models
    page.votes.add(pair(page, 0), "b")
    page.votes.add(pair(page, 1, swapped=True), "a")
    page.votes.add(pair(page, 2), "tie")
    page.votes.add(pair(page, 3), "a")
    assert page.votes.tally(tuned, base) == Tally(wins=2, ties=1, losses=1)
    assert page.votes.tally(base, tuned) == Tally(wins=1, ties=1, losses=2)
    assert blind.tallies(page).startswith(
        "tuned against base: 2 better, 1 tie, 1 worse. It wins 62% of 4 votes"
    )


def test_votes_go_on_where_they_stopped(page: Page) -> None:
    page.votes.add(pair(page, 0), "a")
    page.votes.add(pair(page, 1), "tie")
    again = Votes.open(page.votes.file)
    assert again.entries == page.votes.entries
    asked = {votes.next_row(page.rows, page.models, again)[0] for _ in range(20)}
    assert asked == {page.rows[2]}, "rows with a vote are not asked again"
    again.add(pair(page, 2), "b")
    assert votes.next_row(page.rows, page.models, again) is None
    assert blind.rows_left(page).startswith("1 of 3 held-out rows have no vote yet")
    trained_again = [page.models[0], PageModel("tuned", "", "run-2", *[None] * 2)]
    assert votes.next_row(page.rows, trained_again, again), "the votes belong to the run, not to its name"


def test_a_vote_on_a_question_of_ones_own_answers_no_row(page: Page) -> None:
    page.votes.add(pair(page, 0, source=OWN), "a")
    assert not page.votes.voted(*page.models)
    assert page.votes.tally(*page.models).count == 1


def test_an_incomplete_last_line_is_ended_and_no_other_vote_is_lost(page: Page) -> None:
    page.votes.add(pair(page, 0), "a")
    whole = page.votes.file.read_bytes()
    page.votes.file.write_bytes(whole + whole[: len(whole) // 2])  # the page was killed in its second write
    again = Votes.open(page.votes.file)
    assert len(again.entries) == 1
    again.add(pair(page, 1), "b")
    assert page.votes.file.read_bytes().startswith(whole)
    assert [entry["vote"] for entry in votes.read(page.votes.file)] == ["a", "b"]


def test_a_vote_that_cannot_be_written_is_said_and_can_be_given_again(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.votes.add(pair(page, 0), "a")
    before = page.votes.file.read_bytes()
    shown = pair(page, 1)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    words, counts = blind.vote(page, shown, "b")
    assert "Your vote is not stored" in words
    assert "No space left" in words
    assert "tuned" not in words, "the names stay hidden until the vote is stored"
    assert "1 vote " in counts
    assert page.votes.file.read_bytes() == before
    monkeypatch.setattr(os, "fsync", fsync)
    words, counts = blind.vote(page, shown, "b")
    assert words.startswith("Your vote: B is better. A is base, B is tuned.")
    assert "2 votes " in counts
    words, _ = blind.vote(page, shown, "a")
    assert words == "You have voted: B is better. A is base, B is tuned"
    assert len(votes.read(page.votes.file)) == 2, "a second press is no second vote"


def test_a_file_that_holds_something_else_or_is_published_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "rows.jsonl"
    other.write_text(json.dumps({"instruction": "x", "output": "y"}) + "\n")
    with pytest.raises(DataError, match="line 1 is no vote of this page"):
        votes.read(other)
    other.write_text("some text\n")
    assert "line 1 is no vote" in str(votes.file_problem(other, []))
    run = tmp_path / "run"
    (run / "deeper").mkdir(parents=True)
    (run / "run.json").touch()
    (tmp_path / "link").symlink_to(run)
    for file in (run / "votes.jsonl", run / "deeper" / "votes.jsonl", tmp_path / "link" / "votes.jsonl"):
        assert "the folder of a model, which is published" in str(votes.file_problem(file, []))
    base = tmp_path / "base"
    base.mkdir()
    assert "the folder of a model" in str(votes.file_problem(base / "votes.jsonl", [str(base)]))
    assert votes.file_problem(tmp_path / "new" / "votes.jsonl", [str(base)]) is None


def test_the_order_of_the_answers_is_random_and_the_least_compared_models_come_first(page: Page) -> None:
    first = Counter(votes.next_row(page.rows, page.models, page.votes)[1][0].name for _ in range(200))
    assert 60 < first["base"] < 140, first
    third = PageModel("third", "", "run-3", *[None] * 2)
    three = [*page.models, third]
    for number in range(2):
        page.votes.add(pair(page, number), "a")
    compared = [{m.name for m in votes.next_row(page.rows, three, page.votes)[1]} for _ in range(30)]
    assert {"base", "tuned"} not in compared


def test_nothing_says_whose_an_answer_is_before_the_vote(page: Page) -> None:
    *before, (shown, status, question, first, second) = blind.ask_row(page, "session", *GREEDY)
    assert [step[0] for step in before] == [None] * len(before), "both answers come at once"
    assert shown.models[0] is not shown.models[1]
    assert {first, second} == {"AB", "A A A A"}
    assert (first == "AB") == (shown.models[0].name == "tuned")
    text = " ".join([status, question, first, second, blind.tallies(page)])
    assert not any(word in text for word in ("tuned", "base", "run-1", "token"))
    words, _ = blind.vote(page, shown, "tie")
    assert f"A is {shown.models[0].name}, B is {shown.models[1].name}" in words
    stored = json.loads(page.votes.file.read_text())
    assert stored["a"] == {"name": shown.models[0].name, "id": shown.models[0].identity, "answer": first}
    assert stored["vote"] == "tie"
    assert stored["generation"]["max_new_tokens"] == 8


def test_what_cannot_be_voted_on_is_said(page: Page) -> None:
    assert blind.vote(page, None, "a")[0] == blind.NO_PAIR
    assert (
        list(blind.ask_own(page, "session", "  ", "", *GREEDY))[-1][1] == "The instruction is empty. Type one"
    )
    *_, (shown, status, *_) = blind.ask_own(page, "session", "Hello", "", None, 0, 1, 0)
    assert shown is None
    assert status == "max_new_tokens is empty: expected a whole number from 1"
    for number in range(3):
        page.votes.add(pair(page, number), "a")
    assert list(blind.ask_row(page, "session", *GREEDY))[-1][1].startswith("All 3 held-out rows have a vote")


def test_a_stopped_pair_is_not_voted_on(page: Page) -> None:
    running = blind.ask_own(page, "session", "Say A.", "", 30_000, 0, 1, 0)
    assert next(running)[1] == "The models answer ..."
    threading.Timer(0.5, page.stop, ["session"]).start()
    *_, (shown, status, _, first, second) = running
    assert (shown, status, first, second) == (None, "Stopped. There is nothing to vote on", "", "")


def test_a_failure_does_not_say_which_model_failed(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(page.models[1].model, "generate", fail)
    *_, (shown, status, *answers) = blind.ask_row(page, "session", *GREEDY)
    assert shown is None
    assert status == "No answer (RuntimeError: device lost)"
    assert answers[1:] == ["", ""]
