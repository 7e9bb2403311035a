"""Ranks with an offloaded optimizer are bound to cores, only where DeepSpeed's launcher can do it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from deepspeed.launcher import runner

from tests.plan.test_plan import dolly_plan
from training.launch.local import deepspeed_command, shell_command
from training.machine import cores
from training.machine.cores import binding_words
from training.machine.local import THIS_MACHINE

OFFLOAD, PLAIN = "config/ds_z3_bf16_offload_config.json", "config/ds_z3_bf16_config.json"

# Stands for numactl: two nodes of two cores; notes what it is asked, then runs the command or refuses.
NUMACTL = """#!/bin/sh
if [ "$1" = --hardware ]; then
    printf 'available: 2 nodes (0-1)\\nnode 0 cpus: 0 1\\nnode 1 cpus: 2 3\\n'; exit 0
fi
echo "$@" >> {log}
if [ {refuses} = 1 ] && [ "$1" = -m ]; then echo 'set_mempolicy: Operation not permitted' >&2; exit 1; fi
while [ "${{1#-}}" != "$1" ]; do shift 2; done
exec "$@"
"""
Machine = Callable[..., Path]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """Makes a machine whose CPUs are given as {number: siblings}; returns the file of numactl's calls."""

    def make(siblings: dict[int, str], numactl: bool = True, refuses: bool = False) -> Path:
        for number, text in siblings.items():
            folder = tmp_path / f"cpu{number}" / "topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(f"{text}\n")
        program, log = tmp_path / "bin" / "numactl", tmp_path / "log"
        program.parent.mkdir()
        if numactl:
            program.write_text(NUMACTL.format(log=log, refuses=int(refuses)))
            program.chmod(0o755)
        monkeypatch.setattr(cores, "CPUS", tmp_path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(siblings))
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        return log

    monkeypatch.delenv("KMP_AFFINITY", raising=False)
    binding_words.cache_clear()
    yield make
    binding_words.cache_clear()


FOUR = {number: str(number) for number in range(4)}


def test_each_rank_gets_cores_of_its_own_and_the_command_of_each_was_tried(machine: Machine) -> None:
    log = machine(FOUR)
    words = binding_words(2)
    assert words == ("--bind_cores_to_rank", "--bind_core_list", "0-3")
    assert log.read_text().splitlines() == ["-m 0 -C 0-1 true", "-m 1 -C 2-3 true"]
    read = runner.parse_args([*words, "--num_gpus", "2", "--module", "training.trainer"])
    assert (read.bind_cores_to_rank, read.bind_core_list) == (True, "0-3")


@pytest.mark.parametrize(
    ("siblings", "expected"),
    [
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, "0-1"),
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, "0,2"),
        ({8: "8", 9: "9", 12: "12"}, "8,9,12"),
    ],
    ids=["second threads at the end", "threads side by side", "a container with some cores"],
)
def test_the_list_has_each_physical_core_of_this_process_once(
    machine: Machine, siblings: dict[int, str], expected: str
) -> None:
    machine(siblings)
    assert binding_words(2)[-1] == expected


def test_nothing_is_bound_where_it_would_fail(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    log = machine(FOUR, refuses=True)
    assert binding_words(2) == ()
    assert log.read_text(), "it was tried"
    assert binding_words(8) == (), "more ranks than cores"
    monkeypatch.setenv("KMP_AFFINITY", "compact")  # DeepSpeed's launcher would stop
    assert binding_words(1) == ()


def test_nothing_is_bound_without_numactl(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(FOUR, numactl=False)
    monkeypatch.setattr(cores.shutil, "which", lambda name: None)
    assert binding_words(2) == ()


def test_only_runs_with_an_offloaded_optimizer_are_bound(machine: Machine) -> None:
    machine(FOUR)
    bound = "deepspeed --bind_cores_to_rank --bind_core_list 0-3 --num_gpus 2"
    assert shell_command(deepspeed_command({"deepspeed": OFFLOAD}, 2)).startswith(bound)
    for other in ({"deepspeed": PLAIN}, {"deepspeed": "no/such.json"}, {}):
        assert "bind" not in shell_command(deepspeed_command(other, 2))


def test_the_plan_binds_only_on_this_machine(machine: Machine) -> None:
    machine(FOUR)
    elsewhere = dolly_plan("4xA10")
    assert "bind" not in elsewhere.command
    here = replace(elsewhere, machine=replace(elsewhere.machine, name=THIS_MACHINE))
    bound = "deepspeed --bind_cores_to_rank --bind_core_list 0-3 --num_gpus 4"
    assert here.command == elsewhere.command.replace("deepspeed --num_gpus 4", bound)
