"""A trained demo model is evaluated at the end of its training, beats its base, and the copies hold the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner

from tests.conftest import jsonl
from training.data.demo_rows import demo_rows
from training.evaluate.__main__ import main
from training.options.trainer_options import TrainingOptions
from training.run import finish
from training.trainer import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Those of a run on the demo's rows of one turn, 80 steps on one CPU, that publishes, logs to MLflow and evaluates."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [row for row in demo_rows() if not row.get("history")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        chosen = {
            "input_model": "demo",
            "training_dataset": jsonl(folder / "rows.jsonl", rows),
            "max_steps": 80,
            "lr": 3e-3,
            "bf16": False,
            "per_device_train_batch_size": 64,
            "test_size": 60,
            "eval_steps": 1000,
            "save_steps": 1000,
            "local_output_dir": str(folder / "out"),
            "dbfs_output_dir": str(folder / "published"),
            "report_to": "mlflow",
            "evaluate": True,
        }
        train(TrainingOptions(**chosen))
        mlflow.set_tracking_uri("")
    return chosen


@pytest.fixture
def trained(options: dict[str, Any]) -> Path:
    return Path(options["local_output_dir"])


def evaluation_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())["held_out"]


def test_losses_are_the_held_out_losses_of_training(trained: Path) -> None:
    loss = evaluation_of(trained)["metrics"]["loss"]
    recorded = json.loads((trained / "run.json").read_text())["held_out_loss"]
    assert loss["base"]["value"] == pytest.approx(recorded["before"], rel=1e-5)
    assert loss["tuned"]["value"] == pytest.approx(recorded["after"], rel=1e-5)


def test_the_trained_model_beats_its_base_by_more_than_the_interval(trained: Path) -> None:
    section = evaluation_of(trained)
    assert section["rows"]["count"] == 60
    gains = {name: figures["difference"] for name, figures in section["metrics"].items()}
    assert gains["loss"]["high"] < -4
    assert gains["rouge_l"]["low"] > 0.1
    assert gains["stops"]["low"] > 0.8
    assert gains["length"]["high"] < -200, "the base goes on to the limit"


def test_published_copy_and_mlflow_have_the_evaluation_and_run_json_is_the_same(
    trained: Path, options: dict[str, Any]
) -> None:
    published = Path(options["dbfs_output_dir"])
    for name in ("evaluation.json", "README.md", "run.json"):
        assert (published / name).read_bytes() == (trained / name).read_bytes()
    assert "## Evaluation" in (published / "README.md").read_text()
    assert "evaluation.json" in json.loads((published / "manifest.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{trained.parent}/mlflow.db")
    [run] = client.search_runs(["0"])
    assert (
        run.data.metrics["evaluation/held_out/exact_match/tuned"]
        == (evaluation_of(trained)["metrics"]["exact_match"]["tuned"]["value"])
    )


def test_a_later_evaluation_replaces_its_part_logs_newer_values_and_leaves_run_json_as_it_was(
    trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record, former = (trained / "run.json").read_bytes(), evaluation_of(trained)
    words = ["--model", str(trained), "--limit", "20", "--max-new-tokens", "16"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{trained.parent}/mlflow.db")
    assert CliRunner().invoke(main, words).exit_code == 0
    again = evaluation_of(trained)
    assert again["rows"]["chosen"] == "the first 20 of the 60 rows that the run held out (seed 42)"
    assert again["metrics"] != former["metrics"]
    assert (trained / "run.json").read_bytes() == record
    assert (trained / "README.md").read_text().count("## Evaluation") == 1
    client = mlflow.MlflowClient(f"sqlite:///{trained.parent}/mlflow.db")
    [run] = client.search_runs(["0"])
    assert run.data.metrics["evaluation/held_out/length/base"] == again["metrics"]["length"]["base"]["value"]

    def refuse(*_: object, **__: object) -> None:
        raise OSError("the disk of the server is full")

    with monkeypatch.context() as broken:
        broken.setattr(mlflow.MlflowClient, "log_batch", refuse)
        assert CliRunner().invoke(main, words).exit_code == 0
    assert "the disk of the server is full" in caplog.text
    [run] = client.search_runs(["0"])
    assert run.info.status == "FINISHED", "the training is"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri("")
    assert CliRunner().invoke(main, words).exit_code == 0
    assert "the evaluation could not be logged: MLFLOW_TRACKING_URI is not set" in caplog.text


def test_a_failed_evaluation_is_a_warning_and_the_same_command_repeats_it(
    trained: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (trained / "evaluation.json").unlink()
    target = str(trained.with_name("published again"))
    again = TrainingOptions(**options | {"resume": "auto", "report_to": "none", "dbfs_output_dir": target})

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(finish, "compare_models", fail)
        assert train(again)["status"] == "finished"
    assert (
        f"The model in {trained} is complete, but was not evaluated: RuntimeError: no memory" in caplog.text
    )
    assert (Path(target) / "run.json").is_file(), "it is published all the same"
    assert f"Type python -m training.evaluate --model {trained}" in caplog.text
    calls = []
    monkeypatch.setattr(finish, "_evaluate", lambda settings, record: calls.append(record["status"]))
    train(again)
    assert calls == ["finished"]
