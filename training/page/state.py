"""What the page keeps while it runs, for all sessions of all browsers, and how it shows questions as text."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from training.data.conversations import History, Prompt, Turn
from training.data.prompt import question

if TYPE_CHECKING:
    from training.page.models import Answer, PageModel
    from training.page.votes import Question, Votes

MOST_CHATS = 1000  # kept in memory; a browser that is closed does not always say so


@dataclass
class Exchange:
    """A question of the tab Ask, and the answer of each model as far as it is generated."""

    instruction: str
    input: str
    answers: list[Answer]

    @property
    def missing(self) -> bool:
        """Whether no model has an answer that the conversation could go on from."""
        return all(answer.missing for answer in self.answers)


@dataclass
class Chat:
    """The conversation of a session in the tab Ask. Each model has answers of its own.

    Attributes:
        example: the number of the example that was chosen; None for none.
        earlier: the turns that come with this example.
    """

    example: int | None = None
    earlier: History = ()
    exchanges: list[Exchange] = field(default_factory=list)

    def prompt(self, model: int, instruction: str, input: str) -> Prompt:
        """What a model is asked next: it sees the answers that it gave itself. A question without one is left out."""
        answered = [
            Turn(question(exchange.instruction, exchange.input), exchange.answers[model].text)
            for exchange in self.exchanges
            if not exchange.answers[model].missing
        ]
        return Prompt(instruction, input, (*self.earlier, *answered))


@dataclass
class Page:
    """The models and questions of the page, and the votes.

    Attributes:
        rows: held-out rows to vote on; `rows_problem` says why there are none.
        examples: prompts to choose from.
        saved: for each model the answers that its run has saved: {prompt: (step, answer)}.
        stops: the stop signal of the question that each session of a browser asks at the moment.
        chats: the conversation of each session.
    """

    models: list[PageModel]
    votes: Votes
    rows: list[Question] = field(default_factory=list)
    rows_problem: str = ""
    examples: list[Prompt] = field(default_factory=list)
    saved: Sequence[Mapping[Prompt, tuple[int, str]]] = ()
    stops: dict[str, threading.Event] = field(default_factory=dict)
    chats: dict[str, Chat] = field(default_factory=dict)

    def new_stop(self, session: str) -> threading.Event:
        """The stop signal of a new question. A question that this session still asks is stopped."""
        self.stop(session)
        return self.stops.setdefault(session, threading.Event())

    def stop(self, session: str) -> None:
        """Ends what the models generate for this session."""
        if stop := self.stops.pop(session, None):
            stop.set()

    def chat(self, session: str) -> Chat:
        """The conversation of this session."""
        return self.chats.get(session) or self._keep(session, Chat())

    def new_chat(self, session: str, example: int | None = None) -> Chat:
        """Begins a new conversation, also one with an example. What the models generate for the former one is stopped."""
        self.stop(session)
        return self._keep(session, Chat(example, () if example is None else self.examples[example].history))

    def _keep(self, session: str, chat: Chat) -> Chat:
        while session not in self.chats and len(self.chats) >= MOST_CHATS:
            self.chats.pop(next(iter(self.chats)), None)
        self.chats[session] = chat
        return chat


def question_text(prompt: Prompt) -> str:
    """A question as the page shows it, with the turns before it."""
    text = "\n\nInput:\n".join(filter(None, (prompt.instruction, prompt.input)))
    return "\n\n".join([*history_texts(prompt.history), f"Question: {text}"]) if prompt.history else text


def history_texts(history: History) -> list[str]:
    """The questions and answers of earlier turns."""
    return [
        text
        for turn in history
        for text in (f"Question: {turn.system}{turn.question}", f"Answer: {turn.answer}")
    ]
