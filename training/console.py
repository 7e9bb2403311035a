"""Prepares stdout and stderr of a command, so that every text can be shown, and reads text that was typed."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable

from training.errors import printable


class MessageFormatter(logging.Formatter):
    """Messages alone, printable. `worded` rewords warnings; other lines may show the user's rows, which stay."""

    def __init__(self, worded: Callable[[str], str] = str):
        super().__init__("%(message)s")
        self.worded = worded

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return printable(self.worded(text) if record.levelno >= logging.WARNING else text)


def set_up_console(level: int | None = None, worded: Callable[[str], str] = str) -> None:
    """Each command calls it first. Log messages are printable, also those of libraries.

    With a level they go to stdout; without, only warnings are shown, on stderr, because stdout holds the answer.
    `worded` puts the advice of warnings into other words. A terminal that knows only ASCII gets other characters as
    escapes such as \\xab, instead of a UnicodeEncodeError.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr if level is None else sys.stdout)
    handler.setFormatter(MessageFormatter(worded))
    logging.basicConfig(level=level or logging.WARNING, handlers=[handler])


def typed_text(word: str) -> str:
    """A word of the command line. Where the terminal knows only ASCII, Python has read its UTF-8 as surrogates."""
    try:
        return os.fsencode(word).decode()
    except UnicodeError:  # it is not UTF-8, or does not come from the command line
        return word
