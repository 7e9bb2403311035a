"""DeepSpeed's operators: what their compilation lacks, and compiling them by one rank after the other."""

from __future__ import annotations

import logging
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from torch.utils import cpp_extension

from training.errors import OptionsError
from training.machine.environment import cuda_toolkit_problems, tool_problems
from training.options.deepspeed import offloads_optimizer
from training.run.lock import system_lock

logger = logging.getLogger(__name__)


def compile_operators(config: dict[str, Any], patience: float = -1) -> None:
    """Compiles, or loads, what DeepSpeed would compile later, when the model is loaded already.

    torch marks a compilation by a file, and waits for it to go without an end: a rank that is killed while it
    compiles leaves the file, and every later run hangs. The system takes our own lock from a dead process, so
    whoever holds it knows that a mark still there is a dead rank's. Where the file system has no locks nobody knows,
    and the mark stays.

    Args:
        config: the DeepSpeed configuration.
        patience: seconds to wait for another process that compiles; -1: for ever.

    Raises OptionsError where the compilation fails, or another process holds it up.
    """
    warned = False
    for builder in _builders(config):
        folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
        file = folder / "one-rank-at-a-time.lock"
        try:
            held = system_lock(file, patience)
        except Timeout as error:
            raise OptionsError(
                f"another process has been compiling DeepSpeed's operator {builder.name} for {patience:.0f} s "
                f"(--rank-timeout), and hangs. Find it (fuser {shlex.quote(str(file))}), stop it, and start again"
            ) from error
        if held is None and not warned:
            logger.warning(
                "%s: its file system has no locks. If this start hangs, a rank was killed while it compiled: stop "
                "it, and type rm %s/*/lock, or export TORCH_EXTENSIONS_DIR=/a/folder/on/a/local/disk",
                folder.parent,
                shlex.quote(str(folder.parent)),
            )
            warned = True
        with held or nullcontext(), _torch_libraries_quoted():
            if held is not None:
                (folder / "lock").unlink(missing_ok=True)
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
def _torch_libraries_quoted() -> Iterator[None]:
    """torch quotes each path for the compiler but that of its own libraries, and the linker takes one with a space for two."""
    plain = cpp_extension.TORCH_LIB_PATH
    cpp_extension.TORCH_LIB_PATH = shlex.quote(plain)
    try:
        yield
    finally:
        cpp_extension.TORCH_LIB_PATH = plain


def compiler_problems(config: dict[str, Any]) -> list[str]:
    """What the compilation of the operators lacks on this machine; nothing where they are compiled already.

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
            compile_operators(config)  # nothing of it is needed to load what an earlier run compiled
        except OptionsError:
            return problems
        return []
    return problems


def _builders(config: dict[str, Any]) -> list[Any]:
    """The builders of what DeepSpeed will ask for: CPU collectives, and an Adam of its own.

    It takes its own Adam if the optimizer is offloaded, in plain C++, or if the JSON names one, in CUDA on a GPU.
    Otherwise the optimizer is torch's.
    """
    from deepspeed.accelerator import get_accelerator

    names = [] if torch.cuda.is_available() else ["ShareMemCommBuilder"]
    if offloads_optimizer(config):
        names.append("CPUAdamBuilder")
    elif _names_an_adam(config.get("optimizer")):
        names.append("FusedAdamBuilder")
    builders = [get_accelerator().create_op_builder(name) for name in names]
    # DeepSpeed does without the others, or says why it cannot.
    return [builder for builder in builders if builder is not None and builder.is_compatible(verbose=False)]


def _names_an_adam(optimizer: Any) -> bool:
    """Whether the JSON's optimizer is an Adam of DeepSpeed's own."""
    if not isinstance(optimizer, dict) or str(optimizer.get("type")).lower() not in ("adam", "adamw"):
        return False
    parameters = optimizer.get("params")
    return not (isinstance(parameters, dict) and parameters.get("torch_adam"))


def _is_compiled(builder: Any) -> bool:
    """Whether an earlier run compiled it, or DeepSpeed was installed with it (DS_BUILD_OPS=1)."""
    from deepspeed.git_version_info import installed_ops

    library = Path(cpp_extension._get_build_directory(builder.name, verbose=False)) / f"{builder.name}.so"
    return library.exists() or bool(installed_ops.get(builder.name))
