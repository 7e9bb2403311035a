"""Run by test_attention.py on two ranks: under ZeRO-3 packed rows give the gradients of padded eager attention.

deepspeed --num_gpus 2 --module tests.run.zero3_gradients FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from tests.model.test_attention import VOCABULARY, eager_gptj, packed, padded, random_rows
from training.data.batching import GlobalBatchSampler
from training.data.collator import split_packed_batch
from training.launch.exits import run_and_exit
from training.launch.supervisor import remove_shared_buffer
from training.model.packing import packing_of
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
    "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
}


def tied_llama() -> LlamaForCausalLM:
    """A Llama whose head is its embedding, so that the chunked loss and the embedding give one gradient."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, use_cache=False, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def compare(
    reference: PreTrainedModel,
    folder: Path,
    checkpointing: dict | None,
    row_count: int,
    micro_steps: int = 1,
) -> None:
    """Compares one optimizer step on two ranks with two accumulation steps with a single process."""
    rows = random_rows(seed=7, count=row_count)
    labels = sum(len(row["input_ids"]) - row["response_start"] for row in rows)
    reference(**padded(rows), num_items_in_batch=labels).loss.backward()

    model = AutoModelForCausalLM.from_pretrained(folder).train()
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "the model is not sharded"
    packing_of(model.config).prepare(model)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)

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
        # ZeRO averages over ranks, so the loss is multiplied by their number, as in transformers' Trainer.
        engine.backward(loss * WORLD_SIZE, scale_wrt_gas=False)
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        gradient = safe_get_full_grad(parameter)
        difference = ((gradient - expected.grad).norm() / expected.grad.norm()).item()
        assert difference < 1e-5, f"{name}: {difference}"
    engine.step()
    engine.destroy()


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
        compare(eager_gptj(), gptj, checkpointing=None, row_count=9)
        compare(eager_gptj(), gptj, checkpointing={"use_reentrant": False}, row_count=9)
        compare(eager_gptj(), gptj, checkpointing=None, row_count=9, micro_steps=2)
        compare(
            eager_gptj(), gptj, checkpointing={"use_reentrant": True}, row_count=3
        )  # one of four shares is empty
        compare(tied_llama(), llama, checkpointing={"use_reentrant": False}, row_count=9)
        compare(tied_llama(), llama, checkpointing=None, row_count=3)
        del config
        (folder / f"rank{dist.get_rank()}").write_text("passed")
    finally:
        dist.destroy_process_group()
        remove_shared_buffer()


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[-1])))
