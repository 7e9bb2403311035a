"""Run by test_attention.py on two ranks: under ZeRO-3 packed rows give the gradients of padded eager attention.

Blocks that ZeRO-3 handles as a whole give the same losses, gradients, norms and weights, bit for bit.

torchrun --nproc_per_node 2 -m tests.run.zero3_gradients FOLDER
"""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import get_z3_leaf_modules, safe_get_full_fp32_param, safe_get_full_grad
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from tests.model.test_attention import count_targets, eager_gptj, packed, padded, random_rows, tied_llama
from training.data.batching import GlobalBatchSampler
from training.data.collator import split_packed_batch
from training.launch.exits import run_and_exit
from training.launch.supervisor import remove_shared_buffer
from training.model.blocks import block_parameters, use_whole_blocks
from training.model.packing import packing_of
from training.options.deepspeed import fill_bucket_sizes
from training.run.operators import compile_operators

WORLD_SIZE = 2
ACCUMULATION = 2
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": ACCUMULATION,
    # Every parameter is sharded, however small, and none is kept from one module to the next.
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
    },
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}


def compare(
    reference: PreTrainedModel,
    folder: Path,
    checkpointing: dict | None,
    row_count: int,
    micro_steps: int = 1,
    whole_blocks: bool = False,
) -> dict[str, Any]:
    """Compares one optimizer step on two ranks with two accumulation steps with a single process.

    Returns the losses, the gradients, their norm and the new weights.
    """
    reference.zero_grad()
    rows = random_rows(seed=7, count=row_count)
    labels = count_targets(rows)
    reference(**padded(rows), num_items_in_batch=labels).loss.backward()

    model = AutoModelForCausalLM.from_pretrained(folder).train()
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "the model is not sharded"
    packing_of(model.config).prepare(model)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    config = deepcopy(CONFIG)
    if whole_blocks:
        use_whole_blocks(model)
        config["zero_optimization"] |= {
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_max_live_parameters": 10**9,
        }
        fill_bucket_sizes(config["zero_optimization"], block_parameters(model))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    assert len(get_z3_leaf_modules(model)) == whole_blocks * model.config.num_hidden_layers
    step: dict[str, Any] = {}

    shares = GlobalBatchSampler(
        [len(row["input_ids"]) for row in rows], max(row_count, WORLD_SIZE * ACCUMULATION),
        world_size=WORLD_SIZE, rank=dist.get_rank(), accumulation=ACCUMULATION, seed=0, deal="packed",
    )  # fmt: skip
    parts = [
        part
        for share in shares
        for part in split_packed_batch(packed([rows[row] for row in share]), micro_steps)
    ]
    assert len(parts) == ACCUMULATION * micro_steps
    for i, part in enumerate(parts, start=1):
        engine.set_gradient_accumulation_boundary(i == len(parts))
        loss = engine(**part, num_items_in_batch=labels).loss
        step[f"loss {i}"] = loss.detach().clone()
        # ZeRO averages over ranks, so the loss is multiplied by their number, as in transformers' Trainer.
        engine.backward(loss * WORLD_SIZE, scale_wrt_gas=False)
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        gradient = safe_get_full_grad(parameter)
        difference = ((gradient - expected.grad).norm() / expected.grad.norm()).item()
        assert difference < 1e-5, f"{name}: {difference}"
        step[f"gradient of {name}"] = gradient.clone()
    engine.step()
    step["norm"] = torch.as_tensor(engine.get_global_grad_norm())
    step |= {
        name: safe_get_full_fp32_param(parameter).clone() for name, parameter in model.named_parameters()
    }
    engine.destroy()
    return step


def same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Asserts that two steps are equal bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different


def main(folder: Path) -> None:
    compile_operators({})
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    try:
        gptj, llama = folder / "gptj", folder / "llama"
        if dist.get_rank() == 0:
            eager_gptj().save_pretrained(gptj)
            tied_llama().save_pretrained(llama)
        dist.barrier()
        config = HfDeepSpeedConfig(CONFIG)  # while it exists, transformers shards models as they load
        recomputed = {"use_reentrant": False}
        step = compare(eager_gptj(), gptj, None, row_count=9)
        same(step, compare(eager_gptj(), gptj, None, row_count=9, whole_blocks=True))
        # The backward pass computes the same numbers again, so checkpointing changes no bit either.
        same(step, compare(eager_gptj(), gptj, recomputed, row_count=9))
        same(step, compare(eager_gptj(), gptj, recomputed, row_count=9, whole_blocks=True))
        parts = compare(eager_gptj(), gptj, None, row_count=9, micro_steps=2)
        same(parts, compare(eager_gptj(), gptj, None, row_count=9, micro_steps=2, whole_blocks=True))
        # One of four shares is empty.
        compare(eager_gptj(), gptj, {"use_reentrant": True}, row_count=3, whole_blocks=True)
        step = compare(tied_llama(), llama, recomputed, row_count=9)
        same(step, compare(tied_llama(), llama, recomputed, row_count=9, whole_blocks=True))
        compare(tied_llama(), llama, None, row_count=3)
        del config
        (folder / f"rank{dist.get_rank()}").write_text("passed")
    finally:
        dist.destroy_process_group()
        remove_shared_buffer()


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[-1])))
