"""Writes a model's weights as safetensors files, each tensor read, checked, written and hashed once.

The files hold the bytes that `save_pretrained` would write. Several ranks or threads can write different files at once,
and each holds one tensor in memory. `safetensors` itself takes a whole file, blocks all threads, and does not hash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
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
from training.model.verify import not_finite

INDEX = f"model{WEIGHTS}.index.json"
ONE_FILE = 2**30  # bytes; a smaller model is one file, also if several ranks could write it
OTHER_NAMES = "save_pretrained"  # folder for its files
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
        model: on the meta device.
        weights: the tensors by name; tied ones once.
        max_shard_size: largest file, such as "5GB".
        files: {file name: names of its tensors}; empty if only `save_pretrained` can write this architecture.
        index: content of the index; None for a model in one file.
    """

    model: PreTrainedModel
    weights: dict[str, StoredTensor]
    max_shard_size: str
    files: dict[str, list[str]]
    index: dict[str, Any] | None = None

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.weights.values())


def plan_files(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], writers: int, max_shard_size: str
) -> WeightFiles:
    """Divides the weights into one file for each of `writers`, or into more if they would exceed `max_shard_size`.

    Raises ModelError if a tensor is missing in `stored`, or has another shape than in the model.
    """
    weights = _saved_weights(model, stored)
    if has_other_names(model):
        return WeightFiles(model, weights, max_shard_size, {})
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
    return WeightFiles(model, weights, max_shard_size, split.filename_to_tensors, index)


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


def _saved_weights(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that belong into the files."""
    expected = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
    weights = {}
    for name, empty in expected.items():
        if name in (model._keys_to_ignore_on_save or ()):
            continue
        if name not in stored:
            raise ModelError(f"the checkpoint does not hold {name}")
        if stored[name].shape != tuple(empty.shape):
            raise ModelError(
                f"{name} has the shape {list(stored[name].shape)}, but config.json describes {list(empty.shape)}"
            )
        weights[name] = stored[name]
    return weights


def write_files(
    plan: WeightFiles, folder: Path, writer: int = 0, writers: int = 1
) -> dict[str, dict[str, Any]]:
    """Writes this writer's files of the plan, several at once. Returns {name: {"size": bytes, "sha256": hex}}.

    Raises ModelError if a tensor holds NaN or infinite numbers, OSError if a file cannot be written.
    """
    if not plan.files:
        return _write_with_other_names(plan, folder) if writer == 0 else {}
    if plan.index is not None and writer == 0:
        write_file(folder / INDEX, json.dumps(plan.index, indent=2, sort_keys=True) + "\n")
    names: list[str] = list(plan.files)[writer::writers]
    failures: list[BaseException] = []
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            written = pool.map(
                lambda name: _write_file(plan, folder / name, plan.files[name], failures), names
            )
            return dict(zip(names, written, strict=True))
        except BaseException as error:
            failures.append(error)  # after Ctrl-C the threads must not finish files of many GB first
            raise


def _write_file(
    plan: WeightFiles, file: Path, names: list[str], failures: list[BaseException]
) -> dict[str, Any]:
    """Writes one file. The first of the `failures` of all threads stops each of them before its next tensor."""
    types = list(_TYPES)
    names = sorted(names, key=lambda name: (types.index(plan.weights[name].dtype), name))
    checksum = hashlib.sha256()
    try:
        with open(file, "wb") as stream:
            for block in _blocks(plan, names):
                if failures:
                    raise failures[0]
                checksum.update(block)
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
            return {"size": stream.tell(), "sha256": checksum.hexdigest()}
    except BaseException as error:
        failures.append(error)
        raise


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
        if not_finite({name: content}, plan.model):
            raise ModelError(f"{name} holds NaN or infinite numbers")
        if content.numel():
            yield content.reshape(-1).view(torch.uint8).numpy().data


def _write_with_other_names(plan: WeightFiles, folder: Path) -> dict[str, dict[str, Any]]:
    """Writes a model whose tensors have other names in the files. Holds the model in memory.

    Its experts are joined or divided, across any division into files. So one writer leaves it to `save_pretrained`.
    """
    state = {name: tensor.read() for name, tensor in plan.weights.items()}
    if bad := not_finite(state, plan.model):
        raise ModelError(f"{bad[0]} holds NaN or infinite numbers")
    plan.model.save_pretrained(folder / OTHER_NAMES, state_dict=state, max_shard_size=plan.max_shard_size)
    # Only the weights: config and generation config are the checkpoint's.
    for file in (folder / OTHER_NAMES).glob(f"*{WEIGHTS}*"):
        shutil.copymode(folder / OTHER_NAMES / "config.json", file)
        file.rename(folder / file.name)
    shutil.rmtree(folder / OTHER_NAMES)
    return {file.name: file_digest(file, flush=True) for file in sorted(folder.glob(f"*{WEIGHTS}"))}
