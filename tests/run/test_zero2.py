"""ZeRO-2 trains what ZeRO-3 trains, resumes bit for bit, and its checkpoints are not taken for ZeRO-3's."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import settings_of_a_run
from tests.run.test_kills import drift, history
from tests.run.zero2_runs import COMMON, ZERO_2
from tests.starts import record, run, torchrun
from training.errors import OptionsError
from training.options.deepspeed import Zero
from training.options.settings import Settings
from training.options.trainer_options import TrainingOptions, flag_of
from training.run.start import Start, _check_stage
from training.storage import checkpoint

STEPS = COMMON["max_steps"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs of zero2_runs.py. One start of two ranks makes them."""
    folder = tmp_path_factory.mktemp("zero2")
    result = run(torchrun(2, "tests.run.zero2_runs"), folder)
    assert result.returncode == 0, result.stdout
    assert "2 CPUs in bf16, DeepSpeed ZeRO-2" in result.stdout
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_two_zero2_ranks_have_the_losses_of_zero3_also_with_split_and_accumulated_batches(folder):
    expected = history(folder / "zero-3")
    assert expected[-1]["eval_loss"] < 0.95 * expected[0]["eval_loss"], "they learn"
    for name in ("zero-2", "split", "accumulated"):
        difference = drift(history(folder / name), expected)
        print(f"{name}: losses differ by {difference:.1e} from ZeRO-3's")
        assert difference < 2e-3, name


@pytest.mark.slow
def test_the_model_from_the_shards_has_the_live_weights_bit_for_bit(folder):
    for name in ("zero-3", "zero-2"):
        live, written = torch.load(folder / name / "live.pt"), weights(folder / name)
        assert live.keys() == written.keys()
        for key, tensor in live.items():
            assert tensor.dtype == written[key].dtype == torch.bfloat16
            assert torch.equal(tensor, written[key]), (name, key)


@pytest.mark.slow
def test_a_zero2_run_resumes_bit_for_bit_and_its_best_model_is_verified_and_published(folder):
    whole, resumed = folder / "zero-2", folder / "resumed"
    assert history(resumed) == history(whole)
    last = f"checkpoint-{STEPS}"
    for name in OWN_FILES:
        ours, theirs = (place / last / f"global_step{STEPS}" / name for place in (resumed, whole))
        assert_equal_states(*(torch.load(place, weights_only=False) for place in (ours, theirs)))
    losses = {entry["step"]: entry["eval_loss"] for entry in history(resumed) if entry.get("eval_loss")}
    del losses[0]
    best = min(losses, key=losses.__getitem__)
    assert (record(resumed)["status"], record(resumed)["model_of_step"]) == ("finished", best)
    published = folder / "published"
    place = resumed / f"checkpoint-{best}" / f"global_step{best}" / OWN_FILES[0]
    live = torch.load(place, weights_only=False)["module"]
    assert weights(published).keys() == live.keys()
    assert all(torch.equal(tensor, live[name]) for name, tensor in weights(published).items())
    assert (published / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    _, loaded = AutoModelForCausalLM.from_pretrained(published, output_loading_info=True)
    assert not any(loaded[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))


OWN_FILES = ["mp_rank_00_model_states.pt"] + [
    f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)
]


def assert_equal_states(ours: object, theirs: object) -> None:
    """Compares tensors in nested dictionaries and lists."""
    if isinstance(ours, dict):
        for key in ours:
            assert_equal_states(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        for mine, other in zip(ours, theirs, strict=True):
            assert_equal_states(mine, other)
    elif torch.is_tensor(ours):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_a_checkpoint_of_zero2_has_its_files_in_the_manifest_and_the_predicted_size(folder):
    place = folder / "zero-2" / f"checkpoint-{STEPS}"
    assert checkpoint.problems_of(place) == []
    manifest = checkpoint.read_manifest(place)
    assert {f"global_step{STEPS}/{name}" for name in OWN_FILES} <= manifest["files"].keys()
    parameters = sum(tensor.numel() for tensor in weights(folder / "zero-2").values())
    settings = settings_of_a_run(ranks=2, zero=Zero(stage=2))
    written = sum(file["size"] for file in manifest["files"].values())
    print(f"{written / parameters:.2f} bytes a parameter")
    # Tokenizer, scripts and the files' own headers are 0.2 MB of a model of 0.9 million parameters.
    assert written == pytest.approx(settings.checkpoint_bytes * parameters, rel=0.03)


@pytest.mark.slow
def test_a_zero2_checkpoint_of_two_ranks_is_resumed_by_one(folder, tmp_path):
    words = COMMON | {"deepspeed": ZERO_2, "per_device_train_batch_size": 8, "local_output_dir": tmp_path / "out",
                      "resume": folder / "zero-2" / "checkpoint-2"}  # fmt: skip
    result = run(torchrun(1), *(word for name, value in words.items() for word in (flag_of(name), value)))
    assert result.returncode == 0, result.stdout
    assert "for another number of devices" in result.stdout
    difference = drift(history(tmp_path / "out"), history(folder / "zero-2"))
    print(f"2 -> 1 ranks: losses differ by {difference:.1e}")
    assert 0 < difference < 2e-3
    assert (tmp_path / "out" / f"checkpoint-{STEPS}" / f"global_step{STEPS}" / OWN_FILES[0]).is_file()


# --- another stage -----------------------------------------------------------------------------------


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
