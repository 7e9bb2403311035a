"""LoRA under ZeRO-3 and ZeRO-2: checkpoints without the base, resumes on as many ranks and on another number, the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.run.lora_runs import COMMON
from tests.run.test_kills import drift, history
from tests.run.test_zero2 import assert_equal_states
from tests.starts import record, run, torchrun
from training.model.demo_model import model_folder
from training.run.exporting import export
from training.storage import checkpoint

STEPS = COMMON["max_steps"]
KINDS = ["zero-3", "zero-2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs of lora_runs.py: one start of two ranks, and one of one rank."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "prompts.txt").write_text("Say red.\n")
    for ranks in (2, 1):
        result = run(torchrun(ranks, "tests.run.lora_runs"), folder)
        assert result.returncode == 0, result.stdout
    return folder


def shards(folder: Path, step: int = STEPS) -> list[Path]:
    return sorted((folder / f"checkpoint-{step}" / f"global_step{step}").glob("*_states.pt"))


def names_in(state: object) -> set[str]:
    """Names of all tensors in nested dictionaries and lists that have one."""
    if isinstance(state, dict):
        own = {str(key) for key, value in state.items() if torch.is_tensor(value) and value.numel()}
        return own.union(*(names_in(value) for value in state.values()))
    return set().union(*map(names_in, state)) if isinstance(state, list | tuple) else set()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_adapter_new_rows_and_optimizer_and_not_the_base(kind: str, folder: Path) -> None:
    place = folder / kind / f"checkpoint-{STEPS}"
    assert checkpoint.problems_of(place) == []
    live = torch.load(folder / kind / f"live-{STEPS}.pt")
    trained = {name for name in live if "lora_" in name or "new_" in name}
    assert {"transformer.wte.new_rows", "lm_head.new_rows", "lm_head.new_bias"} < trained < live.keys()
    for file in shards(folder / kind):
        state = torch.load(file, weights_only=False)
        assert not names_in(state) & (live.keys() - trained), file
    # Two moments, masters, and under ZeRO-2 the weights in bf16: DeepSpeed's padding, its scripts and the tokenizer are more.
    numbers = sum(live[name].numel() for name in trained)
    size = sum(file.stat().st_size for file in shards(folder / kind))
    assert 12 * numbers < size < 14 * numbers + 150_000
    assert size < sum(tensor.numel() for tensor in live.values()), "less than a byte a weight of the base"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_continues_bit_for_bit(kind: str, folder: Path) -> None:
    whole, resumed = folder / kind, folder / f"{kind} resumed"
    assert history(resumed) == history(whole)
    assert history(whole)[-1]["eval_loss"] < 0.8 * history(whole)[0]["eval_loss"], "it learns"
    for ours, theirs in zip(shards(resumed), shards(whole), strict=True):
        assert_equal_states(*(torch.load(file, weights_only=False) for file in (ours, theirs)))
    live, other = (torch.load(place / f"live-{STEPS}.pt") for place in (resumed, whole))
    assert live.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in live.items()), (
        "the frozen weights as well"
    )
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rounding"), [("zero-3", 1e-5), ("zero-2", 2e-3)])
def test_one_rank_continues_a_run_of_two_to_rounding(kind: str, rounding: float, folder: Path) -> None:
    difference = drift(history(folder / f"{kind} by one"), history(folder / kind))
    print(f"2 -> 1 ranks: losses differ by {difference:.1e}")
    assert difference < rounding
    assert len(history(folder / f"{kind} by one")) == len(history(folder / kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_base_plus_adapter_in_the_precision_of_the_run(kind: str, folder: Path) -> None:
    merged = load_file(folder / kind / "model.safetensors")
    live = torch.load(folder / kind / f"live-{STEPS}.pt")
    assert {tensor.dtype for tensor in merged.values()} == {
        torch.float32 if kind == "zero-3" else torch.bfloat16
    }
    base = load_file(Path(model_folder("demo")) / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = set()
    for name, tensor in merged.items():
        module, _, part = name.rpartition(".")
        expected = base[name].to(tensor.dtype)
        if f"{module}.new_rows" in live:
            new = live[f"{module}.{'new_rows' if part == 'weight' else 'new_bias'}"]
            expected = torch.cat([expected[:1024], new])
        elif f"{module}.lora_A.default.weight" in live and part == "weight":
            a, b = (live[f"{module}.lora_{letter}.default.weight"].float() for letter in "AB")
            expected = (expected.float() + 2 * b @ a).to(tensor.dtype)  # alpha is twice the rank
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6 if kind == "zero-3" else 1e-3)
        changed |= (
            {name} if tensor.shape != base[name].shape or not torch.equal(tensor, base[name]) else set()
        )
    layers = [name for name in live if name.endswith("lora_B.default.weight")]
    assert len(layers) == 18, "six layers in three blocks"
    assert {name.replace("lora_B.default.", "") for name in layers} <= changed


@pytest.mark.slow
def test_checkpoints_at_checkpoint_to_and_an_export_from_there_are_those_of_the_run(
    folder: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(folder / "copies" / f"checkpoint-{STEPS}", tmp_path / f"checkpoint-{STEPS}"))
    assert {file.name for file in shards(folder / "zero-3")} <= {file.name for file in place.rglob("*.pt")}
    export(place, tmp_path / "model")
    for name in ("model.safetensors", "config.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (folder / "zero-3" / name).read_bytes(), name
    assert record(tmp_path / "model")["weights"] == record(folder / "zero-3")["weights"]


@pytest.mark.slow
def test_two_zero3_ranks_train_every_weight_from_an_adapter_merged_into_its_base(folder: Path) -> None:
    before, after = history(folder / "zero-3")[-1], history(folder / "from the adapter")[0]
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    merged, ours = (load_file(folder / name / "model.safetensors") for name in ("zero-3", "from the adapter"))
    differences = {name: (tensor - merged[name]).abs().max() for name, tensor in ours.items()}
    assert 0 < max(differences.values()) < 5e-5, "one step at a rate of 1e-5 after the merge"


@pytest.mark.slow
def test_answers_over_time_change_nothing(folder: Path) -> None:
    """The resumed run had none, and is equal bit for bit."""
    lines = [json.loads(line) for line in (folder / "zero-3" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, STEPS]
    assert lines[0]["response"] != lines[1]["response"]
