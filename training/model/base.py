"""Identifies the base model of an adapter: its commit on the Hub, or the checksum of its weight files."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from training.consts import DEMO
from training.errors import ModelError, first_line
from training.model.adapter_files import ADAPTER_WEIGHTS, find_adapter
from training.model.demo_model import model_folder
from training.storage.checkpoint import digests

WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")


def identify(name: str) -> dict[str, Any]:
    """{"model", "revision", "sha256"} of a base: its name or absolute path, and one of the other two.

    Reads every weight file of a folder, four at a time. Raises ModelError.
    """
    adapter = find_adapter(name)
    folder = adapter.folder if adapter else Path(model_folder(name))
    if folder.is_dir():
        kinds = (ADAPTER_WEIGHTS,) if adapter else WEIGHT_FILES
        files = sorted({file.name for kind in kinds for file in folder.glob(kind)})
        try:
            parts: Any = digests(folder, files)
        except OSError as error:
            raise ModelError(f"{name}: its weights cannot be read ({first_line(error)})") from error
        if adapter:
            parts = [parts, identify(adapter.base)]
        checksum = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        path = name if name == DEMO or not Path(name).is_dir() else str(folder.resolve())
        return {"model": path, "revision": None, "sha256": checksum}
    try:
        file = cached_file(name, "config.json")
    except OSError as error:
        raise ModelError(f"{name}: its config.json cannot be found ({first_line(error)})") from error
    return {"model": name, "revision": extract_commit_hash(file, None), "sha256": None}


def base_difference(former: dict[str, Any] | None, now: dict[str, Any] | None) -> str | None:
    """How two bases differ, with both values; None if they are the same or one is unknown. The place does not count."""
    if not former or not now or all(former[key] == now[key] for key in ("revision", "sha256")):
        return None
    advice = ""
    if former["revision"]:
        words = ["hf", "download", former["model"], "--revision", former["revision"], "--local-dir"]
        advice = f". To get it again, type {shlex.join(words)} FOLDER"
    return f"the base model was {_in_words(former)}, but is now {_in_words(now)}{advice}"


def is_same_base(former: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
    """Whether two records are known to name the same weights, wherever they are."""
    known = former and now and (now["revision"] or now["sha256"])
    return bool(known) and base_difference(former, now) is None


def _in_words(base: dict[str, Any]) -> str:
    """The base with its full revision or checksum."""
    if base["revision"]:
        return f"{base['model']} at revision {base['revision']}"
    return f"{base['model']} with weights of SHA-256 {base['sha256']}"
