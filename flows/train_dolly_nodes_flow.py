"""Dolly on several nodes as a Metaflow flow: start -> train on each node -> join -> end; see docs/metaflow.md.

    python flows/train_dolly_flow.py run --gpu-family cpu --num-nodes 2       the demo, on this machine
    python flows/train_dolly_flow.py --datastore s3 --config-value machine p4d.24xlarge \
        run --with kubernetes --num-nodes 2 --local-training-root /mnt/dolly
    python flows/train_dolly_nodes_flow.py resume                             continues from the last checkpoint

A flow of its own, because Metaflow's graph is fixed: Kubernetes refuses @parallel on one node, and Step Functions refuses
every flow that has it.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# In Metaflow's package all files lie in one folder.
sys.path.insert(0, str(HERE if (HERE / "training").is_dir() else HERE.parent))

import pod
from flow_errors import StepFailedError
from flow_parameters import changed_options
from gpu_profile import gpu_profile
from metaflow import Parameter, card, config_expr, current, parallel, resources, step
from metaflow.cards import Markdown, Table
from train_dolly_flow import TrainDollyFlow

from training.errors import NodesError, TrainingFailedError
from training.launch.nodes import meet
from training.machine.catalogue import Machine
from training.options.wording import FLOW

NODES = "nodes"  # id of the card that shows all nodes


class TrainDollyNodesFlow(TrainDollyFlow):
    """Fine-tunes a causal language model to follow instructions, on several nodes. The defaults are Dolly's run."""

    num_nodes = Parameter("num-nodes", type=int, default=2, help="Nodes, two or more.")
    restarts = Parameter("restarts", type=int, default=0, help="Only 0. Type --with retry instead.")

    @resources(memory=8000)  # it tokenises the rows
    @step
    def start(self) -> None:
        """Checks options, rows and plan before a GPU is paid for."""
        self._check()
        self.next(self.train, num_parallel=self.num_nodes)

    @gpu_profile(run_folder="output")
    @resources(**{key: config_expr(f"pod.resources(machine, resources)['{key}']") for key in pod.KEYS})
    @parallel
    @step
    def train(self) -> None:
        """Runs this node's part of the training. Node 0 has rank 0, and pushes the model to S3."""
        self._begin_training()
        nodes, folder = current.parallel, Path(self.folder)
        self.node = nodes.node_index
        if self.node == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_files()
        # Local nodes share the cores.
        cpu_ranks = self.cpu_ranks if pod.is_remote() else self.cpu_ranks * nodes.num_nodes
        run = f"{current.run_id}/{current.step_name}/{nodes.control_task_id}/{current.retry_count}"
        try:
            with meet(self.node, nodes.num_nodes, nodes.main_ip, run, folder) as met:
                command = met.command(changed_options(self.options), self.ranks)
                print(f"Running on {self.host}:\n  {shlex.join(['torchrun', *command[3:]])}", flush=True)
                met.train(command, Path(self.output), cpu_ranks, FLOW)
        except (NodesError, TrainingFailedError) as error:
            raise StepFailedError(error) from error
        finally:
            if self.node == 0:
                self._keep_figures()
        if self.node == 0:
            self._keep_model()
        self.next(self.join)

    @card(type="blank", id=NODES)
    @step
    def join(self, inputs: Any) -> None:
        """Takes the artifacts of node 0 and shows the devices of all nodes."""
        self.merge_artifacts(inputs, exclude=["host", "node"])
        rows = [row for node in sorted(inputs, key=lambda node: node.node) for row in _device_rows(node)]
        current.card[NODES].append(Markdown(f"# The {self.num_nodes} nodes of run `{current.run_id}`"))
        headers = ["node", "host", "device", "type", "mean use", "peak use", "peak memory"]
        current.card[NODES].append(Table(rows, headers=headers))
        self.next(self.end)

    def _nodes_problems(self, machine: Machine, remote: bool) -> list[str]:
        """Why the run cannot have several nodes."""
        problems = []
        if self.num_nodes < 2:
            problems.append(
                f"--num-nodes {self.num_nodes}: expected 2 or more. For one node type "
                "python flows/train_dolly_flow.py run"
            )
        if self.restarts:
            problems.append(
                f"--restarts {self.restarts}: several nodes are started again together, by Metaflow. Type "
                f"--with retry:times={self.restarts} after run instead"
            )
        if remote and not self.local_training_root:
            problems.append(
                f"--num-nodes {self.num_nodes}: each rank writes its part of a checkpoint, and a resume needs all parts. "
                "Type --local-training-root with a folder on storage that all pods mount"
            )
        if not remote and not machine.is_cpu:
            problems.append(
                f"--num-nodes {self.num_nodes}: all nodes of a local run are on this machine and would use the same "
                "GPUs. Type --num-nodes 1, or --with kubernetes after run"
            )
        return problems


def _device_rows(node: Any) -> list[list[str]]:
    """A row per device of a node, from the profile of its task."""
    profile = getattr(node, f"gpu_profile_train_{node.node}", None)
    if profile is None:  # it had failed, which the log says
        return [[str(node.node), node.host, "?", "", "", "", ""]]
    use, memory = profile["gpu_utilisation_percent"], profile["peaks"]["gpu_memory_gib"]
    devices = [
        (device["device"], device["type"] or "?", use, profile["peaks"]["gpu_utilisation_percent"], memory)
        for device in profile["devices"]
    ]
    host = profile["peaks"]["host"]
    sizes = {name: host.get(f"{name} GiB") for name in ("memory", "disk")}
    devices += [(name, "host", profile["host"], host, sizes) for name in ("CPU", "memory", "disk")]
    rows = []
    for name, kind, curve, peaks, gib in devices:
        figures = [row[name] for row in curve if name in row]
        mean = f"{sum(figures) / len(figures):.0f} %" if figures else "?"
        peak = "?" if peaks.get(name) is None else f"{peaks[name]:.0f} %"
        most = "" if gib.get(name) is None else f"{gib[name]:.1f} GiB"
        rows.append([str(node.node), node.host, name, kind, mean, peak, most])
    return rows


if __name__ == "__main__":
    TrainDollyNodesFlow()
