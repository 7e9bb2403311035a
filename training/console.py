"""Prepares stdout and stderr of a command, so that every text can be shown."""

from __future__ import annotations

import io
import logging
import sys

from training.errors import printable


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def set_up_console(level: int | None = None) -> None:
    """Each command calls it first. Log messages are printable, also those of libraries.

    With a level they go to stdout; without, only warnings are shown, on stderr, because stdout holds the answer.
    A terminal that knows only ASCII gets other characters as escapes such as \\xab, instead of a UnicodeEncodeError.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr if level is None else sys.stdout)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=level or logging.WARNING, handlers=[handler])
