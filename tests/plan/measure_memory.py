"""Measures the bytes that DeepSpeed's ZeRO-3 engine holds after real steps. test_memory.py runs it on real ranks.

deepspeed --num_gpus 2 --module tests.plan.measure_memory CONFIG OUT.json WIDTH,LAYERS,HEADS,VOCABULARY[,LIVE] ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import GPTJConfig, GPTJForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from training.launch.exits import run_and_exit
from training.launch.supervisor import remove_shared_buffer
from training.options.deepspeed import read_json
from training.run.operators import compile_operators


def filled_in(path: str, width: int, live: int | None) -> dict[str, Any]:
    """A shipped configuration with its "auto" values filled in as transformers does, one row per rank."""
    config = read_json(path)
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }
    del config["train_batch_size"]
    config["zero_optimization"] |= {
        "reduce_bucket_size": width**2,
        "stage3_prefetch_bucket_size": int(0.9 * width**2),
        "stage3_param_persistence_threshold": 10 * width,
    }
    if live:
        config["zero_optimization"] |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
    if "optimizer" in config:
        config["optimizer"]["params"] = {"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    return config


def size(tensors: Any) -> int:
    """Bytes of tensors; shared storage is counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None
    }
    return sum(storages.values())


def measure(
    path: str, width: int, layers: int, heads: int, vocabulary: int, live: int | None = None
) -> dict[str, Any]:
    """Bytes on this rank by part, after three optimizer steps; "gathered" counts parameters."""
    config = filled_in(path, width, live)
    hf_config = HfDeepSpeedConfig(config)  # keep a reference: while it exists, new models are sharded
    shape = GPTJConfig(
        vocab_size=vocabulary, n_positions=64, n_embd=width, n_layer=layers, n_head=heads,
        rotary_dim=width // heads, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = GPTJForCausalLM(shape)
    parameters = list(model.parameters())
    optimizer = None if "optimizer" in config else torch.optim.AdamW(parameters, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters, config=config, optimizer=optimizer
    )
    gathered = 0

    def watch(*_: Any) -> None:
        nonlocal gathered
        whole = [p for p in parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE and not p.ds_persist]
        gathered = max(gathered, sum(p.ds_numel for p in whole))

    for module in model.modules():  # runs after DeepSpeed's hooks
        module.register_forward_pre_hook(watch)
    ids = torch.randint(vocabulary, (1, 32))
    for _ in range(3):  # DeepSpeed prefetches from the second step on
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    zero = engine.optimizer
    states = [v for s in zero.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
    sizes = {
        "parameters": sum(p.ds_numel for p in parameters),
        "weights": size(p.ds_tensor for p in parameters),
        "gradients": size([zero.grad_partitions_flat_buffer]),
        "float32 gradients": size(p.grad for p in zero.fp32_partitioned_groups_flat),
        "optimizer": size([*zero.fp32_partitioned_groups_flat, *states]),
        "gathered": gathered,
    }
    engine.destroy()
    del hf_config
    return sizes


def main(path: str, out: str, *shapes: str) -> None:
    compile_operators(read_json(path))
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    try:
        sizes = [measure(path, *map(int, shape.split(","))) for shape in shapes]
        Path(f"{out}.rank{dist.get_rank()}").write_text(json.dumps(sizes))
        dist.barrier()
    finally:
        dist.destroy_process_group()
        remove_shared_buffer()


if __name__ == "__main__":
    words = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    run_and_exit(lambda: main(*words))
