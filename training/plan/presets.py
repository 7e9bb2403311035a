"""Default training options of each GPU family and of the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.consts import CONFIG, DEMO, GLOBAL_BATCH
from training.machine.catalogue import check_device_count, find_family
from training.options.deepspeed import enabled, read_json

DOLLY_ROWS = 8  # micro batch of a device, as in Dolly
LORA_RANK = 16  # of the adapters that are suggested
# Options of each method of training: all weights, adapters, or adapters on a base in 4 bits.
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": LORA_RANK},
    "qlora": {"lora": LORA_RANK, "quantize": "nf4"},
}
PACKED_ROWS = 16  # packed rows need less memory; 16 of them halve the number of weight gathers


def rows_and_accumulation(global_batch: int, num_gpus: int, batching: str = "packed") -> tuple[int, int]:
    """(micro batch in rows, gradient accumulation) per device, so that a step has about `global_batch` rows.

    8 devices: (8, 1). 4 devices: (16, 1) packed, (8, 2) padded. 2 devices: (16, 2) packed, (8, 4) padded. 3 devices
    cannot have exactly 64 rows: (11, 2) packed gives 66, (7, 3) padded gives 63.
    """
    most = PACKED_ROWS if batching == "packed" else DOLLY_ROWS
    share = max(1, round(global_batch / num_gpus))
    accumulation = -(-share // most)
    return max(1, round(global_batch / (num_gpus * accumulation))), accumulation


def lora_file(family: str, num_gpus: int, whole_weights: bool = True) -> str | None:
    """The DeepSpeed file of a LoRA run: none on one device.

    On several each device keeps the whole frozen weights (ZeRO-2), so that no step gathers them; or without
    `whole_weights` a share of them (ZeRO-3). There is no file for ZeRO-2 in fp16.
    """
    precision = find_family(family).precision
    if num_gpus == 1 or family == "cpu":
        return None
    return f"config/ds_z{2 if whole_weights and precision == 'bf16' else 3}_{precision}_config.json"


def preset_options(
    family: str, num_gpus: int, batching: str = "packed", lora: bool = False
) -> dict[str, Any]:
    """The trainer's options for `num_gpus` devices of a GPU family, keyed by TrainingOptions' names.

    With `lora` they suit adapters on a frozen base: no DeepSpeed on one device, no optimizer in host memory.

    Raises MachineError for an unknown family or fewer than one device.
    """
    recipe = find_family(family)
    check_device_count(num_gpus)
    rows, accumulation = rows_and_accumulation(GLOBAL_BATCH, num_gpus, batching)
    return {
        "deepspeed": lora_file(family, num_gpus) if lora else recipe.deepspeed,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": "auto",  # on only if memory is short without it
        "batching": batching,
    }


def method_options(family: str, num_gpus: int, method: str) -> dict[str, Any]:
    """`preset_options` and the options of a method (key of METHODS)."""
    return preset_options(family, num_gpus, lora=method != "full") | METHODS[method]


def method_of(options: Mapping[str, Any]) -> str:
    """The method of a run with these options: a key of METHODS."""
    return "full" if not options.get("lora") else "qlora" if options.get("quantize") else "lora"


def shipped_files(precision: str) -> list[str]:
    """The files of config/ that train in "bf16" or "fp16", as --deepspeed takes them."""
    names = [f"config/{file.name}" for file in sorted(CONFIG.glob("*.json"))]
    return [name for name in names if enabled(read_json(name), precision)]


# The demo model starts from random weights, so it needs a higher learning rate and more epochs than a pretrained one.
DEMO_RECIPE: dict[str, Any] = {
    "epochs": 6.0,
    "lr": 2.5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "test_size": 400,
    "per_device_eval_batch_size": 50,
    "eval_steps": 182,
    "logging_steps": 20,
}


# The demo of LoRA: a short full training of the base, and an adapter on it. Narrow layers need a high rate.
DEMO_BASE: dict[str, Any] = {"epochs": 5.0}
DEMO_ADAPTER: dict[str, Any] = {"epochs": 14.0, "lr": 5e-3, "warmup_steps": 20}


def demo_recipe(sources: Sequence[str] = (DEMO,)) -> dict[str, Any]:
    """The recipe of the demo model. Its number of held-out rows is for the demo's rows only."""
    its_rows = tuple(sources) == (DEMO,)
    return {name: value for name, value in DEMO_RECIPE.items() if its_rows or name != "test_size"}


def demo_options(ranks: int, *sources: str) -> dict[str, Any]:
    """The trainer's options for the demo model on `ranks` ranks, keyed by TrainingOptions' names."""
    return {
        "input_model": DEMO,
        "training_dataset": sources or (DEMO,),
        "per_device_train_batch_size": max(1, GLOBAL_BATCH // ranks),
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "off",
        **demo_recipe(sources or (DEMO,)),
    }
