"""The options of a run that memory and time depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from training.consts import ROOT
from training.options.deepspeed import Zero, read_deepspeed_json, read_zero
from training.options.trainer_options import TrainingOptions, precision_of


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
