"""Counts the times the host waits for the device, and names the code that makes it wait.

A step on a GPU is fast only while the host stays ahead of the device. On CUDA, torch reports every wait. On a CPU nothing
waits, but the same calls can be seen: reading a number or a shape from a tensor of the device, and copying between host
and device. A tensor counts as the host's if it was made there and not moved, as in a collator."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import TrainerCallback

# A wait is put down to the innermost of these packages in the stack.
OWNERS = ("training", "deepspeed", "transformers", "accelerate")

_ATEN = torch.ops.aten
# Operations whose result on the host, or whose shape, depends on numbers on the device.
_READING = {
    _ATEN._local_scalar_dense, _ATEN.is_nonzero, _ATEN.equal, _ATEN.nonzero, _ATEN.masked_select, _ATEN._unique,
    _ATEN._unique2, _ATEN.unique_consecutive, _ATEN.unique_dim, _ATEN.bincount,
}  # fmt: skip
_INDEXING = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_}
_MASKS = (torch.bool, torch.uint8)
# Methods that copy to the host without an operation that a dispatch mode would see on a CPU.
_TO_HOST = {"tolist", "numpy", "cpu", "__array__"}


@dataclass(frozen=True)
class Wait:
    """One wait of the host for the device.

    Attributes:
        operation: what waited, as in "_local_scalar_dense" for `.item()`; "cuda" where torch reported it.
        owner: one of OWNERS, or "other".
        place: module, line and function of the owner, or of the caller.
    """

    operation: str
    owner: str
    place: str


@contextmanager
def watch_waits(device: torch.device) -> Iterator[list[Wait]]:
    """Yields a list to which every wait of this thread is added while the context is open."""
    waits: list[Wait] = []
    if device.type == "cuda":
        with _cuda_reports(waits):
            yield waits
    else:
        on_host = _HostTensors(waits)
        with on_host, _DeviceReads(waits, on_host.known):
            yield waits


class WaitsPerStep(TrainerCallback):
    """Watches the optimizer steps of a Trainer. Fetching a step's batch counts for the step before it.

    Close it if training may fail: it watches this thread from the first step to the end of training.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waits: list[Wait] = []
        self.begins: list[int] = []
        self.watch = ExitStack()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.begins:
            self.waits = self.watch.enter_context(watch_waits(self.device))
        self.begins.append(len(self.waits))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        self.watch.close()

    def steps(self) -> list[list[Wait]]:
        """The waits of every optimizer step but the last, which is followed by the end of training."""
        return [self.waits[begin:end] for begin, end in pairwise(self.begins)]


def by_owner(waits: Sequence[Wait]) -> Counter[str]:
    """How many waits each package caused."""
    return Counter(wait.owner for wait in waits)


@contextmanager
def _cuda_reports(waits: list[Wait]) -> Iterator[None]:
    """Adds what CUDA's sync debug mode reports. It reports waits in the backward thread after the backward pass."""

    def note(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            waits.append(_wait("cuda"))

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


class _HostTensors(TorchFunctionMode):
    """Follows the tensors that are made on the host, and adds the copies between host and device."""

    def __init__(self, waits: list[Wait]) -> None:
        super().__init__()
        self.waits = waits
        self.known = WeakIdKeyDictionary()  # the host's tensors

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        inputs = [value for value in _flat((args, kwargs)) if isinstance(value, torch.Tensor)]
        devices = [value for value in args if isinstance(value, torch.device | str)]
        device = kwargs.get("device", next(iter(devices), None))
        on_host, waits = device is None and all(tensor in self.known for tensor in inputs), False
        if name in _TO_HOST or (name == "to" and device is not None):
            # On a CPU the device is "cpu" too. The host is meant where a caller writes the word.
            on_host = name != "to" or (isinstance(device, str) and device == "cpu")
            waits = (inputs[0] in self.known) != on_host
        elif name == "copy_":
            on_host = inputs[0] in self.known
            waits = (inputs[1] in self.known) != on_host
        elif name == "new_tensor":
            waits = inputs[0] not in self.known
        elif name in ("tensor", "as_tensor"):
            waits = device is not None and not inputs
        if waits and not kwargs.get("non_blocking"):
            self.waits.append(_wait(name))
        result = func(*args, **kwargs)
        for value in _flat(result):
            if isinstance(value, torch.Tensor):
                if on_host:
                    self.known[value] = True
                else:  # on a CPU, a tensor that is moved to the device is the same object
                    self.known.pop(value, None)
        return result


class _DeviceReads(TorchDispatchMode):
    """Adds the operations that read numbers of the device, also inside torch's own functions."""

    def __init__(self, waits: list[Wait], known: WeakIdKeyDictionary) -> None:
        super().__init__()
        self.waits = waits
        self.known = known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        if packet in _READING and args[0] not in self.known:
            self.waits.append(_wait(packet.__name__))
        elif packet in _INDEXING and any(
            index is not None and index.dtype in _MASKS and index not in self.known for index in args[1]
        ):
            self.waits.append(_wait(f"{packet.__name__} by a mask"))
        return func(*args, **(kwargs or {}))


def _flat(value: Any) -> Iterator[Any]:
    """The values in nested tuples, lists and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _wait(operation: str) -> Wait:
    """A wait with the innermost frame of OWNERS, or else of the first caller outside torch."""
    other = ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        package = module.split(".")[0]
        place = f"{module}:{frame.f_lineno} {frame.f_code.co_name}"
        if module != __name__ and package in OWNERS:
            return Wait(operation, package, place)
        if module != __name__ and package not in ("torch", "warnings"):
            other = other or place
        frame = frame.f_back
    return Wait(operation, "other", other)
