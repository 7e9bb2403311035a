"""DeepSpeed files with the keys of other projects' files: each is accepted, or refused with every reason.

The plan and the trainer read each file and report the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.conftest import problems_of
from training.options.trainer_options import TrainingOptions
from training.plan.__main__ import main as plan

AUTO = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)  # fmt: skip
BOTH_AUTO: dict[str, Any] = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
SCALE = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}  # fmt: skip
ADAMW = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
WARMUP = {"type": "WarmupLR", "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")}  # fmt: skip
CPU = {"device": "cpu", "pin_memory": True}
Z3: dict[str, Any] = {
    "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip
Z2: dict[str, Any] = {
    "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": False, "reduce_scatter": True,
    "reduce_bucket_size": 5e8, "contiguous_gradients": True, "round_robin_gradients": True,
}  # fmt: skip
NO_GATHER = {name: value for name, value in Z3.items() if "gather" not in name}
MONITORS = {"comms_config": {"verbose": False}, "monitor_config": {"enabled": True, "csv_monitor": {"enabled": False}}}  # fmt: skip
SCHEDULER = "has a 'scheduler', which would override --lr-scheduler-type"
NOBODY_READS = "which DeepSpeed would ignore or refuse"

# The project and the file -> (its content, one piece of each problem). The dictionaries are written for this test.
FILES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "LLaMA-Factory, stage 0": (
        AUTO | BOTH_AUTO | MONITORS | {"zero_allow_untested_optimizer": True, "zero_optimization": Z2 | {"stage": 0}},
        [f"sets comms_config, {NOBODY_READS}", f"sets monitor_config, {NOBODY_READS}"],
    ),
    "LLaMA-Factory, stage 2 with tensor parallelism": (
        AUTO | BOTH_AUTO | {"_comment": "x", "zero_optimization": Z2, "tensor_parallel": {"autotp_size": 2}},
        [f"sets _comment, {NOBODY_READS}", "sets tensor_parallel {'autotp_size': 2}: layers are not split"],
    ),
    "LLaMA-Factory, stage 3 with a part offloaded": (
        AUTO | {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"} | SCALE}
        | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": True}
        | {"zero_optimization": Z3 | {"overlap_comm": False, "offload_optimizer": {"device": "cpu", "pin_memory": False}}},
        [],
    ),
    "LLaMA-Factory, stage 3 with split sequences": (
        {name: AUTO[name] for name in AUTO if name != "train_batch_size"} | MONITORS
        | {"bf16": {"enabled": True, "auto_cast": False, "loss_scale": 0}, "optimizer": ADAMW, "scheduler": WARMUP}
        | {"zero_optimization": NO_GATHER | {"offload_optimizer": CPU, "offload_param": CPU}}
        | {"sequence_parallel": {"enabled": True, "size": 4}, "comms_logger": {"enabled": False}, "steps_per_print": 10},
        ["sets bf16.auto_cast", "sets bf16.loss_scale", SCHEDULER, "sets comms_config",
         "sets monitor_config", "sets sequence_parallel, which DeepSpeed would ignore or refuse. Did you mean sequence_parallel_size"],
    ),
    "LLaMA-Factory, a sweep with DeepSpeed's activation checkpointing": (
        AUTO | BF16 | {"fp16": {"enabled": False}, "zero_allow_untested_optimizer": True}
        | {"activation_checkpointing": {"partition_activations": True, "contiguous_memory_optimization": True}}
        | {"zero_optimization": Z3 | {"allgather_bucket_size": 2e8, "stage3_module_granularity_threshold": 16}},
        ["only --gradient-checkpointing recomputes activations. Remove it"],
    ),
    "axolotl, stage 1 with torch.compile": (
        AUTO | BOTH_AUTO | {"zero_optimization": {"stage": 1, "overlap_comm": True}, "wall_clock_breakdown": False}
        | {"compile": {"disable": False, "backend": "inductor"}},
        ["sets compile {'backend': 'inductor', 'disable': False}: the trainer does not compile"],
    ),
    "axolotl, stage 2": (
        AUTO | {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "auto_cast": False} | SCALE | {"initial_scale_power": 32}}
        | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True}},
        [],
    ),
    "axolotl, stage 3 with all in host memory": (
        AUTO | BF16 | {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
        | {"zero_optimization": {
            "stage": 3, "offload_optimizer": CPU, "offload_param": CPU, "sub_group_size": 0, "reduce_bucket_size": "auto",
            "max_live_parameters": 0, "max_reuse_distance": 0, "gather_16bit_weights_on_model_save": True}},
        [],
    ),
    "FastChat, stage 3": (
        {name: AUTO[name] for name in AUTO if name != "gradient_clipping"} | {"fp16": {"enabled": "auto"} | SCALE}
        | {"zero_optimization": Z3 | {"offload_optimizer": CPU, "offload_param": CPU, "sub_group_size": 1e12}},
        ["leaves out gradient_clipping, but the recipe's is 1.0"],  # DeepSpeed would not clip
    ),
    "open-instruct, stage 2": (
        AUTO | {"bf16": {"enabled": "auto"}, "gradient_clipping": 1.0, "steps_per_print": 1e5}
        | {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"}},
        [],
    ),
    "open-instruct, stage 3 with offload": (
        AUTO | {"bf16": {"enabled": "auto"}, "optimizer": ADAMW, "scheduler": WARMUP | {"type": "WarmupDecayLR"}}
        | {"zero_optimization": Z3 | {"offload_optimizer": CPU, "offload_param": CPU}},
        [SCHEDULER],
    ),
    "Dolly, A100": (
        AUTO | {"bf16": {"enabled": "auto"}, "optimizer": ADAMW, "scheduler": WARMUP, "zero_optimization": Z3}
        | {"tensorboard": {"enabled": True, "output_path": "logs", "job_name": "dolly"}},
        [SCHEDULER],
    ),
    "Dolly, V100": (
        AUTO | {"fp16": {"enabled": True}, "bf16": {"enabled": False}, "optimizer": ADAMW, "scheduler": WARMUP}
        | {"zero_optimization": Z3 | {"offload_optimizer": CPU}},
        [SCHEDULER],
    ),
    "transformers' tests, stage 3, years ago": (
        {"fp16": {"enabled": True} | SCALE, "scheduler": WARMUP, "steps_per_print": 2000, "zero_optimization": NO_GATHER | {
            "stage3_gather_fp16_weights_on_model_save": True, "reduce_bucket_size": 0, "sub_group_size": 1e14}}
        | {"optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}}},
        ["sets zero_optimization.reduce_bucket_size 0, expected a whole number from 1", SCHEDULER, "sets lr 3e-05",
         "sets weight_decay 3e-07", "sets betas [0.8, 0.999]", "leaves out train_micro_batch_size_per_gpu",
         "leaves out gradient_clipping"],
    ),
    "accelerate's tests, stage 3": (
        AUTO | BOTH_AUTO | {"scheduler": WARMUP, "gradient_accumulation_steps": 1, "zero_optimization": Z3 | {
            "offload_optimizer": CPU | {"nvme_path": "/nvme"}, "stage3_gather_16bit_weights_on_model_save": "auto"}}
        | {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True, "adam_w_mode": True}}},
        [SCHEDULER],
    ),
    "DeepSpeedExamples, parameters on NVMe": (
        {"train_batch_size": 1, "aio": {"block_size": 8388608, "use_gds": False}, "zero_optimization": {
            "stage": 3, "stage3_max_live_parameters": "auto",
            "offload_param": {"device": "nvme", "nvme_path": "/local_nvme", "buffer_size": "auto", "buffer_count": 5}}},
        ["sets zero_optimization.stage3_max_live_parameters 'auto', expected a whole number from 0", "sets aio",
         "offload_param.device 'nvme', expected 'cpu' or 'none': the plan cannot size an offload to NVMe", "buffer_size 'auto'",
         "leaves out train_micro", "sets train_batch_size 1", "leaves out gradient_clipping"],
    ),
    "DeepSpeedExamples, BERT": (
        {"train_batch_size": 2048, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 32, "gradient_clipping": 1.0}
        | {"fp16": {"enabled": True} | SCALE, "zero_optimization": {"stage": 1}, "scheduler": WARMUP}
        | {"optimizer": {"type": "OneBitLamb", "params": {"lr": "auto", "weight_decay": "auto", "max_coeff": 0.3, "freeze_step": 1000}}},
        [SCHEDULER, "sets optimizer.type 'OneBitLamb', but the recipe's is AdamW", "sets optimizer.params.max_coeff",
         "sets optimizer.params.freeze_step", "sets gradient_accumulation_steps 32", "sets train_batch_size 2048"],
    ),
    "DeepSpeedExamples, GPT-J": (
        BF16 | {"train_batch_size": 128, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4, "gradient_clipping": 1.0}
        | {"zero_optimization": {"stage": 2}, "scheduler": WARMUP}
        | {"optimizer": {"type": "AdamW", "params": {"lr": 1.2e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}}},
        [SCHEDULER, "sets train_batch_size 128, but the product with all ranks is 64", "sets train_micro_batch_size_per_gpu 4",
         "sets gradient_accumulation_steps 4", "sets lr 0.00012", "sets betas", "sets weight_decay"],
    ),
    "DeepSpeedExamples, ZenFlow": (
        AUTO | BF16 | {"zero_allow_untested_optimizer": True, "optimizer": ADAMW}
        | {"zero_optimization": {"stage": 2, "offload_optimizer": CPU, "zenflow": {"topk_ratio": 0.1, "update_interval": 4}}},
        ["it updates some weights later than the others. Remove it"],
    ),
    "DeepSpeedExamples, tensor parallelism": (
        AUTO | {"bf16": {"enabled": "auto"}, "optimizer": ADAMW, "tensor_parallel": {"autotp_size": 4}}
        | {"zero_optimization": {"stage": 2, "gather_16bit_weights_on_model_save": True}},
        ["sets tensor_parallel {'autotp_size': 4}"],
    ),
    "transformers' page on ZeRO-3, years ago": (
        AUTO | {"zero_optimization": {"stage": 3, "cpu_offload": True, "cpu_offload_params": True, "cpu_offload_use_pin_memory": True,
                                      "stage3_gather_fp16_weights_on_model_save": True}},
        ["sets zero_optimization.cpu_offload_params, which DeepSpeed would ignore or refuse. Did you mean cpu_offload_param",
         'cpu_offload_use_pin_memory True: DeepSpeed ignores it. Write "pin_memory" into offload_optimizer'],
    ),
    "the same page, with one setting by two names": (
        AUTO | {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0.94e6, "prefetch_bucket_size": 3e6}},
        ["zero_optimization.stage3_prefetch_bucket_size and zero_optimization.prefetch_bucket_size are the same setting"],
    ),
    "DeepSpeed's tutorial on curricula": (
        AUTO | {"optimizer": {"type": "Adam", "params": {"lr": "auto", "max_grad_norm": 1.0, "betas": [0.9, 0.95]}}}
        | {"zero_optimization": {"stage": 0}, "curriculum_learning": {"enabled": True, "curriculum_type": "seqlen"}},
        ["sets curriculum_learning", "sets optimizer.params.max_grad_norm", "sets betas [0.9, 0.95]"],
    ),
    "DeepSpeed's test of Nebula": (
        AUTO | BF16 | {"zero_optimization": Z3, "nebula": {"enabled": True}, "elasticity": {"enabled": False}, "amp": {"enabled": False}},
        ["sets nebula {'enabled': True}: DeepSpeed no longer has it"],
    ),
    "OpenRLHF": (
        AUTO | BF16 | {"steps_per_print": 100, "prescale_gradients": False, "data_types": {"grad_accum_dtype": None}}
        | {"checkpoint": {"load_universal": False}, "zero_optimization": {
            "stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "none", "pin_memory": True},
            "sub_group_size": "auto", "reduce_bucket_size": "auto", "gather_16bit_weights_on_model_save": True,
            "zero_hpz_partition_size": 8, "zero_quantized_weights": False, "zero_quantized_gradients": True}},
        ["sub_group_size 'auto', expected a whole number", "zero_hpz_partition_size 8, expected 1: the plan does not count",
         "zero_quantized_gradients True: the run would train with quantised numbers"],
    ),
    "a study with float32 gradients in transit": (
        AUTO | BF16 | {"communication_data_type": "fp32", "steps_per_print": 100, "zero_optimization": Z2 | {
            "offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}},
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "reasons"), FILES.values(), ids=FILES)
def test_plan_and_trainer_give_the_same_verdict_on_a_file(
    content: dict[str, Any], reasons: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content), encoding="utf-8-sig")  # with a byte order mark, as on Windows
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    paths = {"local_output_dir": str(tmp_path / "out"), "deepspeed": str(file)}
    problems = [problem for problem in problems_of(TrainingOptions(**paths)) if str(file) in problem]
    assert len(problems) == len(reasons), problems
    for reason in reasons:
        assert sum(reason in problem for problem in problems) == 1, (reason, problems)
    result = CliRunner().invoke(plan, ["--machine", "8xA100-80GB", "--deepspeed", str(file)])
    assert result.exit_code == (2 if reasons else 0), result.output
    for problem in problems:
        assert problem in result.output
    if not reasons:
        assert f"--deepspeed {file}" in result.output
