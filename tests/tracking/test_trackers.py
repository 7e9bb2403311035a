"""--report-to: problems in words, one run across resumes in W&B and Trackio, and servers that are away."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from tests import starts
from tests.conftest import jsonl, problems_of
from training.options.command_line import parse_words
from training.options.reporting import TRACKERS, report_problems, trackers_of
from training.options.trainer_options import TrainingOptions
from training.tracking import background, trackio, wandb
from training.tracking.tracker import Entry, parameters

pytestmark = pytest.mark.usefixtures("every_extra")

KEY = "f" * 39 + "0"  # in the form of W&B's keys
TOKEN = "token-that-nobody-may-see"
TRAIN = [
    *(sys.executable, "-m", "training.trainer", "--input-model", "demo", "--training-dataset", "demo"),
    *("--test-size", 40, "--logging-steps", 1, "--eval-steps", 2, "--save-steps", 2),
]


def chosen(**options: Any) -> TrainingOptions:
    return TrainingOptions(local_output_dir="out", **options)


# --- problems of the options ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report_to", "name", "problem"),
    [
        ("tensorboard", None, None),
        ("none", None, None),
        ("wandb, trackio,mlflow", None, None),
        ("wandbb", None, "'wandbb' is no tracker. Did you mean wandb? Expected tensorboard, mlflow, wandb, trackio, separated"),
        ("Trackio", None, "Did you mean trackio?"),
        ("wandb,comet", None, "--report-to wandb,comet: 'comet' is no tracker. Expected tensorboard,"),
        ("wandb,", None, "'' is no tracker"),
        ("none,wandb", None, "none excludes the others. Type --report-to none, or --report-to wandb"),
        ("none", "a", "--report-to none and --mlflow-model-name a contradict each other"),
    ],
)  # fmt: skip
def test_a_wrong_tracker_is_refused_with_the_nearest_names(
    report_to: str, name: str | None, problem: str | None
) -> None:
    problems = report_problems(chosen(report_to=report_to, mlflow_model_name=name))
    assert len(problems) == (problem is not None), problems
    assert problem is None or problem in problems[0]


def test_registering_a_model_adds_mlflow_and_the_older_switch_still_counts() -> None:
    assert trackers_of(chosen()) == ("tensorboard",)
    assert trackers_of(chosen(report_to="none")) == ()
    assert trackers_of(chosen(mlflow_model_name="dolly")) == ("tensorboard", "mlflow")
    assert trackers_of(chosen(report_to=",".join(TRACKERS[::-1]))) == TRACKERS
    values, problems = parse_words(["--mlflow"])
    assert not [problem for problem in problems if "mlflow" in problem]
    assert values["report_to"] == "tensorboard,mlflow"
    _, problems = parse_words(["--mlflow", "--report-to", "wandb"])
    assert "No such option '--mlflow'. Type --report-to tensorboard,mlflow" in problems


def test_missing_packages_and_a_missing_key_are_reported_together_and_never_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb as package

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for input"))
    monkeypatch.setattr("getpass.getpass", lambda *_, **__: pytest.fail("asked for a key"))
    monkeypatch.setattr(trackio, "find_spec", lambda name: None)
    package.teardown()
    problems = problems_of(chosen(report_to="wandb,trackio", lr=float("nan")))
    text = "\n".join(problems)
    assert "--lr nan" in text
    assert "trackio is not installed. Type " in text
    assert "W&B has no API key for https://" in text
    assert "Type export WANDB_API_KEY=KEY, wandb login, or export WANDB_MODE=offline" in text
    monkeypatch.setattr(wandb, "find_spec", lambda name: None)
    assert "wandb is not installed. Type " in wandb.problems(chosen())[0]
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_API_KEY", KEY)):
        package.teardown()
        monkeypatch.setenv(name, value)
        assert wandb._key_problem() is None
        monkeypatch.delenv(name)
    package.teardown()
    monkeypatch.setenv("WANDB_API_KEY", TOKEN)
    assert TOKEN not in (wandb._key_problem() or TOKEN), "a key of a wrong form is refused and not repeated"
    package.teardown()


def test_a_store_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", "/proc/none")
    assert trackio.problems(chosen()) == [
        "TRACKIO_DIR /proc/none: cannot be written. Name a folder of your own"
    ]


def test_the_settings_sent_to_a_tracker_hold_no_password() -> None:
    options = {"dbfs_output_dir": f"s3://me:{TOKEN}@host/a", "lr": 1e-5, "training_dataset": ["a.jsonl", "b"]}
    record = {"options": options, "world_size": 2}
    sent = parameters(record)
    assert TOKEN not in str(sent)
    assert (sent["lr"], sent["world_size"]) == (1e-5, 2)


# --- the thread ------------------------------------------------------------------------------------------


class Broken:
    """A tracker that fails until `answers`, or hangs for ever."""

    title = "Broken"

    def __init__(self, hangs: bool = False) -> None:
        self.hangs, self.answers, self.sent, self.status = hangs, False, [], ""

    def attach(self) -> None:
        if self.hangs:
            threading.Event().wait()
        if not self.answers:
            raise OSError(f"GET http://me:{TOKEN}@host refused")

    def send(self, entries: list[Entry]) -> None:
        self.sent += [(entry.step, entry.figures()) for entry in entries]

    def end(self, status: str) -> None:
        self.status = status


def test_entries_are_kept_while_a_tracker_fails_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.01)
    caplog.set_level(logging.INFO, "training")
    broken, state = Broken(), TrainerState(max_steps=2)
    with background.background_logs([broken], tmp_path) as [log]:
        for step in (1, 2):
            state.global_step = step
            log.on_log(None, state, TrainerControl(), logs={"loss": 1.0 / step, "grad_norm": float("nan")})
            time.sleep(0.1)
        broken.answers = True
        time.sleep(0.1)
        log.on_train_end(None, state, TrainerControl())
    assert broken.sent == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]
    assert broken.status == "FINISHED"
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [
        "Broken does not answer (GET http://***@host refused). Training continues; metrics are kept and sent when it "
        "answers",
        "Broken answers again",
    ]


def test_figures_that_a_failing_tracker_never_got_are_said_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with background.background_logs([Broken()], tmp_path) as [log]:
        log.on_log(None, TrainerState(), TrainerControl(), logs={"loss": 1.0})
    assert [record.getMessage() for record in caplog.records][-1] == (
        "Broken: the last figures were not sent. The output folder has all of them"
    )


def test_a_tracker_that_hangs_delays_start_and_end_by_their_limits_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "START_SECONDS", 0.1)
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.1)
    start = time.monotonic()
    with background.background_logs([Broken(hangs=True), Broken(hangs=True)], tmp_path):
        pass
    assert time.monotonic() - start < 2
    assert caplog.text.count("Broken: the last figures were not sent within") == 2


# --- real packages -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the runs, with Trackio's store and no account of W&B."""
    folder = tmp_path_factory.mktemp("trackers")
    asked = [
        {"instruction": "Classify the word drum."},
        {"instruction": "Again?", "history": [["Say 1.", "1"]]},
    ]
    jsonl(folder / "prompts.jsonl", asked)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
            patch.delenv(name)
        patch.setenv("HOME", str(folder))
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        yield folder


def trained(output: Path, *words: object) -> str:
    result = starts.run([], *TRAIN, *words, "--local-output-dir", output, timeout=400)
    assert result.returncode == 0, result.stdout
    assert KEY not in result.stdout
    assert TOKEN not in result.stdout
    return result.stdout


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def offline_rows(run: Path) -> tuple[str, dict[int, dict[str, Any]]]:
    """(id, row of each step) of an offline run of W&B: records of protobuf in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    [file] = run.glob("run-*.wandb")
    data, at, body, identity, rows = file.read_bytes(), 7, b"", "", {}
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        body = (b"" if kind in (1, 2) else body) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record.FromString(body)
            identity = record.run.run_id or identity
            if record.history.item:
                step = record.history.step.num
                assert step not in rows, "one row for each step"
                rows[step] = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
    return identity, rows


def figure(entries: list[dict[str, Any]], name: str) -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in entries if name in entry}


READ = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps([[run, SQLiteStorage.get_logs("dolly", run)] for run in SQLiteStorage.get_runs("dolly")]))
"""


def trackio_runs() -> list[tuple[str, list[dict[str, Any]]]]:
    result = starts.run([], sys.executable, "-c", READ)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_resumed_run_is_one_run_of_both_trackers_with_each_step_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    output = folder / "out"
    words = [
        "--report-to",
        "wandb,trackio",
        "--sample-prompts",
        folder / "prompts.jsonl",
        "--sample-every",
        2,
    ]
    printed = trained(output, *words, "--max-steps", 4)
    assert "Weights & Biases: offline. To upload the run later, type wandb sync " in printed
    first = metrics(output)
    # As after a kill at step 4: the trackers have its figures, and it is computed again.
    record = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(record | {"status": "running"}))
    shutil.rmtree(output / "checkpoint-4")
    trained(output, *words, "--max-steps", 6, "--resume", "auto")
    written = metrics(output)
    losses, held_out = figure(written, "loss"), figure(written, "eval_loss")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert figure(first, "loss") == {step: losses[step] for step in (1, 2, 3, 4)}

    before, after = sorted((output / "wandb").glob("offline-run-*"))
    for run, last in ((before, 4), (after, 6)):  # the newest folder has the whole run
        identity, rows = offline_rows(run)
        assert identity == record["id"]
        assert list(rows) == list(range(last + 1))
        assert {step: row["train/loss"] for step, row in rows.items() if step} == {
            step: loss for step, loss in losses.items() if step <= last
        }
        assert {step: row["eval/loss"] for step, row in rows.items() if "eval/loss" in row} == {
            step: loss for step, loss in held_out.items() if step <= last
        }
    tables = {len(json.loads(file.read_text())["data"]) for file in after.glob("files/media/table/*")}
    assert tables == {6, 8}, "answers of steps 0, 2 and 4, then of 6 as well"
    for table in (json.loads(file.read_text()) for file in after.glob("files/media/table/*")):
        assert table["columns"] == ["step", "history", "instruction", "input", "response"]
        assert [row[1] for row in table["data"][:2]] == ["", "user: Say 1.\nassistant: 1"]
    for name in ("tokens_per_second", "mfu", "peak_memory_gib", "blocked_seconds"):
        later = {step: row[f"train/{name}"] for step, row in rows.items() if f"train/{name}" in row}
        assert {step: later.get(step) for step in (5, 6)} == {
            step: figure(written, name).get(step) for step in (5, 6)
        }, name
    assert not [file for file in after.rglob("*") if file.suffix in (".safetensors", ".pt", ".bin")]

    [(name, logs)] = trackio_runs()
    assert name == f"out-{record['id'][:8]}"
    assert [(entry["step"], entry["train/loss"]) for entry in logs if "train/loss" in entry] == [
        *losses.items()
    ]
    assert [(entry["step"], entry["eval/loss"]) for entry in logs if "eval/loss" in entry] == [
        *held_out.items()
    ]
    assert [entry["step"] for entry in logs if "answers" in entry] == [0, 2, 4, 6]
    answers = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    last = [entry["answers"]["_value"] for entry in logs if "answers" in entry][-1]
    assert {row["history"] for row in last} == {"", "user: Say 1.\nassistant: 1"}
    assert [(row["step"], row["response"]) for row in last] == [
        (row["step"], row["response"]) for row in answers
    ]


@pytest.mark.slow
def test_servers_that_are_away_change_no_loss_and_are_reported_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens: connections are refused
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("TRACKIO_WRITE_TOKEN", TOKEN)
        losses = []
        for name, server in (("silent", silent), ("closed", closed)):
            address = f"http://127.0.0.1:{server.getsockname()[1]}"
            monkeypatch.setenv("WANDB_BASE_URL", address)
            monkeypatch.setenv("TRACKIO_SERVER_URL", address)
            start = time.monotonic()
            printed = trained(folder / name, "--max-steps", 4, "--report-to", "wandb,trackio")
            assert time.monotonic() - start < 300
            assert printed.count("Weights & Biases does not answer") == 1, printed
            [run] = (folder / name / "wandb").glob("offline-run-*")
            assert f"type wandb sync {run}" in printed
            written = metrics(folder / name)
            _, rows = offline_rows(run)
            assert {step: row["train/loss"] for step, row in rows.items() if step} == figure(written, "loss")
            losses.append((figure(written, "loss"), figure(written, "eval_loss")))
    trained(folder / "none", "--max-steps", 4, "--report-to", "none")
    written = metrics(folder / "none")
    assert losses == [(figure(written, "loss"), figure(written, "eval_loss"))] * 2
    assert not {"wandb", "runs"} & {file.name for file in (folder / "none").iterdir()}
