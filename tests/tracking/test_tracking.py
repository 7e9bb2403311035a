"""MLflow: parameters and tags of a run, servers that die or never answer, and loading the logged model elsewhere."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import starts
from tests.conftest import problems_of, resolved
from tests.starts import DEMO, FLOAT32, free_port, torchrun
from training.errors import OptionsError, PublishError, TrackingError
from training.model.generation import generate_response, load_model_tokenizer_for_generate
from training.options.trainer_options import TrainingOptions
from training.run import finish
from training.run.identity import new_record
from training.tracking.hide_secrets import without_secrets
from training.tracking.mlflow_address import tracking_problems
from training.tracking.mlflow_model import log_finished
from training.tracking.mlflow_server import tags
from training.tracking.served import Served
from training.tracking.tracker import parameters

pytestmark = pytest.mark.usefixtures("every_extra")

ROOT = Path(__file__).parents[2]
TOKEN, PASSWORD = "token-that-nobody-may-see", "password-that-nobody-may-see"
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
NAME = "main.models.dolly"
GREEDY = {"do_sample": False, "top_p": None, "top_k": None}


def record_of(**options: Any) -> dict[str, Any]:
    return new_record(resolved(TrainingOptions(local_output_dir="out", **options), 2))


# --- parameters, tags and secrets --------------------------------------------------------------------


def test_parameters_are_the_options_and_the_plans_choices():
    logged = parameters(record_of(lr=2e-5) | {"decided": {"gradient_checkpointing": True}})
    assert (logged["lr"], logged["world_size"], logged["decided_gradient_checkpointing"]) == (2e-5, 2, True)
    assert set(vars(TrainingOptions(local_output_dir="out"))) <= set(logged)


def test_tags_hold_commit_versions_base_model_and_dataset():
    record = record_of(input_model="demo") | {"git_commit": "abc"}
    logged = tags(record)
    assert (logged["git_commit"], logged["base_model"], logged["dolly_run"]) == ("abc", "demo", record["id"])
    assert logged["version_torch"] == record["versions"]["torch"]


def test_passwords_and_tokens_are_removed_from_messages_of_libraries(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    text = without_secrets(
        f"GET http://me:{PASSWORD}@host/api failed\n Bearer {TOKEN}, postgresql://u:{PASSWORD}@db/x"
    )
    assert text == "GET http://***@host/api failed Bearer ***, postgresql://***@db/x"
    text = without_secrets(
        f"HTTPConnectionPool: Max retries exceeded with url: /api/2.0/x?token={PASSWORD} (refused)"
    )
    assert text == "HTTPConnectionPool: Max retries exceeded with url: /api/2.0/x?*** (refused)"


# --- problems of the options ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "name", "problem"),
    [
        ("http://127.0.0.1:5000", "main.models.dolly", None),
        ("http://127.0.0.1:5000", "dolly", None),
        ("databricks", "main.models.dolly", None),
        ("databricks://profile", None, None),
        ("sqlite:////tmp/mlflow.db", None, None),
        ("postgresql+psycopg2://u:p@host/db", None, "Python has no module psycopg2, which MLflow needs"),
        ("http://127.0.0.1:5000", "models.dolly", "'models.dolly': expected one word, or catalog.schema.model"),
        ("http://127.0.0.1:5000", "a.b.c.d", "expected one word"),
        ("http://127.0.0.1:5000", "a..c", "expected one word"),
        ("http://127.0.0.1:5000", "my model", "expected one word"),
        ("http://127.0.0.1:5000", "a/b", "expected one word"),
        ("http://127.0.0.1:5000", "dolly\n", "expected one word"),
        ("databricks", "dolly", "'dolly': Databricks expects catalog.schema.model"),
        ("http://[::1", None, "http://[::1: is not a valid address; expected http(s)://HOST:PORT"),
        ("http://host:port", None, "expected http(s)://HOST:PORT"),
        ("http://", None, "has no host"),
        ("localhost:5000", None, "localhost:5000: MLflow has no store of that kind; expected http(s)://HOST:PORT"),
        ("./mlruns", None, "./mlruns: is a folder, and MLflow "),
        ("mlruns", None, "refuses folders. Type export MLFLOW_TRACKING_URI=sqlite:////"),
        ("file:mlruns", None, "/mlruns/mlflow.db"),
        ("file:///tmp/mlruns", None, "Type export MLFLOW_TRACKING_URI=sqlite:////tmp/mlruns/mlflow.db"),
        ("uc:http://127.0.0.1", None, "uc:http://127.0.0.1: MLflow refuses it (Detected Unity Catalog tracking URI"),
        ("sqlite://", None, "sqlite://: names no file, so everything would be lost"),
        ("sqlite:////proc/none/mlflow.db", None, "/proc/none/mlflow.db cannot be written"),
        ("sqlite:////tmp", None, "/tmp cannot be written"),
        ("sqlite:mlflow.db", None, "is not a valid address; expected"),
        ("databricks://nobody", None, "~/.databrickscfg has no profile nobody"),
        (None, None, "MLFLOW_TRACKING_URI is not set"),
    ],
)  # fmt: skip
def test_an_invalid_name_or_uri_is_refused_with_what_was_expected(monkeypatch, tmp_path, uri, name, problem):
    monkeypatch.delenv("DATABRICKS_RUNTIME_VERSION", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".databrickscfg").write_text("[profile]\nhost = https://one.databricks.com\ntoken = x\n")
    monkeypatch.setenv("DATABRICKS_CONFIG_PROFILE", "profile")
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    problems = tracking_problems("--mlflow-model-name", name)
    assert len(problems) == (problem is not None), problems
    assert problem is None or problem in problems[0]


def test_mlflow_is_asked_about_its_stores_and_about_the_registry(monkeypatch, tmp_path):
    monkeypatch.delenv("DATABRICKS_RUNTIME_VERSION", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert tracking_problems("--name", None) == [], "the user allows MLflow a folder"
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"{tmp_path}/registry")
    assert tracking_problems("--name", None) == [], "nothing is registered"
    [problem] = tracking_problems("--name", "dolly")
    assert problem.startswith(f"MLFLOW_REGISTRY_URI {tmp_path}/registry: is a folder, and MLflow ")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "databricks-uc")
    [problem] = tracking_problems("--name", NAME)
    assert "there are no credentials of Databricks" in problem
    assert "Type databricks auth login" in problem
    monkeypatch.setenv("DATABRICKS_HOST", "https://one.databricks.com")
    assert tracking_problems("--name", NAME) == []
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:{}@host",
        "http://me:{}@[::1",
        "http://me:{}@host:port",
        "http://me:{}/more@host:1",
        "http://me:{}?more@host:1",
        "http://me:{}\nmore@host",
        "http:/me:{}@host",
        "http:me:{}@host",
        "me:{}@host",
        "http://host:1/?token={}",
        "http://host:1/#{}",
    ],
)
def test_a_password_in_the_uri_is_refused_and_not_repeated(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(PASSWORD))
    problems = tracking_problems("--mlflow-model-name", None)
    assert problems
    assert PASSWORD not in "".join(problems)


def test_databricks_needs_no_tracking_uri(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "16.4")
    assert tracking_problems("--mlflow-model-name", NAME) == []


def test_a_profile_file_of_databricks_that_cannot_be_parsed_is_named_without_what_it_holds(
    monkeypatch, tmp_path
):
    for name in ("DATABRICKS_RUNTIME_VERSION", "DATABRICKS_HOST", "DATABRICKS_CONFIG_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "config"))
    for text, kind in (
        ("[DEFAULT]\nhost = a\nhost = b\n", "DuplicateOptionError"),
        (TOKEN, "MissingSectionHeaderError"),
    ):
        (tmp_path / "config").write_text(text)
        assert tracking_problems("--mlflow-model-name", None) == [
            f"MLFLOW_TRACKING_URI databricks: {tmp_path}/config cannot be read ({kind}). Correct that file, or export "
            "DATABRICKS_HOST and DATABRICKS_TOKEN"
        ]


def test_mlflow_problems_are_reported_together_with_problems_of_other_options(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://")
    options = TrainingOptions(
        local_output_dir=str(tmp_path / "out"), mlflow_model_name="a.b", max_shard_size="6GB", lr=float("nan")
    )
    message = str(OptionsError(*problems_of(options)))
    for part in ("--lr nan", "--mlflow-model-name 'a.b'", "nowhere://", "--max-shard-size 6GB"):
        assert part in message


def test_a_missing_mlflow_package_is_reported_with_the_pip_command():
    code = (
        "from importlib import util; real = util.find_spec;"
        "util.find_spec = lambda name: None if name == 'mlflow' else real(name);"
        "from training.tracking.mlflow_address import tracking_problems; print(*tracking_problems('--name', None))"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
    assert "pip install '.[mlflow]'" in printed


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "its training did not finish"),
        ({"status": "finished", "weights": {"model.safetensors": {"size": 7, "sha256": "0" * 64}}},
         "its weights have changed since training verified them"),
        ({"status": "finished", "weights": {"gone.safetensors": {"size": 7, "sha256": "0" * 64}}},
         "gone.safetensors: cannot be read [(]No such file or directory[)]"),
    ],
)  # fmt: skip
def test_unfinished_runs_and_changed_or_missing_weights_are_not_logged(tmp_path, entries, message):
    (tmp_path / "model.safetensors").write_bytes(b"changed")
    (tmp_path / "run.json").write_text(json.dumps(record_of() | entries))
    with pytest.raises(TrackingError, match=message):
        log_finished(tmp_path)


def test_a_copy_that_fails_does_not_cost_the_model_in_mlflow(monkeypatch, tmp_path):
    logged = []

    def fail(*arguments: object) -> None:
        raise PublishError("no space is left there")

    monkeypatch.setattr(finish, "publish", fail)
    monkeypatch.setattr(finish, "log_or_warn", lambda folder, name: logged.append((folder, name)))
    options = TrainingOptions(
        local_output_dir=str(tmp_path), dbfs_output_dir="/dbfs/x", mlflow_model_name=NAME, report_to="mlflow"
    )
    with pytest.raises(PublishError, match="no space is left there"):
        finish.deliver_again(SimpleNamespace(options=options, output=tmp_path), {})
    assert logged == [(tmp_path, NAME)]


# --- the served model --------------------------------------------------------------------------------


def test_the_served_model_answers_each_row_and_keeps_control_token_text_as_text(
    answering_model, tokenizer, monkeypatch
):
    prompts, real = [], answering_model.generate
    monkeypatch.setattr(
        answering_model, "generate", lambda ids, **kwargs: prompts.extend(ids.tolist()) or real(ids, **kwargs)
    )
    columns = {"instruction": ["a ### End b", "Repeat."], "input": [None, "### Response:\n"]}
    table = pandas.DataFrame(columns, index=[7, 3])
    for data in (table, table[["instruction"]]):
        answers = Served(answering_model, tokenizer).predict(data, {"temperature": 0.0, "max_new_tokens": 8})
        assert answers["response"].tolist() == ["AB", "AB"], "generation stops at the end key"
        assert answers.index.tolist() == [7, 3]
    for key, count in (("### End", 0), ("### Response:\n", 1)):
        assert [ids.count(tokenizer.convert_tokens_to_ids(key)) for ids in prompts] == [count] * 4


# --- a real server -----------------------------------------------------------------------------------


class Server:
    """`mlflow server` on 127.0.0.1 with sqlite and artifacts in `folder`. It can be killed and restarted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
                    "--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
                    "--artifacts-destination", str(self.folder / "artifacts"),
                ],
                cwd=self.folder, env=os.environ | QUIET, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 240
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def secret(monkeypatch):
    for name, value in (QUIET | {"MLFLOW_TRACKING_TOKEN": TOKEN}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def client(server, secret, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    mlflow.set_tracking_uri(server.uri)
    return mlflow.MlflowClient()


def run(*words: object) -> str:
    """Output of a command that must succeed and print no token."""
    result = starts.run([], *words)
    assert result.returncode == 0, result.stdout
    assert TOKEN not in result.stdout
    return result.stdout


TRAIN = [sys.executable, "-m", "training.trainer", *DEMO, "--logging-steps", 1]


def mlflow_runs(client: Any, folder: Path) -> list[Any]:
    identity = json.loads((folder / "run.json").read_text())["id"]
    return client.search_runs(["0"], f"tags.dolly_run = '{identity}'")


def steps_of(client: Any, run_id: str, name: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run_id, name)]


def closure(requirements: list[str]) -> set[str]:
    """Names of the distributions that pip would install for these requirements."""
    found: set[str] = set()
    queue = [Requirement(line) for line in requirements]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            queue += [Requirement(line) for line in requires(name) or []]
        except ModuleNotFoundError:  # such as GPU-only packages
            continue
    return found


LOAD = """
import json, sys
from importlib.machinery import PathFinder

class OnlyRequired(PathFinder):  # hides all packages outside the model's requirements
    absent = set(json.loads(sys.argv[3]))

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in cls.absent else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyRequired
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
import training
table = pandas.DataFrame({"instruction": json.loads(sys.argv[2])})
greedy = {"temperature": 0.0, "max_new_tokens": 12}
print(json.dumps({
    "package": training.__file__,
    "answers": model.predict(table, params=greedy)["response"].tolist(),
    "with_input": model.predict(table.assign(input="drum"), params=greedy)["response"].tolist(),
    "signature": model.metadata.signature.to_dict(),
}))
"""


@pytest.mark.slow
def test_two_ranks_log_one_run_and_its_model_answers_without_this_repository(server, client, tmp_path):
    out = tmp_path / "out"
    words = [
        *DEMO, "--logging-steps", 1, "--deepspeed", FLOAT32, "--max-steps", 4, "--eval-steps", 2,
        "--local-output-dir", out, "--mlflow-model-name", NAME,
    ]  # fmt: skip
    printed = run(*torchrun(2), *words)
    assert "MLflow does not answer" not in printed
    (logged,) = mlflow_runs(client, out)
    assert logged.info.status == "FINISHED"
    assert logged.data.params["per_device_train_batch_size"] == "8"
    assert logged.data.params["world_size"] == "2"
    assert logged.data.tags["base_model"] == "demo"
    assert TOKEN not in str(logged)
    assert steps_of(client, logged.info.run_id, "loss") == [1, 2, 3, 4]
    assert steps_of(client, logged.info.run_id, "eval_loss") == [0, 2, 4]
    written = json.loads((out / "run.json").read_text())
    assert logged.data.metrics["held_out_loss_after"] == written["held_out_loss"]["after"]
    (version,) = client.search_model_versions(f"name='{NAME}'")
    assert version.run_id == logged.info.run_id

    again = run(sys.executable, "-m", "training.tracking", "--model", out, "--name", NAME)
    assert f"logged to MLflow: models:/{NAME}/{version.version}" in again
    assert len(client.search_model_versions(f"name='{NAME}'")) == 1, "a logged model is not logged again"

    (artifacts,) = server.folder.glob("artifacts/**/MLmodel")
    assert not list(artifacts.parent.rglob("*.pkl"))
    required = closure((artifacts.parent / "requirements.txt").read_text().splitlines())
    absent = [
        module
        for module, names in packages_distributions().items()
        if not {canonicalize_name(name) for name in names} & required
    ]
    assert {"deepspeed", "matplotlib", "sqlalchemy"} <= set(absent)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    instructions = ["Classify the word drum.", "What do 2 and 1 make together?"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [
            sys.executable, "-P", "-c", LOAD,
            f"models:/{NAME}/{version.version}", json.dumps(instructions), json.dumps(absent),
        ],
        cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert not Path(answer["package"]).is_relative_to(ROOT)
    model, tokenizer = load_model_tokenizer_for_generate(str(out))
    for key, text in (("answers", None), ("with_input", "drum")):
        assert answer[key] == [
            generate_response(
                instruction, text, model=model, tokenizer=tokenizer, max_new_tokens=12, **GREEDY
            )
            for instruction in instructions
        ]
    inputs = {column["name"]: column["required"] for column in json.loads(answer["signature"]["inputs"])}
    assert inputs == {"instruction": True, "input": False, "history": False}
    assert [column["name"] for column in json.loads(answer["signature"]["outputs"])] == ["response"]


@pytest.mark.slow
def test_a_server_killed_during_training_harms_no_run_and_gets_all_metrics_later(server, client, tmp_path):
    out = tmp_path / "out"
    training = subprocess.Popen(
        [*map(str, TRAIN), "--max-steps", "30", "--local-output-dir", str(out), "--report-to", "mlflow"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    printed = []
    for line in training.stdout:
        printed.append(line)
        if line.startswith("step 3/30"):
            server.kill()
            break
    printed += training.stdout
    text = "".join(printed)
    server.start()
    assert training.wait() == 0, text
    assert text.count("MLflow does not answer") == 1, text
    (line,) = [line for line in text.splitlines() if "could not be logged" in line]
    assert TOKEN not in text
    retry = re.search(r"Type python (-m training\.tracking .*)$", line).group(1)
    assert "logged to MLflow: models:/m-" in run(sys.executable, *retry.split())
    (logged,) = mlflow_runs(client, out)
    assert sorted(steps_of(client, logged.info.run_id, "loss")) == list(range(1, 31)), "each step once"
    assert logged.info.status == "FINISHED"


@pytest.mark.slow
def test_a_resumed_run_continues_its_mlflow_run_and_logs_its_new_model(server, client, tmp_path):
    out = tmp_path / "out"
    words = [*TRAIN, "--local-output-dir", out, "--mlflow-model-name", "resumed", "--resume", "auto"]
    for steps in (2, 4, 4):
        run(*words, "--max-steps", steps)
    (logged,) = mlflow_runs(client, out)
    assert sorted(steps_of(client, logged.info.run_id, "loss")) == [1, 2, 3, 4]
    versions = client.search_model_versions("name='resumed'")
    assert {version.run_id for version in versions} == {logged.info.run_id}
    assert len({version.source for version in versions}) == len(versions) == 2, (
        "one model for each end of the run"
    )


@pytest.mark.slow
def test_a_server_that_never_answers_delays_no_step_and_is_reported_once(secret, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        out = tmp_path / "out"
        # With MLflow's own timeouts, eight times two minutes per request, `run` would time out.
        printed = run(*TRAIN, "--max-steps", 4, "--local-output-dir", out, "--report-to", "mlflow")
    assert printed.count("MLflow does not answer") == 1, printed
    assert printed.count("could not be logged") == 1
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
