"""Seconds of a run outside its steps: against hand-computed cases and against the Trainer's own decisions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.conftest import settings_of_a_run
from training.machine.catalogue import find_machine
from training.options.deepspeed import Zero
from training.options.settings import resolve
from training.options.trainer_options import TrainingOptions
from training.plan import overhead
from training.plan.epoch import alpaca_lengths, epoch_load
from training.plan.lookup import model_shape
from training.plan.overhead import (
    checkpoint_seconds,
    checkpoints,
    evaluations,
    finish_seconds,
    start_seconds,
)
from training.trainer import train

GPTJ = model_shape("EleutherAI/gpt-j-6B")
N = GPTJ.parameters
A100 = find_machine("8xA100-40GB")
CPU = replace(A100, family="cpu", count=2, gpu_memory_gib=0.0)


@pytest.mark.parametrize(
    ("eval_steps", "save_steps", "steps"),
    [(100, 200, 797), (100, 200, 800), (180, 100_000, 357), (50, 70, 700), (1, 1, 5), (10, 3, 1), (7, 5, 36)],
)
def test_a_held_out_loss_comes_first_every_eval_steps_and_with_every_checkpoint(
    eval_steps, save_steps, steps
):
    settings = settings_of_a_run(eval_steps=eval_steps, save_steps=save_steps)
    saved = {step for step in range(1, steps + 1) if step % save_steps == 0} | {steps}
    measured = {step for step in range(1, steps + 1) if step % eval_steps == 0} | saved | {0}
    assert (evaluations(settings, steps), checkpoints(settings, steps)) == (len(measured), len(saved))


def test_a_real_run_makes_as_many_held_out_losses_and_checkpoints_as_planned(tmp_path):
    options = TrainingOptions(
        input_model="demo",
        training_dataset="demo",
        test_size=8,
        per_device_train_batch_size=2,
        max_steps=7,
        eval_steps=3,
        save_steps=5,
        local_output_dir=str(tmp_path / "run"),
    )
    train(options)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    made = sum("eval_loss" in entry for entry in history), len(list(tmp_path.glob("run/checkpoint-*")))
    settings = resolve(options, 1, "fp32")
    assert made == (evaluations(settings, 7), checkpoints(settings, 7)) == (5, 2)


def test_dollys_run_has_nine_held_out_losses_and_four_checkpoints():
    settings = settings_of_a_run(ranks=8, save_steps=200)
    assert (evaluations(settings, 797), checkpoints(settings, 797)) == (9, 4)


def test_a_checkpoint_is_checked_written_flushed_and_hashed():
    seconds = checkpoint_seconds(GPTJ, A100, settings_of_a_run(ranks=8))
    assert seconds == pytest.approx(
        {
            "checking": 2 * N / 8 / 5.7e9,
            "writing the model": 0,
            # one of eight shards of 12 bytes a parameter, from the device
            "writing the shards": 12 * N / 8 * (1 / 1.1e9 + 1 / 3e9),
            "flushing": 12 * N / 2e9,
            "hashing": 12 * N / 8 / 0.47e9,
        }
    )
    assert 50 < sum(seconds.values()) < 90
    host = settings_of_a_run(ranks=8, zero=Zero(stage=3, offload_optimizer=True))
    offloaded = checkpoint_seconds(GPTJ, A100, host)
    assert offloaded["writing the shards"] == pytest.approx(12 * N / 8 / 1.1e9), "it is in host memory"
    nodes = checkpoint_seconds(GPTJ, A100, settings_of_a_run(ranks=16))
    assert nodes["flushing"] == pytest.approx(12 / 2 * N / 2e9), "each machine has half of the shards"
    alone = checkpoint_seconds(GPTJ, A100, settings_of_a_run(ranks=1))
    assert alone["hashing"] == pytest.approx(12 * N / 0.47e9), "one file, one thread"
    second = checkpoint_seconds(GPTJ, A100, settings_of_a_run(ranks=8, zero=Zero(stage=2)))
    assert second["writing the model"] == pytest.approx(2 * N * (1 / 1.2e9 + 1 / 3e9)), "by rank 0"
    assert second["writing the shards"] == pytest.approx(seconds["writing the shards"])
    whole = settings_of_a_run(ranks=8, zero=Zero(stage=0))
    assert checkpoint_seconds(GPTJ, A100, whole)["writing the shards"] == pytest.approx(
        8 * N * (1 / 1.1e9 + 1 / 3e9)
    ), "without ZeRO rank 0 writes all of Adam's moments"


def test_the_more_ranks_the_sooner_the_finished_model_is_written():
    def model(ranks: int) -> float:
        return finish_seconds(GPTJ, settings_of_a_run(ranks=ranks))["model"]

    assert model(8) == pytest.approx(2 * N * (1 / 2e9 + (1 / 1.2e9 + 1 / 0.47e9) / 8))
    assert model(1) == pytest.approx(2 * N * (1 / 2e9 + (1 / 1.2e9 + 1 / 0.47e9) / 3)), "three files of 5 GB"


def test_the_start_counts_the_download_only_for_a_model_of_the_hub():
    settings = settings_of_a_run(ranks=8)
    load = epoch_load(alpaca_lengths(), settings)
    seconds = start_seconds(GPTJ, A100, settings, load)
    assert seconds["download"] == pytest.approx(4 * N / 0.3e9)
    assert seconds["loading"] == pytest.approx(4 * N / overhead.LOADING)
    local = start_seconds(replace(GPTJ, downloaded=False), A100, settings, load)
    assert local == seconds | {"download": 0}
    alone = settings_of_a_run(ranks=1, per_device_train_batch_size=64)
    assert seconds["start"] - start_seconds(GPTJ, A100, alone, load)["start"] == overhead.NCCL_SECONDS


def test_publishing_is_counted_only_if_the_run_publishes():
    settings = settings_of_a_run(ranks=8)
    assert finish_seconds(GPTJ, settings)["publishing"] == 0
    published = finish_seconds(GPTJ, settings_of_a_run(ranks=8, dbfs_output_dir="/dbfs/dolly"))
    assert published["publishing"] == pytest.approx(2 * N * (1 / 0.47e9 + 2 / 0.2e9)), (
        "hashed, written, read back"
    )
    assert published["verification"] == finish_seconds(GPTJ, settings)["verification"]
