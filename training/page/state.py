"""What the page shows and keeps while it runs, for all sessions of all browsers."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.page.models import PageModel
    from training.page.votes import Question, Votes


@dataclass
class Page:
    """The models and questions of the page, and the votes.

    Attributes:
        rows: held-out rows to vote on; `rows_problem` says why there are none.
        examples: (instruction, input) to choose from.
        saved: for each model the answers that its run has saved: {(instruction, input): (step, answer)}.
        stops: the stop signal of the question that each session of a browser asks at the moment.
    """

    models: list[PageModel]
    votes: Votes
    rows: list[Question] = field(default_factory=list)
    rows_problem: str = ""
    examples: list[tuple[str, str]] = field(default_factory=list)
    saved: Sequence[Mapping[tuple[str, str], tuple[int, str]]] = ()
    stops: dict[str, threading.Event] = field(default_factory=dict)

    def new_stop(self, session: str) -> threading.Event:
        """The stop signal of a new question. A question that this session still asks is stopped."""
        self.stop(session)
        return self.stops.setdefault(session, threading.Event())

    def stop(self, session: str) -> None:
        """Ends what the models generate for this session."""
        if stop := self.stops.pop(session, None):
            stop.set()
