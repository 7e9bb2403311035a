"""Every option of every command that names a file or folder: ~ is expanded, and what cannot be used is refused alike."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from flows import model_on_s3
from notebooks.cells import DATASET_PARTS, read_widgets
from tests.conftest import problems_of, rows_of
from training import demo, generate, notebook, publish, trainer
from training.bench.__main__ import main as bench
from training.consts import ROOT
from training.errors import ModelError, RunRefusedError, printable
from training.files import path_problem
from training.model.loading import load_config
from training.options.trainer_options import TrainingOptions
from training.plan.__main__ import main as plan
from training.tracking.__main__ import main as tracking

# (command, words, flag, whether it names a folder, whether it also takes a URL)
OPTIONS: list[tuple[click.Command, list[str], str, bool | None, bool]] = [
    *((trainer.main, [], flag, folder, url) for flag, folder, url in (
        ("--input-model", True, False), ("--training-dataset", None, False), ("--deepspeed", False, False),
        ("--deepspeed_config", False, False), ("--local-output-dir", True, False), ("--dbfs-output-dir", None, True),
        ("--sample-prompts", False, False), ("--resume", None, False),
    )),
    *((plan, ["--machine", "8xH100"], flag, folder, False) for flag, folder in (
        ("--input-model", True), ("--training-dataset", None), ("--deepspeed", False), ("--local-output-dir", True),
    )),
    (publish.main, ["--to", "x"], "--model", True, False),
    (publish.main, ["--model", "."], "--to", None, True),
    (tracking, [], "--model", True, False),
    (bench, [], "--training-dataset", None, False),
    (demo.main, [], "--local-output-dir", True, False),
    (generate.main, ["--model", "demo", "a"], "--prompts", False, False),
    (generate.main, ["--model", "demo", "a"], "--output", False, False),
    (notebook.main, ["--out", "x.ipynb"], "", False, False),
    (notebook.main, ["notebooks/train_dolly.py"], "--out", False, False),
    (model_on_s3.main, ["1"], "--to", True, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "words", "flag", "folder", "url"), OPTIONS, ids=[f"{o[0].callback.__module__} {o[2]}" for o in OPTIONS]
)  # fmt: skip
def test_a_path_that_cannot_be_used_is_refused_in_one_line_with_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: click.Command, words: list[str], flag: str,
    folder: bool | None, url: bool,
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    unusable = {
        "~nobody-here/x": "there is no user 'nobody-here'",
        "a\0b": "holds a null byte",
        f"{tmp_path}/{300 * 'x'}": "cannot be used (File name too long)",
        f"{tmp_path}/loop/x": "cannot be used (Too many levels of symbolic links)",
    }
    if not url:
        unusable["gs://bucket/x"] = "is a URL"
    if folder is not None:
        unusable[str(tmp_path / "file" if folder else tmp_path)] = "is a file" if folder else "is a folder"
    for path, reason in unusable.items():
        result = CliRunner().invoke(command, [*words, *([flag, path] if flag else [path])])
        assert (result.exit_code, isinstance(result.exception, SystemExit)) == (2, True), result.output
        lines = [line for line in result.output.splitlines() if reason in line]
        assert len(lines) == 1, result.output
        assert path in lines[0] or printable(path) in lines[0]
        assert (flag or "NOTEBOOK") in lines[0]
        assert lines[0].rstrip("'\"").split(". ")[-1][:4] in ("Name", "Type")


def test_every_option_of_the_trainer_that_names_a_path_expands_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {f.name: "~/x" for f in fields(TrainingOptions) if "path" in f.metadata}
    assert {f"--{name.replace('_', '-')}" for name in paths} | {"--deepspeed_config"} >= {
        option[2] for option in OPTIONS if option[0] is trainer.main
    }
    options = TrainingOptions(**paths)
    path = str(tmp_path / "x")
    assert {name: getattr(options, name) for name in paths} == {
        name: (path,) if name == "training_dataset" else path for name in paths
    }
    unknown = TrainingOptions(local_output_dir="~nobody-here/x", resume="auto")
    assert (unknown.local_output_dir, unknown.resume) == ("~nobody-here/x", "auto")


def test_files_and_folders_of_the_home_folder_are_read_by_trainer_and_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_folder: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").symlink_to(base_folder)
    (tmp_path / "rows.json").write_text(json.dumps(rows_of(40)))
    (tmp_path / "ds.json").write_text((ROOT / "config" / "ds_z3_bf16_config.json").read_text())
    (tmp_path / "prompts.txt").write_text("Name a river.\n")
    data = ["--input-model=~/base", "--training-dataset=~/rows.json", "--deepspeed=~/ds.json"]
    result = CliRunner().invoke(plan, ["--machine", "8xA100-40GB", *data])
    assert result.exit_code == 0, result.output
    monkeypatch.setenv("RANK", "0")
    more = {"sample_prompts": "~/prompts.txt", "local_output_dir": "~/run"}
    names = ("input_model", "training_dataset", "deepspeed")
    assert (
        problems_of(
            TrainingOptions(**dict(zip(names, ("~/base", "~/rows.json", "~/ds.json"), strict=True)), **more)
        )
        == []
    )
    assert load_config("~/base").model_type == "gptj"


@pytest.mark.parametrize("name", ["/no/x", "./x", "../x", "~/x", "a/b/c", "x y"])
def test_a_model_that_can_only_be_a_folder_and_does_not_exist_is_no_such_folder(name: str) -> None:
    """And not an invalid name on the Hub."""
    with pytest.raises(
        ModelError, match=r"no such folder\. Name a folder with config.json, or a model on the Hub"
    ):
        load_config(name)
    assert path_problem("EleutherAI/gpt-j-6B", "model") is path_problem("gpt2", "model") is None


def test_a_page_of_the_hub_is_answered_with_the_name() -> None:
    page = "https://huggingface.co/EleutherAI/gpt-j-6b/tree/main"
    assert path_problem(page, "model") == "is a web page. Type EleutherAI/gpt-j-6b"
    page = "https://huggingface.co/datasets/tatsu-lab/alpaca"
    assert path_problem(page, "dataset") == "is a web page. Type tatsu-lab/alpaca"


def test_the_widgets_of_the_notebook_are_checked_in_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    names = "num_gpus num_nodes epochs test_size restarts resume dbfs_output_root checkpoint_root mlflow_model_name method training_dataset"
    empty = dict.fromkeys([*names.split(), *(f"dataset_{part}" for part in DATASET_PARTS)], "")
    values = empty | {"gpu_family": "cpu", "input_model": "~/base", "local_training_root": "~/runs"}
    choices = read_widgets(SimpleNamespace(getAll=lambda: values))
    assert (choices.input_model, choices.output.parent) == (str(tmp_path / "base"), tmp_path / "runs")
    values |= {
        "input_model": "/no/x",
        "training_dataset": "a\0b",
        "local_training_root": "s3://b/x",
        "dbfs_output_root": "~nobody-here/x",
    }
    with pytest.raises(RunRefusedError) as refused:
        read_widgets(SimpleNamespace(getAll=lambda: values))
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
        "input_model /no/x", f"training_dataset {printable(chr(0)).join('ab')}", "local_training_root s3", "dbfs_output_root ~nobody-here/x",
    ]  # fmt: skip
