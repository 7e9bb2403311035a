"""The demo of LoRA keeps one task from the base, and shows exact matches by task."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from training import demo
from training.data.demo_rows import Row, demo_rows, first_question, rows_by_task
from training.options.trainer_options import TrainingOptions
from training.plan import lora_demo


def test_the_base_never_sees_the_new_task_and_no_run_sees_a_held_out_row(tmp_path: Path) -> None:
    files = lora_demo.write_rows(tmp_path / "out")
    base, adapter, held_out = (
        [json.loads(line) for line in Path(files[name]).read_text().splitlines()]
        for name in ("base", "adapter", "held_out")
    )
    tasks = {first_question(row): task for task, rows in rows_by_task().items() for row in rows}

    def keys(rows: list[Row]) -> list[tuple[str, str]]:
        return list(map(first_question, rows))

    new = lora_demo.NEW_TASK
    assert all(tasks[key] != new for key in keys(base))
    assert sum(tasks[key] == new for key in keys(adapter)) == len(adapter) // 2
    assert not set(keys(held_out)) & {*keys(base), *keys(adapter)}
    assert all(tasks[key] == row["category"] for key, row in zip(keys(held_out), held_out, strict=True))
    assert len(held_out) == lora_demo.HELD_OUT * len(rows_by_task())
    assert len(demo_rows()) == sum(map(len, rows_by_task().values()))


def test_the_runs_are_options_of_the_trainer_and_only_the_second_has_an_adapter(tmp_path: Path) -> None:
    files = {"base": "base.jsonl", "adapter": "adapter.jsonl"}
    base, adapter = (TrainingOptions(**values) for values in lora_demo.runs(tmp_path, files, 2, 16))
    assert (base.lora, adapter.lora) == (0, 16)
    assert adapter.input_model == base.local_output_dir == str(tmp_path / "base")
    assert base.input_model == "demo"


def test_the_table_has_a_line_for_each_task_and_the_new_one_last() -> None:
    tasks = ["add", "rewrite", "add", "rewrite", "read"]
    lines = lora_demo.table(tasks, [1, 0, 0, 0, 1], [1, 1, 1, 0, 0]).splitlines()
    cells = [line.split()[-3:] for line in lines[1:]]
    assert cells == [["2", "50%", "100%"], ["1", "100%", "0%"], ["3", "67%", "67%"], ["2", "0%", "50%"]]
    assert lines[-1].startswith("rewrite, which only the adapter was trained on")


def test_a_missing_package_and_a_taken_folder_are_reported_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "run_trainer", lambda *_: pytest.fail("it trains"))
    result = CliRunner().invoke(demo.main, ["--lora", "8", "--local-output-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "exists. Name a new folder" in result.output
    monkeypatch.setattr(demo, "lora_package_problems", lambda **_: ["--lora needs the package peft"])
    result = CliRunner().invoke(demo.main, ["--lora", "8", "--local-output-dir", str(tmp_path / "new")])
    assert "needs the package peft" in result.output
    result = CliRunner().invoke(demo.main, ["--lora", "8", "--plot", str(tmp_path / "a.png")])
    assert result.exit_code == 2


@pytest.mark.slow
def test_a_short_demo_of_lora_trains_both_models_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lora_demo, "DEMO_BASE", {"max_steps": 2})
    monkeypatch.setattr(lora_demo, "DEMO_ADAPTER", {"max_steps": 2})
    monkeypatch.setattr(lora_demo, "HELD_OUT", 2)

    def in_one_process(values: dict, ranks: int, extra: tuple, title: str) -> None:
        run = [sys.executable, "-m", "training.trainer", "--no-bf16"]
        words = demo.deepspeed_command(values, ranks)
        demo.subprocess.run([*run, *words[words.index("training.trainer") + 1 :], *extra], check=True)

    monkeypatch.setattr(demo, "run_trainer", in_one_process)
    output = tmp_path / "demo"
    result = CliRunner().invoke(
        demo.main,
        ["--lora", "4", "--num-gpus", "1", "--local-output-dir", str(output), "--lora-dropout", "0.1"],
    )
    assert result.exit_code == 0, result.output
    assert "rewrite, which only the adapter was trained on" in result.output
    assert (output / "lora" / "adapter" / "adapter_model.safetensors").is_file()
    record = json.loads((output / "lora" / "run.json").read_text())
    assert (record["options"]["lora"], record["options"]["lora_dropout"]) == (4, 0.1)
