"""An edit of training/data/prompt.py is enough to change the prompt: rows, demo model and templates follow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_from_disk
from transformers import PreTrainedTokenizerBase

from training.data import tokens
from training.data.rows import Columns
from training.model import demo_model

ROOT = Path(__file__).parents[2]
BEFORE, AFTER = "Write a response that appropriately completes", "Write a reply that appropriately completes"


def run(tree: Path, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python in a copy of the code. All copies share their caches."""
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def edit_a_word(tree: Path) -> None:
    file = tree / "training" / "data" / "prompt.py"
    text = file.read_text()
    assert BEFORE in text
    file.write_text(text.replace(BEFORE, AFTER))


def test_the_cache_key_covers_every_source_file_that_affects_ids(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = [Path(shutil.copy(file, tmp_path)) for file in tokens.SOURCES]
    assert {file.name for file in copies} == {
        f"{name}.py"
        for name in "table json_rows formats folders columns conversations rows prompt encoding tokens ledger".split()
    }
    monkeypatch.setattr(tokens, "SOURCES", copies)
    keys = set()
    for file in [None, *copies]:
        if file:
            file.write_text(file.read_text() + "\n")
        keys.add(tokens._fingerprint("demo", Columns([], [], []), tokenizer, 8, False))
    assert len(keys) == 1 + len(copies)
    assert "prompt.py" in {file.name for file in demo_model.SOURCES}


@pytest.mark.slow
def test_a_changed_word_of_the_prompt_changes_the_rows_and_refuses_a_resume(
    tmp_path: Path, base_folder: Path
) -> None:
    tree, home, output = tmp_path / "tree", tmp_path / "home", tmp_path / "out"
    for folder in ("training", "config"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    # A model that does not depend on the prompt, unlike the demo model, so that its vocabulary stays the same.
    train = ("-m", "training.trainer", "--input-model", base_folder, "--training-dataset", "demo",
             "--test-size", 8, "--max-steps", 2, "--local-output-dir", output)  # fmt: skip
    tokenizer = ("-c", "from training.model.tokenizer import load_tokenizer as load; t = load('demo'); "
                 "print(t.chat_template)")  # fmt: skip

    first = run(tree, home, *train)
    assert first.returncode == 0, first.stdout
    assert f"{BEFORE} the request" in first.stdout, "a row as the model sees it"
    assert BEFORE in run(tree, home, *tokenizer).stdout
    edit_a_word(tree)

    again = run(tree, home, *train, "--resume", "auto")
    assert f"{AFTER} the request" in again.stdout, again.stdout
    assert again.returncode == 2
    assert "the rows differ" in again.stdout
    assert "prompt (training/data/prompt.py)" in again.stdout
    caches = sorted((home / "datasets" / "dolly").iterdir(), key=lambda folder: folder.stat().st_mtime)
    old, new = (load_from_disk(str(folder))["input_ids"] for folder in caches)
    assert old[0] != new[0]

    assert AFTER in run(tree, home, *tokenizer).stdout
    assert len(list((home / "dolly").glob("demo-*"))) == 2, "the demo model follows"
    assert json.loads((output / "run.json").read_text())["status"] == "finished"
