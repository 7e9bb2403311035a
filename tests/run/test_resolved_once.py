"""Options, DeepSpeed JSON, precision and world size are resolved once, into one frozen object."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.starts import changed_start
from tests.trees import ROOT, run_in
from training.options.settings import resolve
from training.options.trainer_options import TrainingOptions

# Writes a line each time the process opens the file.
RECORD_OPENS = """
import os, sys

def note(event, arguments):
    if event == "open" and str(arguments[0]).endswith("/counted.json"):
        os.write(notes, b"opened\\n")

notes = os.open({file!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.addaudithook(note)
"""


@pytest.mark.slow
def test_a_rank_reads_the_deepspeed_json_once_and_its_stage_and_loggers_work(tmp_path: Path) -> None:
    config = json.loads((ROOT / "config" / "ds_z3_bf16_config.json").read_text())
    config["zero_optimization"]["stage"] = 2
    for monitor in ("csv_monitor", "tensorboard"):
        config[monitor] = {"enabled": True, "output_path": str(tmp_path / monitor), "job_name": "job"}
    config |= {"timers": {"throughput": {"enabled": True}}, "communication_data_type": "fp32"}
    (tmp_path / "counted.json").write_text(json.dumps(config))
    noted = changed_start(tmp_path, RECORD_OPENS.format(file=str(tmp_path / "notes")))
    options = ["--num_gpus", "1", "--master_port", "29713", "--module", "training.trainer"]
    options += ["--deepspeed", str(tmp_path / "counted.json"), "--local-output-dir", str(tmp_path / "out")]
    options += [
        "--input-model",
        "demo",
        "--training-dataset",
        "demo",
        "--test-size",
        "50",
        "--max-steps",
        "2",
    ]
    run = run_in(ROOT, "deepspeed.launcher.runner", *options, **noted)
    assert run.returncode == 0, run.stdout
    assert "DeepSpeed ZeRO-2" in run.stdout
    assert all(list((tmp_path / monitor).rglob("*.*")) for monitor in ("csv_monitor", "tensorboard"))
    assert (tmp_path / "notes").read_text() == "opened\n"


def test_resolved_settings_are_frozen() -> None:
    options = TrainingOptions(local_output_dir="OUT", deepspeed=str(ROOT / "config/ds_z3_bf16_config.json"))
    settings = resolve(options, ranks=2, best_precision="fp32")
    assert (settings.precision, settings.zero.stage, settings.global_batch) == ("bf16", 3, 16)
    for frozen, name in ((settings, "precision"), (options, "lr"), (settings.zero, "stage")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, None)
