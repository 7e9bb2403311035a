"""Starts the one command on several nodes of a Spark cluster, through Spark's own DeepSpeed distributor.

Each rank is a Spark task with one GPU, which starts `torchrun --nproc_per_node=1 -m training.trainer ...` on its node.
Imports pyspark where it is used: Databricks Runtime ML brings it, elsewhere it is the extra `spark`."""

from __future__ import annotations

import math
import re
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

from training.consts import METRICS_FILE, ROOT
from training.errors import OptionsError, TrainingFailedError
from training.files import TRACE, nearest_existing
from training.launch.exits import exit_meaning
from training.launch.local import LAST_LINES, TRAINER
from training.options.command_line import option_words
from training.options.deepspeed import read_json
from training.storage import metrics

SILENCE = 30.0  # seconds without a line of the ranks, after which their metrics.jsonl is read out instead
FIRST_WORKER = 120.0  # seconds that a cluster that has just been started is waited for
SETTLED = 15.0  # seconds without another worker, after which no more are
GPUS_PER_TASK = "spark.task.resource.gpu.amount"
IGNORE_TLS = "deepspeed.spark.distributor.ignoreSsl"


def launch_on_spark(
    options: Mapping[str, Any], num_nodes: int, gpus_per_node: int, use_gpu: bool = True
) -> None:
    """Trains with `options`, by the names of TrainingOptions, on `num_nodes` x `gpus_per_node` ranks of the cluster.

    Shows what the ranks print, as it comes. An interruption, as of a notebook's cell, ends the Spark job; the ranks
    finish their step and save within 30 seconds.

    Args:
        use_gpu: False trains on `gpus_per_node` CPU ranks a node, as the demo does.

    Raises:
        OptionsError: with all that is wrong with options and cluster, before anything is started.
        TrainingFailedError: a rank failed; with its exit code in words, and its last lines.
    """
    problems = spark_problems(options, num_nodes, gpus_per_node, use_gpu)
    if problems:
        raise OptionsError(*problems)
    from pyspark.ml.deepspeed.deepspeed_distributor import DeepspeedTorchDistributor
    from pyspark.sql import SparkSession

    session = SparkSession.getActiveSession()
    output, ranks = Path(options["local_output_dir"]), num_nodes * gpus_per_node
    try:
        nodes = look_at_nodes(session, ranks, output)
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
        with never_silent(output / METRICS_FILE):
            _run_beside(session, partial(distributor.run, "-m", TRAINER, *words))
    except OptionsError:
        raise
    except (
        Exception
    ) as error:  # Py4J's, PySpark's, Spark Connect's: pages of Java, and the rank's words within
        raise failure(str(error)) from None


def _run_beside(session: Any, job: Callable[[], Any]) -> None:
    """Runs a Spark job in a thread of its own. In the main thread an interruption would break the connection to Spark
    in the middle of an answer, and nothing could be cancelled by it."""
    group = f"dolly-{uuid.uuid4().hex}"

    def run() -> None:
        with suppress(Exception):  # Spark Connect has none
            session.sparkContext.setJobGroup(group, "training")
        job()

    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(run)
        try:
            running.result()
        except KeyboardInterrupt:
            print(
                "Interrupted. The ranks finish their step and save, for which they have 30 seconds; go on with resume auto",
                flush=True,
            )
            with suppress(Exception):
                session.sparkContext.cancelJobGroup(group)
            raise


def spark_problems(
    options: Mapping[str, Any], num_nodes: int, gpus_per_node: int, use_gpu: bool = True
) -> list[str]:
    """All that is wrong with the options and the cluster's settings, each with what to do instead."""
    problems = []
    if num_nodes < 2:
        problems.append(f"{num_nodes} nodes: Spark starts 2 or more. On one, use training.launch")
    if gpus_per_node < 1:
        problems.append(f"{gpus_per_node} ranks a node: at least one is needed to train")
    try:
        _deepspeed_config(options)
    except OptionsError as error:
        problems += error.problems
    if not options.get("local_output_dir"):
        problems.append("--local-output-dir is missing. Name a folder on storage that all nodes share")
    for name in ("local_output_dir", "dbfs_output_dir", "training_dataset", "input_model", "resume"):
        value = str(options.get(name) or "")
        there = "://" not in value and (
            name.endswith("_dir") or value.startswith((".", "~")) or _exists(value)
        )
        if value and there and not Path(value).is_absolute():
            place = Path(value).expanduser().absolute()
            problems.append(
                f"--{name.replace('_', '-')} {value}: the nodes work in other folders. Type {place}"
            )
    return problems + _cluster_problems(num_nodes * gpus_per_node, use_gpu)


def _deepspeed_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the DeepSpeed file, which Spark's distributor writes anew on each node."""
    file = options.get("deepspeed")
    if not file:
        raise OptionsError(
            "--deepspeed is missing, and Spark's distributor needs it. Name config/ds_z3_bf16_config.json"
        )
    return read_json(str(ROOT / file))


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):
        return False


def _cluster_problems(ranks: int, use_gpu: bool) -> list[str]:
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        return [
            "pyspark is not installed. Choose a Databricks Runtime ML of version 14 or newer, or type "
            "python -m pip install '.[spark]'"
        ]
    session = SparkSession.getActiveSession()
    if session is None:
        return [
            "there is no active Spark session. Attach the notebook to a cluster, or make one with SparkSession.builder"
        ]
    problems = []
    per_task = session.conf.get(GPUS_PER_TASK, None)
    if use_gpu and per_task != "1":
        # More than one would have each task wait for ranks that nobody starts.
        problems.append(
            f"{GPUS_PER_TASK} is {per_task or 'not set'}, and each rank needs a task with one GPU. "
            f"Write '{GPUS_PER_TASK} 1' into the cluster's Spark configuration"
        )
    elif (slots := _task_slots(session, ranks)) is not None and slots < ranks:
        problems.append(
            f"the cluster runs {slots} tasks at once, and {ranks} ranks need one each. Start more workers, or train on fewer"
        )
    if (
        session.conf.get("spark.ssl.enabled", "false") == "true"
        and session.conf.get(IGNORE_TLS, "false") != "true"
    ):
        problems.append(
            "the cluster encrypts its traffic, and ranks exchange weights and gradients in the clear. If that may be, "
            f"write '{IGNORE_TLS} true' into its Spark configuration"
        )
    return problems


def _task_slots(session: Any, wanted: int) -> int | None:
    """Tasks that the cluster can run at once, `wanted` or all that come up; None where it cannot be asked (Spark Connect).

    Spark's scheduler counts them so for a barrier job, and says only after ten minutes that they are too few.
    """
    slots, since = -1, time.monotonic()
    with suppress(Exception):
        scala = session.sparkContext._jsc.sc()
        profile = scala.resourceProfileManager().defaultResourceProfile()
        while slots < wanted and time.monotonic() - since < (SETTLED if slots > 0 else FIRST_WORKER):
            now = int(scala.maxNumConcurrentTasks(profile))
            if now != slots:
                slots, since = now, time.monotonic()
            time.sleep(0.2 if slots < wanted else 0)
    return slots if slots >= 0 else None


def look_at_nodes(session: Any, ranks: int, output: Path) -> list[dict[str, Any]]:
    """What `ranks` tasks that run at once, as the ranks will, find on their nodes.

    Returns {"host": name, "installed": whether `training` is, "shared": whether `output` is our own} of each.
    """
    trace = nearest_existing(output) / f"{TRACE}{uuid.uuid4().hex}"
    path = str(trace)

    def look(
        batches: Iterator[Any],
    ) -> Iterator[Any]:  # runs there: Spark sends it with what it names, but no module
        import os
        import socket
        import subprocess
        import sys

        import pyarrow

        asked = [sys.executable, "-c", "import training.consts"]
        found = subprocess.run(asked, stderr=subprocess.DEVNULL, check=False).returncode == 0
        shared = os.path.exists(path) and os.access(os.path.dirname(path), os.W_OK)
        columns = {"host": [socket.gethostname()], "installed": [found], "shared": [shared]}
        yield pyarrow.RecordBatch.from_pydict(columns)

    schema = "host string, installed boolean, shared boolean"
    try:
        with suppress(OSError):  # a folder that we cannot write either is told as one that is not shared
            trace.touch()
        tasks = session.range(0, ranks, 1, ranks)
        return [row.asDict() for row in tasks.mapInArrow(look, schema, barrier=True).collect()]
    finally:
        trace.unlink(missing_ok=True)


def node_problems(nodes: list[dict[str, Any]], output: Path) -> list[str]:
    """What is missing on which nodes, of what `look_at_nodes` found."""
    problems = []
    if without := sorted({node["host"] for node in nodes if not node["installed"]}):
        problems.append(
            f"the package is not installed on {', '.join(without)}. On Databricks type %pip install {ROOT} in the "
            f"notebook; elsewhere install it on every node, or set spark.executorEnv.PYTHONPATH to its folder"
        )
    if without := sorted({node["host"] for node in nodes if not node["shared"]}):
        problems.append(
            f"--local-output-dir {output}: {', '.join(without)} cannot write there, or not what this machine sees. Each "
            "rank saves a shard, and a resume needs all of them. Name a folder on storage that is mounted on every "
            "node at the same place (NFS, EFS, FSx, Azure Files)"
        )
    return problems


class _Heard:
    """Standard output, which remembers when it was last written to, and holds no line back."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.last = -math.inf

    def write(self, text: str) -> int:
        self.last = time.monotonic()
        count = self.stream.write(text)
        self.stream.flush()
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def never_silent(file: Path, silence: float = SILENCE) -> Iterator[None]:
    """Shows the newest entry of `file`, the run's metrics.jsonl, where the ranks' own lines stay away.

    Spark's distributor brings each line of a rank to the driver over a connection that it makes once. When that is
    refused (Spark Connect), or cut after minutes without a line, it gives up, and training goes on unseen.
    """
    heard = _Heard(sys.stdout)
    done = threading.Event()

    before = _newest(file)

    def follow() -> None:
        shown, waiting = before, None
        while not done.wait(silence / 5):
            # An entry waits from one look to the next for its line, which may come later by the ranks' connection.
            if waiting and time.monotonic() - heard.last > silence:
                print(_in_words(waiting), file=heard.stream, flush=True)
            newest = _newest(file)
            shown, waiting = newest, newest if newest != shown else None

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        with redirect_stdout(cast(TextIO, heard)):
            yield
    finally:
        done.set()
        follower.join()


def _newest(file: Path) -> dict[str, Any]:
    with suppress(OSError):
        entries = metrics.read(file)
        return entries[-1] if entries else {}
    return {}


def _in_words(entry: Mapping[str, Any]) -> str:
    figures = {
        "loss": "loss {:.4f}",
        "eval_loss": "held-out loss {:.4f}",
        "tokens_per_second": "{:,.0f} tokens/s",
    }
    said = [words.format(entry[name]) for name, words in figures.items() if name in entry]
    return "  ".join([f"step {entry['step']:,}/{entry.get('max_steps', 0):,}", *said])


_JAVA = re.compile(r"\n\s+(?:SQLSTATE: |at [\w.$]+\()|\nDriver stacktrace:")

# torch is named by its path from the working folder, which may hold the environment.
_TORCHRUN = re.compile(r"^E\d{4} [\d:.]+ +\d+ \S*torch/distributed/elastic", re.MULTILINE)


def failure(told: str) -> TrainingFailedError:
    """The error that a person can act on, from what Spark tells of a failed job: the rank's own last lines.

    Those stand between a Python traceback of pyspark's and what torchrun and Java add, a page each.
    """
    _, found, said = told.partition("included below: ")
    if not found:  # no rank failed by itself: a node was lost, or the job was cancelled
        reason = " ".join(_JAVA.split(told)[0].split())
        return TrainingFailedError(
            f"Spark ended the training: {reason}\nType the same with resume auto to go on"
        )
    said = _JAVA.split(said)[0]
    code = int(match[1]) if (match := re.search(r"^\s*exitcode\s*: (-?\d+)", said, re.MULTILINE)) else 1
    lines = _TORCHRUN.split(said)[0].rstrip().splitlines()[-LAST_LINES:]
    last = "\n".join(lines)
    return TrainingFailedError(
        f"Training ended with exit code {code}: {exit_meaning(code)}\nIts last lines:\n{last}", code
    )
