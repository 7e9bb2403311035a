"""Run by test_packing.py on two ranks: what architectures support, while a ZeRO-3 run is prepared.

torchrun --nproc_per_node 2 -m tests.run.zero3_packing FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoConfig
from transformers.integrations import HfDeepSpeedConfig

from training.launch.exits import run_and_exit
from training.launch.supervisor import remove_shared_buffer
from training.model.packing import packing_of
from training.ranks import rank
from training.run.operators import compile_operators

# Packed with the chunked loss, packed with our attention, packed with their own loss, refused.
KINDS = ["llama", "gptj", "gemma2", "bloom"]


def answers() -> dict[str, dict[str, Any]]:
    """What the architectures support, by kind and precision of the config."""
    return {
        f"{kind} in {dtype}": asdict(packing_of(AutoConfig.for_model(kind, dtype=dtype)))
        for kind in KINDS
        for dtype in (torch.float32, torch.bfloat16)
    }


def main(folder: Path) -> None:
    compile_operators({})
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    try:
        alive = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
        (folder / f"rank{rank()}").write_text(json.dumps(answers()))
        del alive
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
        remove_shared_buffer()


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[-1])))
