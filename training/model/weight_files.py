"""Writes a model's weights as safetensors files, each tensor read, checked, written and hashed once.

The files hold the bytes that `save_pretrained` would write. Several ranks or threads can write different files at once,
and each holds one tensor in memory. `safetensors` itself takes a whole file, blocks all threads, and does not hash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from training.consts import WEIGHTS
from training.errors import ModelError
from training.files import file_digest, write_file
from training.model.stored_weights import StoredTensor
from training.model.verify import largest_magnitudes, not_finite

INDEX = f"model{WEIGHTS}.index.json"
ONE_FILE = 2**30  # bytes; a smaller model is one file, also if several ranks could write it
THREADS = 4  # of a rank; a thread writes one file at a time

# The format's names of the types, in the order in which it sorts the tensors of a file.
_TYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a model before they are written.

    Attributes:
        weights: the tensors, by the names that they have in the files.
        files: {file name: names of its tensors}.
        index: content of the index; None for a model in one file.
        infinite: names of the tensors that may be infinite: Gemma 4 stores limits in some buffers.
    """

    weights: dict[str, StoredTensor]
    files: dict[str, list[str]]
    index: dict[str, Any] | None
    infinite: frozenset[str]


def empty_model(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The model that a folder's config.json describes, on the meta device."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=config.dtype, trust_remote_code=trust_remote_code
        )


def has_other_names(model: PreTrainedModel) -> bool:
    """Whether `save_pretrained` renames, joins or splits tensors of this architecture, such as the experts of Mixtral."""
    unchanged: dict[str, torch.Tensor] = {}
    return revert_weight_conversion(model, unchanged) is not unchanged


def saved_weights(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that belong into the files: tied ones once. Raises ModelError if one is missing or misshapen."""
    expected = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
    ignored = set(model._keys_to_ignore_on_save or ())
    weights = {}
    for name, empty in expected.items():
        if name in ignored:
            continue
        if name not in stored:
            raise ModelError(f"the checkpoint does not hold {name}")
        if stored[name].shape != tuple(empty.shape):
            raise ModelError(
                f"{name} has the shape {list(stored[name].shape)}, but config.json describes {list(empty.shape)}"
            )
        weights[name] = stored[name]
    return weights


def plan_files(
    model: PreTrainedModel, weights: dict[str, StoredTensor], writers: int, max_shard_size: str
) -> WeightFiles:
    """Divides the weights into one file for each of `writers`, or into more if they would exceed `max_shard_size`."""
    empty = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in weights.items()
    }
    split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    total = split.metadata["total_size"]
    if total > ONE_FILE and len(split.filename_to_tensors) < writers:
        # No tensor is divided. So with files of exactly an equal share there would be more files than writers.
        limit = math.ceil(total / writers)
        while (
            len(split_torch_state_dict_into_shards(empty, max_shard_size=limit).filename_to_tensors) > writers
        ):
            limit += math.ceil(limit / 50)
        split = split_torch_state_dict_into_shards(empty, max_shard_size=limit)
    index = None
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    infinite = frozenset(name for name in weights if name.rpartition(".")[2] in buffers)
    return WeightFiles(weights, split.filename_to_tensors, index, infinite)


def write_files(plan: WeightFiles, folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Writes these files of the plan, several at once. Returns {name: {"size": bytes, "sha256": hex}}.

    Raises ModelError if a tensor holds NaN or infinite numbers, OSError if a file cannot be written.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        written = pool.map(lambda name: (name, _write_file(plan, folder / name, plan.files[name])), names)
        return dict(written)


def _write_file(plan: WeightFiles, file: Path, names: list[str]) -> dict[str, Any]:
    types = list(_TYPES)
    names = sorted(names, key=lambda name: (types.index(plan.weights[name].dtype), name))
    checksum = hashlib.sha256()
    with open(file, "wb") as stream:
        for block in _blocks(plan, names):
            checksum.update(block)
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
        return {"size": stream.tell(), "sha256": checksum.hexdigest()}


def _blocks(plan: WeightFiles, names: list[str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: length of the header, header, tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = plan.weights[name]
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        content = plan.weights[name].read()
        (largest,) = largest_magnitudes([content])
        if math.isnan(largest) or (math.isinf(largest) and name not in plan.infinite):
            raise ModelError(f"{name} holds NaN or infinite numbers")
        if content.numel():
            yield content.reshape(-1).view(torch.uint8).numpy().data


def write_index(plan: WeightFiles, folder: Path) -> None:
    """Writes the index of a model in several files, as `save_pretrained` does."""
    if plan.index is not None:
        write_file(folder / INDEX, json.dumps(plan.index, indent=2, sort_keys=True) + "\n")


def write_with_other_names(
    model: PreTrainedModel, weights: Mapping[str, StoredTensor], folder: Path, max_shard_size: str
) -> dict[str, dict[str, Any]]:
    """Writes a model whose tensors have other names in the files (`has_other_names`). Holds the model in memory.

    Joined or divided tensors may come from several files of a plan, so this is left to `save_pretrained`.
    """
    state = {name: tensor.read() for name, tensor in weights.items()}
    if bad := not_finite(state, model):
        raise ModelError(f"{bad[0]} holds NaN or infinite numbers")
    model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    return {file.name: file_digest(file, flush=True) for file in sorted(folder.glob(f"*{WEIGHTS}"))}
