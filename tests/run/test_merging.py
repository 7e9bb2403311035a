"""The adapter of a LoRA run, in peft's files: what the run computed, the merged model and peft agree on every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedModel

from tests.model.test_adapter_files import IDS, ROWS, gpt2, gptj, llama
from training.errors import ModelError
from training.model.adapter import Lora, add_adapter
from training.model.adapter_files import find_adapter, merge_into
from training.model.new_rows import trainable_state
from training.model.stored_weights import in_memory
from training.options.settings import resolve
from training.options.trainer_options import TrainingOptions
from training.run.merging import merged_files, write_adapter

peft = pytest.importorskip("peft")

GROWN = ROWS + 2
TRAINED = [7, ROWS, ROWS + 1]  # rows: one that the base has, and two that it grew by


def tied_with_bias() -> PreTrainedModel:
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 32}
    model = GPTJForCausalLM(GPTJConfig(vocab_size=ROWS, **sizes, **tokens))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "gptj": gptj, "llama, tied": llama, "llama, own head": lambda: llama(tied=False), "gpt2": gpt2,
    "gptj, tied": tied_with_bias,
}  # fmt: skip


def grown(folder: Path) -> PreTrainedModel:
    torch.manual_seed(1)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.resize_token_embeddings(GROWN, mean_resizing=False)
    return model


@pytest.mark.parametrize("targets", ["all", "some"])
@pytest.mark.parametrize("base", BASES)
def test_run_merged_model_and_peft_have_the_same_logits(base: str, targets: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    BASES[base]().save_pretrained(tmp_path / "base")
    model = grown(tmp_path / "base")
    if targets == "some":  # in one block only, so that short names would mean too much
        layers = [
            name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")
        ]
        targets = layers[1]
    lora = Lora(3, 5.0, 0.0, targets)
    add_adapter(model, lora, TRAINED, seed=0)
    with torch.no_grad():
        for tensor in trainable_state(model).values():
            tensor += 0.2 * torch.randn(tensor.shape)
    facts = {
        "rank": 3, "alpha": 5.0, "dropout": 0.0, "rows": TRAINED, "precision": "fp32",
        "base": {"model": str(tmp_path / "base"), "revision": None, "sha256": "0"},
    }  # fmt: skip
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", grown(tmp_path / "base"), facts, in_memory(trainable_state(model)))
    modes = {file.stat().st_mode for file in (tmp_path / "adapter").iterdir()}
    assert len(modes) == 1, "who can read the config can read the weights"
    merged = grown(tmp_path / "base")
    merge_into(merged, find_adapter(str(tmp_path / "adapter")))
    in_peft = peft.PeftModel.from_pretrained(grown(tmp_path / "base"), tmp_path / "adapter").eval()
    ids = torch.cat([IDS, torch.tensor([TRAINED, TRAINED[::-1]])], dim=1)
    with torch.no_grad():
        expected, plain = model.eval()(ids).logits, grown(tmp_path / "base")(ids).logits
        for other in (merged, in_peft):
            torch.testing.assert_close(other(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 0.1


def test_a_checkpoint_of_gptj_at_rank_16_is_below_one_gib() -> None:
    """By arithmetic, on the real shapes: float32 masters and two moments, and weights in bf16 under ZeRO-2."""
    with torch.device("meta"):
        model = GPTJForCausalLM(GPTJConfig(vocab_size=50403))
    add_adapter(model, Lora(16, 32.0), [50400, 50401, 50402], seed=0)
    numbers = sum(tensor.numel() for tensor in trainable_state(model).values())
    assert numbers == 28 * 16 * (8 * 4096 + 2 * (4096 + 16384)) + 2 * 3 * 4096 + 3
    options = TrainingOptions(local_output_dir="OUT", lora=16)
    plain = resolve(options, 1, "bf16")
    zero_2 = resolve(options, 2, "bf16", {"zero_optimization": {"stage": 2}})
    for settings in (plain, zero_2):
        assert 0.3 < settings.checkpoint_bytes * numbers / 2**30 < 0.5


def test_a_base_that_changed_or_went_while_the_run_trained_is_not_merged(tmp_path: Path) -> None:
    gptj().save_pretrained(tmp_path / "base")
    base = {"model": str(tmp_path / "base"), "revision": None, "sha256": "0"}
    (tmp_path / "lora.json").write_text(json.dumps({"base": base}))
    with pytest.raises(ModelError, match=r"of SHA-256 0, but is now .* Put the former weights there again"):
        merged_files(tmp_path, tmp_path / "model", "5GB", False)
    elsewhere = (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"its base model is gone: .* The adapter is kept. Put the model"):
        merged_files(tmp_path, tmp_path / "model", "5GB", False)
    with pytest.raises(ModelError, match="elsewhere with weights of SHA-256"):
        merged_files(tmp_path, tmp_path / "model", "5GB", False, str(elsewhere))
