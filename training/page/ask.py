"""The tab Ask: all models answer one question side by side, while they generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from training.page.models import generation_arguments, question_problem, stream_answers
from training.page.state import Page


def ask_tab(page: Page, sampling: Sequence[gr.Number]) -> None:
    """Lays out the tab. `sampling` are the fields of PARAMETERS."""
    instruction = gr.Textbox(label="Instruction", lines=3, max_lines=12, elem_id="instruction")
    context = gr.Textbox(label="Input (optional)", lines=1, max_lines=12, elem_id="input")
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", elem_id="ask")
        stop = gr.Button("Stop", elem_id="stop")
    problem = gr.Textbox(label="Not asked", visible=False, interactive=False, elem_id="problem")
    boxes: list[gr.Textbox] = []
    with gr.Row():
        for number, model in enumerate(page.models):
            with gr.Column(min_width=280):
                boxes += [
                    gr.Textbox(
                        label=model.name, lines=6, max_lines=16, interactive=False, elem_id=f"answer-{number}"
                    ),
                    gr.Textbox(
                        label=f"How {model.name} answered",
                        lines=1,
                        max_lines=4,
                        interactive=False,
                        elem_id=f"note-{number}",
                    ),
                ]
    offered = gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=[["\n".join(filter(None, prompt))] for prompt in page.examples],
        type="index",
        label="Examples",
        elem_id="examples",
    )

    def answer(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        for found, texts in answers(page, str(request.session_hash), *values):
            yield [gr.update(value=found, visible=bool(found)), *texts]

    def stop_answers(request: gr.Request) -> None:
        page.stop(str(request.session_hash))

    def choose(number: int) -> list[Any]:
        return [*page.examples[number], gr.update(value="", visible=False), *saved_texts(page, number)]

    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    fields = [instruction, context, *sampling]
    ask.click(answer, fields, [problem, *boxes], concurrency_limit=8, **hidden)
    stop.click(stop_answers, None, None, queue=False, **hidden)
    offered.click(choose, offered, [instruction, context, problem, *boxes], **hidden)


def answers(
    page: Page, session: str, instruction: str, context: str, *sampling: Any
) -> Iterator[tuple[str, list[str]]]:
    """Yields (why the question is not asked or "", [text, note, text, note, ...] of the models) until all are done."""
    found = question_problem(instruction, context)
    generation: dict[str, Any] = {}
    try:
        generation = generation_arguments(*sampling)
    except ValueError as error:
        found = found or str(error)
    if found:
        yield found, [""] * 2 * len(page.models)
        return
    for streamed in stream_answers(
        page.models, instruction, context or "", generation, page.new_stop(session)
    ):
        yield "", [text for answer in streamed for text in (answer.text, answer.note())]


def saved_texts(page: Page, number: int) -> list[str]:
    """[text, note, text, note, ...] that the runs have saved for an example."""
    texts = []
    for saved in page.saved:
        step, text = saved.get(page.examples[number], (None, ""))
        note = "" if step is None else f"Saved by the training run at step {step:,}, greedy"
        texts += [text, note]
    return texts
