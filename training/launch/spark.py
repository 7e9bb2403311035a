"""Starts the trainer on several nodes of a Spark cluster with Spark's DeepspeedTorchDistributor.

Each rank is a Spark task with one GPU, which starts `torchrun --nproc_per_node=1 -m training.trainer ...` on its node.
pyspark is imported inside functions: Databricks Runtime ML includes it, elsewhere it is the extra `spark`."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from training.consts import INSTALLED, ROOT
from training.errors import OptionsError, TrainingFailedError, install_extra
from training.files import SCRATCH, expanded, nearest_existing
from training.launch.exits import exit_meaning
from training.launch.local import LAST_LINES, TRAINER
from training.options.command_line import option_words
from training.options.deepspeed import read_json
from training.options.trainer_options import TrainingOptions, flag_of
from training.options.wording import worded

FIRST_WORKER_WAIT = 120.0  # seconds to wait for the first worker of a new cluster
NEXT_WORKER_WAIT = 15.0  # seconds to wait for each further worker
GPUS_PER_TASK = "spark.task.resource.gpu.amount"
IGNORE_TLS = "deepspeed.spark.distributor.ignoreSsl"


def launch_on_spark(
    options: Mapping[str, Any],
    num_nodes: int,
    gpus_per_node: int,
    use_gpu: bool = True,
    typed: str | None = None,
) -> None:
    """Trains with `options` (names of TrainingOptions) on `num_nodes` x `gpus_per_node` ranks of the cluster.

    Shows the output of the ranks as it is printed. An interrupt, such as a notebook's, cancels the Spark job; the ranks
    finish their step and save within 30 seconds.

    Args:
        use_gpu: False trains on `gpus_per_node` CPU ranks per node, as for the demo.
        typed: the command that a person typed: the advice of the errors is in its words (options/wording.py).

    Raises:
        OptionsError: before training starts, with every problem of options and cluster.
        TrainingFailedError: a rank failed; with the meaning of its exit code and its last lines.
    """
    problems = spark_problems(options, num_nodes, gpus_per_node, use_gpu)
    if problems:
        raise OptionsError(*problems)
    from pyspark.ml.deepspeed.deepspeed_distributor import DeepspeedTorchDistributor
    from pyspark.sql import SparkSession

    session = SparkSession.getActiveSession()
    output, ranks = Path(options["local_output_dir"]), num_nodes * gpus_per_node
    try:
        nodes = probe_nodes(session, ranks, output)
        problems = node_problems(nodes, output)
        if problems:
            raise OptionsError(*problems)
        hosts = Counter(node["host"] for node in nodes)
        print(
            f"{ranks} ranks: {', '.join(f'{n} on {host}' for host, n in sorted(hosts.items()))}", flush=True
        )
        distributor = DeepspeedTorchDistributor(
            numGpus=gpus_per_node,
            nnodes=num_nodes,
            localMode=False,
            useGpu=use_gpu,
            deepspeedConfig=_deepspeed_config(options),
        )
        words = option_words({name: value for name, value in options.items() if name != "deepspeed"})
        _run_in_thread(session, partial(distributor.run, "-m", TRAINER, *words), typed)
    except OptionsError:
        raise
    except Exception as error:  # from Py4J, PySpark or Spark Connect: the rank's output inside pages of Java
        failure = training_failure(str(error))
        raise TrainingFailedError(worded(str(failure), typed), failure.code) from None


def _run_in_thread(session: Any, job: Callable[[], Any], typed: str | None) -> None:
    """Runs a Spark job in its own thread. In the main thread an interrupt could break the connection to Spark in the
    middle of a reply, and the job could no longer be cancelled."""
    group = f"dolly-{uuid.uuid4().hex}"

    def run() -> None:
        with suppress(Exception):  # Spark Connect has no sparkContext
            session.sparkContext.setJobGroup(group, "training")
        job()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            running.result()
        except KeyboardInterrupt:
            text = "Interrupted. The ranks have 30 seconds to finish their step and save. Continue with --resume auto"
            print(worded(text, typed), flush=True)
            with suppress(Exception):
                session.sparkContext.cancelJobGroup(group)
            raise


def spark_problems(
    options: Mapping[str, Any], num_nodes: int, gpus_per_node: int, use_gpu: bool = True
) -> list[str]:
    """Every problem of the options and of the cluster's settings, with its fix."""
    problems = []
    if num_nodes < 2:
        problems.append(f"{num_nodes} nodes: expected 2 or more. On one node use training.launch.local")
    if gpus_per_node < 1:
        problems.append(f"{gpus_per_node} ranks per node: expected 1 or more")
    try:
        _deepspeed_config(options)
    except OptionsError as error:
        problems += error.problems
    if not options.get("local_output_dir"):
        problems.append("--local-output-dir is missing. Name a folder on storage shared by all nodes")
    return [*problems, *_relative_paths(options), *_cluster_problems(num_nodes * gpus_per_node, use_gpu)]


def _relative_paths(options: Mapping[str, Any]) -> list[str]:
    """The problems of paths that the nodes would look up in working folders of their own."""
    problems = []
    for option in fields(TrainingOptions):
        kind, typed = option.metadata.get("path"), options.get(option.name) or ()
        is_read_here = option.name in ("deepspeed", "deepspeed_config")  # by `_deepspeed_config`
        if kind is None or is_read_here:
            continue
        may_be_a_name = kind in ("model", "dataset", "checkpoint")
        for value in map(str, [typed] if isinstance(typed, str | Path) else typed):
            is_path = not may_be_a_name or value.startswith((".", "~")) or os.path.exists(value)
            if value and is_path and "://" not in value and not Path(value).is_absolute():
                full = Path(expanded(value)).absolute()
                problems.append(
                    f"{flag_of(option.name)} {value}: is a relative path, and the nodes have other working folders. "
                    f"Type {full}"
                )
    return problems


def _deepspeed_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the DeepSpeed file, which Spark's distributor writes on each node."""
    file = options.get("deepspeed")
    if not file:
        raise OptionsError(
            "--deepspeed is missing. Spark's distributor needs a file such as config/ds_z3_bf16_config.json"
        )
    return read_json(str(file))


def _cluster_problems(ranks: int, use_gpu: bool) -> list[str]:
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        return [
            "pyspark is not installed. Use Databricks Runtime ML 14 or newer, or type "
            f"{install_extra('spark')}"
        ]
    session = SparkSession.getActiveSession()
    if session is None:
        return [
            "there is no active Spark session. Attach the notebook to a cluster, or create one with SparkSession.builder"
        ]
    problems = []
    per_task = session.conf.get(GPUS_PER_TASK, None)
    if use_gpu and per_task != "1":
        # With more than one GPU each task would wait for ranks that are never started.
        problems.append(
            f"{GPUS_PER_TASK} is {per_task or 'not set'}, expected 1: each rank is a task with one GPU. "
            f"Write '{GPUS_PER_TASK} 1' into the cluster's Spark configuration"
        )
    elif (slots := _task_slots(session, ranks)) is not None and slots < ranks:
        problems.append(
            f"the cluster runs {slots} tasks at once, but {ranks} ranks need {ranks}. Start more workers, or fewer ranks"
        )
    if (
        session.conf.get("spark.ssl.enabled", "false") == "true"
        and session.conf.get(IGNORE_TLS, "false") != "true"
    ):
        problems.append(
            "the cluster encrypts its traffic, but ranks exchange weights and gradients unencrypted. To allow that, "
            f"write '{IGNORE_TLS} true' into its Spark configuration"
        )
    return problems


def _task_slots(session: Any, needed: int) -> int | None:
    """Number of tasks that the cluster can run at once. Waits until it is `needed`, or no further worker starts.

    None on Spark Connect, which does not report it. Spark's scheduler makes the same check for a barrier job, but
    reports missing slots only after ten minutes.
    """
    slots, changed = -1, time.monotonic()
    with suppress(Exception):
        scala = session.sparkContext._jsc.sc()
        profile = scala.resourceProfileManager().defaultResourceProfile()
        while slots < needed and time.monotonic() - changed < (
            NEXT_WORKER_WAIT if slots > 0 else FIRST_WORKER_WAIT
        ):
            current = int(scala.maxNumConcurrentTasks(profile))
            if current != slots:
                slots, changed = current, time.monotonic()
            time.sleep(0.2)
    return slots if slots >= 0 else None


def probe_nodes(session: Any, ranks: int, output: Path) -> list[dict[str, Any]]:
    """Runs `ranks` tasks at once, as training will, and returns what each finds on its node.

    Each result is {"host": name, "installed": is `training` installed, "shared": can it write to our `output`}.
    """
    marker = nearest_existing(output) / f"{SCRATCH}{uuid.uuid4().hex}"
    path = str(marker)

    # Runs on the nodes: Spark sends the function and the variables it uses, but no modules.
    def probe(batches: Iterator[Any]) -> Iterator[Any]:
        import os
        import socket
        import subprocess
        import sys

        import pyarrow

        command = [sys.executable, "-c", "import training.consts"]
        installed = subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
        shared = os.path.exists(path) and os.access(os.path.dirname(path), os.W_OK)
        columns = {"host": [socket.gethostname()], "installed": [installed], "shared": [shared]}
        yield pyarrow.RecordBatch.from_pydict(columns)

    schema = "host string, installed boolean, shared boolean"
    try:
        with suppress(OSError):  # the folder is then reported as not shared
            marker.touch()
        tasks = session.range(0, ranks, 1, ranks)
        return [row.asDict() for row in tasks.mapInArrow(probe, schema, barrier=True).collect()]
    finally:
        marker.unlink(missing_ok=True)


def node_problems(nodes: list[dict[str, Any]], output: Path) -> list[str]:
    """Nodes without the package or without the shared folder, from the results of `probe_nodes`."""
    problems = []
    if without := sorted({node["host"] for node in nodes if not node["installed"]}):
        source = "of its wheel" if INSTALLED else ROOT
        problems.append(
            f"the package is not installed on {', '.join(without)}. On Databricks type %pip install {source} in the "
            f"notebook; elsewhere install it on every node, or set spark.executorEnv.PYTHONPATH to its folder"
        )
    if without := sorted({node["host"] for node in nodes if not node["shared"]}):
        problems.append(
            f"--local-output-dir {output}: {', '.join(without)} cannot write to this folder of the driver. Each rank saves "
            "a shard, and a resume needs all of them. Name a folder on storage that is mounted at the same path on "
            "every node (NFS, EFS, FSx, Azure Files)"
        )
    return problems


_JAVA = re.compile(r"\n\s+(?:SQLSTATE: |at [\w.$]+\()|\nDriver stacktrace:")

# The path of torch is relative to the working folder, which may contain the environment.
_TORCHRUN = re.compile(r"^E\d{4} [\d:.]+ +\d+ \S*torch/distributed/elastic", re.MULTILINE)


def training_failure(text: str) -> TrainingFailedError:
    """Extracts the last lines of the failed rank from Spark's text about a failed job.

    They follow a traceback of pyspark, and are followed by pages of torchrun and Java.
    """
    _, separator, output = text.partition("included below: ")
    if not separator:  # no rank failed: a node was lost, or the job was cancelled
        reason = " ".join(_JAVA.split(text)[0].split())
        return TrainingFailedError(f"Spark ended the training: {reason}\nContinue with --resume auto")
    output = _JAVA.split(output)[0]
    code = int(match[1]) if (match := re.search(r"^\s*exitcode\s*: (-?\d+)", output, re.MULTILINE)) else 1
    last = "\n".join(_TORCHRUN.split(output)[0].rstrip().splitlines()[-LAST_LINES:])
    return TrainingFailedError(
        f"Training ended with exit code {code}: {exit_meaning(code)}\nIts last lines:\n{last}", code
    )
