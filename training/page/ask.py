"""The tab Ask: all models answer one question side by side, while they generate. The next question continues the
conversation: each model sees its own earlier answers."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import gradio as gr

from training.data.conversations import Prompt
from training.page.models import REFRESH_SECONDS, generation_arguments, question_problem, stream_answers
from training.page.state import Chat, Exchange, Page, history_texts, question_text

FIRST, NEXT = "Instruction", "Next instruction. It continues the conversation"
# gradio does so only if less than 100 pixels are new.
SHOW_END = """() => setTimeout(() => document.querySelectorAll("[id^=conversation-] textarea").forEach(
    box => { box.scrollTop = box.scrollHeight; }), 50)"""
NO_ANSWER = "No answer, so the model does not see this question again"


class Shown(NamedTuple):
    """The texts of a model: the conversation up to the last question, the answer to it, and how it was answered."""

    conversation: str
    answer: str
    note: str


class View(NamedTuple):
    """What the tab shows.

    Attributes:
        problem: why the question is not asked; "" if it is.
        models: the texts of each model.
        fields: (instruction, input) to put into the fields; None leaves them as they are.
        continues: whether the next question continues a conversation.
    """

    problem: str
    models: list[Shown]
    fields: tuple[str, str] | None
    continues: bool

    def updates(self) -> list[Any]:
        """Values of the components: instruction, input, problem, and those of each model."""
        if self.fields is None:
            fields = [gr.skip(), gr.skip()]
        else:
            label = NEXT if self.continues else FIRST
            fields = [gr.update(value=self.fields[0], label=label), gr.update(value=self.fields[1])]
        boxes: list[Any] = []
        for shown in self.models:
            boxes += [_optional(shown.conversation), shown.answer, shown.note]
        return [*fields, _optional(self.problem), *boxes]


def _optional(text: str) -> dict[str, Any]:
    """The update of a box that is hidden while it is empty."""
    return gr.update(value=text, visible=bool(text))


def ask_tab(page: Page, sampling: Sequence[gr.Number]) -> None:
    """Lays out the tab. `sampling` are the fields of PARAMETERS."""
    instruction = gr.Textbox(label=FIRST, lines=3, max_lines=12, elem_id="instruction")
    context = gr.Textbox(label="Input (optional)", lines=1, max_lines=12, elem_id="input")
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", min_width=90, elem_id="ask")
        stop = gr.Button("Stop", min_width=90, elem_id="stop")
        new = gr.Button("New conversation", min_width=160, elem_id="new")
    problem = gr.Textbox(label="Not asked", visible=False, interactive=False, elem_id="problem")
    boxes: list[gr.Textbox] = []
    with gr.Row():
        for number, model in enumerate(page.models):
            with gr.Column(min_width=280):
                boxes += _model_boxes(number, model.name)
    offered = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=[[_example_text(prompt)] for prompt in page.examples],
        type="index",
        label="Examples",
        elem_id="examples",
    )

    def answer(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        for view in answers(page, str(request.session_hash), *values):
            yield view.updates()

    def stop_answers(request: gr.Request) -> None:
        page.stop(str(request.session_hash))

    def begin(request: gr.Request) -> list[Any]:
        return new_conversation(page, str(request.session_hash)).updates()

    def choose(request: gr.Request, number: int) -> list[Any]:
        return new_conversation(page, str(request.session_hash), number).updates()

    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    shown = [instruction, context, problem, *boxes]
    ask.click(answer, [instruction, context, *sampling], shown, concurrency_limit=8, **hidden)
    stop.click(stop_answers, None, None, queue=False, **hidden)
    new.click(begin, None, shown, **hidden)
    for conversation in boxes[::3]:
        conversation.change(None, js=SHOW_END, **hidden)
    offered.click(choose, offered, shown, **hidden)


def _model_boxes(number: int, name: str) -> list[gr.Textbox]:
    """The boxes of a model: the conversation so far, its last answer, and how it answered."""
    return [
        gr.Textbox(
            label=f"Conversation with {name}",
            visible=False,
            lines=2,
            max_lines=12,
            interactive=False,
            elem_id=f"conversation-{number}",
        ),
        gr.Textbox(label=name, lines=6, max_lines=16, interactive=False, elem_id=f"answer-{number}"),
        gr.Textbox(
            label=f"How {name} answered", lines=1, max_lines=4, interactive=False, elem_id=f"note-{number}"
        ),
    ]


def _example_text(prompt: Prompt) -> str:
    earlier = len(prompt.history)
    turns = f"(after {earlier} earlier turn{'s' * (earlier != 1)})" if earlier else ""
    return "\n".join(filter(None, [turns, *prompt[:2]]))


def answers(
    page: Page, session: str, instruction: str, context: str, *sampling: Any
) -> Generator[View, None, None]:
    """Asks all models the next question of the session's conversation. Yields what to show until all are done.

    Each view is that of the conversation which the session then has: it may begin a new one meanwhile.
    """
    problem = question_problem(instruction, context)
    generation: dict[str, Any] = {}
    try:
        generation = generation_arguments(*sampling)
    except ValueError as error:
        problem = problem or str(error)
    if problem:
        yield _view(page, page.chat(session), problem=problem)
        return
    stop, chat = page.new_stop(session), page.chat(session)
    while chat.exchanges and not all(answer.done for answer in chat.exchanges[-1].answers):
        time.sleep(REFRESH_SECONDS)  # the answers that were just stopped
    if chat.exchanges and chat.exchanges[-1].missing:
        chat.exchanges.pop()  # nobody answered it
    prompts = [chat.prompt(model, instruction, context or "") for model in range(len(page.models))]
    with closing(stream_answers(page.models, prompts, generation, stop)) as stream:
        exchange = Exchange(instruction, context or "", next(stream))
        chat.exchanges.append(exchange)
        yield _view(page, page.chat(session), fields=("", ""))
        for _ in stream:
            yield _view(page, page.chat(session))
    if page.chat(session) is chat and exchange.missing:
        yield _view(page, chat, fields=(instruction, context or ""))


def new_conversation(page: Page, session: str, example: int | None = None) -> View:
    """Begins anew, with empty fields or with those of an example."""
    fields = ("", "") if example is None else page.examples[example][:2]
    return _view(page, page.new_chat(session, example), fields=fields)


def _view(page: Page, chat: Chat, problem: str = "", fields: tuple[str, str] | None = None) -> View:
    """What the tab shows of a conversation."""
    if chat.exchanges:
        models = [_shown(chat, model) for model in range(len(page.models))]
    else:
        earlier = "\n\n".join(history_texts(chat.earlier))
        models = [Shown(earlier, *texts) for texts in saved_texts(page, chat.example)]
    continues = bool(chat.earlier) or not all(exchange.missing for exchange in chat.exchanges)
    return View(problem, models, fields, continues)


def _shown(chat: Chat, model: int) -> Shown:
    texts = history_texts(chat.earlier)
    for exchange in chat.exchanges:
        answer = exchange.answers[model]
        texts.append(f"Question: {question_text(Prompt(exchange.instruction, exchange.input))}")
        texts.append(f"Answer: {answer.text}" if not answer.missing else NO_ANSWER)
    return Shown("\n\n".join(texts[:-1]), answer.text, answer.note())


def saved_texts(page: Page, example: int | None) -> list[tuple[str, str]]:
    """(text, note) of each model: what the runs have saved for an example."""
    if example is None:
        return [("", "")] * len(page.models)
    texts = []
    for saved in page.saved:
        step, text = saved.get(page.examples[example], (None, ""))
        note = "" if step is None else f"Saved by the training run at step {step:,}, greedy"
        texts.append((text, note))
    return texts
