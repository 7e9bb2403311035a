"""What the notebook finds where it runs: Databricks or not, GPUs, a local disk, DBFS. Chooses the widgets' defaults by it."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from pathlib import Path

from training.files import DBFS
from training.machine.catalogue import family_of
from training.machine.local import free_disk_gib

LOCAL_DISK = "/local_disk0"  # of a cluster's node
DATABRICKS = "/databricks"  # a folder of every node
VOLUME = "/Volumes/main/default/dolly"  # an example
RUNTIME = "DATABRICKS_RUNTIME_VERSION"


def on_databricks() -> bool:
    return RUNTIME in os.environ or Path(DATABRICKS).is_dir()


def has_dbfs() -> bool:
    """Whether DBFS is mounted and can be written. It is on clusters, and not on serverless nodes."""
    return os.access(DBFS, os.W_OK)


def has_local_disk() -> bool:
    return os.access(LOCAL_DISK, os.W_OK)


def default_training_root() -> str:
    """A folder on the local disk of a cluster's node or of a serverless one; elsewhere in the home folder."""
    if has_local_disk():
        return f"{LOCAL_DISK}/dolly_training"
    return f"{tempfile.gettempdir()}/dolly_training" if on_databricks() else "~/dolly_training"


def default_output_root() -> str:
    """A folder on DBFS if it can be written, and outside Databricks in the home folder.

    Empty on a node without DBFS, because nobody knows the name of your Volume.
    """
    if has_dbfs():
        return f"{DBFS}/dolly_training"
    return "" if on_databricks() else "~/dolly_published"


def lost_model_problem(output_root: str, mlflow_model_name: str) -> str | None:
    """A problem if the finished model would be only on the disk of a node of Databricks, which is lost with it."""
    if output_root or mlflow_model_name or not on_databricks() or has_dbfs():
        return None
    return (
        "dbfs_output_root is empty, and this node has no DBFS, so the model would be lost with the node. "
        f"Name a folder of a Volume, such as {VOLUME}"
    )


def gpu_names() -> list[str]:
    """Names of the GPUs, from nvidia-smi, because torch may not be installed yet. Empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [name for line in listed.splitlines() if (name := line.strip())]


def default_family() -> str:
    """The GPU family of the first GPU; Dolly's where there is none, so that no run trains on CPUs by mistake."""
    # An unknown GPU is taken for a new one. The plan refuses bf16 on an old one.
    gpus = gpu_names()
    return family_of(gpus[0], has_bf16=True) if gpus else "a100"


def description() -> str:
    """What was found, and what the widgets' defaults are for that reason, one line each."""
    gpus = gpu_names()
    runtime = os.environ.get(RUNTIME, "without a named runtime")
    where = f"Databricks {runtime}" if on_databricks() else "not on Databricks"
    devices = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none"
    disk = f"{free_disk_gib(Path(default_training_root()).expanduser()):.0f} GiB free in {default_training_root()}"
    missing = "" if has_local_disk() else f" ({LOCAL_DISK} is missing)"
    dbfs = f"models go to {default_output_root()}" if has_dbfs() else "missing"
    volume = ". Name a folder of a Volume in dbfs_output_root" if on_databricks() and not has_dbfs() else ""
    return (
        f"found             {where}, Python {platform.python_version()}\n"
        f"  GPUs            {devices}; gpu_family {default_family()}\n"
        f"  disk            {disk}{missing}\n"
        f"  DBFS            {dbfs}{volume}"
    )
