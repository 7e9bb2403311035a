"""S3's own SHA-256 of an uploaded file, compared with ours instead of reading the file back.

A file is sent in parts, each with its SHA-256, and S3 refuses a part that arrives damaged. Its checksum of a file of one
request is the SHA-256 of the file; that of several parts is the SHA-256 over the parts' checksums
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html, composite checksums)."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

PART = 2**26  # bytes; S3 accepts 10,000 parts, so a file may have 625 GiB
# Of S3FileSystem.open: s3fs passes the second one to each request that knows it.
WITH_CHECKSUMS: dict[str, Any] = {"block_size": PART, "ChecksumAlgorithm": "SHA256"}


class PartChecksums:
    """The checksums of a file that s3fs uploads, from the blocks written to it. s3fs ends a part at PART bytes or more."""

    def __init__(self) -> None:
        self._file, self._part = hashlib.sha256(), hashlib.sha256()
        self._size = self._part_size = 0
        self._parts: list[bytes] = []

    def add(self, block: bytes) -> None:
        for checksum in (self._file, self._part):
            checksum.update(block)
        self._size += len(block)
        self._part_size += len(block)
        if self._part_size >= PART:
            self._parts.append(self._part.digest())
            self._part, self._part_size = hashlib.sha256(), 0

    def whole(self) -> dict[str, Any]:
        """{"size": bytes, "sha256": hex} of the file, as `files.digest` gives it."""
        return {"size": self._size, "sha256": self._file.hexdigest()}

    def value(self) -> str:
        """The checksum that S3 must report for this file, in base64."""
        if not self._parts:
            return base64.b64encode(self._file.digest()).decode()
        parts = [*self._parts, self._part.digest()] if self._part_size else self._parts
        return base64.b64encode(hashlib.sha256(b"".join(parts)).digest()).decode()


def stored_checksum(fs: Any, path: str) -> str | None:
    """S3's SHA-256 of a file, in base64; None if the store has none. Without the number of parts that S3 appends."""
    bucket, key, _ = fs.split_path(path)
    found = fs.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED").get("ChecksumSHA256")
    return found.partition("-")[0] if found else None
