"""Settings of a run: its options, with the DeepSpeed JSON, precision and number of ranks resolved once."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from training.consts import LEARNING_RATES
from training.files import local_path
from training.options.deepspeed import Zero, enabled, read_json, read_zero
from training.options.intervals import SECONDS_BETWEEN_SAVES, fixed_save_steps
from training.options.trainer_options import TrainingOptions

Batching = Literal["packed", "padded", "length"]


@dataclass(frozen=True)
class Settings:
    """Resolved settings of one run, made by `resolve`, used by the plan and by training.

    Attributes:
        options: as the user typed them, with the method's `lr` and `lora_alpha`; once the rows are read, `test_size` is
            the number of held-out rows.
        ranks: world size: number of devices, or of processes on a CPU.
        deepspeed: content of the DeepSpeed JSON; None without DeepSpeed.
        precision: of forward and backward, "bf16", "fp16" or "fp32".
        checkpointing: whether activations are recomputed in the backward pass; "auto" until the plan chooses.
        max_tokens: largest packed batch of a device, in tokens; None: no limit; "auto" until the plan chooses.
        batching: "packed" or "padded" as requested; "length" if packing was requested and the model's architecture
            cannot be packed: padded, with rows of similar length together.
        whole_blocks: whether DeepSpeed gathers and reduces a block at a time; "auto" until the plan chooses. It costs
            memory and saves the host time. Runs that have recorded no choice began without it.
        background_saves: checkpoints are written in the background, from copies in host memory; the plan decides.
        save_seconds: seconds between checkpoints, if options.save_steps is None; the plan decides.
        checkpoint_seconds: seconds until a checkpoint is written, by the plan.
    """

    options: TrainingOptions
    ranks: int
    deepspeed: dict[str, Any] | None
    precision: str
    checkpointing: bool | Literal["auto"]
    max_tokens: int | str | None
    batching: Batching
    whole_blocks: bool | Literal["auto"] = "auto"
    background_saves: bool = True
    save_seconds: float = SECONDS_BETWEEN_SAVES
    checkpoint_seconds: float = 0.0

    @property
    def plan_choices(self) -> dict[str, Any]:
        """The values that the plan has chosen, as stored in run.json."""
        return {
            "gradient_checkpointing": self.checkpointing,
            "max_tokens_per_device": self.max_tokens,
            "batching": self.batching,
            "whole_blocks": self.whole_blocks,
            "background_saves": self.background_saves,
            "save_seconds": self.save_seconds,
            "checkpoint_seconds": self.checkpoint_seconds,
            "save_steps": self.options.save_steps,
        }

    def with_plan_choices(
        self,
        gradient_checkpointing: bool,
        max_tokens_per_device: int | None,
        batching: Batching,
        whole_blocks: bool = False,
        background_saves: bool = True,
        save_seconds: float = SECONDS_BETWEEN_SAVES,
        checkpoint_seconds: float = 0.0,
        save_steps: int | None = None,
    ) -> Settings:
        """These settings with the values that the plan has chosen."""
        return replace(
            self,
            checkpointing=gradient_checkpointing,
            max_tokens=max_tokens_per_device,
            batching=batching,
            whole_blocks=whole_blocks,
            background_saves=background_saves,
            save_seconds=save_seconds,
            checkpoint_seconds=checkpoint_seconds,
            options=replace(self.options, save_steps=save_steps or self.options.save_steps),
        )

    def with_test_size(self, rows: int) -> Settings:
        """These settings with the number of held-out rows, which depends on the dataset."""
        return replace(self, options=replace(self.options, test_size=rows))

    def with_save_steps(self, steps: int | None) -> Settings:
        """These settings with the steps between saves; None: a time decides."""
        return replace(self, options=replace(self.options, save_steps=steps))

    def without_packing(self) -> Settings:
        """These settings for an architecture that cannot be packed. Nothing changes if packing was not requested."""
        return replace(self, batching="length", max_tokens=None) if self.packed else self

    @property
    def output(self) -> Path:
        """The run's output folder."""
        return local_path(self.options.local_output_dir)

    @cached_property
    def zero(self) -> Zero:
        """The memory settings of the DeepSpeed JSON."""
        return read_zero(self.deepspeed or {})

    @property
    def packed(self) -> bool:
        return self.batching == "packed"

    @property
    def lora(self) -> bool:
        """Whether the run trains an adapter, and freezes the base model."""
        return self.options.lora > 0

    @property
    def rows(self) -> int:
        """Rows in a device's batch."""
        return self.options.per_device_train_batch_size

    @property
    def accumulation(self) -> int:
        """Batches of a device per optimizer step."""
        return self.options.gradient_accumulation_steps

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step."""
        return self.ranks * self.rows * self.accumulation

    @property
    def number_bytes(self) -> int:
        """Bytes per number in forward and backward."""
        return {"bf16": 2, "fp16": 2, "fp32": 4}[self.precision]

    @property
    def weight_bytes(self) -> int:
        """Bytes per stored weight. Without DeepSpeed trained weights are float32 in every precision, and a frozen base is not."""
        return self.number_bytes if self.zero.stage or self.lora else 4

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes per trained parameter of a checkpoint: Adam's two moments and the weights. No frozen weight is in it.

        At stages 1 and 2 DeepSpeed writes the weights of forward and backward beside the float32 masters, at stage 3 the
        masters alone. Measured on two ranks: 12.0 at stage 3, 14.0 at stage 2 in 16 bits.
        """
        return 8 + 4 + (self.weight_bytes if self.zero.stage in (1, 2) else 0)


def resolve(
    options: TrainingOptions, ranks: int, best_precision: str, deepspeed: dict[str, Any] | None = None
) -> Settings:
    """The settings of a run of `ranks` ranks.

    Args:
        best_precision: of the devices; used if neither the options nor the DeepSpeed JSON name one.
        deepspeed: content of the DeepSpeed JSON if the caller has already read it.

    Raises OptionsError for an unreadable DeepSpeed JSON.
    """
    if deepspeed is None and options.deepspeed_json:
        deepspeed = read_json(options.deepspeed_json)
    requested = options.gradient_checkpointing
    return Settings(
        options=replace(
            options,
            lr=learning_rate(options),
            lora_alpha=lora_alpha(options),
            save_steps=fixed_save_steps(options),
        ),
        ranks=ranks,
        deepspeed=deepspeed,
        precision=_precision(options, deepspeed, best_precision),
        checkpointing="auto" if requested == "auto" else requested == "on",
        max_tokens=options.max_tokens_per_device if options.batching == "packed" else None,
        batching="packed" if options.batching == "packed" else "padded",
    )


def learning_rate(options: TrainingOptions) -> float:
    """--lr, or the default of the method."""
    return LEARNING_RATES["lora" if options.lora else "full"] if options.lr is None else options.lr


def lora_alpha(options: TrainingOptions) -> float | None:
    """--lora-alpha, or twice the rank; None if no adapter is trained."""
    return (options.lora_alpha or 2.0 * options.lora) if options.lora else None


def defaults_of(options: TrainingOptions) -> dict[str, Any]:
    """The value that each option of a run has if it is not typed, by name."""
    plain = replace(options, lr=None, lora_alpha=None)
    defaults = {option.name: option.default for option in fields(TrainingOptions)}
    return defaults | {"lr": learning_rate(plain), "lora_alpha": lora_alpha(plain)}


def _precision(options: TrainingOptions, deepspeed: dict[str, Any] | None, best: str) -> str:
    """The precision of the options, else of the DeepSpeed JSON, else the best one of the devices."""
    for name in ("bf16", "fp16"):
        if getattr(options, name):
            return name
    for name in ("bf16", "fp16"):
        if enabled(deepspeed or {}, name) and getattr(options, name) is None:
            return name
    is_set = options.bf16 is False or options.fp16 is False or deepspeed is not None
    return "fp32" if is_set else best
