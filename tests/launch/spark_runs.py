"""A driver of a real Spark with two workers on this machine, which trains by `launch_on_spark`; for test_spark.py.

    python -m tests.launch.spark_runs runs.json outcomes.json

Each of the runs is {"options": {...}, "ranks": 2, "installed": true, "kill": false, "use_gpu": false}; each outcome has the error, if
any, and the processes that were left behind.
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
FOR_RANKS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}


def session(installed: bool) -> SparkSession:
    """Two worker JVMs with one task each; with our package on their path, or without."""
    settings = {
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.executor.memory": "512m",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        **{f"spark.executorEnv.{name}": value for name, value in FOR_RANKS.items()},
        "spark.executorEnv.PYTHONPATH": str(ROOT if installed else Path.home()),
    }
    builder = SparkSession.builder.master("local-cluster[2,1,2048]")
    for name, value in settings.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("OFF")
    return spark


def of_run(folder: str) -> list[psutil.Process]:
    """Launchers, supervisors and ranks of the run that writes into a folder."""
    own = {"training.trainer", folder}
    found = psutil.process_iter(["cmdline"])
    return [each for each in found if each.pid != os.getpid() and own <= set(each.info["cmdline"] or [])]


def left_of(folder: str) -> list[str]:
    """What is still there when all should have ended."""
    end = time.monotonic() + 40
    while (there := of_run(folder)) and time.monotonic() < end:
        time.sleep(0.2)
    return [str(process) for process in there]


def kill_rank_1(folder: str) -> None:
    """SIGKILL, as of a system without memory, once the run has begun."""
    while not (Path(folder) / "run.json").exists():
        time.sleep(0.1)
    for process in of_run(folder):
        environment = process.environ()
        if environment.get("RANK") == "1" and "DOLLY_SUPERVISED" in environment:
            process.send_signal(signal.SIGKILL)


def addresses() -> list[str]:
    """Where Spark listens: the driver, its JVM, and those of the workers."""
    found = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # a rank of the run before, at its end
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(connection.laddr.ip.removeprefix("::ffff:"))
    return sorted(found)


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
        outcomes.append(outcome | {"seconds": time.monotonic() - begin, "left": left_of(folder)})
        outcomes_file.write_text(json.dumps(outcomes, indent=1))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
