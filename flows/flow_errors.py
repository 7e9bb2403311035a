"""Errors with which a run of the flow ends."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from metaflow import current
from metaflow.exception import MetaflowException


class RunRefusedError(MetaflowException):
    """The run cannot start. The message lists every problem and what to type."""

    headline = "Cannot train"

    def __init__(self, problems: Iterable[str]):
        super().__init__("\n" + "\n".join(f"  - {problem}" for problem in problems))


class StepFailedError(MetaflowException):
    """Training or the push of its model failed. The message says why, and how to resume."""

    headline = "The run can be resumed"

    def __init__(self, error: Exception):
        file = Path(sys.argv[0]).name  # of the flow, for one node or several
        command = f"python flows/{file} resume --origin-run-id {current.run_id}"
        super().__init__(f"{error}\nWhen the cause is fixed, type {command}")
