"""A line of the GPU check: its setup, its result, and the process that computes it."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from training.errors import first_line

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"


@dataclass(frozen=True)
class Setup:
    """What a line needs to know. It travels to the line's process as JSON.

    Attributes:
        device: "cuda" or "cpu".
        precision: of forward and backward, "bf16" or "fp16".
        layers, width, heads, vocabulary: of the random GPT-J.
        rows: rows in a step.
        folder: a scratch folder; `results` is the file in it to which results are appended.
        seconds: for which a short operation is repeated to time it.
    """

    device: str
    precision: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    rows: int
    folder: str
    results: str
    seconds: float


@dataclass(frozen=True)
class Result:
    """The answer of a line: `status` is PASS, FAIL or NOT_APPLICABLE, `text` says what was measured, or why not."""

    name: str
    status: str
    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Finding:
    """What a check found: whether it is as it should be, in words, and its figures."""

    good: bool
    text: str
    figures: dict[str, Any] = field(default_factory=dict)


class NotApplicableError(Exception):
    """The line cannot be checked here. The message says why."""


Check = Callable[[Setup], Finding]


def outcome(name: str, check: Check, setup: Setup) -> Result:
    """The result of a check, whatever it raises. A package that is not installed makes it not applicable."""
    start = time.monotonic()

    def result(status: str, text: str, figures: dict[str, Any] | None = None) -> Result:
        return Result(name, status, text, figures or {}, round(time.monotonic() - start, 1))

    try:
        finding = check(setup)
    except NotApplicableError as error:
        return result(NOT_APPLICABLE, str(error))
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "training").startswith("training"):
            return result(NOT_APPLICABLE, f"the package {error.name} is not installed")
        traceback.print_exc()
        return result(FAIL, first_line(error))
    return result(PASS if finding.good else FAIL, finding.text, finding.figures)


def serve(checks: dict[str, Check]) -> None:
    """The main function of a process of the check: `SETUP NAME ...` on the command line, one result a line in a file.

    Ends without Python's shutdown, in which NCCL may wait for ranks that do not exist.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    faulthandler.register(signal.SIGUSR1)  # of a parent that has waited too long
    setup = Setup(**json.loads(sys.argv[1]))
    for name in sys.argv[2:]:
        result = outcome(name, checks[name], setup)
        with open(setup.results, "a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
