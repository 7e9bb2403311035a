"""Reads the files that are copied to a target."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import SourceError
from training.files import file_digest


def source_digest(file: Path) -> dict[str, Any]:
    """`files.digest` of a file. Raises SourceError."""
    with source_errors(file):
        return file_digest(file, f"{file.name}: checksum")


@contextmanager
def source_errors(source: Path) -> Iterator[None]:
    """Turns OSError into SourceError, to tell an unreadable source from an unwritable target."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{source}: cannot be read ({error.strerror})") from error
