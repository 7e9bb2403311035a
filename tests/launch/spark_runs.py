"""A Spark driver with two workers on this machine that trains with `launch_on_spark`; used by test_spark.py.

    python -m tests.launch.spark_runs runs.json outcomes.json

Each run is {"options": {...}, "ranks": 2, "installed": true, "kill": false, "use_gpu": false}. Each outcome has the
error, if any, and the processes that still run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from pyspark.sql import SparkSession

from training.errors import TrainingFailedError
from training.launch.spark import launch_on_spark

ROOT = Path(__file__).parents[2]
RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}


def session(installed: bool) -> SparkSession:
    """A session with two worker JVMs of one task each, with our package on their path or without."""
    settings = {
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.executor.memory": "512m",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        **{f"spark.executorEnv.{name}": value for name, value in RANK_ENVIRONMENT.items()},
        "spark.executorEnv.PYTHONPATH": os.pathsep.join(
            [str(ROOT if installed else Path.home()), os.environ.get("PYTHONPATH", "")]
        ),
    }
    builder = SparkSession.builder.master("local-cluster[2,1,2048]")
    for name, value in settings.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    return spark


def processes_of(folder: str) -> list[psutil.Process]:
    """Launchers, supervisors and ranks of the run that writes into a folder."""
    words = {"training.trainer", folder}
    running = psutil.process_iter(["cmdline"])
    return [p for p in running if p.pid != os.getpid() and words <= set(p.info["cmdline"] or [])]


def remaining_processes(folder: str) -> list[str]:
    """The run's processes that have not ended after 40 s."""
    end = time.monotonic() + 40
    while (remaining := processes_of(folder)) and time.monotonic() < end:
        time.sleep(0.2)
    return [str(process) for process in remaining]


def kill_rank_1(folder: str) -> None:
    """Sends SIGKILL to rank 1, as the system does without memory, once the run has started."""
    while not (Path(folder) / "run.json").exists():
        time.sleep(0.1)
    for process in processes_of(folder):
        environment = process.environ()
        if environment.get("RANK") == "1" and "DOLLY_SUPERVISED" in environment:
            process.send_signal(signal.SIGKILL)


def addresses() -> list[str]:
    """Addresses on which Spark listens: the driver, its JVM, and those of the workers."""
    listening = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # a rank of the previous run that is ending
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listening.add(connection.laddr.ip.removeprefix("::ffff:"))
    return sorted(listening)


def main(runs: list[dict[str, Any]], outcomes_file: Path) -> None:
    os.environ |= {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    outcomes: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        installed = run.get("installed", True)
        if number and installed != runs[number - 1].get("installed", True):
            session(installed).stop()
        session(installed)
        folder, outcome = run["options"]["local_output_dir"], {"addresses": addresses(), "error": None}
        print(f"=== run {number}", flush=True)
        if run.get("kill"):
            threading.Thread(target=kill_rank_1, args=(folder,), daemon=True).start()
        begin = time.monotonic()
        try:
            launch_on_spark(run["options"], run.get("ranks", 2), 1, run.get("use_gpu", False))
        except (ValueError, TrainingFailedError, KeyboardInterrupt) as error:
            outcome |= {
                "error": str(error),
                "kind": type(error).__name__,
                "code": getattr(error, "code", None),
            }
        outcomes.append(outcome | {"seconds": time.monotonic() - begin, "left": remaining_processes(folder)})
        outcomes_file.write_text(json.dumps(outcomes, indent=1))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
