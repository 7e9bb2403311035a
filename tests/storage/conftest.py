"""A finished run to publish, and what its copy must be."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.conftest import python
from training import files

ROOT = Path(__file__).parents[2]
MODEL = "README.md config.json ledger.json model.safetensors tokenizer.json trainer_state.json".split()
PUBLISHED = {*MODEL, "run.json", "manifest.json"}
RUN = {"status": "finished", "started": "2026-01-01T00:00:00Z", "steps": 6}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished run: the model's files, one larger than two blocks, and files that are not published."""
    folder = tmp_path / "out"
    for name in ("checkpoint-200", "runs"):
        (folder / name).mkdir(parents=True)
        (folder / name / "big").write_bytes(b"big")
    for name in ("run.json.partial", "model.lock", ".nfs0001"):
        (folder / name).write_bytes(b"not the model's")
    for name in MODEL:
        (folder / name).write_bytes(random.Random(name).randbytes(1000))
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(2 * files.BLOCK + 7))
    (folder / "run.json").write_text(json.dumps(RUN))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def publish_command(folder: Path, target: str, **environment: str) -> subprocess.CompletedProcess:
    words = ["-m", "training.publish", "--model", folder, "--to", target]
    return python(*words, env=os.environ | environment, timeout=120)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_complete(copy: dict[str, bytes], finished: Path) -> None:
    manifest = json.loads(copy["manifest.json"])
    assert copy.keys() == {*manifest, "manifest.json"} == PUBLISHED
    for name, entry in manifest.items():
        assert copy[name] == (finished / name).read_bytes(), name
        assert entry == {"size": len(copy[name]), "sha256": hashlib.sha256(copy[name]).hexdigest()}
