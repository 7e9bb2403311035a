"""A base in 4 bits trains adapters with the gradients of the weights that its 4 bits stand for."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.data.test_collator import packed
from training.errors import ModelError, OptionsError
from training.machine.flops import adapter_parameters, model_parameters
from training.model.adapter import Lora, add_adapter, row_ids
from training.model.loading import check_quantization, load_model
from training.model.new_rows import trainable_state
from training.model.packing import Packing

LORA = Lora(rank=4, alpha=8.0)


def rows_of(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    ids = tokenizer("### Instruction:\nSay 3.\n\n### Response:\nthree\n\n### End")["input_ids"]
    return [
        {"input_ids": ids, "response_spans": [[len(ids) - 5, len(ids)]]},
        {"input_ids": ids[2:], "response_spans": [[4, len(ids) - 2]]},
    ]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_gradients_on_4_bits_are_those_of_the_weights_that_they_stand_for(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, checkpointing: bool
) -> None:
    model = load_model(str(base_folder), tokenizer, torch.float32, seed=42, quantize="nf4")
    whole = load_model(str(base_folder), tokenizer, torch.float32, seed=42)
    bnb = importlib.import_module("bitsandbytes")
    layers = {name: part for name, part in model.named_modules() if isinstance(part, bnb.nn.Linear4bit)}
    assert len(layers) == 2 * 6, "the head and the embedding keep their precision"
    changed = 0.0
    with torch.no_grad():
        for name, layer in layers.items():
            assert layer.weight.quant_state.quant_type == "nf4"
            values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            changed += (whole.get_submodule(name).weight - values).norm().item()
            whole.get_submodule(name).weight.copy_(values)
    assert changed > 0.1, "4 bits are coarse"
    ids = row_ids(tokenizer, 500)
    for trained in (model, whole):
        Packing(response_loss=True).prepare(trained)
        add_adapter(trained, LORA, ids, seed=3)
        with torch.no_grad():
            for number, tensor in enumerate(trainable_state(trained).values()):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
        if checkpointing:
            trained.gradient_checkpointing_enable({"use_reentrant": False})
        trained.train()
        trained(**packed(rows_of(tokenizer))).loss.backward()
    expected = trainable_state(whole)
    for name, tensor in trainable_state(model).items():
        difference = (tensor.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert difference < 1e-5, f"{name}: {difference}"
    assert all(tensor.grad is None for tensor in model.parameters() if not tensor.requires_grad)
    assert model_parameters(model) == model_parameters(whole), "two numbers in a byte are counted as two"
    assert adapter_parameters(model) == adapter_parameters(whole)


def test_an_evaluation_before_the_first_step_leaves_4_bits_trainable(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_model(str(base_folder), tokenizer, torch.float32, seed=42, quantize="nf4")
    Packing(response_loss=True).prepare(model)
    add_adapter(model, LORA, row_ids(tokenizer, 500), seed=3)
    batch = packed(rows_of(tokenizer))
    with torch.no_grad():
        before = model.eval()(**batch).loss
    loss = model.train()(**copy.copy(batch)).loss
    loss.backward()
    assert loss.item() == pytest.approx(before.item(), rel=1e-4)


def test_an_adapter_as_the_base_in_4_bits_is_refused(
    tmp_path: Path, base_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "base_model_name_or_path": "{base_folder}", "r": 2, "target_modules": ["q_proj"]}}'
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"cannot be merged into weights in 4 bits\. Leave out --quantize"):
        load_model(str(tmp_path), tokenizer, torch.float32, seed=42, quantize="nf4")


def test_a_device_that_bitsandbytes_does_not_know_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_quantization("nf4", torch.device("cpu"))

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", fail)
    words = r"--quantize nf4: bitsandbytes cannot compute in 4 bits on this cpu device \(.*no kernel image.*\). Leave out"
    with pytest.raises(OptionsError, match=words):
        check_quantization("nf4", torch.device("cpu"))
