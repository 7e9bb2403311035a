"""Publishing to the Hub: in commits, run.json last, resumable, checked by the Hub's own checksums. On a local stand-in."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from notebooks.cells import read_widgets
from tests.storage.conftest import PUBLISHED, ROOT, RUN, assert_complete, content, publish_command
from tests.storage.hub_server import SIGNATURE, TOKEN, HubServer, Repo
from training import notebook
from training.errors import PublishError
from training.files import path_problem
from training.options.trainer_options import TrainingOptions
from training.run.finish import deliver_again
from training.run.preflight import destination_problems
from training.storage import hub as hub_module
from training.storage import hub_requests
from training.storage.copy import marker_of, publish, target_problems
from training.storage.remote import store_problems

TARGET = "hf://me/dolly"
OWN_COMMIT = 2**18  # bytes, in these tests


@pytest.fixture
def finished(finished: Path) -> Path:
    """A finished run with a model card, whose metadata the Hub reads, and weights that need a commit of their own."""
    (finished / "README.md").write_text(
        "---\nlicense: other\nbase_model: EleutherAI/gpt-j-6B\n---\n# dolly\n"
    )
    (finished / "model.safetensors").write_bytes(random.Random(0).randbytes(OWN_COMMIT + 7))
    return finished


@pytest.fixture
def waits() -> list[float]:
    """Seconds of the pauses between two tries, which take no time in these tests."""
    return []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[HubServer]:
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(hub_module, "OWN_COMMIT", OWN_COMMIT)
        pauses = SimpleNamespace(sleep=waits.append, monotonic=time.monotonic)
        for module in (hub_requests, huggingface_hub.utils._http):
            monkeypatch.setattr(module, "time", pauses)
        yield server
        server.shutdown()


def settings(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """The environment of a command that talks to the stand-in."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }


def shards(finished: Path, count: int = 3) -> list[Path]:
    """More files that are large enough for a commit of their own."""
    files = [finished / f"model-{number}.safetensors" for number in range(count)]
    for number, file in enumerate(files):
        file.write_bytes(random.Random(number).randbytes(OWN_COMMIT))
    return files


def oid(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def uploads(hub: HubServer) -> list[str]:
    """SHA-256 of the files of Git LFS that were sent."""
    return [line.split("/")[2] for line, _ in hub.sent(r"^PUT /storage/\w+$")]


def assert_nothing_sent(hub: HubServer) -> None:
    assert not hub.sent("^(POST|PUT) ")


# --- complete uploads ---------------------------------------------------------------------------------


def test_a_model_is_uploaded_private_and_run_json_comes_with_the_last_commit(
    hub: HubServer, finished: Path, tmp_path: Path
) -> None:
    (finished / "model.safetensors").write_bytes(random.Random(0).randbytes(10 * 2**20))
    before = content(finished)
    result = publish_command(finished, TARGET, **settings(hub, tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(
        rf"published to {TARGET}: 8 files, 10\.0 MiB, each file compared with the Hub's checksum, private; \d+ s\n",
        result.stdout,
    )
    repo = hub.repos["me/dolly"]
    assert repo.private
    assert_complete(repo.files, finished)
    assert "model.safetensors" in repo.lfs
    assert content(finished) == before
    incomplete = [commit.keys() for commit in repo.commits[1:-1]]
    assert incomplete[0] == {".gitattributes", "publishing.json"}, "the name is claimed before a large byte"
    assert all("publishing.json" in names and "run.json" not in names for names in incomplete)
    assert incomplete[1] == {".gitattributes", "publishing.json", "model.safetensors"}, (
        "large files come first"
    )
    assert incomplete[-1] == {".gitattributes", "publishing.json", *PUBLISHED} - {"run.json"}

    result = publish_command(finished, TARGET + "/", **settings(hub, tmp_path))
    assert result.stdout.startswith(f"{TARGET}/ already holds this model, complete and unchanged: 8 files")
    assert len(repo.commits) == 5
    assert len(uploads(hub)) == 1


def test_what_is_downloaded_is_byte_for_byte_what_was_published(
    hub: HubServer, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finished / "adapter").mkdir()
    (finished / "adapter" / "adapter_model.safetensors").write_bytes(b"adapter")
    assert target_problems(TARGET, finished) == []
    assert publish(finished, TARGET)[-1] == "run.json"
    assert target_problems(TARGET, finished) == []
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    huggingface_hub.snapshot_download("me/dolly", local_dir=tmp_path / "copy", max_workers=1, token=TOKEN)
    copy = {name: data for name, data in content(tmp_path / "copy").items() if not name.startswith(".")}
    assert copy.keys() == {*PUBLISHED, "adapter/adapter_model.safetensors"}
    assert {name: copy[name] for name in copy if name != "manifest.json"} == {
        name: data for name, data in content(finished).items() if name in copy
    }
    publish(tmp_path / "copy", str(tmp_path / "onwards"))  # a downloaded model is one to publish


def test_a_large_file_is_sent_in_parts_if_the_hub_asks_for_them(hub: HubServer, finished: Path) -> None:
    hub.part = 2**16
    publish(finished, TARGET)
    assert [size for _, size in hub.sent(r"^PUT /storage/\w+/\d")] == [hub.part] * 4 + [7]
    assert_complete(hub.repos["me/dolly"].files, finished)


def test_a_public_repository_of_the_user_is_filled_and_called_public(
    hub: HubServer, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.repos["ours/dolly"] = Repo(private=False)
    with caplog.at_level(logging.INFO):
        publish(finished, "hf://ours/dolly")
    assert "compared with the Hub's checksum, public;" in caplog.text
    assert not hub.sent("create")


# --- interrupted uploads ------------------------------------------------------------------------------


def test_an_interrupted_upload_is_continued_with_the_files_that_are_missing(
    hub: HubServer, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = shards(finished)
    hub.fail(f"PUT /storage/{oid(second)}", 403, message="Request has expired", times=3)
    with pytest.raises(PublishError) as error:
        publish(finished, TARGET)
    assert str(error.value) == (
        f"{TARGET}: cannot be written: the Hub answered 403 (Request has expired). The model in {finished} "
        "is complete, and the files copied so far are kept. "
        f"Fix the cause, then type python -m training.publish --model {finished} --to {TARGET}"
    )
    repo = hub.repos["me/dolly"]
    assert repo.files.keys() == {"publishing.json", first.name}
    assert target_problems(TARGET, finished) == [], "the run's own upload may be continued"
    assert "already holds something (model-0.safetensors, publishing.json)" in target_problems(TARGET)[0]
    hub.requests.clear()
    assert first.name not in publish(finished, TARGET)
    assert uploads(hub) == [oid(second), oid(third), oid(finished / "model.safetensors")]
    assert {name: repo.files[name] for name in PUBLISHED - {"manifest.json"}} == {
        name: data for name, data in content(finished).items() if name in PUBLISHED
    }
    assert SIGNATURE not in caplog.text


def test_a_connection_that_breaks_in_the_middle_of_a_file_is_tried_again(
    hub: HubServer, finished: Path, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("PUT /storage", cut_after=2**16, times=7)  # six times by huggingface_hub, once by us
    publish(finished, TARGET)
    assert_complete(hub.repos["me/dolly"].files, finished)
    assert len(hub.sent("PUT /storage.*cut")) == 7
    assert f"{TARGET}: the connection to {hub.url} failed" in caplog.text
    assert "Trying again in 1 s" in caplog.text
    assert len(waits) == 7
    assert SIGNATURE not in caplog.text
    assert "thrown while requesting PUT" in caplog.text
    hub.fail("PUT /storage", cut_after=2**16, times=99)
    hub.objects.clear()
    del hub.repos["me/dolly"]
    with pytest.raises(
        PublishError, match=r"cannot be written: the connection to .* failed .* is complete, and"
    ):
        publish(finished, TARGET)


@pytest.mark.parametrize("number", range(4))
def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: HubServer, finished: Path, number: int) -> None:
    passed = iter(range(9))
    real = hub_module._commit

    def lose(*args: Any) -> None:
        if next(passed) == number:
            hub.fail("POST /api/models/me/dolly/commit", lost=True)
        real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_module, "_commit", lose)
        publish(finished, TARGET)
    assert_complete(hub.repos["me/dolly"].files, finished)
    messages = hub.repos["me/dolly"].messages
    # After the last one, only a listing shows that it arrived.
    assert len(messages) == (4 if number < 3 else 6)
    assert len(uploads(hub)) == 1


def test_a_busy_hub_is_asked_again_after_the_time_that_it_names(
    hub: HubServer, finished: Path, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("GET /api/models/me/dolly$", 429, headers={"Retry-After": "7"})
    hub.fail("POST .*/commit/", 503, headers={"Retry-After": "900"})
    hub.fail("POST .*/commit/", 500, message="database is locked")
    publish(finished, TARGET)
    assert_complete(hub.repos["me/dolly"].files, finished)
    assert waits == [7, hub_requests.LONGEST_WAIT, 5]
    assert f"{TARGET}: the Hub answered 429 and asks to wait 7 s. Trying again in 7 s" in caplog.text
    assert "the Hub answered 500 (database is locked). Trying again in 5 s" in caplog.text


def test_an_incomplete_file_of_a_complete_upload_is_sent_again_and_never_looks_complete(
    hub: HubServer, finished: Path
) -> None:
    publish(finished, TARGET)
    repo = hub.repos["me/dolly"]
    repo.commits.append(repo.commits[-1] | {"config.json": b"?" * 1000})
    assert publish(finished, TARGET) == ["config.json", "run.json"]
    assert ["run.json" in commit for commit in repo.commits[-4:]] == [True, False, False, True]
    assert_complete(repo.files, finished)
    assert len(uploads(hub)) == 1
    repo.commits.append(
        repo.commits[-1] | {"publishing.json": marker_of((finished / "run.json").read_bytes())}
    )
    assert publish(finished, TARGET) == []
    assert_complete(repo.files, finished)


# --- checksums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "run.json"])
def test_another_checksum_of_the_hub_is_named_and_the_upload_is_not_called_complete(
    hub: HubServer, finished: Path, name: str
) -> None:
    hub.lies[name] = "0" * 64
    wrong = f"the Hub's checksums of {name} are not those of the files that were sent"
    with pytest.raises(PublishError, match=rf"{TARGET}: {wrong}\. The model in .* is complete"):
        publish(finished, TARGET)
    assert name == "run.json" or "run.json" not in hub.repos["me/dolly"].files
    hub.lies.clear()
    publish(finished, TARGET)
    assert_complete(hub.repos["me/dolly"].files, finished)


def test_an_upload_whose_process_is_killed_is_continued(
    hub: HubServer, finished: Path, tmp_path: Path
) -> None:
    first, second = [finished / f"model-{number}.safetensors" for number in (1, 2)]
    for file in (first, second):
        file.write_bytes(random.Random(file.name).randbytes(10 * 2**20))
    words = [sys.executable, "-m", "training.publish", "--model", finished, "--to", TARGET]
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ | settings(hub, tmp_path))
    hub.fail(f"PUT /storage/{oid(second)}", act=process.kill)
    assert process.wait(60) == -signal.SIGKILL
    assert "run.json" not in hub.repos["me/dolly"].files
    hub.objects.pop(oid(second), None)  # it arrived or not, as the kill comes a moment after the bytes
    hub.requests.clear()
    sent = publish(finished, TARGET)
    assert first.name not in sent
    assert uploads(hub)[0] == oid(second)
    assert hub.repos["me/dolly"].files[second.name] == second.read_bytes()


def test_a_signed_address_that_has_expired_is_replaced_by_a_new_one(
    hub: HubServer, finished: Path, waits: list[float]
) -> None:
    hub.fail("PUT /storage", 403, message="Request has expired")
    publish(finished, TARGET)
    assert waits == [1]
    assert_complete(hub.repos["me/dolly"].files, finished)


def test_a_source_that_changes_during_the_upload_is_reported_and_not_called_complete(
    hub: HubServer, finished: Path
) -> None:
    first, second, _ = shards(finished)
    hub.fail(f"PUT /storage/{oid(first)}", act=lambda: second.write_bytes(b"?" * OWN_COMMIT))
    with pytest.raises(
        PublishError, match=rf"{second}: changed while it was copied\. .* must not change"
    ) as error:
        publish(finished, TARGET)
    assert "is complete" not in str(error.value)
    assert hub.repos["me/dolly"].files.keys() == {"publishing.json", first.name}


# --- names that are taken -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b"mine"}, r"already holds something \(README\.md\)\. Name a new repository"),
        ({"run.json": b"{}", "config.json": b""}, r"already holds another run's model, or part of it \(config\.json, run"),
        ({"publishing.json": marker_of(b"another"), "x": b""}, "already holds another run's model, or part of it"),
        ({"run.json": None, "runs/notes.txt": b""}, r"not part of this model \(runs/notes\.txt\)\. Name a new repository"),
    ],
    ids=["other files", "another run", "another upload", "more files"],
)  # fmt: skip
def test_a_repository_that_holds_something_else_is_refused_before_a_byte(
    hub: HubServer, finished: Path, files: dict[str, bytes | None], message: str
) -> None:
    record = (finished / "run.json").read_bytes()
    held = {name: record if data is None else data for name, data in files.items()}
    hub.repos["me/dolly"] = Repo(private=True)
    hub.repos["me/dolly"].commits[-1] |= held
    with pytest.raises(PublishError, match=rf"^{TARGET}: (holds files that are )?{message}"):
        publish(finished, TARGET)
    assert_nothing_sent(hub)
    assert target_problems(TARGET)[0].startswith(f"{TARGET}: already holds something")
    assert_nothing_sent(hub)
    assert hub.repos["me/dolly"].files == held


def test_what_another_process_commits_during_the_upload_is_never_overwritten(
    hub: HubServer, finished: Path
) -> None:
    hub.repos["me/dolly"] = repo = Repo(private=True)

    def interfere() -> None:
        repo.commits.append(
            repo.commits[-1] | {"README.md": b"theirs", "publishing.json": marker_of(b"theirs")}
        )

    hub.fail("POST .*/preupload/", act=interfere)
    with pytest.raises(PublishError, match="already holds another run's model, or part of it"):
        publish(finished, TARGET)
    assert repo.files == {"README.md": b"theirs", "publishing.json": marker_of(b"theirs")}
    assert not uploads(hub)


def test_a_repository_that_was_renamed_is_named(hub: HubServer, finished: Path) -> None:
    hub.repos["me/dolly"] = Repo(private=True)
    info = {"id": "me/new", "sha": "1", "private": True, "siblings": [], "tags": []}
    hub.fail("GET /api/models/me/dolly$", 200, content=info)
    with pytest.raises(
        PublishError, match=rf"{TARGET}: is called me/new on the Hub\. Type hf://me/new, or another"
    ):
        publish(finished, TARGET)
    assert_nothing_sent(hub)


# --- names and tokens ---------------------------------------------------------------------------------

NAMES = {
    "hf://": "hf://: names no model of an owner. Type hf://OWNER/MODEL",
    "hf://dolly": "hf://dolly: names no model of an owner. Type hf://OWNER/MODEL",
    "hf://datasets/me/rows": "hf://datasets/me/rows: is a dataset, but a model's repository is needed. Type hf://OWNER/MODEL",
    "hf://spaces/me/demo": "hf://spaces/me/demo: is a Space, but",
    "hf://me/dolly/v2": "hf://me/dolly/v2: is a folder in a repository, but a model needs a repository of its own. Type hf://me/dolly",
    "hf://me/do lly": "hf://me/do lly: the Hub has no such names. Repo id must use alphanumeric",
    "hf://me/-": "hf://me/-: the Hub has no such names. Repo id must use",
    "hf://me:hf_abcdefghijklmnopq@huggingface.co/dolly": "hf://***@huggingface.co/dolly: holds a token, or an '@' or '?'. Type hf://OWNER/MODEL. Make a token with",
    "hf://me/dolly@v2": "hf://***@v2: holds a token",
    "hf://me/dolly?token=hf_abcdefghijklmnopq": "hf://me/dolly?***: holds a token",
    "hf://hf_abcdefghijklmnopq/dolly": "hf://hf_***/dolly: holds a token",
}  # fmt: skip


@pytest.mark.parametrize("target", NAMES, ids=[str(number) for number in range(len(NAMES))])
def test_a_name_that_is_no_repository_is_refused_without_a_request_or_its_token(
    hub: HubServer, finished: Path, target: str
) -> None:
    [problem] = target_problems(target)
    with pytest.raises(PublishError) as error:
        publish(finished, target)
    assert str(error.value) == problem
    assert problem.startswith(NAMES[target])
    assert "abcdefgh" not in problem
    assert not hub.requests
    [problem] = store_problems(target, finished, "auto")
    assert "is on the Hub, which takes finished models only. Name a folder, or a URL such as s3://" in problem
    assert "abcdefgh" not in problem


def without_token(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")


def wrong_token(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", "hf_wrongwrongwrongwrong")


def offline(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    patch.setenv("HF_HUB_OFFLINE", "1")


def unreachable(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def unreachable_with_a_password(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "ENDPOINT", f"http://me:{SIGNATURE}@127.0.0.1:9")


def token_that_was_copied_badly(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", "hf_wrong“wrongwrong")


def login_page(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    hub.fail("", 200, content=b"<html>Log in to the network</html>", times=99)


def another_program(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    hub.fail("", 200, content=b"[]", times=99)


def slow(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hub_module, "ASKING", 0.1)
    patch.setattr(hub_module, "SENDING", 0.1)
    hub.fail("", act=lambda: time.sleep(0.5), times=9)


def reading(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    hub.role = "read"


def reading_own(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    hub.role = "read"
    hub.repos["me/dolly"] = Repo(private=True)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (without_token, "there is no token for the Hub. Make a token with write permission at https://huggingface.co"),
        (wrong_token, "the Hub does not know the token (Invalid credentials in Authorization header). Make a token with"),
        (offline, "the Hub is switched off. HF_HUB_OFFLINE is set, so nothing is downloaded: type unset HF_HUB_OFFLINE"),
        (unreachable, "the connection to http://127.0.0.1:9 failed ([Errno 111] Connection refused)"),
        (unreachable_with_a_password, "the connection to http://***@127.0.0.1:9 failed"),
        (token_that_was_copied_badly, "the token for the Hub has a character that no token has. Make a token"),
        (login_page, "does not answer as the Hub does. Look at HF_ENDPOINT, and for a proxy in between"),
        (another_program, "does not answer as the Hub does. Look at HF_ENDPOINT"),
        (slow, "did not answer in time"),
        (reading, "The token of me may not write there. Make a token with write permission"),
        (reading_own, "cannot be written: the Hub refuses (Forbidden). The token of me may not write there. Make"),
    ],
)  # fmt: skip
def test_a_hub_that_cannot_be_used_is_reported_before_training_and_after_it_with_the_command_to_type(
    hub: HubServer,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[..., None],
    message: str,
) -> None:
    before = content(finished)
    prepare(hub, monkeypatch)
    start = time.monotonic()
    [problem] = target_problems(TARGET)
    assert problem.startswith(f"{TARGET}: ")
    assert message in problem
    assert time.monotonic() - start < 5
    if prepare is not reading_own:  # the stand-in's commits do not ask for the role
        with pytest.raises(PublishError) as error:
            publish(finished, TARGET)
        assert message in str(error.value)
        assert str(error.value).endswith(
            f". The model in {finished} is complete. Fix the cause, then type python -m training.publish "
            f"--model {finished} --to {TARGET}"
        )
        assert error.value.__cause__.__cause__ is None, "an error of the library may show a signed address"
    for secret in (TOKEN, "hf_wrong", SIGNATURE):
        assert secret not in problem
    assert content(finished) == before


def test_the_namespace_of_someone_else_is_reported_with_ones_own(hub: HubServer, finished: Path) -> None:
    assert target_problems("hf://openai/dolly") == [
        "hf://openai/dolly: cannot be opened: the Hub refuses (You don't have the rights to create a model under the "
        'namespace "openai"). You are me there, and openai is no organisation of yours. Type hf://me/dolly'
    ]
    assert target_problems("hf://ours/dolly") == []
    assert hub.repos["ours/dolly"].private


def test_a_run_is_refused_before_training_and_a_finished_one_is_published_by_the_same_command(
    hub: HubServer, finished: Path, tmp_path: Path
) -> None:
    folders = {"local_output_dir": str(tmp_path / "new"), "dbfs_output_dir": "hf://me/dolly/v2"}
    assert destination_problems(TrainingOptions(**folders)) == [
        f"--dbfs-output-dir {NAMES['hf://me/dolly/v2']}"
    ]
    options = TrainingOptions(**folders | {"dbfs_output_dir": TARGET, "checkpoint_to": "hf://me/checkpoints"})
    assert destination_problems(options) == [
        "--checkpoint-to hf://me/checkpoints: is on the Hub, which takes finished models only. "
        "Name a folder, or a URL such as s3://bucket/folder"
    ]
    assert hub.repos["me/dolly"].files == {}, "it was created to learn whether the token may"
    options = replace(options, checkpoint_to=None)
    assert deliver_again(SimpleNamespace(options=options, output=finished), RUN) is RUN
    assert_complete(hub.repos["me/dolly"].files, finished)


@pytest.mark.parametrize("root", ["hf://me", "hf://me/"])
def test_a_root_on_the_hub_gets_a_repository_for_each_run_of_the_notebook(
    hub: HubServer, finished: Path, root: str
) -> None:
    names = notebook.widget_names(notebook.read_source((ROOT / "notebooks" / "train_dolly.py").read_text()))
    values = dict.fromkeys(names, "") | {
        "gpu_family": "cpu",
        "local_training_root": str(finished),
        "dbfs_output_root": root,
    }
    published = str(read_widgets(SimpleNamespace(getAll=lambda: values)).published)
    assert re.fullmatch(r"hf://me/dolly__[\dT-]+", published)
    assert target_problems(published) == []


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_url_of_the_hub_is_answered_with_the_name_to_type(kind: Any) -> None:
    assert path_problem("hf://me/dolly", kind) == "is a URL. Type me/dolly"
    assert path_problem("hf://datasets/me/rows", kind) == "is a URL. Type me/rows"
    assert path_problem("https://huggingface.co/me/dolly", kind) == "is a web page. Type me/dolly"


def test_the_token_is_nowhere_in_the_output_of_the_command(
    hub: HubServer, finished: Path, tmp_path: Path
) -> None:
    hub.fail("POST .*/commit/", 400, message=f"leaks {TOKEN}")
    result = publish_command(finished, TARGET, **settings(hub, tmp_path))
    assert result.returncode == 2
    assert "the Hub answered 400 (leaks ***). The model in" in result.stderr
    assert result.stderr.count("\n") == 1
    assert TOKEN not in result.stdout + result.stderr + str(hub.repos)
