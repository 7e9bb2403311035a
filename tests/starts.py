"""How tests start the trainer and its ranks. Ranks import this, and not conftest.py, which clears a launcher's variables."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from training.launch.local import DEEPSPEED

ROOT = Path(__file__).parents[1]
BF16 = "config/ds_z3_bf16_config.json"
# Many times faster on a CPU that has no instructions for bf16. For tests whose point is not the precision.
FLOAT32 = "config/ds_z3_fp32_config.json"
ALONE = [sys.executable, "-m", "training.trainer"]  # without a launcher, on one device
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
DEMO = ["--input-model", "demo", "--training-dataset", "demo", "--test-size", "100"]
LIGHT = str(Path(__file__).with_name("light"))  # first on PYTHONPATH


def without_a_launcher() -> dict[str, str]:
    """An environment without a launcher's variables, with one thread per rank."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return environment


def run(launcher: list[str], *options: object, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """Runs the trainer as a user would, and returns its output."""
    return subprocess.run(
        [*launcher, *map(str, options)],
        cwd=ROOT,
        env=without_a_launcher(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def deepspeed(ranks: int) -> list[str]:
    port = str(free_port())
    return [*DEEPSPEED, "--num_gpus", str(ranks), "--master_port", port, "--module", "training.trainer"]


def torchrun(ranks: int, module: str = "training.trainer") -> list[str]:
    """The command of the launcher that starts sooner, for tests in which the launcher does not matter."""
    return [*TORCHRUN, f"--nproc_per_node={ranks}", f"--master_port={free_port()}", "-m", module]


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def changed_start(folder: Path, code: str) -> dict[str, str]:
    """The variable with which processes run `code` before their program, and see neither MLflow nor bitsandbytes."""
    (folder / "sitecustomize.py").write_text((Path(LIGHT) / "sitecustomize.py").read_text() + code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
