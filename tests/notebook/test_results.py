"""The last cells of the notebook: the evaluation of the finished model, or words about why there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from notebooks import results
from tests.conftest import jsonl, say_rows
from training.data.held_out import rows_digest, split_held_out
from training.data.tokens import prepare_dataset


@pytest.fixture
def choices(answering_folder: Path, base_folder: Path, tokenizer: Any, tmp_path: Path) -> SimpleNamespace:
    """Those of a finished run whose model answers "AB" to everything."""
    folder = tmp_path / "run"
    shutil.copytree(answering_folder, folder)
    source = jsonl(tmp_path / "rows.jsonl", [row | {"category": "words"} for row in say_rows(30)])
    parts = split_held_out(prepare_dataset(source, tokenizer, 100)[0], 6, 7)
    options = {"training_dataset": source, "test_size": 6, "seed": 7, "max_length": 100}
    record = {"status": "finished", "options": options, "rows": rows_digest(*parts)}
    (folder / "run.json").write_text(json.dumps(record))
    return SimpleNamespace(output=folder, name="run", input_model=str(base_folder), published=None)


def test_base_and_trained_model_are_compared_once_and_shown_again(
    choices: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = results.evaluation(choices, 4)
    assert table.headings == [
        "the first 4 of the 6 rows that the run held out (seed 7)",
        "base",
        "tuned",
        "tuned - base",
    ]
    labels = [row[0] for row in table.rows]
    assert labels[2:4] == ["exact match", "ROUGE-L"]
    assert labels.index("category words, 4 rows:") == len(labels) // 2, (
        "then the same lines again, of the category"
    )
    assert len({len(row) for row in table.rows}) == 1
    assert "95% intervals" in capsys.readouterr().out
    assert (choices.output / "evaluation.json").is_file()
    monkeypatch.setattr("training.evaluate.answers.compare_models", None)
    assert results.evaluation(choices, 4) == table


def test_without_rows_a_package_or_the_dataset_the_cell_says_so_and_does_not_fail(
    choices: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert results.evaluation(choices, 0) is None
    assert "Not evaluated: rows is 0" in capsys.readouterr().out
    (choices.output.parent / "rows.jsonl").unlink()
    assert results.evaluation(choices, 4) is None
    assert "Not evaluated: the rows that the run held out cannot be read" in capsys.readouterr().out
    monkeypatch.setattr("training.evaluate.metrics.find_spec", lambda name: None)
    assert results.evaluation(choices, 4) is None
    assert "Not evaluated: the package rouge-score is not installed. Type" in capsys.readouterr().out


def test_usage_names_the_published_copy_or_the_folder_of_the_run(choices: Any) -> None:
    assert f'load_model_tokenizer_for_generate("{choices.output}")' in results.usage(choices)
    choices.published = "/dbfs/dolly"
    assert 'pipeline("text-generation", model="/dbfs/dolly")' in results.usage(choices)
    choices.published = "s3://bucket/dolly"
    assert f'load_model_tokenizer_for_generate("{choices.output}")' in results.usage(choices)
