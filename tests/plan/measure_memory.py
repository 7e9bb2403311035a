"""Measures the bytes that DeepSpeed's engine holds and sends in real steps. test_memory.py runs it on real ranks.

torchrun --nproc_per_node 2 -m tests.plan.measure_memory CONFIG[,CONFIG] OUT.json WIDTH,LAYERS,HEADS,VOCABULARY[,LIVE[,WHOLE[,RANK]]] ...

LIVE limits the gathered parameters, unless it is 0; WHOLE is 1 if blocks are handled as a whole; RANK is that of adapters on
frozen weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import GPTJConfig, GPTJForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from tests.plan.peak import peak_bytes
from training.launch.exits import run_and_exit
from training.launch.supervisor import remove_shared_buffer
from training.model.adapter import Lora, add_adapter
from training.model.blocks import block_parameters, use_whole_blocks
from training.options.deepspeed import fill_bucket_sizes, read_json
from training.run.operators import compile_operators


def filled_in(path: str, width: int, live: int | None, block: int) -> dict[str, Any]:
    """A shipped configuration with its "auto" values filled in as a run does, one row per rank.

    `block`: parameters of a block that is handled as a whole, or 0.
    """
    config = read_json(path)
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }
    del config["train_batch_size"]
    zero = config["zero_optimization"]
    sharded = zero["stage"] == 3
    if block:
        fill_bucket_sizes(zero, block)
    sizes = {"reduce_bucket_size": width**2}
    if sharded:
        sizes |= {
            "stage3_prefetch_bucket_size": int(0.9 * width**2),
            "stage3_param_persistence_threshold": 10 * width,
        }
    zero |= {name: size for name, size in sizes.items() if zero[name] == "auto"}
    if live and sharded:
        config["zero_optimization"] |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
    if "optimizer" in config:
        config["optimizer"]["params"] = {"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    return config


def gptj(width: int, layers: int, heads: int, vocabulary: int) -> GPTJConfig:
    return GPTJConfig(
        vocab_size=vocabulary, n_positions=64, n_embd=width, n_layer=layers, n_head=heads,
        rotary_dim=width // heads, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip


def size(tensors: Any) -> int:
    """Bytes of tensors; shared storage is counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None
    }
    return sum(storages.values())


# Collectives, the position of their largest tensor, and how often each rank sends it, apart from (ranks - 1) / ranks.
COLLECTIVES = {
    "all_reduce": (0, 2),
    "reduce": (0, 1),
    "all_gather_into_tensor": (0, 1),
    "reduce_scatter_tensor": (1, 1),
}
sent = 0.0  # bytes that this rank sent


def count_sent_bytes() -> None:
    """Counts in `sent` what collectives send. A few numbers, such as a norm, are not counted."""

    def counting(function: Callable[..., Any], position: int, times: int) -> Callable[..., Any]:
        def collective(self: Any, *tensors: Any, **how: Any) -> Any:
            global sent
            tensor = [*tensors, *how.values()][position]
            if tensor.numel() > 16:
                sent += times * tensor.nbytes * (1 - 1 / dist.get_world_size())
            return function(self, *tensors, **how)

        return collective

    for name, (position, times) in COLLECTIVES.items():
        setattr(TorchBackend, name, counting(getattr(TorchBackend, name), position, times))


def measure(
    path: str,
    width: int,
    layers: int,
    heads: int,
    vocabulary: int,
    live: int | None = None,
    whole: int = 0,
    rank: int = 0,
) -> dict[str, Any]:
    """Bytes on this rank by part, after three optimizer steps; "gathered" counts parameters, "sent" is of one step.

    "transient" is the peak of what a forward and a backward pass allocate.
    """
    global sent
    block = 0
    if whole:
        with torch.device("meta"):
            block = block_parameters(GPTJForCausalLM(gptj(width, layers, heads, vocabulary)))
    config = filled_in(path, width, live, block)
    sharded = config["zero_optimization"]["stage"] == 3
    hf_config = HfDeepSpeedConfig(config)  # keep a reference: while it exists, new models are sharded
    torch.manual_seed(0)  # at stage 2 the ranks begin with the same weights
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=sharded):
        model = GPTJForCausalLM(gptj(width, layers, heads, vocabulary))
    if whole and sharded:
        use_whole_blocks(model)
    if rank:
        add_adapter(model, Lora(rank, 2.0 * rank), [vocabulary - 3, vocabulary - 2, vocabulary - 1], seed=0)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = None if "optimizer" in config else torch.optim.AdamW(trained, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, config=config, optimizer=optimizer
    )
    gathered = 0

    def watch(*_: Any) -> None:
        nonlocal gathered
        whole = [p for p in parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE and not p.ds_persist]
        gathered = max(gathered, sum(p.ds_numel for p in whole))

    if sharded:
        for module in model.modules():  # runs after DeepSpeed's hooks
            module.register_forward_pre_hook(watch)
    zero, gradients, step = engine.optimizer, 0, 0
    ids = torch.randint(vocabulary, (1, 32))

    def pass_both_ways() -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)

    for _ in range(3):  # DeepSpeed prefetches from the second step on
        sent = 0.0
        transient = peak_bytes(pass_both_ways)
        if not sharded:
            gradients = size(tensor for group in zero.averaged_gradients.values() for tensor in group)
        step = peak_bytes(engine.step)
    states = [v for s in zero.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
    masters = zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups
    sizes = {
        "parameters": sum(p.ds_numel if sharded else p.numel() for p in parameters),
        "weights": size((p.ds_tensor for p in parameters) if sharded else parameters),
        "gradients": size([zero.grad_partitions_flat_buffer]) if sharded else gradients,
        "float32 gradients": size(p.grad for p in masters),
        "optimizer": size([*masters, *states]),
        "gathered": gathered,
        "step": step,
        "sent": sent,
        "transient": transient,
    }
    engine.destroy()
    del hf_config
    return sizes


def main(paths: str, out: str, *shapes: str) -> None:
    files = paths.split(",")
    compile_operators(read_json(files[-1]))
    count_sent_bytes()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    try:
        sizes = [measure(file, *map(int, shape.split(","))) for file in files for shape in shapes]
        Path(f"{out}.rank{dist.get_rank()}").write_text(json.dumps(sizes))
        dist.barrier()
    finally:
        dist.destroy_process_group()
        remove_shared_buffer()


if __name__ == "__main__":
    run_and_exit(lambda: main(*sys.argv[1:]))
