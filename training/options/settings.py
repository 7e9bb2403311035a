"""A run's options with what follows from them: the DeepSpeed JSON, the precision and the ranks, each decided once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from training.files import local_path
from training.options.deepspeed import Zero, enabled, read_json, read_zero
from training.options.trainer_options import TrainingOptions


@dataclass(frozen=True)
class Settings:
    """One run, resolved. `resolve` makes it; everything that plans or trains reads it.

    Attributes:
        options: as they were typed.
        ranks: devices, or processes on a CPU: the world size.
        deepspeed: content of the DeepSpeed JSON; None without one.
        precision: of forward and backward, "bf16", "fp16" or "fp32".
        checkpointing: whether activations are recomputed in the backward pass; "auto" until the plan decides.
        max_tokens: the most packed tokens a device computes at once, None for no limit; "auto" until the plan decides.
    """

    options: TrainingOptions
    ranks: int
    deepspeed: dict[str, Any] | None
    precision: str
    checkpointing: bool | Literal["auto"]
    max_tokens: int | str | None

    @property
    def decided(self) -> dict[str, Any]:
        """What the plan has decided, as run.json keeps it."""
        return {"gradient_checkpointing": self.checkpointing, "max_tokens_per_device": self.max_tokens}

    def decide(self, gradient_checkpointing: bool, max_tokens_per_device: int | None) -> Settings:
        """The same run with what the plan has decided."""
        return replace(self, checkpointing=gradient_checkpointing, max_tokens=max_tokens_per_device)

    @property
    def output(self) -> Path:
        """The run's own folder."""
        return local_path(self.options.local_output_dir)

    @cached_property
    def zero(self) -> Zero:
        """What the DeepSpeed JSON says about memory."""
        return read_zero(self.deepspeed or {})

    @property
    def packed(self) -> bool:
        return self.options.batching == "packed"

    @property
    def rows(self) -> int:
        """Rows that a device computes at once."""
        return self.options.per_device_train_batch_size

    @property
    def accumulation(self) -> int:
        """Batches of a device in one optimizer step."""
        return self.options.gradient_accumulation_steps

    @property
    def global_batch(self) -> int:
        """Rows of one optimizer step."""
        return self.ranks * self.rows * self.accumulation

    @property
    def number_bytes(self) -> int:
        """Bytes of a number in forward and backward."""
        return {"bf16": 2, "fp16": 2, "fp32": 4}[self.precision]

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight as it is kept. Without DeepSpeed the trainer keeps float32 whatever it computes in."""
        return self.number_bytes if self.zero.stage else 4

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes a parameter of a checkpoint: Adam's two moments, and the model as it is kept.

        Under ZeRO with 16-bit weights, the float32 masters as well: 4 + 8 + 2. DeepSpeed's model_states files hold no
        weights, but transformers adds the gathered model. Measured on two ranks: 14.0.
        """
        return 8 + self.weight_bytes + (4 if self.zero.stage and self.weight_bytes == 2 else 0)


def resolve(
    options: TrainingOptions, ranks: int, best_precision: str, deepspeed: dict[str, Any] | None = None
) -> Settings:
    """The settings of a run of `ranks` ranks.

    Args:
        best_precision: of the devices, for options and a DeepSpeed JSON that name none.
        deepspeed: content of the DeepSpeed JSON where the caller has read it.

    Raises OptionsError for an unreadable DeepSpeed JSON.
    """
    if deepspeed is None and options.deepspeed_json:
        deepspeed = read_json(options.deepspeed_json)
    requested = options.gradient_checkpointing
    return Settings(
        options=options,
        ranks=ranks,
        deepspeed=deepspeed,
        precision=_precision(options, deepspeed, best_precision),
        checkpointing="auto" if requested == "auto" else requested == "on",
        max_tokens=options.max_tokens_per_device if options.batching == "packed" else None,
    )


def _precision(options: TrainingOptions, deepspeed: dict[str, Any] | None, best: str) -> str:
    """The options first, then the DeepSpeed JSON, then what the devices do best."""
    for name in ("bf16", "fp16"):
        if getattr(options, name):
            return name
    for name in ("bf16", "fp16"):
        if enabled(deepspeed or {}, name) and getattr(options, name) is None:
            return name
    named = options.bf16 is False or options.fp16 is False or deepspeed is not None
    return "fp32" if named else best
