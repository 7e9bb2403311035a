"""How a run is trained: the recipe of each GPU family, and the options that memory and time depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from training.machines import MachineError
from training.options import TrainingOptions, precision_of, read_deepspeed_json

ROOT = Path(__file__).parents[1]

# --- the recipe of each GPU family -------------------------------------------------------------------

GLOBAL_BATCH = 64  # rows of one optimizer step, whatever the devices; Dolly's run had 8 GPUs of 8 rows
DOLLYS_ROWS = 8  # rows a device computes at once
PACKED_ROWS = 16  # packed rows cost memory by their tokens, and 16 of them gather the weights half as often


@dataclass(frozen=True)
class Preset:
    """What a GPU family trains with, so that nobody edits a JSON.

    Attributes:
        deepspeed: DeepSpeed configuration, from the root of the repository.
        offload: the same with the optimizer in host memory; None where that gains nothing.
        precision: as the configuration enables it.
    """

    deepspeed: str
    offload: str | None
    precision: str


_BF16, _BF16_OFFLOAD = "config/ds_z3_bf16_config.json", "config/ds_z3_bf16_offload_config.json"
_FP16_OFFLOAD = "config/ds_z3_fp16_offload_config.json"

PRESETS = {
    "a100": Preset(_BF16, _BF16_OFFLOAD, "bf16"),
    "h100": Preset(_BF16, _BF16_OFFLOAD, "bf16"),
    "a10": Preset(_BF16_OFFLOAD, _BF16_OFFLOAD, "bf16"),
    "v100": Preset(_FP16_OFFLOAD, _FP16_OFFLOAD, "fp16"),  # has no bf16
    # For the demo and the tests: ranks on a CPU, whose memory is the host's already.
    "cpu": Preset(_BF16, None, "bf16"),
}


def rows_and_accumulation(global_batch: int, num_gpus: int, batching: str = "packed") -> tuple[int, int]:
    """Rows a device computes at once, and how many times before a step, so that about `global_batch` make a step.

    8 devices: (8, 1). 4: (16, 1) packed, (8, 2) padded. 2: (16, 2), (8, 4). With 3 devices 64 rows cannot be had:
    (11, 2) makes 66, (7, 3) padded 63.
    """
    most = DOLLYS_ROWS if batching == "padded" else PACKED_ROWS
    share = max(1, round(global_batch / num_gpus))
    accumulation = -(-share // most)
    return max(1, round(global_batch / (num_gpus * accumulation))), accumulation


def preset_options(family: str, num_gpus: int, batching: str = "packed") -> dict[str, Any]:
    """The trainer's options for `num_gpus` devices of a family, by the names of TrainingOptions.

    Raises MachineError for an unknown family, or no device.
    """
    if family not in PRESETS:
        raise MachineError(f"no GPU family {family!r} is known. There are: {', '.join(PRESETS)}")
    if num_gpus < 1:
        raise MachineError(f"--num-gpus {num_gpus}: at least one device is needed to train")
    rows, accumulation = rows_and_accumulation(GLOBAL_BATCH, num_gpus, batching)
    return {
        "deepspeed": PRESETS[family].deepspeed,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": "auto",  # only where memory is short without it
        "batching": batching,
    }


# --- what memory and time depend on ------------------------------------------------------------------


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed configuration says about memory. Stage 0 is training without DeepSpeed.

    `live_parameters`, `sub_group` and `bucket` count parameters; a bucket of 0 is transformers' "auto": width^2.
    """

    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    pinned: bool = False
    live_parameters: float = 1e9
    sub_group: float = 1e9
    bucket: float = 0


@dataclass(frozen=True)
class Settings:
    """The options of a run that memory and time depend on.

    `checkpointing` and `max_tokens` may be "auto"; those of a Plan are decided. `max_tokens` None never splits.
    """

    ranks: int
    rows: int = 8
    eval_rows: int = 8
    accumulation: int = 1
    packed: bool = True
    checkpointing: bool | Literal["auto"] = "auto"
    max_tokens: int | str | None = None
    precision: str = "bf16"
    zero: Zero = Zero(stage=3)
    epochs: float = 1.0
    max_steps: int | None = None
    test_size: int = 1000
    eval_steps: int = 100
    save_steps: int = 200
    checkpoints: int = 2

    @property
    def number_bytes(self) -> int:
        """Bytes of a number in forward and backward."""
        return {"bf16": 2, "fp16": 2, "fp32": 4}[self.precision]

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight as it is kept: without DeepSpeed the trainer keeps float32, whatever it computes in."""
        return self.number_bytes if self.zero.stage else 4

    @property
    def global_batch(self) -> int:
        """Rows of an optimizer step."""
        return self.ranks * self.rows * self.accumulation


def settings_of(options: TrainingOptions, ranks: int, family: str) -> Settings:
    """Settings from the trainer's options. Raises OptionsError for an unreadable DeepSpeed file.

    Where neither options nor DeepSpeed name a precision, it is the best of the GPU family.
    """
    file = options.deepspeed_json
    if file and not Path(file).exists() and (ROOT / file).exists():  # a shipped one, from another folder
        file = str(ROOT / file)
    options = replace(options, deepspeed=file, deepspeed_config=None)
    if file or options.bf16 is not None or options.fp16 is not None:
        precision = precision_of(options)
    else:
        precision = {"cpu": "fp32", "v100": "fp16"}.get(family, "bf16")
    asked = options.gradient_checkpointing
    return Settings(
        ranks=ranks,
        rows=options.per_device_train_batch_size,
        eval_rows=options.per_device_eval_batch_size,
        accumulation=options.gradient_accumulation_steps,
        packed=options.batching == "packed",
        checkpointing="auto" if asked == "auto" else asked == "on",
        max_tokens=options.max_tokens_per_device if options.batching == "packed" else None,
        precision=precision,
        zero=read_zero(read_deepspeed_json(file)) if file else Zero(),
        epochs=options.epochs,
        max_steps=options.max_steps,
        test_size=options.test_size,
        eval_steps=options.eval_steps,
        save_steps=options.save_steps,
        checkpoints=options.save_total_limit,
    )


def read_zero(config: dict[str, Any]) -> Zero:
    """The memory settings of a DeepSpeed configuration; what it leaves open are the defaults of DeepSpeed 0.19
    (runtime/zero/config.py)."""
    zero = config.get("zero_optimization", {})
    optimizer, parameters = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}

    def number(key: str, default: float) -> float:
        value = zero.get(key, default)
        return default if value == "auto" else float(value)

    return Zero(
        stage=int(zero.get("stage", 0)),
        offload_optimizer=optimizer.get("device", "none") != "none",
        offload_parameters=parameters.get("device", "none") != "none",
        pinned=bool(optimizer.get("pin_memory", False)),
        live_parameters=number("stage3_max_live_parameters", 1e9),
        sub_group=number("sub_group_size", 1e9),
        bucket=number("reduce_bucket_size", 0),
    )
