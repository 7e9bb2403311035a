"""The finished folder: exact weights, verification from the files alone, and the model card."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tests.conftest import resolved
from training.data.ledger import Ledger
from training.errors import ModelError
from training.machine.cores import usable_cores
from training.model.tokenizer import generation_config
from training.model.verify import save_model, verify_model
from training.options.trainer_options import TrainingOptions
from training.run import finish
from training.run.final_model import UNFINISHED, copy_files, place_files
from training.run.identity import new_record
from training.run.model_card import write_model_card
from training.storage import checkpoint


def make_record(tmp_path: Path, **options: Any) -> dict[str, Any]:
    record = new_record(resolved(TrainingOptions(local_output_dir=str(tmp_path), bf16=True, **options), 8))
    return record | {"status": "finished", "steps": 797, "held_out_loss": {"before": 2.34567, "after": 1.2}}


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, shard: str) -> None:
    save_model(model, model.state_dict(), generation_config(tokenizer), folder, shard)
    tokenizer.save_pretrained(folder)


# --- weights, tokenizer, generation config -----------------------------------------------------------


@pytest.mark.parametrize(("shard", "several"), [("5GB", False), ("50KB", True)])
def test_a_saved_folder_has_the_exact_weights_and_equal_file_permissions(
    answering_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    shard: str,
    several: bool,
) -> None:
    save(answering_model, tokenizer, tmp_path, shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) is several
    assert (tmp_path / "model.safetensors").exists() is not several
    assert len({file.stat().st_mode for file in tmp_path.iterdir() if file.is_file()}) == 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    weights = answering_model.state_dict()
    assert again.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(again[key], tensor), key
        assert again[key].dtype == tensor.dtype
    verify_model(tmp_path)
    if several:
        next(tmp_path.glob("model-00002*")).unlink()
        with pytest.raises(ModelError, match="its files hold"):
            verify_model(tmp_path)


def test_saving_during_training_writes_the_generation_config_and_leaves_the_model_unchanged(
    answering_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Training turns the cache off: with it, packed rows would attend to each other.
    monkeypatch.setattr(answering_model.config, "use_cache", False)
    before = answering_model.generation_config
    save(answering_model, tokenizer, tmp_path, "5GB")
    assert answering_model.config.use_cache is False
    assert answering_model.generation_config is before
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


# --- the card ----------------------------------------------------------------------------------------


def test_the_card_has_base_data_licences_losses_options_ledger_and_a_valid_example(
    tmp_path: Path,
) -> None:
    ledger = Ledger("tatsu-lab/alpaca", 2048, 10, 8, {"empty response": 2}, {"empty response": [3, 7]})
    write_model_card(tmp_path, make_record(tmp_path), ledger)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.datasets) == ("EleutherAI/gpt-j-6B", ["tatsu-lab/alpaca"])
    assert (card.data.pipeline_tag, card.data.license, card.data.language) == (
        "text-generation",
        "other",
        "en",
    )
    [example] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    ast.parse(example)
    for words in (
        "licence: apache-2.0",
        "licence: cc-by-nc-4.0",
        "2.3457 before training, **1.2000** after",
        "797 steps on 8 devices in bf16",
        "dropped 2: empty response (first rows: 3, 7)",
        "| `lr` | `1e-05` |",
        "It answers one instruction at a time",
    ):
        assert words in card.text


def test_the_card_of_local_model_and_data_links_to_nothing_on_the_hub(tmp_path: Path) -> None:
    model, rows = tmp_path / "own", tmp_path / "own.jsonl"
    model.mkdir()
    rows.touch()
    record = make_record(tmp_path, input_model=str(model), training_dataset=str(rows))
    write_model_card(tmp_path, record | {"steps": 1, "world_size": 1}, Ledger("x", 8))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is card.data.datasets is card.data.language is None
    assert "licence: unknown" in card.text
    assert "1 step on 1 device in bf16" in card.text
    # An export may run where the folders are gone. The Hub refuses a card that names them.
    record = make_record(tmp_path, input_model="/gone/own/model", training_dataset="/gone/own.jsonl")
    write_model_card(tmp_path, record, Ledger("x", 8))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is card.data.datasets is None


# --- verified from the files alone -------------------------------------------------------------------


@pytest.fixture
def model_folder(
    answering_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Path:
    """A complete model in a folder that a test may damage."""
    save(answering_model, tokenizer, tmp_path / "model", "5GB")
    return tmp_path / "model"


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_json(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def poison(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        change_weights(folder, lambda weights: weights[EMBEDDING][3, 5].fill_(value))

    return change


def omit_shard_from_index(folder: Path) -> None:
    """Splits the weights into two shards, but lists only the first one in the index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    first, second = (f"model-{number:05}-of-00002.safetensors" for number in (1, 2))
    for file, part in ((first, names[:5]), (second, names[5:])):
        save_file({n: weights[n] for n in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(names[:5], first)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remove_control_token(folder: Path) -> None:
    def remove(content: dict[str, Any]) -> None:
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "### Response:\n"]

    change_json(folder, "tokenizer.json", remove)
    change_json(folder, "tokenizer_config.json", lambda content: content.update(extra_special_tokens=[]))


def enlarge_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<more{n}>" for n in range(5)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_weights(f, lambda w: w.pop(HEAD)), f"{HEAD} is missing"),
        (lambda f: change_weights(f, lambda w: w.update(x=torch.ones(2))), "x is not of this architecture"),
        (
            lambda f: change_weights(f, lambda w: w.update({HEAD: w[HEAD][:-1].clone()})),
            f"{HEAD} has the shape [",
        ),
        (poison(float("nan")), f"{EMBEDDING} holds NaN or infinite numbers"),
        (poison(float("inf")), f"{EMBEDDING} holds NaN or infinite numbers"),
        (lambda f: change_weights(f, lambda w: w.update({HEAD: torch.empty(0, 32)})), f"{HEAD} is empty"),
        (lambda f: os.truncate(f / "model.safetensors", 50_000), "SafetensorError"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "SafetensorError"),
        (lambda f: (f / "model.safetensors").unlink(), "its files hold 0 numbers"),
        (lambda f: (f / "config.json").unlink(), "config"),
        (lambda f: change_json(f, "config.json", lambda c: c.update(n_layer=3)), "h.2.attn.k_proj.weight is missing"),
        (omit_shard_from_index, " is missing"),
        (enlarge_tokenizer, "but the embedding only"),
        (remove_control_token, "does not keep '### Response:\\n' as one token"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "Error"),
        (
            lambda f: change_json(f, "generation_config.json", lambda c: c.update(eos_token_id=0)),
            "generation_config.json does not stop at '### End'",
        ),
        (lambda f: (f / "chat_template.jinja").unlink(), "chat"),
    ],
)  # fmt: skip
def test_a_damaged_model_is_refused_with_the_problem(
    model_folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    verify_model(model_folder)
    damage(model_folder)
    with pytest.raises(ModelError, match="is not a usable model") as error:
        verify_model(model_folder)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, tie_word_embeddings=True),
        GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
    ],
    ids=["tied embeddings", "gpt-neox"],
)
def test_other_architectures_pass_verification_and_fail_when_damaged(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config.vocab_size = len(tokenizer)
    save(AutoModelForCausalLM.from_config(config), tokenizer, tmp_path, "5GB")
    verify_model(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop(sorted(weights)[0]))
    with pytest.raises(ModelError, match="is missing"):
        verify_model(tmp_path)


def test_a_finished_model_is_verified_on_every_core_also_where_a_rank_has_one_thread() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with finish._all_cores():
            assert torch.get_num_threads() == usable_cores()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


# --- placing a checkpoint's model --------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_the_placed_model_is_the_checkpoints_and_replaces_an_earlier_one(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    source = tmp_path / "checkpoint-7"
    shutil.copytree(model_folder, source)
    names = checkpoint.files_of(source)
    (source / "optimizer.pt").write_bytes(b"not the model's")
    checkpoint.write_manifest(source, 1.0, names, checkpoint.digests(source, names))
    output = tmp_path / "out"
    output.mkdir()
    earlier = (
        "model-00001-of-00002.safetensors model.safetensors.index.json config.json run.json evaluation.json"
    )
    for name in earlier.split():
        (output / name).write_bytes(b"of an earlier model")

    def refuse(*args: Any) -> None:
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    (output / UNFINISHED).mkdir()
    (output / UNFINISHED / "model.safetensors").write_bytes(b"of a killed run")
    copy_files(source, names, output / UNFINISHED)
    assert (output / "config.json").read_bytes() == b"of an earlier model", "nothing is replaced yet"
    place_files(output / UNFINISHED, output, names)
    assert not (output / UNFINISHED).exists()
    assert checkpoint.files_of(output) == sorted([*names, "run.json"])
    assert all((output / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert (output / "model.safetensors").samefile(source / "model.safetensors") is links
