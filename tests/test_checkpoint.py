"""The finished folder: weights bit for bit, a record never half-written, a card that can be read."""

from __future__ import annotations

import ast
import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from training.checkpoint import (
    save_model,
    start_record,
    write_model_card,
    write_run_record,
)
from training.data import Ledger
from training.options import TrainingOptions


def a_record(tmp_path: Path, **options: Any) -> dict[str, Any]:
    record = start_record(TrainingOptions(local_output_dir=str(tmp_path), **options), 8, "bf16")
    return record | {"status": "finished", "steps": 797, "held_out_loss": {"before": 2.34567, "after": 1.2}}


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, shard: str) -> None:
    """`save_model` with the Trainer that training has, on one device."""
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    save_model(Trainer(model=model, args=args), tokenizer, folder, shard)


# --- weights, tokenizer, generation config -----------------------------------------------------------


@pytest.mark.parametrize(("shard", "several"), [("5GB", False), ("50KB", True)])
def test_a_saved_folder_has_the_weights_bit_for_bit(
    answering_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    shard: str,
    several: bool,
) -> None:
    save(answering_model, tokenizer, tmp_path, shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is several
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    weights = answering_model.state_dict()
    assert again.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(again[key], tensor), key
        assert again[key].dtype == tensor.dtype


def test_who_may_read_the_config_may_read_the_weights(
    answering_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    save(answering_model, tokenizer, tmp_path, "50KB")
    assert len({file.stat().st_mode for file in tmp_path.iterdir() if file.is_file()}) == 1


def test_a_saved_folder_says_how_to_stop_pad_and_sample(
    answering_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    answering_model.config.use_cache = False  # as in training
    save(answering_model, tokenizer, tmp_path, "5GB")
    end = tokenizer.convert_tokens_to_ids("### End")
    written = json.loads((tmp_path / "generation_config.json").read_text())
    written.pop("transformers_version")
    written.pop("_from_model_config", None)
    assert written == {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [end, tokenizer.eos_token_id],
        "pad_token_id": tokenizer.eos_token_id,
        "max_new_tokens": 256,
        "do_sample": True,
        "top_p": 0.92,
        "top_k": 0,
    }
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert len(stock) == len(tokenizer)
    assert stock.convert_tokens_to_ids("### End") == end
    assert stock.chat_template == tokenizer.chat_template


# --- the record --------------------------------------------------------------------------------------


def test_the_record_tells_versions_options_and_commit(tmp_path: Path) -> None:
    record = start_record(TrainingOptions(local_output_dir=str(tmp_path), lr=2e-5), 8, "bf16")
    assert record["status"] == "running"
    assert (record["world_size"], record["precision"], record["options"]["lr"]) == (8, "bf16", 2e-5)
    for package in ("torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers"):
        assert record["versions"][package] == version(package)
    assert record["git_commit"] is None or re.fullmatch("[0-9a-f]{40}", record["git_commit"])
    assert json.loads(json.dumps(record)) == record


def test_a_record_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run_record(tmp_path, {"status": "running"})

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_run_record(tmp_path, {"status": "finished"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "running"}
    write_run_record(tmp_path, {"status": "finished"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "finished"}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


# --- the card ----------------------------------------------------------------------------------------


def test_the_card_names_base_data_licences_losses_options_and_ledger(tmp_path: Path) -> None:
    ledger = Ledger("tatsu-lab/alpaca", 2048, 10, 8, {"empty response": 2}, {"empty response": [3, 7]})
    write_model_card(tmp_path, a_record(tmp_path), ledger)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "EleutherAI/gpt-j-6B"
    assert card.data.datasets == ["tatsu-lab/alpaca"]
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "other"
    for words in (
        "licence: apache-2.0",
        "licence: cc-by-nc-4.0",
        "2.3457 before training, **1.2000** after",
        "797 steps on 8 devices in bf16",
        "dropped 2: empty response (first rows: 3, 7)",
        "| `lr` | `1e-05` |",
    ):
        assert words in card.text


def test_the_cards_example_is_python(tmp_path: Path) -> None:
    write_model_card(tmp_path, a_record(tmp_path), Ledger("x", 8))
    [example] = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    ast.parse(example)


def test_the_card_of_a_local_model_and_data_points_to_no_page_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own.jsonl").touch()
    record = a_record(
        tmp_path, input_model=str(tmp_path / "own"), training_dataset=str(tmp_path / "own.jsonl")
    )
    write_model_card(tmp_path, record, Ledger("x", 8))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert "licence: unknown" in card.text
