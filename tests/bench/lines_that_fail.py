"""Lines of a check that pass, fail, crash and hang. Run by test_gpu.py: python -m tests.bench.lines_that_fail."""

from __future__ import annotations

import os
import time

from training.bench.lines import Finding, NotApplicableError, Setup, serve


def machine(setup: Setup) -> Finding:
    return Finding(True, "a CPU", {"device": "CPU", "free_gib": 1.0, "precision": "bf16"})


def good(setup: Setup) -> Finding:
    return Finding(True, "one | two", {"figure": 1.0})


def wrong(setup: Setup) -> Finding:
    return Finding(False, "two instead of one")


def error(setup: Setup) -> Finding:
    raise ValueError("no such number")


def crash(setup: Setup) -> Finding:
    print("the last words", flush=True)
    os._exit(3)


def hang(setup: Setup) -> Finding:
    time.sleep(600)
    raise AssertionError


def missing(setup: Setup) -> Finding:
    import no_such_package  # noqa: F401

    raise AssertionError


def other_gpu(setup: Setup) -> Finding:
    raise NotApplicableError("it needs another GPU")


if __name__ == "__main__":
    serve({f.__name__: f for f in (machine, good, wrong, error, crash, hang, missing, other_gpu)})
