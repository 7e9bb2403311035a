"""Targets that are URLs: S3, and file systems that are asked before training whether they can be written."""

from __future__ import annotations

import sys
import threading
import tomllib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from tests.conftest import S3_KEYS
from tests.storage.conftest import ROOT, assert_complete, content, publish_command
from training.errors import PublishError
from training.storage.copy import marker_of, publish, target_problems


def objects(s3: Any, prefix: str) -> dict[str, bytes]:
    s3.invalidate_cache()
    return {Path(name).name: s3.cat_file(name) for name in s3.find(prefix)}


def test_a_file_system_is_asked_before_training_whether_it_can_be_written(
    finished: Path, target: Path, tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "files").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "files")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        [problem] = target_problems(f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
    assert problem.endswith(
        "/: its file system cannot write files. Name a folder, or a URL such as s3://bucket/folder"
    )
    assert target_problems(f"file://{target}") == []
    publish(finished, f"file://{target}")
    assert_complete(content(target), finished)

    real = type(s3).open
    assert target_problems("s3://models/x") == []
    assert objects(s3, "models/x") == {}, "the check leaves nothing behind"
    with monkeypatch.context() as patch:

        def refuse(self: Any, path: str, mode: str = "rb", **more: Any) -> Any:
            if mode == "wb":
                raise PermissionError("Access Denied")
            return real(self, path, mode, **more)

        patch.setattr(type(s3), "open", refuse)
        assert target_problems("s3://models/x") == ["s3://models/x: cannot be written: Access Denied"]


@pytest.mark.parametrize("prefix", ["models/a/dolly", "models"])
def test_a_model_is_published_to_s3_only_once(finished: Path, s3: Any, prefix: str) -> None:
    assert target_problems(f"s3://{prefix}") == []
    result = publish_command(finished, f"s3://{prefix}/")
    assert result.returncode == 0, result.stderr
    assert_complete(objects(s3, prefix), finished)
    assert publish(finished, f"s3://{prefix}") == []
    assert target_problems(f"s3://{prefix}/", finished) == []
    assert "already holds something (README.md" in target_problems(f"s3://{prefix}")[0]


def test_an_interrupted_copy_on_s3_is_continued_and_foreign_objects_are_refused(
    finished: Path, s3: Any
) -> None:
    s3.touch("models/dolly/")  # as the S3 console creates a folder
    publish(finished, "s3://models/dolly")
    s3.pipe_file("models/dolly/publishing.json", marker_of((finished / "run.json").read_bytes()))
    s3.rm_file("models/dolly/run.json")
    s3.pipe_file("models/dolly/model.safetensors", b"half")
    s3.pipe_file("models/dolly/config.json", b"?" * 1000)
    assert publish(finished, "s3://models/dolly") == ["config.json", "model.safetensors", "run.json"]
    copy = objects(s3, "models/dolly")
    copy.pop("dolly", None)
    assert_complete(copy, finished)
    s3.pipe_file("models/dolly/runs/notes.txt", b"mine")
    with pytest.raises(PublishError, match=r"not part of this model \(runs\)"):
        publish(finished, "s3://models/dolly")


@pytest.mark.parametrize("url", ["s3://models/with-adapter", "file://TARGET"])
def test_an_adapter_is_published_in_its_folder_continued_and_foreign_files_in_it_are_refused(
    finished: Path, target: Path, s3: Any, url: str
) -> None:
    url = url.replace("TARGET", str(target))
    (finished / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (finished / "adapter" / name).write_bytes(name.encode())
    written = publish(finished, url)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} < set(written)
    assert publish(finished, url) == []
    assert target_problems(url, finished) == []
    fs, place = (s3, url.removeprefix("s3://")) if url.startswith("s3") else (LocalFileSystem(), str(target))
    fs.pipe_file(f"{place}/adapter/adapter_model.safetensors", b"half")
    assert publish(finished, url) == ["adapter/adapter_model.safetensors", "run.json"]
    fs.invalidate_cache()
    assert fs.cat_file(f"{place}/adapter/adapter_model.safetensors") == b"adapter_model.safetensors"
    fs.pipe_file(f"{place}/adapter/notes.txt", b"mine")
    with pytest.raises(PublishError, match=r"not part of this model \(adapter/notes.txt\)"):
        publish(finished, url)


def test_a_write_that_s3_refuses_is_reported_and_leaves_no_record(
    finished: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(s3).open

    def refuse(self: Any, path: str, mode: str = "rb", **more: Any) -> Any:
        if mode == "wb" and path.endswith("tokenizer.json"):
            raise PermissionError("Access Denied")
        return real(self, path, mode, **more)

    with monkeypatch.context() as patch:
        patch.setattr(type(s3), "open", refuse)
        with pytest.raises(PublishError, match=r"x/tokenizer\.json: cannot be written: Access Denied"):
            publish(finished, "s3://models/x")
    assert "run.json" not in objects(s3, "models/x")
    publish(finished, "s3://models/x")
    assert_complete(objects(s3, "models/x"), finished)


@pytest.mark.parametrize(
    ("target", "environment", "message"),
    [
        ("s3://none/dolly", {}, "s3://none/dolly: there is no bucket 'none'. Make it first\n"),
        ("s3://none", {}, "s3://none: there is no bucket 'none'. Make it first\n"),
        ("s3://models/x", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "cannot be listed: Unable to locate credentials"),
        ("s3://models/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}, "cannot be listed: Could not connect to the endpoint"),
    ],
    ids=["no bucket", "no bucket, no folder", "no credentials", "no server"],
)  # fmt: skip
@pytest.mark.usefixtures("s3")
def test_an_unusable_s3_is_reported_in_one_line_without_credentials(
    finished: Path, target: str, environment: dict[str, str], message: str
) -> None:
    result = publish_command(finished, target, **environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    for secret in (S3_KEYS["AWS_ACCESS_KEY_ID"], S3_KEYS["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in result.stdout + result.stderr


def test_a_missing_s3fs_is_reported_with_the_extra_that_installs_it(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    [problem] = target_problems("s3://models/x")
    assert problem == "s3://models/x: s3fs is not installed. Type python -m pip install '.[s3]'"
    with pytest.raises(PublishError, match="s3fs is not installed"):
        publish(finished, "s3://models/x")


def test_the_s3_extra_pins_the_tested_version() -> None:
    """Each s3fs release requires the fsspec of the same version, so the three pins change together."""
    [extra] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["s3"]
    assert extra in (ROOT / "requirements_dev.txt").read_text().split()
    assert extra.replace("s3fs", "fsspec") in (ROOT / "requirements.txt").read_text().split()
