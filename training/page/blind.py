"""The tab Blind: two answers in random order, a vote, and only then whose they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import gradio as gr

from training.data.conversations import Prompt
from training.page.models import Answer, PageModel, generation_arguments, question_problem, stream_answers
from training.page.state import Page, question_text
from training.page.votes import OWN, Pair, Question, in_random_order, next_row

LABELS = {"a": "A is better", "tie": "Tie", "b": "B is better"}
NO_PAIR = "There are no two answers to vote on. Get them first"
VOTE = "Which answer is better? The names are shown after your vote"


def blind_tab(page: Page, sampling: Sequence[gr.Number]) -> None:
    """Lays out the tab. `sampling` are the fields of PARAMETERS."""
    if len(page.models) < 2:
        gr.Markdown(
            "A vote needs two models. Start the page with `--base MODEL` or with a second `--model FOLDER`."
        )
        return
    pair = gr.State(None)  # stays on the server
    with gr.Row():
        row = gr.Button("Next held-out row", variant="primary", interactive=bool(page.rows), elem_id="next")
        stop = gr.Button("Stop", elem_id="stop-blind")
    with gr.Accordion("A question of your own", open=not page.rows):
        instruction = gr.Textbox(label="Instruction", lines=2, max_lines=12, elem_id="own-instruction")
        context = gr.Textbox(label="Input (optional)", lines=1, max_lines=12, elem_id="own-input")
        own = gr.Button("Ask this", elem_id="own")
    # A function is called for each visitor; a text would show the votes at the start of the page.
    status = _output("What to do", "status", lambda: rows_left(page), max_lines=6)
    question = _output("Question", "question", lines=2, max_lines=16)
    with gr.Row():
        boxes = [
            _output(f"Answer {side}", f"blind-{side.lower()}", lines=6, max_lines=16, min_width=280)
            for side in "AB"
        ]
    with gr.Row():
        buttons = {
            choice: gr.Button(label, min_width=90, elem_id=f"vote-{choice}")
            for choice, label in LABELS.items()
        }
    rates = _output("Votes so far", "rates", lambda: tallies(page), lines=2, max_lines=12)

    def answer_row(request: gr.Request, *values: Any) -> Iterator[tuple[Pair | None, str, str, str, str]]:
        yield from ask_row(page, str(request.session_hash), *values)

    def answer_own(request: gr.Request, *values: Any) -> Iterator[tuple[Pair | None, str, str, str, str]]:
        yield from ask_own(page, str(request.session_hash), *values)

    def stop_answers(request: gr.Request) -> None:
        page.stop(str(request.session_hash))

    def voter(choice: str) -> Any:
        return lambda pair: vote(page, pair, choice)

    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    shown = [pair, status, question, *boxes]
    row.click(answer_row, [*sampling], shown, concurrency_limit=8, **hidden)
    own.click(answer_own, [instruction, context, *sampling], shown, concurrency_limit=8, **hidden)
    stop.click(stop_answers, None, None, queue=False, **hidden)
    for choice, button in buttons.items():
        button.click(voter(choice), pair, [status, rates], **hidden)


def _output(label: str, name: str, value: Any = None, **shape: Any) -> gr.Textbox:
    return gr.Textbox(label=label, value=value, interactive=False, elem_id=name, **shape)


def ask_row(page: Page, session: str, *sampling: Any) -> Iterator[tuple[Pair | None, str, str, str, str]]:
    """Asks two models a held-out row that has no vote yet. Yields what `_ask` yields."""
    if found := next_row(page.rows, page.models, page.votes):
        yield from _ask(page, session, *found, sampling)
    else:
        yield None, rows_left(page), "", "", ""


def ask_own(
    page: Page, session: str, instruction: str, context: str, *sampling: Any
) -> Iterator[tuple[Pair | None, str, str, str, str]]:
    """Asks two models a question that somebody typed. Yields what `_ask` yields."""
    if problem := question_problem(instruction, context):
        yield None, problem, "", "", ""
    else:
        question = Question(Prompt(instruction, context or ""), OWN)
        yield from _ask(page, session, question, in_random_order(page.models), sampling)


def _ask(
    page: Page,
    session: str,
    question: Question,
    models: tuple[PageModel, PageModel],
    sampling: Sequence[Any],
) -> Iterator[tuple[Pair | None, str, str, str, str]]:
    """Yields (pair, status, question, answer A, answer B), the answers both at once: the time that one takes, its number
    of tokens and its problems would say whose it is."""
    shown = question_text(question.prompt)
    try:
        generation = generation_arguments(*sampling)
    except ValueError as error:
        yield None, str(error), shown, "", ""
        return
    yield None, "The models answer ...", shown, "", ""
    *_, answers = stream_answers(models, [question.prompt] * 2, generation, page.new_stop(session))
    if problems := sorted({answer.problem for answer in answers if answer.problem}):
        yield None, ". ".join(problems), shown, "", ""
    elif any(answer.stopped for answer in answers):
        yield None, "Stopped. There is nothing to vote on", shown, "", ""
    else:
        first, second = answers
        pair = Pair(question, models, (first.text, second.text), generation)
        yield (
            pair,
            ". ".join([VOTE, *_shortened(answers)]),
            shown,
            first.text or "(an empty answer)",
            second.text or "(an empty answer)",
        )


def _shortened(answers: Sequence[Answer]) -> list[str]:
    """What a model did not see of the question, without saying which model."""
    words = []
    if any(answer.left_out for answer in answers):
        words.append("The conversation was too long, and its oldest turns were left out")
    if any(answer.cut_from for answer in answers):
        words.append("The question was too long, and its end was cut")
    return words


def vote(page: Page, pair: Pair | None, choice: str) -> tuple[str, str]:
    """Stores a vote. Returns (whose answers they were, or why the vote is not stored; the votes so far)."""
    if pair is None:
        return NO_PAIR, tallies(page)
    first, second = pair.models
    names = f"A is {first.name}, B is {second.name}"
    if pair.vote:
        return f"You have voted: {LABELS[pair.vote]}. {names}", tallies(page)
    try:
        page.votes.add(pair, choice)
    except OSError as error:
        return (
            f"Your vote is not stored: {page.votes.file} cannot be written ({error.strerror}). Make room or give the "
            "permission, and vote again",
            tallies(page),
        )
    return f"Your vote: {LABELS[choice]}. {names}. {rows_left(page)}", tallies(page)


def rows_left(page: Page) -> str:
    """How many held-out rows have no vote yet, and what to do."""
    if not page.rows:
        return f"{page.rows_problem}. Ask a question of your own"
    pairs = combinations(page.models, 2)
    left = max(
        sum(row.prompt not in voted for row in page.rows)
        for voted in (page.votes.voted(*pair) for pair in pairs)
    )
    if not left:
        return f"All {len(page.rows):,} held-out rows have a vote. Ask a question of your own"
    return f"{left:,} of {len(page.rows):,} held-out rows have no vote yet. Get the next one, or ask a question of your own"


def tallies(page: Page) -> str:
    """The votes on each two models that have any, with the share that the later one wins."""
    lines = []
    for base, tuned in combinations(page.models, 2):
        tally = page.votes.tally(tuned, base)
        if not tally.count:
            continue
        low, high = tally.interval()
        open_ = ", so either may be better" if low <= 0.5 <= high else ""
        lines.append(
            f"{tuned.name} against {base.name}: {tally.wins} better, {tally.ties} tie{'s' * (tally.ties != 1)}, "
            f"{tally.losses} worse. It wins {tally.rate:.0%} of {tally.count} vote{'s' * (tally.count != 1)} "
            f"(95% interval: {low:.0%} to {high:.0%}{open_})"
        )
    return "\n".join([*lines, "A tie is half a win for each"]) if lines else "No votes yet"
