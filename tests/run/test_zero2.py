"""Checkpoints of ZeRO-2 are not taken for those of ZeRO-3."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from training.errors import OptionsError
from training.options.settings import Settings
from training.options.trainer_options import TrainingOptions
from training.run.start import Start, _check_stage


@pytest.mark.parametrize(
    ("written", "stage", "words"),
    [
        (
            "zero_pp_rank_0_mp_rank_00",
            2,
            "was written with ZeRO-3, and FILE sets stage 2, which cannot load it",
        ),
        ("mp_rank_00", 3, "was written with ZeRO-1 or ZeRO-2, and FILE sets stage 3, which cannot load it"),
        ("zero_pp_rank_0_mp_rank_00", 3, ""),
        ("mp_rank_00", 1, ""),
        ("mp_rank_00", 2, ""),
    ],
)
def test_a_checkpoint_of_another_zero_stage_is_refused_with_the_file_of_its_run(
    tmp_path: Path, written: str, stage: int, words: str
) -> None:
    shards = tmp_path / "checkpoint-6" / "global_step6"
    shards.mkdir(parents=True)
    (shards / f"{written}_model_states.pt").touch()
    (shards / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    start = Start(shards.parent, {"options": {"deepspeed": "former.json"}}, 2)
    zero = {"zero_optimization": {"stage": stage}}
    options = TrainingOptions(local_output_dir="OUT", deepspeed="FILE")
    settings = Settings(options, 2, zero, "bf16", False, None, "packed")
    refused = pytest.raises(OptionsError, match=re.escape(f"{words}. Type --deepspeed former.json"))
    with refused if words else nullcontext():
        _check_stage(start, settings)
