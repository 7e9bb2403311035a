"""Makes the merged model of a LoRA run from a checkpoint, and beside it the adapter as peft loads it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from training.consts import ADAPTER_FOLDER, DEFAULT_SEED, DEMO
from training.errors import ModelError
from training.files import file_digest, write_json
from training.model.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PREFIX,
    find_adapter,
    merge_into,
)
from training.model.base import base_difference, identify
from training.model.demo_model import model_folder
from training.model.loading import DTYPES, load_model
from training.model.stored_weights import StoredTensor, in_memory
from training.model.tokenizer import generation_config
from training.model.verify import save_model
from training.model.weight_files import WeightFiles, empty_model, plan_files
from training.run.adapter_checkpoint import read_facts, stored_trained

logger = logging.getLogger(__name__)


def merged_files(
    checkpoint: Path, folder: Path, max_shard_size: str, trust_remote_code: bool, place: str | None = None
) -> WeightFiles:
    """The weight files of a checkpoint's merged model, not yet written; `folder` holds its tokenizer already.

    Loads a fresh base in the run's precision into host memory, never one in 4 bits, and merges the adapter into it. The
    adapter is written first, and merged from its files. So what peft will load has been read back and found to fit.
    The weights of a base in a folder are compared with those of the run: they may have changed while it trained. A base on
    the Hub is loaded at the run's commit. `place`: where the base is, if it may have been moved. Raises ModelError.
    """
    lora = read_facts(checkpoint)
    assert lora is not None
    base = lora["base"] = _found_base(checkpoint, lora["base"], place)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    logger.info("merging the adapter into %s", base["model"])
    model = load_model(
        base["model"], tokenizer, DTYPES[lora["precision"]], DEFAULT_SEED, trust_remote_code, base["revision"]
    )
    adapter = folder / ADAPTER_FOLDER
    adapter.mkdir()
    write_adapter(adapter, model, lora, stored_trained(checkpoint))
    tokenizer.save_pretrained(adapter)
    found = find_adapter(str(adapter))
    assert found is not None
    merge_into(model, found)
    save_model(model, {}, generation_config(tokenizer), folder, max_shard_size)
    return plan_files(
        empty_model(folder, trust_remote_code), in_memory(model.state_dict()), 1, max_shard_size
    )


def _found_base(checkpoint: Path, base: dict[str, Any], place: str | None) -> dict[str, Any]:
    """The base of a checkpoint, with the name of the folder that holds it now. Raises ModelError if none does."""
    if not base["sha256"]:
        return base
    problems = []
    for name in dict.fromkeys((place or base["model"], base["model"])):
        if name != DEMO and not Path(name).is_dir():
            problems.append(
                f"its base model is gone: there is no folder {name}. The adapter is kept. Put the model with weights of "
                f"SHA-256 {base['sha256']} there again, or a link to it"
            )
            continue
        now = identify(name)
        other = base_difference(base, now)
        if other is None:
            return base | {"model": now["model"]}
        problems.append(f"{other}. Put the former weights there again")
    raise ModelError(f"{checkpoint}: {problems[0]}")


def adapter_digests(folder: Path) -> dict[str, dict[str, Any]]:
    """{"adapter/adapter_model.safetensors": {"size", "sha256"}} of a model folder."""
    name = f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}"
    return {name: file_digest(folder / name, flush=True)}


def write_adapter(
    folder: Path, base: PreTrainedModel, lora: dict[str, Any], trained: Mapping[str, StoredTensor]
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    peft's trainable_token_indices hold new rows, but would drop the bias of a head (TrainableTokensLayer of peft 0.21.2).
    Such a head is saved whole, and so is an embedding that shares its weight. `base` has its embedding grown already.
    """
    tensors, layers = _adapter_tensors(trained)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    whole_modules = []
    if getattr(head, "bias", None) is not None:
        whole_modules = [head, embedding] if head.weight is embedding.weight else [head]
    names = {id(module): name for name, module in base.named_modules()}
    rows: dict[str, list[int]] = {}
    for module in (embedding, head):
        name = names[id(module)]
        if module in whole_modules:
            tensors |= _whole(module, name, names[id(embedding)], lora["rows"], trained)
        elif f"{name}.new_rows" in trained:
            tensors[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = trained[
                f"{name}.new_rows"
            ].read()
            rows[name] = lora["rows"]
    file = folder / ADAPTER_WEIGHTS
    file.touch()
    mode = file.stat().st_mode  # of any new file; safetensors writes one that only its owner may read
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base_path(lora["base"]["model"]),
        "revision": lora["base"]["revision"],
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "target_modules": _short_names(base, layers),
        "bias": "none",
        "fan_in_fan_out": all(isinstance(base.get_submodule(layer), Conv1D) for layer in layers),
        "trainable_token_indices": rows or None,
        "modules_to_save": [names[id(module)] for module in whole_modules] or None,
        "inference_mode": True,
    }
    write_json(folder / ADAPTER_CONFIG, config)


def _adapter_tensors(trained: Mapping[str, StoredTensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The factors A and B under the names of peft's files, and the names of the layers that have them."""
    tensors, layers = {}, []
    for name in sorted(trained):
        if name.endswith(".default.weight"):  # layer.lora_A.default.weight
            short = name.replace(".default.weight", ".weight")
            tensors[PREFIX + short] = trained[name].read()
            if short.endswith(".lora_A.weight"):
                layers.append(short.removesuffix(".lora_A.weight"))
    return tensors, layers


def _whole(
    module: torch.nn.Module, name: str, embedding: str, rows: list[int], trained: Mapping[str, StoredTensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a module of the base with its new rows and biases."""
    new_rows = f"{name if f'{name}.new_rows' in trained else embedding}.new_rows"
    tensors = {}
    for part, parameter in module.named_parameters():
        source = new_rows if part == "weight" else f"{name}.new_bias"
        whole = parameter.detach().clone()
        if source in trained:
            whole[rows] = trained[source].read().to(whole)
        tensors[f"{PREFIX}{name}.{part}"] = whole
    return tensors


def _base_path(model: str) -> str:
    return model_folder(model) if model == DEMO else model


def _short_names(base: PreTrainedModel, layers: list[str]) -> list[str]:
    """The last parts of the layers' names if they mean the same layers, else the whole names."""
    short = {layer.rpartition(".")[2] for layer in layers}
    meant = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in short]
    return sorted(short) if sorted(meant) == sorted(layers) else sorted(layers)
