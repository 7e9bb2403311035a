"""Answers of the page: those of training.generate, while they grow; stop, cut, wait and failures in words."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import GPTJForCausalLM, PreTrainedTokenizerBase

from tests.conftest import POSITIONS
from tests.page.conftest import LONG, RIVER, save_run
from training.data.conversations import Prompt
from training.data.held_out import split_held_out
from training.model.generation import generate_response
from training.model.loading import load_model
from training.page import ask
from training.page.models import (
    Answer,
    PageModel,
    _AnswerStreamer,
    generation_arguments,
    names_of,
    stream_answers,
)
from training.page.questions import examples, held_out_rows, rows_of_file, saved_answers
from training.page.state import Page
from training.page.votes import HELD_OUT, Question
from training.storage.record import finished_run

GREEDY = {"max_new_tokens": 20, "do_sample": False, "top_p": None, "top_k": None}


def last_answers(models: list[PageModel], prompt: Prompt, generation: dict) -> list:
    *_, answers = stream_answers(models, [prompt] * len(models), generation, threading.Event())
    return answers


def test_the_page_answers_as_generate_does_also_with_a_prompt_that_is_cut(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_model(str(base_folder), tokenizer, torch.float32, seed=42).eval()
    shown = PageModel("random", "hub/random", "hub/random", model, tokenizer)
    for instruction, context in (("Name a colour.", ""), ("Name", "red, blue"), ("word " * 400, "")):
        [answer] = last_answers([shown], Prompt(instruction, context), GREEDY)
        expected = generate_response(instruction, context, model=model, tokenizer=tokenizer, **GREEDY)
        assert answer.text == expected
        assert bool(answer.cut_from) == (len(instruction) > 1000)
    assert answer.cut_to == POSITIONS - 20
    assert f"so the end of your text was cut to fit {answer.cut_to} and leave room" in answer.note()


def test_an_answer_grows_and_both_models_answer_at_the_same_time(page: Page) -> None:
    seen = []
    for view in ask.answers(page, "session", "Say A.", "", 400, 0, 1, 0):
        assert view.problem == ""
        seen.append(view.models)
    lengths = [len(base.answer) for base, _ in seen]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 2, "it grows on the page"
    base, tuned = seen[-1]
    assert tuned.answer == "AB"
    assert tuned.note.startswith("3 tokens in ")
    assert base.note == "Cut off at max_new_tokens, 400 tokens"
    assert lengths[0] == 0 or "AB" in [tuned.answer for base, tuned in seen if len(base.answer) < 800], (
        "before the other ended"
    )


def test_an_answer_on_its_way_has_no_white_space_at_its_ends_so_that_it_never_gets_shorter(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    answer = Answer()
    streamer = _AnswerStreamer(tokenizer, answer, 0.0)
    shown = []
    for text in ("\n", "A ", "B ", ""):
        streamer.on_finalized_text(text)
        shown.append(answer.text)
    assert shown == ["", "A", "A B", "A B"]


def test_stop_ends_the_generation_at_the_next_token(page: Page) -> None:
    running = ask.answers(page, "session", "Say A.", "", 30_000, 0, 1, 0)
    other = ask.answers(page, "other", "Say A.", "", 20, 0, 1, 0)
    while "A A A" not in next(running).models[0].answer:
        pass
    next(other)
    page.stop("other session")  # that of another tab, which asks nothing
    time.sleep(0.3)
    assert next(other).models[0].note == "Waiting: the model answers another question"
    page.stop("session")
    *_, view = running
    words, count, *_ = view.models[0].note.removeprefix("Stopped after").split()[::-1]
    assert words == "tokens"
    assert 3 < int(count) < 20_000
    assert view.models[1].note.startswith("3 tokens"), "the model that had ended keeps its answer"
    *_, view = other
    assert view.models[0].answer.split() == ["A"] * 10, "then the waiting question is answered"


def test_a_closed_tab_ends_the_generation(page: Page) -> None:
    running = ask.answers(page, "session", "Say A.", "", 30_000, 0, 1, 0)
    next(running)
    running.close()
    assert page.models[0].lock.acquire(timeout=5), "the model is free for the next question"
    page.models[0].lock.release()


def test_a_failure_is_said_in_words_and_the_model_answers_the_next_question(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> list:
        def generate(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(page.models[1].model, "generate", generate)
        return last_answers(page.models[1:], Prompt("Say A."), GREEDY)

    assert "Lower max_new_tokens" in fail(torch.OutOfMemoryError("CUDA"))[0].note()
    assert fail(RuntimeError("device lost"))[0].note() == "No answer (RuntimeError: device lost)"
    monkeypatch.undo()
    assert last_answers(page.models[1:], Prompt("Say A."), GREEDY)[0].text == "AB"
    [answer] = last_answers(page.models[1:], Prompt("Say A."), GREEDY | {"max_new_tokens": LONG})
    assert "Ask for fewer new tokens" in answer.note()


def test_a_model_whose_folder_was_removed_still_answers_and_says_so(
    brief_model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = PageModel("tuned", str(tmp_path / "gone"), "run-1", brief_model, tokenizer)
    [answer] = last_answers([model], Prompt("Say A."), GREEDY)
    assert answer.text == "AB"
    assert "The model's folder was removed" in answer.note()


@pytest.mark.parametrize("instruction", ["", " \n", None, "half \ud83d"])
def test_a_question_without_text_is_not_asked(page: Page, instruction: str | None) -> None:
    [view] = ask.answers(page, "session", instruction, None, 8, 0, 1, 0)
    assert view.problem.startswith("The instruction is ")
    assert view.models == [("", "", "")] * 2
    assert view.fields is None, "what was typed stays"


def test_sampling_settings_are_checked_together() -> None:
    assert generation_arguments(8, 0, 0.9, 5) == {"max_new_tokens": 8, "temperature": None, "do_sample": False, "top_p": None, "top_k": None}  # fmt: skip
    assert generation_arguments(8.0, 0.5, 0.9, 5.0) == {
        "max_new_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
    }
    with pytest.raises(ValueError, match="max_new_tokens 0: expected") as problems:
        generation_arguments(0, -1, 1.5, None)
    assert [part.split()[0] for part in str(problems.value).split(". ")] == [
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
    ]
    with pytest.raises(ValueError, match="max_new_tokens inf: expected a whole number from 1"):
        generation_arguments(float("inf"), 1, 0.9, float("inf"))  # JSON's 1e999


def test_models_have_names_that_differ(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "dolly", tmp_path / "b" / "dolly"
    for folder in (first, second):
        folder.mkdir(parents=True)
    assert names_of("gpt2", [str(first)]) == ["gpt2 (base)", "dolly"]
    assert names_of(None, [str(first), str(second)]) == [str(first), str(second)]


def test_the_questions_are_the_held_out_rows_of_the_run_and_its_saved_answers(
    brief_model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    save_run(tmp_path / "run", brief_model, tokenizer, "base", tmp_path / "rows.jsonl")
    found = held_out_rows(tmp_path / "run", finished_run(tmp_path / "run"), tokenizer)
    all_rows = rows_of_file(str(tmp_path / "rows.jsonl"))
    import datasets

    numbered = datasets.Dataset.from_dict({"row": range(40)})
    assert sorted(found) == sorted(all_rows[number] for number in split_held_out(numbered, 6, 42)[1]["row"])
    assert examples(tmp_path / "run") == [Prompt(RIVER), *examples(tmp_path)]
    assert saved_answers(tmp_path / "run") == {Prompt(RIVER): (60, "The Rhine")}
    assert saved_answers(tmp_path / "run", step=0) == {Prompt(RIVER): (0, "A A A")}
    assert len(examples(tmp_path)) == 5, "Dolly's own"
    (tmp_path / "rows.csv").write_text("instruction,output\nName a river.,Rhine\n")
    assert rows_of_file(str(tmp_path / "rows.csv")) == [Question(Prompt("Name a river."), HELD_OUT)]
