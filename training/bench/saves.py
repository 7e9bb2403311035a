"""Compares checkpoints in the background with those that training waits for, in one run of two CPU ranks.

    python -m training.bench.saves

The saves of one run alternate between both ways, so that a busy machine slows both. A second run saves nothing before its
last step. Both train the same random GPT-J under ZeRO-3."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from training.console import set_up_console
from training.consts import DEMO, METRICS_FILE, ROOT, SUPERVISED
from training.options.command_line import option_words

WAYS = ("in the background", "waiting")
EVERY = 4  # steps between saves
NEVER = 10**6  # steps, or checkpoints: more than a run has
FIGURES = ("step", "loss", "grad_norm", "eval_loss")
# Environment variable of the ranks: the file for the times of the run's saves.
TIMES = "DOLLY_BENCH_SAVES"


def make_model(folder: Path, width: int, layers: int) -> int:
    """Writes a random GPT-J with the demo's tokenizer. Returns its number of parameters."""
    from transformers import AutoModelForCausalLM, GPTJConfig

    from training.model.demo_model import model_folder
    from training.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model_folder(DEMO), False)
    rotary = min(32, width // 8)  # of a head
    size = {"n_embd": width, "n_layer": layers, "n_head": 8, "rotary_dim": rotary, "n_positions": 256}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = AutoModelForCausalLM.from_config(GPTJConfig(vocab_size=len(tokenizer), **size, **ends))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def train(model: Path, output: Path, steps: int, every: int, times: Path | None = None) -> float:
    """Trains on two ranks. Returns the seconds of the command. `times`: the saves alternate between both ways."""
    begin = time.monotonic()
    options = {
        "deepspeed": "config/ds_z3_fp32_config.json",
        "input_model": str(model),
        "training_dataset": (DEMO,),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "test_size": 4,
        "max_steps": steps,
        "save_steps": every,
        "save_total_limit": NEVER,
        "eval_steps": NEVER,
        "logging_steps": 1,
        "gradient_checkpointing": "off",
        "local_output_dir": str(output),
    }
    launcher = "deepspeed --num_gpus 2 --master_port 29533 --module training.bench.saves".split()
    environment = os.environ | ({} if times is None else {TIMES: str(times)})
    result = subprocess.run(
        [*launcher, *option_words(options)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        raise click.ClickException(result.stdout[-3000:])
    return time.monotonic() - begin


def alternate(times: Path) -> None:
    """Lets this rank's saves alternate between both ways. Rank 0 writes each save's way and the time of its beginning."""
    from training.run import saving

    save = saving.save_checkpoint
    began: list[float] = []

    def either_way(trainer: Any, write_files: Any) -> None:
        saving.finish(trainer)  # what is left of the save before belongs to its time
        trainer.writer.background = len(began) % 2 == 0
        began.append(time.monotonic())
        if trainer.is_world_process_zero():
            times.write_text(json.dumps(began))
        save(trainer, write_files)

    saving.save_checkpoint = either_way


def compare(folder: Path, parameters: int) -> dict[str, Any]:
    """The figures of both ways, without the first save of each, which allocates memory."""
    from training.storage import checkpoint, metrics

    began = json.loads((folder / "times.json").read_text())
    saves = [entry for entry in metrics.read(folder / "saving" / METRICS_FILE) if "blocked_seconds" in entry]
    lasted = [after - before for before, after in pairwise(began)]
    last = (
        len(lasted) - len(lasted) % 2
    )  # pairs only, and not the last save, for which the end of the run waits
    result: dict[str, Any] = {"parameters": parameters}
    for number, way in enumerate(WAYS):
        chosen = range(2 + number, last, 2)
        result[way] = {
            "saves": len(chosen),
            "blocked_seconds": sum(saves[i]["blocked_seconds"] for i in chosen),
            "written_bytes": sum(saves[i]["written_bytes"] for i in chosen),
            "seconds_from_save_to_save": sum(lasted[i] for i in chosen),
        }
    files = [  # by both ways; the names have the step in them
        {name.replace(saved.name.removeprefix("checkpoint-"), "N") for name in manifest["files"]}
        for saved in checkpoint.checkpoints(folder / "saving")[2:4]
        if (manifest := checkpoint.read_manifest(saved))
    ]
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("saving", "alone")]
    logged = [_figures(folder / name) for name in ("saving", "alone")]
    shared = {entry["step"] for entry in logged[1] if "eval_loss" in entry}
    figures = [
        [entry for entry in entries if "loss" in entry or ("eval_loss" in entry and entry["step"] in shared)]
        for entries in logged
    ]
    background, waiting = (result[way] for way in WAYS)
    return result | {
        "blocked_ratio": background["blocked_seconds"] / waiting["blocked_seconds"],
        "run_ratio": background["seconds_from_save_to_save"] / waiting["seconds_from_save_to_save"],
        "same_files": files[0] == files[1],
        "same_losses_and_norms": figures[0] == figures[1],
        "same_weights": weights[0] == weights[1],
    }


def _figures(output: Path) -> list[dict[str, Any]]:
    from training.storage import metrics

    return [{k: entry[k] for k in FIGURES if k in entry} for entry in metrics.read(output / METRICS_FILE)]


@click.command()
@click.option("--width", default=512, help="Width of the GPT-J.", show_default=True)
@click.option(
    "--layers", default=8, help="Its layers. A checkpoint holds 12 bytes a parameter.", show_default=True
)
@click.option("--pairs", default=4, help="Saves of each way that count.", show_default=True)
def main(width: int, layers: int, pairs: int) -> None:
    """Compare checkpoints in the background with those that training waits for."""
    set_up_console()
    steps = EVERY * (2 * pairs + 3)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = make_model(folder / "model", width, layers)
        train(folder / "model", folder / "saving", steps, EVERY, folder / "times.json")
        train(folder / "model", folder / "alone", steps, NEVER)
        print(json.dumps(compare(folder, parameters), indent=2))


if __name__ == "__main__":
    if "RANK" not in os.environ:
        main()
    else:
        # A supervisor would start the trainer without what `alternate` changes.
        os.environ[SUPERVISED] = "log"
        if TIMES in os.environ:
            alternate(Path(os.environ[TIMES]))
        # By name: this process becomes the trainer.
        runpy.run_module("training.trainer", run_name="__main__", alter_sys=True)
    sys.exit(0)
