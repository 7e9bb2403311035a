"""Compiles DeepSpeed's operators, one rank at a time, and checks beforehand that this machine can."""

from __future__ import annotations

import logging
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from filelock import Timeout
from torch.utils import cpp_extension

from training.errors import OptionsError
from training.machine.environment import cuda_toolkit_problems, tool_problems
from training.options.deepspeed import read_zero
from training.run.lock import system_lock

logger = logging.getLogger(__name__)

NOTICE_AFTER = 3.0  # seconds; a compiled operator is loaded in less


def compile_operators(config: dict[str, Any], timeout: float = -1) -> None:
    """Compiles or loads the operators that DeepSpeed would otherwise compile after the model is loaded.

    torch marks a running compilation by a file `lock` and waits for its removal without a limit. A rank that is
    killed while it compiles leaves that file, and every later run hangs. Our own lock is released by the system, so
    the process that holds it can safely remove torch's. Without file locks torch's file stays.

    Args:
        config: the DeepSpeed configuration.
        timeout: seconds to wait for another process that compiles; -1: forever.

    Raises OptionsError if the compilation fails, or if another process blocks it for `timeout` seconds.
    """
    warned = False
    for builder in _builders(config):
        folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
        with _notice(builder.name, folder):
            lock = _take_lock(builder.name, folder, timeout)
            if lock is None and not warned:
                _warn_without_locks(folder.parent)
                warned = True
            with lock or nullcontext(), _quote_torch_libraries():
                if lock is not None:
                    (folder / "lock").unlink(missing_ok=True)
                _load(builder, folder)


def _take_lock(name: str, folder: Path, timeout: float) -> AbstractContextManager[Any] | None:
    """`system_lock` of the folder of one operator. Raises OptionsError after `timeout` seconds."""
    file = folder / "one-rank-at-a-time.lock"
    try:
        return system_lock(file, timeout)
    except Timeout as error:
        raise OptionsError(
            f"another process has been compiling DeepSpeed's operator {name} for {timeout:.0f} s "
            f"(--rank-timeout) and hangs. Find it (fuser {shlex.quote(str(file))}), stop it, and start again"
        ) from error


def _warn_without_locks(folder: Path) -> None:
    logger.warning(
        "%s: its file system has no locks. If this start hangs, a rank was killed while it compiled: stop "
        "it, and type rm %s/*/lock, or export TORCH_EXTENSIONS_DIR=/a/folder/on/a/local/disk",
        folder,
        shlex.quote(str(folder)),
    )


def _load(builder: Any, folder: Path) -> None:
    """Loads one operator, compiled in `folder` if need be. Raises OptionsError with the compiler's reason."""
    try:
        builder.load()
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "error:" in line.lower()), lines[0] if lines else "")
        raise OptionsError(
            f"DeepSpeed's operator {builder.name} could not be compiled or loaded: {reason.strip()}. "
            f"It needs a compiler for C++20, such as g++ 11. Then type rm -r {shlex.quote(str(folder))}"
        ) from error


@contextmanager
def _notice(name: str, folder: Path) -> Iterator[None]:
    """Says what takes so long, also if another rank compiles."""
    words = "compiling DeepSpeed's operator %s, which takes a minute or two, once; it is kept in %s"
    timer = Timer(NOTICE_AFTER, logger.info, (words, name, folder))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _quote_torch_libraries() -> Iterator[None]:
    """Quotes the path of torch's libraries for the linker. torch does not, and a space would split it."""
    plain = cpp_extension.TORCH_LIB_PATH
    cpp_extension.TORCH_LIB_PATH = shlex.quote(plain)
    try:
        yield
    finally:
        cpp_extension.TORCH_LIB_PATH = plain


def compiler_problems(config: dict[str, Any]) -> list[str]:
    """Missing tools for compiling the operators on this machine; none if they are compiled already.

    Args:
        config: the DeepSpeed configuration.
    """
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder

    builders = _builders(config)
    if not builders:
        return []
    problems = tool_problems()
    try:
        folder = Path(cpp_extension._get_build_directory(builders[0].name, verbose=False))
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return [
            *problems,
            f"DeepSpeed's operators are compiled in {error.filename}, which cannot be written ({error.strerror}). "
            "Type export TORCH_EXTENSIONS_DIR=/a/folder/of/yours",
        ]
    if any(isinstance(builder, CUDAOpBuilder) for builder in builders) and torch.version.cuda:
        home = cpp_extension.CUDA_HOME
        problems += cuda_toolkit_problems(Path(home) if home else None, torch.version.cuda)
    if problems and all(_is_compiled(builder) for builder in builders):
        try:
            compile_operators(config)  # loading compiled operators needs no tools
        except OptionsError:
            return problems
        return []
    return problems


def _builders(config: dict[str, Any]) -> list[Any]:
    """Builders of the operators that DeepSpeed will load: CPU collectives, and its own Adam.

    DeepSpeed uses its C++ Adam if the optimizer is offloaded, and its CUDA Adam if the JSON names an Adam. Otherwise
    the optimizer is torch's.
    """
    from deepspeed.accelerator import get_accelerator

    names = [] if torch.cuda.is_available() else ["ShareMemCommBuilder"]
    if read_zero(config).offload_optimizer:
        names.append("CPUAdamBuilder")
    elif _names_an_adam(config.get("optimizer")):
        names.append("FusedAdamBuilder")
    builders = [get_accelerator().create_op_builder(name) for name in names]
    # DeepSpeed works without incompatible ones, or reports why it cannot.
    return [builder for builder in builders if builder is not None and builder.is_compatible(verbose=False)]


def _names_an_adam(optimizer: Any) -> bool:
    """Whether the JSON's optimizer is DeepSpeed's own Adam."""
    if not isinstance(optimizer, dict) or str(optimizer.get("type")).lower() not in ("adam", "adamw"):
        return False
    parameters = optimizer.get("params")
    return not (isinstance(parameters, dict) and parameters.get("torch_adam"))


def _is_compiled(builder: Any) -> bool:
    """Whether an earlier run compiled it, or DeepSpeed was installed with it (DS_BUILD_OPS=1)."""
    from deepspeed.git_version_info import installed_ops

    library = Path(cpp_extension._get_build_directory(builder.name, verbose=False)) / f"{builder.name}.so"
    return library.exists() or bool(installed_ops.get(builder.name))
