"""Writes a checkpoint's files in a thread, from copies in host memory, and hashes every byte while it is written."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors.torch import save as safetensors_bytes

from training.errors import first_line

# What a rank reports at the end of a step. All files are on the disk once every rank reports WRITTEN.
NO_SAVE, WRITING, WRITTEN, FAILED = range(4)


class HostCopies:
    """Copies of a save's tensors in host memory, which is allocated once and used again by the next save.

    On a machine with CUDA the memory is pinned. It is registered rather than allocated as pinned memory, because
    PyTorch's allocator rounds that up to a power of two.
    """

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []  # (bytes,) uint8 each
        self.used = 0

    def begin(self) -> None:
        """Starts the next save. The copies of the last one are overwritten."""
        self.used = 0

    def copy(self, state: Any, compact: bool = False) -> Any:
        """A deep copy of `state` that holds nothing of the original.

        Tensors that share a storage share one in the copy, and a storage is copied whole, as torch.save writes it. With
        `compact` a tensor's own numbers are copied, without the storage around them. `wait` before the copy is used.
        """
        memo: dict[int, Any] = {}
        storages: dict[tuple[torch.device, int], torch.UntypedStorage] = {}
        for tensor in _tensors(state):
            if id(tensor) not in memo:
                memo[id(tensor)] = self._copy(tensor, storages, compact)
        return copy.deepcopy(state, memo)  # deepcopy takes what memo already holds

    def wait(self) -> None:
        """Waits until the device has finished the copies, so that the next step may change the originals."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def _copy(
        self,
        tensor: torch.Tensor,
        storages: dict[tuple[torch.device, int], torch.UntypedStorage],
        compact: bool,
    ) -> torch.Tensor:
        source = tensor.detach()
        if compact:
            buffer = self._buffer(source.numel() * source.element_size())
            target = buffer.view(source.dtype).view(source.shape)
            target.copy_(source, non_blocking=True)
        else:
            original = source.untyped_storage()
            key = (source.device, original.data_ptr())
            if key not in storages:
                buffer = self._buffer(original.nbytes())
                whole = torch.empty(0, dtype=torch.uint8, device=source.device).set_(original)
                buffer.copy_(whole, non_blocking=True)
                storages[key] = buffer.untyped_storage()
            target = torch.empty(0, dtype=source.dtype)
            target.set_(storages[key], source.storage_offset(), source.shape, source.stride())
        if isinstance(tensor, torch.nn.Parameter):
            target = torch.nn.Parameter(target, tensor.requires_grad)
        target.requires_grad_(tensor.requires_grad)
        target.__dict__.update(copy.deepcopy(vars(tensor)))  # torch.save writes attributes too
        return target

    def _buffer(self, size: int) -> torch.Tensor:
        """The memory of the next storage, `(size,)` uint8."""
        if self.used == len(self.buffers):
            self.buffers.append(_host_memory(size))
        elif self.buffers[self.used].numel() != size:
            _release(self.buffers[self.used])
            self.buffers[self.used] = _host_memory(size)
        self.used += 1
        return self.buffers[self.used - 1]


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """The dense tensors in nested containers. deepcopy copies what other objects hold."""
    if isinstance(state, torch.Tensor):
        if state.layout == torch.strided and state.device.type != "meta":
            yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def _host_memory(size: int) -> torch.Tensor:
    buffer = torch.empty(size, dtype=torch.uint8)
    if size and torch.cuda.is_available():
        torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)  # without success only slower
    return buffer


def _release(buffer: torch.Tensor) -> None:
    if buffer.numel() and torch.cuda.is_available():
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


class HashedStream:
    """A file that is hashed while it is written.

    It keeps its first error and takes the rest without writing it: after an error torch.save raises one of its own,
    which does not say that the disk is full.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.checksum = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, block: Any) -> int:
        size = memoryview(block).nbytes
        if self.error is None:
            try:
                self.file.write(block)
                self.checksum.update(block)
            except OSError as error:
                self.error = error
        self.size += size
        return size

    def flush(self) -> None:
        pass  # once, at the end


def write_hashed(file: Path, write: Callable[[HashedStream], None]) -> dict[str, Any]:
    """Writes a file through `write` to the disk. Returns {"size": bytes, "sha256": hex}. Raises OSError."""
    with open(file, "wb") as opened:
        stream = HashedStream(opened)
        write(stream)
        if stream.error is not None:
            raise stream.error
        opened.flush()
        os.fsync(opened.fileno())
    return {"size": stream.size, "sha256": stream.checksum.hexdigest()}


def write_safetensors(
    stream: HashedStream, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Writes tensors of the CPU as safetensors.torch.save does, but from where they are.

    The library copies all of them and lets no other thread run meanwhile. It chooses the order of the tensors and the
    names of their dtypes here too, for tensors of one number.
    """
    sample = safetensors_bytes({name: tensor.new_empty(1) for name, tensor in tensors.items()}, metadata)
    header = json.loads(sample[8 : 8 + int.from_bytes(sample[:8], "little")])
    names, end = [name for name in header if name != "__metadata__"], 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] |= {"shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        stream.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())


@dataclass
class Written:
    """What a rank has written of a save: {file in the folder: {"size": bytes, "sha256": hex}}, and why it failed."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: str | None = None
    full: bool = False  # the problem is one of the disk
    seconds: float = 0.0  # from `begin` to the last byte


class Writer:
    """Writes this rank's large files of a checkpoint, one checkpoint at a time.

    `begin`, the files, `start`, and once `status` is WRITTEN or FAILED, or after `join`: `take`.

    Args:
        background: copy tensors into host memory and write in a thread. Otherwise each file is written at once.
    """

    def __init__(self, background: bool) -> None:
        self.background = background
        self.copies = HostCopies()
        self.thread: threading.Thread | None = None
        self.written = Written()
        self.queue: list[tuple[Path, Callable[[HashedStream], None]]] = []
        # Of the checkpoint that is written: its folder, when it began, and whether the thread has said how it went.
        self.folder, self.begin_time, self.reported = Path(), 0.0, False
        # The record's checksum, which torch.save computes without letting another thread run, is left out: the manifest
        # has one of the whole file, and torch.load reads none.
        torch.serialization.set_crc32_options(False)

    def begin(self, folder: Path) -> None:
        """Starts a checkpoint in `folder`. The one before must have been taken."""
        self.folder, self.begin_time, self.reported = folder, time.monotonic(), False
        self.written, self.queue = Written(), []
        self.copies.begin()

    def save(self, state: Any, file: Path, compact: bool = False) -> None:
        """Adds a file for torch.load. `compact`: see HostCopies.copy."""
        if self.background:
            state = self.copies.copy(state, compact)
        self._add(file, lambda stream: torch.save(state, cast(IO[bytes], stream)))

    def save_weights(self, tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        """Adds a safetensors file."""
        state = self.copies.copy(tensors, compact=True) if self.background else tensors
        self._add(file, lambda stream: write_safetensors(stream, _on_cpu(state), metadata))

    def _add(self, file: Path, write: Callable[[HashedStream], None]) -> None:
        self.queue.append((file, write))
        if not self.background:
            self._write()

    @property
    def names(self) -> list[str]:
        """Names of the files that were added since `begin`."""
        return [*self.written.files, *(self._name(file) for file, _ in self.queue)]

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def start(self) -> None:
        """Lets the thread write. The next step may now change the originals of the copies."""
        self.copies.wait()
        self.thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._write()
            _sync_folders(self.folder)
        except BaseException as error:
            self.written.problem = _reason(error)
            self.written.full = isinstance(error, OSError)
        self.written.seconds = time.monotonic() - self.begin_time
        self.reported = True

    def _write(self) -> None:
        while self.queue:
            file, write = self.queue.pop(0)
            self.written.files[self._name(file)] = write_hashed(file, write)

    @property
    def status(self) -> int:
        """NO_SAVE, WRITING, WRITTEN or FAILED."""
        if self.thread is None:
            return NO_SAVE
        if self.thread.is_alive():
            return WRITING
        return WRITTEN if self.reported and self.written.problem is None else FAILED

    def join(self) -> None:
        """Waits until the files are written or have failed."""
        if self.thread is not None:
            self.thread.join()

    def take(self) -> Written:
        """Ends the checkpoint and returns what was written."""
        if not self.reported and self.status == FAILED:
            self.written.problem = "the thread that wrote it ended without a word"
        self.thread = None
        return self.written


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return str(error)
    return first_line(error) if isinstance(error, Exception) else type(error).__name__


def _sync_folders(folder: Path) -> None:
    """Writes the names of the files in `folder` and its folders to the disk."""
    for place in [folder, *(path for path in folder.iterdir() if path.is_dir()), folder.parent]:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def deepspeed_checkpoint_engine(writer: Writer, trained: Collection[str] | None = None) -> Any:
    """DeepSpeed's interface for writing a checkpoint's files, through `writer`.

    `trained`: names of the only weights to write; None: all. DeepSpeed itself keeps the second name of a frozen weight
    that embedding and head share, and buffers.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

    class BackgroundEngine(CheckpointEngine):
        def create(self, info: CheckpointCommitInfo) -> None:
            pass

        def save(self, state_dict: Any, path: str) -> None:
            if trained is not None and "module" in state_dict:
                kept = {name: tensor for name, tensor in state_dict["module"].items() if name in trained}
                state_dict = {**state_dict, "module": kept, "buffer_names": []}
            # Stages 1 and 2 keep the weights in one flat buffer, with padding.
            writer.save(state_dict, Path(path), compact=path.endswith("model_states.pt"))

        def load(self, path: str, map_location: Any = None) -> Any:
            return torch.load(path, map_location=map_location, weights_only=False)

        def commit(self, info: CheckpointCommitInfo) -> bool:
            return True  # the manifest is the commit

        def preserves_storage_sharing(self) -> bool:
            """Whether DeepSpeed must copy the model's weights before `save`."""
            return not writer.background

    return BackgroundEngine()
