"""The resources that the pod of the train step requests."""

from __future__ import annotations

from typing import Any

import pytest

from flows import pod
from tests.conftest import ONE_OF_EACH, resolved
from training.consts import GIB
from training.options.trainer_options import TrainingOptions
from training.plan.epoch import alpaca_lengths
from training.plan.fit import plan_run
from training.plan.lookup import model_shape
from training.plan.presets import preset_options


def test_an_eight_a10_pod_has_host_memory_for_the_offloaded_optimizer_and_a_cpu_pod_little() -> None:
    little = pod.resources("cpu", {})
    assert (little["gpu"], little["cpu"], little["memory"] < 16_000) == (None, 2, True)
    requested = pod.resources("g5.48xlarge", {})
    plan = pod.plan_for(pod.machine_of("g5.48xlarge"))
    needed = max(plan.host_memory_gib.values())
    assert (requested["gpu"], requested["cpu"], requested["shared_memory"]) == (8, 32, 16 * 1024)
    assert requested["memory"] * 1e6 / GIB > needed + 16, "used /dev/shm counts as memory"
    assert 128_000 < requested["memory"] < 768 * GIB / 1e6, "128 GB are too few for eight ranks"
    assert requested["disk"] * 1e6 / GIB > sum(plan.disk_gib.values())


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "g5.2xlarge", "cpu"])
def test_a_run_that_fits_a_machine_with_some_memory_left_fits_its_pod(name: str) -> None:
    machine, granted = pod.machine_of(name), pod.pod_machine(name, {})
    plan = pod.plan_for(machine)
    assert pod.resources(name, {})["memory"] * 1e6 / GIB < max(0.97 * machine.host_gib, 16), "no node has it"
    most = 0.95 * machine.host_gib - pod.DRIVER_GIB - pod.SHARED_GIB * machine.count
    if plan.fits and max(plan.host_memory_gib.values()) < most:
        assert pod.plan_for(granted).fits
    if max(plan.host_memory_gib.values()) > most:
        assert "host memory" in pod.plan_for(granted).shortages, "it would be killed during training"


@pytest.mark.parametrize(
    ("machine", "method"), [("g5.2xlarge", "lora"), ("g5.4xlarge", "lora"), ("8xA100-40GB", "full"), ("4xA10", "full")]
)  # fmt: skip
def test_a_pod_with_one_small_gpu_is_planned_for_adapters(machine: str, method: str) -> None:
    plan = pod.plan_for(pod.machine_of(machine))
    assert plan.fits
    assert plan.settings.lora == (method == "lora")
    granted = pod.resources(machine, {})
    assert granted["memory"] * 1e6 / GIB > max(plan.host_memory_gib.values())
    if method == "lora":
        assert granted["disk"] < 50_000, "no checkpoint holds the base"


def test_requested_resources_replace_those_of_the_plan() -> None:
    requested = pod.resources("8xA100-80GB", {"gpu": 4, "memory": 300_000})
    assert (requested["memory"], requested["gpu"], requested["cpu"]) == (300_000, 4, 16), (
        "the cores of four GPUs"
    )
    with pytest.raises(pod.PodError, match=r"4xA10 has 4"):
        pod.resources("4xA10", {"gpu": 5})
    with pytest.raises(pod.PodError, match=r'"gpu": 1}: the machine cpu has none\. Leave it out'):
        pod.resources("cpu", {"gpu": 1})


def test_unknown_resources_and_machines_are_refused_and_known_ones_are_listed() -> None:
    for text in ("[]", "{", '{"mem": 1}', '{"memory": "1"}', '{"memory": 0}', '{"cpu": true}'):
        with pytest.raises(pod.PodError, match="cpu, gpu, memory, disk, shared_memory"):
            pod.parse_resources(text)
    with pytest.raises(pod.PodError, match=r"Nearest: .*8xV100-32GB.* cpu"):
        pod.parse_machine("8xV100")


def test_a_larger_model_is_refused_with_the_resources_to_request_and_then_fits() -> None:
    name, model = "8xA100-80GB", model_shape("EleutherAI/pythia-12b")
    options = TrainingOptions(local_output_dir="OUTPUT", input_model=model.name, **preset_options("a100", 8))

    def plan(requested: dict[str, int]) -> Any:
        return plan_run(
            resolved(options, 8, "a100"), alpaca_lengths(), model, pod.pod_machine(name, requested)
        )

    refused = plan({})
    assert "disk" in refused.shortages
    advice = pod.advice(refused, {})
    assert plan(pod.parse_resources(advice.split("'")[1])).fits
