"""Writes files to a target sequentially, and checks what arrived."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from training.errors import PublishError, SourceError
from training.files import LARGE, digest, read_blocks, size_in_words
from training.storage.s3_checksum import WITH_CHECKSUMS, PartChecksums, stored_checksum
from training.storage.source import source_digest, source_errors
from training.storage.target import Target, as_publish_error

logger = logging.getLogger(__name__)


def write_checked(
    target: Target,
    name: str,
    source: Path | bytes,
    expected: dict[str, Any],
    on_block: Callable[[bytes], None] | None = None,
) -> None:
    """Writes a file sequentially and reads it back. Tries once more if the bytes differ.

    Args:
        expected: {"size": bytes, "sha256": hex} of the file.
        on_block: called with each block that was written. With it, and where S3 has a SHA-256 of its own for what
            arrived, that is compared instead of reading the file back, and no progress bar is shown.

    Raises PublishError if the target fails or the bytes differ twice, SourceError if the source is not as expected.
    """
    size = expected["size"]
    try:
        for _ in range(2):
            remove_file(target, name)
            start = time.monotonic()
            arrived = _write(target, name, source, size, on_block)
            seconds = time.monotonic() - start
            if (arrived or target_digest(target, name, size)) == expected:
                if size >= LARGE:
                    speed = size / 2**20 / max(seconds, 1e-9)
                    how = "checked by S3's SHA-256" if arrived else "read back"
                    logger.info("%s: %s at %.0f MiB/s, %s", name, size_in_words(size), speed, how)
                return
            if isinstance(source, Path) and source_digest(source) != expected:
                raise SourceError(f"{source}: changed while it was copied")
            logger.warning("%s/%s: the bytes read back differ from the bytes written", target.name, name)
        raise PublishError(f"{target.name}/{name}: the bytes read back differ from the bytes written, twice")
    except PublishError:
        with suppress(PublishError):
            remove_file(target, name)
        raise


def _write(
    target: Target, name: str, source: Path | bytes, size: int, on_block: Callable[[bytes], None] | None
) -> dict[str, Any] | None:
    """Writes a file sequentially. Returns the digest of what arrived if S3 reports it, else None."""
    parts = PartChecksums() if on_block and target.in_bucket else None
    with (
        as_publish_error(f"{target.name}/{name}: cannot be written"),
        _open(source) as file,
        target.fs.open(target.file(name), "wb", **(WITH_CHECKSUMS if parts else {})) as copy,
    ):
        for block in read_blocks(file, size, "" if on_block else name):
            copy.write(block)
            if parts:
                parts.add(block)
            if on_block:
                on_block(block)
    if parts is None:
        return None
    with as_publish_error(f"{target.name}/{name}: cannot be read"):
        stored = stored_checksum(target.fs, target.file(name))
    if stored is None:
        return None
    return parts.whole() if stored == parts.value() else {"size": size, "sha256": "another"}


def remove_file(target: Target, name: str) -> None:
    """Removes a file from the target, if it exists. Raises PublishError."""
    with as_publish_error(f"{target.name}/{name}: cannot be removed"):
        if target.fs.exists(target.file(name)):
            target.fs.rm_file(target.file(name))


def target_digest(target: Target, name: str, size: int) -> dict[str, Any]:
    with (
        as_publish_error(f"{target.name}/{name}: cannot be read"),
        target.fs.open(target.file(name), "rb") as copy,
    ):
        return digest(read_blocks(copy, size, f"{name}: reading back"))


def _open(source: Path | bytes) -> IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    with source_errors(source):
        return source.open("rb")
