"""Weight files written tensor by tensor are those of save_pretrained, byte for byte, and each byte is hashed once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from training.errors import ModelError
from training.files import file_digest
from training.model import weight_files
from training.model.stored_weights import StoredTensor
from training.model.weight_files import INDEX, empty_model, has_other_names, plan_files, write_files


def gptj() -> PreTrainedModel:
    return GPTJForCausalLM(
        GPTJConfig(vocab_size=90, n_positions=32, n_embd=32, n_layer=4, n_head=2, rotary_dim=4)
    )


def tied() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=90, n_positions=32, n_embd=32, n_layer=4, n_head=2))


def experts() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4}
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=90, num_attention_heads=2, num_key_value_heads=2, **sizes)
    )


def stored(model: PreTrainedModel) -> dict[str, StoredTensor]:
    """The weights as a checkpoint holds them."""

    def of(tensor: torch.Tensor) -> StoredTensor:
        return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    return {name: of(tensor) for name, tensor in model.state_dict().items()}


@pytest.fixture(params=["5GB", "50KB"])
def shard(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", [gptj, tied, experts])
def test_the_files_are_those_of_save_pretrained_byte_for_byte(
    make: Callable[[], PreTrainedModel], dtype: torch.dtype, shard: str, tmp_path: Path
) -> None:
    model = make().to(dtype)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model.save_pretrained(theirs, max_shard_size=shard)
    ours.mkdir()
    plan = plan_files(empty_model(theirs, False), stored(model), 1, shard)
    assert plan.model.dtype == dtype
    digests = write_files(plan, ours)
    names = sorted(file.name for file in theirs.glob("*.safetensors*"))
    assert sorted(file.name for file in ours.iterdir()) == names
    assert (INDEX in names) is (shard == "50KB")
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert digests == {name: file_digest(ours / name) for name in names if name != INDEX}


@pytest.mark.parametrize("make", [gptj, experts])
@pytest.mark.parametrize("writers", [2, 3, 8])
def test_several_writers_write_the_files_of_one_model(
    make: Callable[[], PreTrainedModel], writers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "ONE_FILE", 1000)
    model = make()
    model.config.save_pretrained(tmp_path)
    digests = {}
    for writer in range(writers):
        plan = plan_files(empty_model(tmp_path, False), stored(model), writers, "5GB")
        share = write_files(plan, tmp_path, writer, writers)
        if plan.files:
            assert len(plan.files) <= writers
            assert len(share) <= 1, "each writer has at most one file"
            sizes = [file["size"] for file in share.values()]
            largest = max(tensor.numel() for tensor in model.parameters()) * 4
            assert all(size < plan.size / writers + largest + 10_000 for size in sizes)
        assert not digests.keys() & share.keys()
        digests |= share
    weights = {
        name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert digests.keys() == {file.name for file in tmp_path.glob("*.safetensors")}
    again, loaded = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loaded[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    assert has_other_names(model) or weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("make", [gptj, experts])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_is_met_while_it_is_written(
    make: Callable[[], PreTrainedModel], value: float, tmp_path: Path
) -> None:
    model = make()
    model.config.save_pretrained(tmp_path)
    model.lm_head.weight.data[7, 3] = value
    with pytest.raises(ModelError, match=r"lm_head.weight holds NaN or infinite numbers"):
        write_files(plan_files(empty_model(tmp_path, False), stored(model), 1, "5GB"), tmp_path)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    model = gptj()
    model.config.save_pretrained(tmp_path)
    weights = stored(model)
    missing = {name: tensor for name, tensor in weights.items() if name != "lm_head.bias"}
    with pytest.raises(ModelError, match=r"the checkpoint does not hold lm_head\.bias"):
        plan_files(empty_model(tmp_path, False), missing, 1, "5GB")
    wrong = weights | {"lm_head.bias": StoredTensor((7,), torch.float32, torch.empty)}
    with pytest.raises(
        ModelError, match=r"lm_head.bias has the shape \[7\], but config.json describes \[90\]"
    ):
        plan_files(empty_model(tmp_path, False), wrong, 1, "5GB")


def test_a_full_disk_stops_the_other_threads_between_two_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gptj()
    model.config.save_pretrained(tmp_path)
    plan = plan_files(empty_model(tmp_path, False), stored(model), 1, "20KB")
    assert len(plan.files) > 8
    written = []

    def fsync(number: int) -> None:
        written.append(number)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_files(plan, tmp_path)
    assert len(written) <= weight_files.THREADS
