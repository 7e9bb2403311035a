"""Reads a LoRA adapter in peft's format, from a folder or the Hub, and merges it into its base model.

Neither step needs peft, and neither runs code from the adapter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from training.errors import ModelError, first_line
from training.files import expanded, is_hub_name
from training.model.sharded import gathered

ADAPTER_CONFIG = "adapter_config.json"  # the package peft writes it
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of each tensor in peft's files

# Settings of peft with which a module computes more than W x + scale * B A x, or starts from changed base weights.
_OTHER_METHODS = {
    "use_dora": "DoRA", "use_qalora": "QA-LoRA", "use_bdlora": "BD-LoRA", "lora_bias": "biases in its adapters",
    "layer_replication": "replicated layers", "target_parameters": "changes of single parameters",
    "alora_invocation_tokens": "activated LoRA", "arrow_config": "Arrow", "kasa_config": "KaSA",
    "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA",
}  # fmt: skip
_PLAIN_STARTS = (True, False, None, "true", "gaussian", "orthogonal", "eva")  # values of init_lora_weights

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_MOST_LEFT_OUT = 1024  # new rows that an adapter may leave untrained; a token id far beyond would fill memory

Change = Callable[[torch.Tensor], torch.Tensor]  # a weight of the base -> that of the merged model


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of any origin.

    Attributes:
        name: as the user typed it.
        folder: with adapter_config.json and adapter_model.safetensors.
        base: folder of the base model, or its name on the Hub.
        revision: the base's commit, branch or tag on the Hub; None: the newest.
        config: content of adapter_config.json.
    """

    name: str
    folder: Path
    base: str
    revision: str | None
    config: dict[str, Any]

    @property
    def tokenizer_name(self) -> str:
        """The folder whose tokenizer belongs to the adapter, or the base's name."""
        return str(self.folder) if (self.folder / "tokenizer_config.json").is_file() else self.base


def find_adapter(name: str, above: frozenset[Path] = frozenset()) -> Adapter | None:
    """The adapter in a folder or in a repository on the Hub; None for anything else, such as a model.

    `above`: folders of adapters whose base it is, as an adapter's base may have an adapter of its own.

    Raises ModelError for one that is broken, is not LoRA, or whose base is not on this machine.
    """
    folder = _local_folder(name) or _hub_folder(name)
    if folder is None:
        return None
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        kind, base = str(config["peft_type"]), config.get("base_model_name_or_path")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{name}: it is an adapter, and its {ADAPTER_CONFIG} is broken ({first_line(error)}). Copy the adapter again"
        ) from error
    others = [words for key, words in _OTHER_METHODS.items() if config.get(key)]
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        others.append(f"a start from changed base weights ({start})")
    if kind != "LORA" or others:
        raise ModelError(
            f"{name}: it is an adapter on {base}, of the kind {kind}{f' with {others[0]}' if others else ''}; plain LoRA was "
            "expected. Merge it into its base (merge_and_unload of the package peft), and name the folder of the merged model"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{name}: it is a LoRA adapter on {base}, but it has no {ADAPTER_WEIGHTS}. Copy the adapter again, or save "
            "it in that format (save_pretrained of the package peft)"
        )
    return Adapter(name, folder, _base_of(name, folder, base, above), config.get("revision"), config)


def _local_folder(name: str) -> Path | None:
    folder = Path(expanded(name))
    try:
        if not (folder / ADAPTER_CONFIG).is_file():
            return None
    except (OSError, ValueError):  # no path at all
        return None
    has_model = any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return None if has_model else folder


@cache
def _hub_folder(name: str) -> Path | None:
    """The folder with the files of an adapter on the Hub; None for a model, or if the Hub cannot be asked."""
    if "/" not in name or not is_hub_name(name) or Path(name).exists():
        return None
    found = [_hub_file(name, file) for file in ("config.json", ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    if found[0] is not None or found[1] is None:
        return None
    for file in ("tokenizer_config.json", "tokenizer.json"):
        _hub_file(name, file)
    return Path(found[1]).parent


def _hub_file(name: str, file: str) -> str | None:
    try:
        return cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such repository
        return None


def _base_of(name: str, folder: Path, base: object, above: frozenset[Path]) -> str:
    """The base as it is loaded. Raises ModelError if it is unknown or not on this machine."""
    entry = f"base_model_name_or_path in {folder / ADAPTER_CONFIG}"
    if not isinstance(base, str) or not base.strip():
        raise ModelError(f"{name}: it is a LoRA adapter without the name of its base model. Set {entry}")
    path = Path(expanded(base))
    if path.is_dir():
        above |= {folder.resolve()}
        if path.resolve() in above:
            raise ModelError(
                f"{name}: it is a LoRA adapter on itself, {base}; a model was expected. Correct {entry}"
            )
        find_adapter(base, above)
        return str(path)
    if is_hub_name(base):
        return base
    raise ModelError(
        f"{name}: it is a LoRA adapter on {base}, and there is no such folder on this machine. Copy the base model there, "
        f"or name its folder as {entry}"
    )


# --- merging ------------------------------------------------------------------------------------------


def merge_into(model: PreTrainedModel, adapter: Adapter) -> None:
    """Adds an adapter to the weights of its base, one tensor at a time; under ZeRO-3 all ranks call it.

    W + scale * B @ A is computed in float32 and rounded once to the base's precision. New rows of embedding and head, and
    modules that were trained whole, replace those of the base; the embedding grows if they need it.

    Raises ModelError if the adapter does not fit the base, or if a sum overflows; the model is of no use then.
    """
    try:
        with safe_open(adapter.folder / ADAPTER_WEIGHTS, framework="pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118  (not a dict)
    except Exception as error:  # safetensors has an error of its own
        raise ModelError(
            f"{adapter.name}: its {ADAPTER_WEIGHTS} cannot be read ({first_line(error)}). Copy the adapter again"
        ) from error
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    if not tensors:
        raise ModelError(f"{adapter.name}: its {ADAPTER_WEIGHTS} is empty. Copy the adapter again")
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"{adapter.name}: {name} holds {kind}, expected float16, bfloat16 or float32. Save the adapter again in float32"
            )
    _grow(model, adapter, tensors)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, change in _changes(model, adapter, tensors).items():
        with gathered(parameters[name], modifier_rank=0), torch.no_grad():
            merged = change(parameters[name])
            if not torch.isfinite(merged).all() and torch.isfinite(parameters[name]).all():
                raise ModelError(
                    f"{adapter.name}: with the adapter, {name} would hold numbers beyond those of "
                    f"{str(merged.dtype).removeprefix('torch.')}. Copy the adapter again, or choose bf16 or float32"
                )
            parameters[name].copy_(merged)


def _grow(model: PreTrainedModel, adapter: Adapter, tensors: dict[str, torch.Tensor]) -> None:
    """Grows the embedding to the rows that the adapter's tensors have."""
    embedding, head = embedding_names(model)
    needed, existing = [0], model.get_input_embeddings().num_embeddings
    for name, tensor in tensors.items():
        module, kind = _parts(name)
        if kind == "rows":
            ids = _row_ids(adapter, model, module)
            if max(ids) >= existing + len(ids) + _MOST_LEFT_OUT:
                raise ModelError(
                    f"{adapter.name}: it trains row {max(ids):,} of the embedding, and its base has {existing:,} rows. Copy the "
                    "adapter again with its tokenizer"
                )
            needed += [1 + max(ids)]
        elif kind == "whole" and name in (f"{embedding}.weight", f"{head}.weight") and tensor.dim() == 2:
            needed += [tensor.shape[0]]
    if max(needed) > existing:
        model.resize_token_embeddings(max(needed), mean_resizing=False)


def embedding_names(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Names of the modules that are the input embedding and the head."""
    modules = {id(module): name for name, module in model.named_modules()}
    return modules.get(id(model.get_input_embeddings())), modules.get(id(model.get_output_embeddings()))


_KINDS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "embedding A", ".lora_embedding_B": "embedding B",
    ".token_adapter.trainable_tokens_delta": "rows",
}  # fmt: skip


def _parts(name: str) -> tuple[str, str]:
    """(module, kind) of a tensor of an adapter; for one that replaces the base's (its parameter, "whole")."""
    for suffix, kind in _KINDS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), kind
    return re.sub(r"\.(base_layer|original_module|modules_to_save)(?=\.)", "", name), "whole"


def _factor(name: str, letter: str) -> str:
    """The name of the factor A or B that belongs to the factor of this name."""
    return re.sub(r"_[AB](?=(\.weight)?$)", f"_{letter}", name)


def _changes(model: PreTrainedModel, adapter: Adapter, tensors: dict[str, torch.Tensor]) -> dict[str, Change]:
    """{name of a parameter: its change}. Raises ModelError for what does not fit, before anything is changed."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    embedding, head = embedding_names(model)
    names = {f"{embedding}.weight", f"{head}.weight", f"{head}.bias"}
    changes: dict[str, Change] = {}
    for name, tensor in sorted(tensors.items()):
        module, kind = _parts(name)
        if kind in ("B", "embedding B"):
            if _factor(name, "A") not in tensors:
                raise _misfit(adapter, f"{name} has no other factor")
            continue
        target = module if kind == "whole" else f"{module}.weight"
        if target not in parameters:
            raise _misfit(adapter, f"it changes {target}, which this model does not have")
        shape = _shape(parameters[target])
        change, changed = _change(model, adapter, name, tensors)
        fewer_rows = target in names and changed[1:] == shape[1:] and changed[0] <= shape[0]
        if changed != shape and not fewer_rows and kind != "rows":
            raise _misfit(adapter, f"{target} has the shape {list(shape)}, but its change {list(changed)}")
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{adapter.name}: {name} holds NaN or infinite numbers. Copy the adapter again")
        former = changes.get(target)
        changes[target] = change if former is None else _both(former, change)
    if f"{head}.weight" in changes and parameters[f"{head}.weight"] is parameters.get(f"{embedding}.weight"):
        ours, theirs = (tensors.get(f"{part}.weight") for part in (head, embedding))
        if ours is None or theirs is None or not torch.equal(ours, theirs):
            raise _misfit(adapter, f"it changes {head}, which this model shares with its embedding")
        del changes[f"{head}.weight"]
    return changes


def _both(first: Change, second: Change) -> Change:
    return lambda weight: second(first(weight))


def _change(
    model: PreTrainedModel, adapter: Adapter, name: str, tensors: dict[str, torch.Tensor]
) -> tuple[Change, tuple[int, ...]]:
    """The change that a tensor of the adapter makes, and its shape."""
    tensor = tensors[name]
    module, kind = _parts(name)
    if kind == "whole":
        rows = list(range(tensor.shape[0] if tensor.dim() else 0))
        return _replaced_rows(rows, tensor), tuple(tensor.shape)
    if kind == "rows":
        ids = _row_ids(adapter, model, module)
        width = _shape(model.get_submodule(module).weight)[-1]
        if tuple(tensor.shape) != (len(ids), width):
            raise _misfit(adapter, f"{name} has the shape {list(tensor.shape)}, expected {[len(ids), width]}")
        return _replaced_rows(ids, tensor), tuple(tensor.shape)
    other = tensors.get(_factor(name, "B"))
    if other is None or tensor.dim() != 2 or other.dim() != 2 or other.shape[1] != tensor.shape[0]:
        raise _misfit(adapter, f"the two factors of {module} do not fit each other")
    transposed = kind == "embedding A" or isinstance(model.get_submodule(module), Conv1D)
    shape = (other.shape[0], tensor.shape[1])
    scale = _scale(adapter, module, tensor.shape[0])
    return _added(tensor, other, scale, transposed), shape[::-1] if transposed else shape


def _replaced_rows(ids: list[int], rows: torch.Tensor) -> Change:
    def change(weight: torch.Tensor) -> torch.Tensor:
        index = torch.tensor(ids, device=weight.device)
        return weight.index_copy(0, index, rows.to(weight))

    return change


def _added(a: torch.Tensor, b: torch.Tensor, scale: float, transposed: bool) -> Change:
    """W + scale * B @ A, in float32. `a` (rank, in), `b` (out, rank)."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        delta = scale * (b.to(weight.device).float() @ a.to(weight.device).float())
        delta = delta.T if transposed else delta
        total = weight.float()  # in float32 it is the weight itself
        total = total.clone() if total is weight else total
        total[: len(delta)] += delta
        return total.to(weight.dtype)

    return change


def _scale(adapter: Adapter, module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rank-stabilized LoRA, as peft computes them (LoraLayer.update_layer)."""
    patterns, alpha = adapter.config.get("alpha_pattern") or {}, adapter.config.get("lora_alpha", 8)
    try:
        fitting = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)]
    except (AttributeError, re.error) as error:
        raise ModelError(
            f"{adapter.name}: alpha_pattern in its {ADAPTER_CONFIG} is {patterns!r}, expected names of layers with numbers "
            f"({first_line(error)}). Copy the adapter again"
        ) from error
    alpha = fitting[0] if fitting else alpha
    if rank == 0:
        raise ModelError(f"{adapter.name}: the factors of {module} have rank 0. Copy the adapter again")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(
            f"{adapter.name}: lora_alpha in its {ADAPTER_CONFIG} is {alpha!r}, expected a number. Copy the adapter again"
        )
    return alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)


def _row_ids(adapter: Adapter, model: PreTrainedModel, module: str) -> list[int]:
    """The rows of a module that were trained (peft's trainable_token_indices)."""
    indices = adapter.config.get("trainable_token_indices")
    if isinstance(indices, dict):
        names = [key for key in indices if module == key or module.endswith(f".{key}")]
        indices = indices[names[0]] if names else None
    elif module != embedding_names(model)[0]:
        indices = None
    if not isinstance(indices, list) or not indices or not all(type(id) is int and id >= 0 for id in indices):
        raise ModelError(
            f"{adapter.name}: trainable_token_indices in its {ADAPTER_CONFIG} does not name the rows of {module}. "
            "Copy the adapter again"
        )
    return indices


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Of the whole parameter, also under ZeRO-3."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _misfit(adapter: Adapter, reason: str) -> ModelError:
    return ModelError(
        f"{adapter.name}: the adapter does not fit its base {adapter.base}: {reason}. Name the model on which it was "
        f"trained as base_model_name_or_path in {adapter.folder / ADAPTER_CONFIG}"
    )
