"""Run by test_zero2.py on two ranks: several trainings in the same two processes, under ZeRO-3 and ZeRO-2.

torchrun --nproc_per_node 2 -m tests.run.zero2_runs FOLDER
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from training import ranks
from training.console import set_up_console
from training.launch.exits import run_and_exit
from training.options.trainer_options import TrainingOptions
from training.run import saving
from training.trainer import train

ZERO_3, ZERO_2 = "config/ds_z3_bf16_config.json", "config/ds_z2_bf16_config.json"
COMMON: dict[str, Any] = {
    "input_model": "demo",
    "training_dataset": "demo",
    "test_size": 20,
    "max_steps": 6,
    "logging_steps": 1,
    "eval_steps": 2,
    "save_steps": 2,
    "save_total_limit": 100,
    "lr": 1e-3,
    "per_device_train_batch_size": 4,
    "gradient_checkpointing": "off",
}


def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The options of each run, by the name of its folder."""
    resumed = {
        "resume": str(folder / "zero-2" / "checkpoint-2"),
        "final_model": "best",
        "dbfs_output_dir": str(folder / "published"),
    }
    return {
        "zero-3": {"deepspeed": ZERO_3},
        "zero-2": {"deepspeed": ZERO_2},
        "resumed": {"deepspeed": ZERO_2, **resumed},
        "split": {"deepspeed": ZERO_2, "max_tokens_per_device": 100},
        "accumulated": {
            "deepspeed": ZERO_2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
    }


def main(folder: str) -> None:
    """Also writes the weights that the model computes with at the last save as live.pt of each run.

    Raises an error if the trainer collects the weights of the whole model.
    """
    set_up_console(logging.WARNING)
    if ranks.is_main_process():
        logging.getLogger("training").setLevel(logging.INFO)
    # The group lives on, but rank 0 must not shard the finished model when it verifies it.
    end_process_group, ranks.end_process_group = ranks.end_process_group, unset_hf_deepspeed_config

    def gathered(*_: Any, **__: Any) -> None:
        raise AssertionError("no rank collects the weights of the whole model")

    Accelerator.get_state_dict = gathered
    save_model_files = saving.save_model_files

    def keep_live_weights(trainer: Any, saved: Path) -> list[str]:
        names = save_model_files(trainer, saved)
        with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
            live = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
        if ranks.is_main_process():
            torch.save(live, saved.parent / "live.pt")
        return names

    saving.save_model_files = keep_live_weights
    for name, options in runs(Path(folder)).items():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        train(TrainingOptions(**COMMON | {"local_output_dir": f"{folder}/{name}"} | options))
        torch.distributed.barrier()  # rank 0 has finished the folder
    end_process_group()


if __name__ == "__main__":
    run_and_exit(lambda: main(*sys.argv[1:]))
