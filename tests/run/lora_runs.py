"""Run by test_lora_resume.py: several LoRA trainings in the same processes, under ZeRO-3 and ZeRO-2.

torchrun --nproc_per_node 2 -m tests.run.lora_runs FOLDER
torchrun --nproc_per_node 1 -m tests.run.lora_runs FOLDER
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from training import ranks
from training.console import set_up_console
from training.launch.exits import run_and_exit
from training.options.trainer_options import TrainingOptions
from training.run import saving
from training.trainer import train

ZERO_3, ZERO_2 = "config/ds_z3_fp32_config.json", "config/ds_z2_bf16_config.json"
COMMON: dict[str, Any] = {
    "input_model": "demo",
    "training_dataset": "demo",
    "test_size": 20,
    "max_steps": 4,
    "logging_steps": 1,
    "eval_steps": 2,
    "save_steps": 2,
    "save_total_limit": 100,
    "lora": 4,
    "lr": 1e-2,
    "gradient_checkpointing": "off",
}


def runs(folder: Path, world: int) -> dict[str, dict[str, Any]]:
    """The options of each run, by the name of its folder."""
    common = {"per_device_train_batch_size": 8 // world}
    zero_3, zero_2 = (common | {"deepspeed": file} for file in (ZERO_3, ZERO_2))
    if world == 1:
        return {
            "zero-3 by one": zero_3 | {"resume": str(folder / "zero-3" / "checkpoint-2")},
            "zero-2 by one": zero_2 | {"resume": str(folder / "zero-2" / "checkpoint-2")},
        }
    return {
        "zero-3": zero_3
        | {"checkpoint_to": str(folder / "copies"), "sample_prompts": str(folder / "prompts.txt")},
        "zero-3 resumed": zero_3 | {"resume": str(folder / "zero-3" / "checkpoint-2")},
        "from the adapter": zero_3
        | {
            "input_model": str(folder / "zero-3" / "adapter"),
            "lora": 0,
            "lr": 1e-5,
            "max_steps": 1,
            "eval_steps": 1,
        },
        "zero-2": zero_2,
        "zero-2 resumed": zero_2 | {"resume": str(folder / "zero-2" / "checkpoint-2"), "final_model": "best"},
    }


def main(folder: str) -> None:
    """Also writes all weights that the model computes with at each save as live-STEP.pt of each run."""
    set_up_console(logging.WARNING)
    if ranks.is_main_process():
        logging.getLogger("training").setLevel(logging.INFO)
    # The group lives on, but rank 0 must not shard the finished model when it verifies it.
    end_process_group, ranks.end_process_group = ranks.end_process_group, unset_hf_deepspeed_config
    save_model_files = saving.save_model_files

    def keep_live_weights(trainer: Any, saved: Path) -> list[str]:
        names = save_model_files(trainer, saved)
        if trainer.model_wrapped.zero_optimization_stage() == 3:
            trainer.model_wrapped.optimizer.checkpoint_event_prologue()  # nothing is in flight
        with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
            live = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
        if ranks.is_main_process():
            torch.save(live, saved.parent / f"live-{trainer.state.global_step}.pt")
        return names

    saving.save_model_files = keep_live_weights
    for name, options in runs(Path(folder), ranks.world_size()).items():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        train(TrainingOptions(**COMMON | {"local_output_dir": f"{folder}/{name}"} | options))
        torch.distributed.barrier()  # rank 0 has finished the folder
    end_process_group()


if __name__ == "__main__":
    run_and_exit(lambda: main(*sys.argv[1:]))
