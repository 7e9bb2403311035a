"""Run by test_lora_ranks.py on two ranks: under ZeRO-3 and ZeRO-2 adapters get the gradients of one process.

torchrun --nproc_per_node 2 -m tests.run.lora_gradients FOLDER
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
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from tests.model.test_attention import count_targets, eager_gptj, packed, padded, random_rows, tied_llama
from tests.run.zero3_gradients import CONFIG
from training.data.batching import GlobalBatchSampler
from training.launch.exits import run_and_exit
from training.launch.supervisor import remove_shared_buffer
from training.model.adapter import Lora, add_adapter
from training.model.blocks import block_parameters, use_whole_blocks
from training.model.new_rows import trainable_state
from training.model.packing import packing_of
from training.options.deepspeed import fill_bucket_sizes
from training.run.operators import compile_operators

LORA, IDS, WORLD_SIZE, ACCUMULATION = Lora(rank=4, alpha=8.0), [5, 209, 210], 2, 2


def set_random(model: PreTrainedModel) -> None:
    """Gives the adapter other values than zero, before an engine divides them among the ranks."""
    with torch.no_grad():
        for number, tensor in enumerate(trainable_state(model).values()):
            tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))


def reference_of(make: Any, rows: list[dict[str, Any]], labels: int) -> dict[str, torch.Tensor]:
    """Gradients of one process on padded rows, with the architecture's own attention and loss."""
    model = make()
    add_adapter(model, LORA, IDS, seed=3)
    set_random(model)
    model(**padded(rows), num_items_in_batch=labels).loss.backward()
    return {name: tensor.grad for name, tensor in trainable_state(model).items()}


def compare(make: Any, folder: Path, stage: int, checkpointing: bool, whole_blocks: bool) -> None:
    """Compares the gradients of a step of two ranks with those of one process, and steps."""
    rows = random_rows(seed=7, count=9)
    for row in rows:
        row["input_ids"][:2] = IDS[:2]
    labels = count_targets(rows)
    expected = reference_of(make, rows, labels)
    config = deepcopy(CONFIG)
    config["zero_optimization"]["stage"] = stage
    alive = HfDeepSpeedConfig(config) if stage == 3 else None
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    assert (next(model.parameters()).numel() == 0) == (stage == 3)
    packing_of(model.config).prepare(model)
    add_adapter(model, LORA, IDS, seed=3)
    check_same_on_all_ranks(model)
    set_random(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if whole_blocks:
        use_whole_blocks(model)
        config["zero_optimization"] |= {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
        config["zero_optimization"] |= {"stage3_max_live_parameters": 10**9}
        fill_bucket_sizes(config["zero_optimization"], block_parameters(model))
    trained = trainable_state(model)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(trained.values()), config=config)
    assert bool(get_z3_leaf_modules(model)) == whole_blocks
    shares = GlobalBatchSampler(
        [len(row["input_ids"]) for row in rows], len(rows), world_size=WORLD_SIZE, rank=dist.get_rank(),
        accumulation=ACCUMULATION, seed=0, deal="packed",
    )  # fmt: skip
    for number, share in enumerate(shares, start=1):
        engine.set_gradient_accumulation_boundary(number == ACCUMULATION)
        loss = engine(**packed([rows[row] for row in share]), num_items_in_batch=labels).loss
        engine.backward(loss * WORLD_SIZE, scale_wrt_gas=False)
    assert trained.keys() == expected.keys()
    before = {name: safe_get_full_fp32_param(tensor).clone() for name, tensor in trained.items()}
    for name, tensor in trained.items():
        difference = ((safe_get_full_grad(tensor) - expected[name]).norm() / expected[name].norm()).item()
        assert difference < 1e-5, f"stage {stage}, {name}: {difference}"
    assert all(tensor.grad is None for tensor in model.parameters() if not tensor.requires_grad)
    engine.step()
    after = {name: safe_get_full_fp32_param(tensor) for name, tensor in trained.items()}
    assert all(not torch.equal(before[name], after[name]) for name in after)
    engine.destroy()
    if alive is not None:
        unset_hf_deepspeed_config()


def check_same_on_all_ranks(model: PreTrainedModel) -> None:
    """Asserts that every rank has drawn the same adapter."""
    own = torch.cat([tensor.detach().flatten() for tensor in trainable_state(model).values()])
    everyones = [torch.empty_like(own) for _ in range(WORLD_SIZE)]
    dist.all_gather(everyones, own)
    assert torch.equal(*everyones)
    assert own.abs().sum() > 0


def main(folder: Path) -> None:
    compile_operators({})
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    try:
        gptj, llama = folder / "gptj", folder / "llama"
        if dist.get_rank() == 0:
            eager_gptj().save_pretrained(gptj)
            tied_llama().save_pretrained(llama)
        dist.barrier()
        torch.manual_seed(100 + dist.get_rank())  # adapters must not depend on it
        compare(eager_gptj, gptj, stage=3, checkpointing=False, whole_blocks=False)
        compare(eager_gptj, gptj, stage=3, checkpointing=True, whole_blocks=True)
        compare(tied_llama, llama, stage=3, checkpointing=True, whole_blocks=False)
        compare(tied_llama, llama, stage=3, checkpointing=False, whole_blocks=True)
        compare(eager_gptj, gptj, stage=2, checkpointing=True, whole_blocks=False)
        compare(tied_llama, llama, stage=2, checkpointing=False, whole_blocks=False)
        (folder / f"rank{dist.get_rank()}").write_text("passed")
    finally:
        dist.destroy_process_group()
        remove_shared_buffer()


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[-1])))
