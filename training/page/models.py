"""Loads the models of the page, each once, and streams their answers to one question."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from training.data.conversations import Prompt, without_first_turns
from training.data.prompt import RESPONSE_KEY
from training.errors import first_line, printable
from training.model.generation import (
    PARAMETERS,
    answer_batch,
    load_model_tokenizer_for_generate,
    prompt_ids,
    sampling_arguments,
)
from training.model.loading import max_positions
from training.options.checks import is_utf8
from training.storage.record import read_run_record

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 0.1  # between two updates of the page
NO_LIMIT = 2**62  # tokens of a prompt


@dataclass
class PageModel:
    """A loaded model. It answers one question at a time.

    Attributes:
        name: what the page calls it.
        identity: what its votes are counted by: the id of its run, else its path or its name on the Hub. A model that
            is trained again at the same path has another one.
    """

    name: str
    path: str
    identity: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Answer:
    """The answer of a model, as far as it is generated.

    Attributes:
        tokens: generated tokens, with the end key.
        left_out: the oldest turns of the conversation that the model does not see, because they leave no room.
        cut_from, cut_to: tokens of the prompt before and after the end of the user's text was cut; 0 if it was not.
        problem: why there is no answer, in words; "" if there is one.
    """

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    limit: int = 0
    left_out: int = 0
    cut_from: int = 0
    cut_to: int = 0
    waiting: bool = False
    stopped: bool = False
    removed: bool = False
    done: bool = False
    problem: str = ""

    @property
    def missing(self) -> bool:
        """Whether there is no answer that a conversation could go on from."""
        return bool(self.problem) or (self.stopped and not self.text)

    def note(self) -> str:
        """How the answer came about, for the line below it."""
        if self.problem:
            return self.problem
        if self.waiting:
            return "Waiting: the model answers another question"
        figures = f"{self.tokens} token{'s' * (self.tokens != 1)}"
        parts = [f"{figures} in {self.seconds:.1f} s" if self.done else f"{figures} so far"]
        if self.stopped:
            parts = [f"Stopped after {figures}"]
        elif self.done and self.tokens >= self.limit:
            parts = [f"Cut off at max_new_tokens, {figures}"]
        elif self.done and not self.text:
            parts = [f"An empty answer, {figures}"]
        if self.left_out:
            turns = "turn is" if self.left_out == 1 else f"{self.left_out:,} turns are"
            parts.append(f"the conversation is too long for the model, so its oldest {turns} left out")
        if self.cut_from:
            parts.append(
                f"the prompt has {self.cut_from:,} tokens, so the end of your text was cut to fit {self.cut_to:,} and "
                "leave room for the answer"
            )
        if self.removed:
            parts.append("the model's folder was removed, so this page is the last to have the model")
        return ". ".join(part[:1].upper() + part[1:] for part in parts)


def names_of(base: str | None, folders: Sequence[str]) -> list[str]:
    """What the page calls the models: the last part of a folder, or all of it if two would have the same name."""
    paths = [*([base] if base else []), *folders]
    names = [Path(path).resolve().name if os.path.isdir(path) else path for path in paths]
    names[: len(paths) - len(folders)] = [f"{name} (base)" for name in names[: len(paths) - len(folders)]]
    return [path if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


def load_models(base: str | None, folders: Sequence[str], trust_remote_code: bool = False) -> list[PageModel]:
    """Loads the base, if there is one, and the models, each once. Raises ModelError."""
    models = []
    for path, name in zip([*([base] if base else []), *folders], names_of(base, folders), strict=True):
        print(f"Loading {printable(name)} ...", flush=True)
        model, tokenizer = load_model_tokenizer_for_generate(path, trust_remote_code=trust_remote_code)
        record = read_run_record(Path(path)) or {}
        location = str(Path(path).resolve()) if os.path.isdir(path) else path
        identity = str(record.get("id") or record.get("started") or location)
        models.append(PageModel(name, location, identity, model, tokenizer))
    return models


def question_problem(instruction: str | None, context: str | None) -> str | None:
    """Why a question cannot be asked, in words; None if it can."""
    if not (instruction or "").strip():
        return "The instruction is empty. Type one"
    for name, text in (("instruction", instruction), ("input", context)):
        if not is_utf8(text or ""):
            return f"The {name} is not valid text: it has half of a character. Type it again"
    return None


def generation_arguments(*values: Any) -> dict[str, Any]:
    """Arguments of `model.generate` for the values of PARAMETERS; None is a field that was left empty.

    Raises ValueError with every problem.
    """
    chosen = {name: value for (name, _, _), value in zip(PARAMETERS, values, strict=True)}
    expected: dict[str, tuple[Callable[[float], bool], str]] = {
        "max_new_tokens": (lambda value: value >= 1 and float(value).is_integer(), "a whole number from 1"),
        "temperature": (lambda value: 0 <= value <= 100, "a number from 0 to 100"),
        "top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
        "top_k": (lambda value: value >= 0 and float(value).is_integer(), "a whole number from 0"),
    }
    problems = [
        f"{name} {'is empty' if chosen[name] is None else chosen[name]}: expected {words}"
        for name, (is_right, words) in expected.items()
        if chosen[name] is None or not is_right(chosen[name])
    ]
    if problems:
        raise ValueError(". ".join(problems))
    whole = {name: int(chosen[name]) for name, kind, _ in PARAMETERS if kind == "long"}
    return sampling_arguments(chosen | whole)


def stream_answers(
    models: Sequence[PageModel],
    prompts: Sequence[Prompt],
    generation: dict[str, Any],
    stop: threading.Event,
) -> Generator[list[Answer], None, None]:
    """Yields the answers of all models so far, again and again until all are done.

    The models answer at the same time. `stop` ends the generation at the next token; it is also set when the caller
    closes this iterator, because the tab of the browser was closed.

    Args:
        prompts: of each model: in a conversation each sees its own earlier answers.
        generation: arguments of `model.generate`; max_new_tokens is needed.
    """
    answers = [Answer(limit=int(generation["max_new_tokens"])) for _ in models]
    threads = [
        threading.Thread(target=_answer, args=(model, prompt, generation, stop, answer), daemon=True)
        for model, prompt, answer in zip(models, prompts, answers, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        while not all(answer.done for answer in answers):
            yield answers
            for thread in threads:
                thread.join(REFRESH_SECONDS / len(threads))
        yield answers
    finally:
        stop.set()


def _answer(
    model: PageModel,
    prompt: Prompt,
    generation: dict[str, Any],
    stop: threading.Event,
    answer: Answer,
) -> None:
    """Fills `answer`. Every failure becomes its `problem`: the page must not wait for a thread that has ended."""
    try:
        while not model.lock.acquire(timeout=REFRESH_SECONDS):
            answer.waiting = True
            if stop.is_set():
                answer.stopped = True
                return
        try:
            answer.waiting = False
            _generate(model, prompt, generation, stop, answer)
        finally:
            model.lock.release()
    except torch.OutOfMemoryError:
        answer.problem = "The GPU ran out of memory. Lower max_new_tokens, or shorten your text"
    except ValueError as error:
        answer.problem = str(error)
    except Exception as error:
        logger.warning("%s could not answer: %s", model.name, first_line(error))
        answer.problem = f"No answer ({first_line(error)})"
    finally:
        answer.waiting = False
        answer.done = True


def _generate(
    model: PageModel,
    prompt: Prompt,
    generation: dict[str, Any],
    stop: threading.Event,
    answer: Answer,
) -> None:
    """Answers with the prompt, the cut and the text of `generate_responses`. Raises what generation raises."""
    room = max_positions(model.model.config) - answer.limit
    ids = _fitting_ids(model.tokenizer, prompt, room, answer)
    answer.removed = os.path.isabs(model.path) and not os.path.isdir(model.path)
    start = time.perf_counter()
    streamer = _AnswerStreamer(model.tokenizer, answer, start)
    [text] = answer_batch(
        [ids],
        model.model,
        model.tokenizer,
        model.model.device,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([_StopSignal(stop)]),
        **generation,
    )
    answer.text, answer.stopped = text, stop.is_set()


def _fitting_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, room: int, answer: Answer) -> list[int]:
    """Token ids of a prompt, at most `room`. Notes in `answer` what was left out or cut. Raises ValueError."""

    def ids(asked: Prompt, most: int) -> list[int]:
        return prompt_ids(tokenizer, [asked], most)[0]

    fitting, key = ids(prompt, room), tokenizer.convert_tokens_to_ids(RESPONSE_KEY)
    # Text never becomes the response key, so there is one for each turn that the model sees.
    answer.left_out = len(prompt.history) + 1 - fitting.count(key)
    whole = ids(without_first_turns(prompt, answer.left_out), NO_LIMIT)
    if len(fitting) < len(whole):
        answer.cut_from, answer.cut_to = len(whole), len(fitting)
    return fitting


class _AnswerStreamer(TextStreamer):
    """Writes the text into an Answer as it is generated, without white space at its ends, as the whole answer has it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answer: Answer, start: float) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.answer, self.start, self.streamed = answer, start, ""

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:  # the first call brings the prompt
            self.answer.tokens += 1
            self.answer.seconds = time.perf_counter() - self.start
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.streamed += text
        self.answer.text = self.streamed.strip()


class _StopSignal(StoppingCriteria):
    """Ends the generation when an event is set."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)
