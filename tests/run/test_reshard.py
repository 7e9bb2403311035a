"""A checkpoint is converted for another number of ranks, in parallel, and the optimizer continues from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.conftest import python
from tests.launch.test_supervisor import has_ended
from tests.run.test_kills import contents
from tests.run.test_ranks import start_ranks
from tests.starts import ROOT
from training.errors import OptionsError
from training.run import reshard as conversion
from training.run.reshard import conversion_workers, reshard
from training.run.resume import own_step_counts


def test_a_checkpoint_that_cannot_be_converted_is_refused_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free disk is checked first."""
    folder = tmp_path / "checkpoint-3"
    (folder / "global_step3").mkdir(parents=True)
    (folder / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"no pickle" * 100)
    before = contents(tmp_path)
    with monkeypatch.context() as full:
        full.setattr("training.run.reshard.free_bytes", lambda place: 1)
        with pytest.raises(OptionsError, match="Make room, or use as many devices as before"):
            reshard(folder, tmp_path)
    with pytest.raises(OptionsError, match="DeepSpeed cannot convert") as error:
        reshard(folder, tmp_path)
    assert "Use as many as before" in str(error.value)
    assert contents(tmp_path) == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-3"]


def test_each_parameter_group_counts_its_own_steps() -> None:
    """DeepSpeed's universal load shares one tensor, so three groups would count three steps at once."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW([{"params": [parameter]} for parameter in parameters])
    shared = torch.tensor(6.0)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
        moments = {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
        optimizer.state[parameter] = {"step": shared, **moments}
    own_step_counts(optimizer)
    optimizer.step()
    assert [float(optimizer.state[parameter]["step"]) for parameter in parameters] == [7.0, 7.0, 7.0]


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {}], ids=str)
def test_after_a_conversion_the_step_counts_are_where_torch_would_load_them(options: dict[str, bool]) -> None:
    """DeepSpeed leaves them on the CPU, where a fused Adam on a GPU refuses them."""
    with FakeTensorMode():
        parameters = [torch.nn.Parameter(torch.ones(2, device="cuda", dtype=torch.float32)) for _ in range(2)]
        optimizer, loaded = (torch.optim.AdamW(parameters, **options) for _ in range(2))
        shared = torch.tensor(6, dtype=torch.float64)
        for parameter in parameters:
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            optimizer.state[parameter] = {"step": shared, **moments}
        loaded.load_state_dict(optimizer.state_dict())
        own_step_counts(optimizer)
        for parameter in parameters:
            ours, torchs = optimizer.state[parameter]["step"], loaded.state[parameter]["step"]
            assert (ours.device, ours.dtype) == (torchs.device, torchs.dtype)
            assert (ours.device.type == "cuda") == bool(options)


SHAPES = {"wte.weight": (5, 3), "ln.bias": (7,)}
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def numbers(name: str, state: str) -> torch.Tensor:
    size = torch.Size(SHAPES[name]).numel()
    return (
        torch.arange(size, dtype=torch.float32) + 100 * list(SHAPES).index(name) + 1000 * STATES.index(state)
    )


def write_checkpoint(folder: Path, ranks: int) -> None:
    """A checkpoint of ZeRO-3 as DeepSpeed writes it: each parameter is cut into one padded piece a rank."""
    shards = folder / "global_step3"
    shards.mkdir(parents=True)
    for rank in range(ranks):
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"param_shapes": [SHAPES]}, shards / f"{name}_model_states.pt")

        def piece(state: str, rank: int = rank) -> torch.Tensor:
            pieces = []
            for parameter in SHAPES:
                whole = numbers(parameter, state)
                size = -(-whole.numel() // ranks)
                padded = torch.cat([whole, torch.zeros(size * ranks - whole.numel())])
                pieces.append(padded[rank * size : (rank + 1) * size])
            return torch.cat(pieces)

        moments = {state: piece(state) for state in STATES[1:]}
        optimizer: dict[str, Any] = {
            "zero_stage": 3,
            "loss_scaler": None,
            "dynamic_loss_scale": False,
            "overflow": False,
            "fp32_flat_groups": [piece("fp32")],
            "optimizer_state_dict": {
                "state": {0: {"step": torch.tensor(3.0), **moments}},
                "param_groups": [{"lr": 1e-3, "params": []}],
            },
        }
        torch.save({"optimizer_state_dict": optimizer}, shards / f"{name}_optim_states.pt")


def loaded(folder: Path) -> dict[str, Any]:
    """{relative name: content} of every file that torch saved."""
    return {
        str(file.relative_to(folder)): torch.load(file, weights_only=False) for file in folder.rglob("*.pt")
    }


@pytest.mark.slow
def test_the_parallel_conversion_gives_deepspeeds_files_without_a_whole_shard_for_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "checkpoint-3", ranks=2)
    before = contents(tmp_path)
    monkeypatch.setattr(conversion, "conversion_workers", lambda size: 2)
    ours = loaded(reshard(tmp_path / "checkpoint-3", tmp_path) / "global_step3_universal")
    source, target = tmp_path / "checkpoint-3" / "global_step3", tmp_path / "theirs" / "universal"
    command = (
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--input_folder",
        source,
        "--output_folder",
        target,
    )
    result = python(*command, "--num_extract_workers", 1, "--num_merge_workers", 1)
    assert result.returncode == 0, result.stderr
    theirs = loaded(target)
    settings, their_settings = (files.pop("zero/optimizer_state.pt") for files in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert isinstance(tensor, dict) or torch.equal(ours[name], tensor)
    for name in SHAPES:
        for state in STATES:
            assert torch.equal(ours[f"zero/{name}/{state}.pt"], numbers(name, state))
    optimizer, their_optimizer = (each["optimizer_state_dict"] for each in (settings, their_settings))
    assert optimizer["state"] == {0: {"step": their_optimizer["state"][0]["step"]}}
    assert optimizer["param_groups"] == their_optimizer["param_groups"]
    assert their_settings.keys() - settings.keys() == {"fp32_flat_groups"}
    written = contents(tmp_path)
    assert {name: written[name] for name in before} == before


def test_as_many_processes_convert_as_cores_and_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(96)), raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    optimizer = 12 * 6_053_381_344  # bytes of GPT-J
    for free, workers in ((1000, 96), (100, 17), (2, 1)):
        monkeypatch.setattr(conversion, "free_host_gib", lambda free=free: free)
        assert conversion_workers(optimizer) == workers


# Trains, saves, converts and loads at a stage of ZeRO; prints whether the loaded run is the same.
LOADED = """
import json, sys
from pathlib import Path
import deepspeed, torch
from training.run.reshard import reshard
from training.run.resume import own_step_counts

stage, folder = int(sys.argv[1]), Path(sys.argv[2])
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)

def engine(**more):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)).bfloat16()
    groups = [{"params": [p for p in model.parameters() if p.ndim == dims]} for dims in (2, 1)]
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True,
              "zero_optimization": {"stage": stage}}
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config | more)[0]

def train(engine, steps):
    for step in steps:
        torch.manual_seed(step)
        engine.backward((engine(torch.randn(3, 4).bfloat16()) ** 2).mean())
        engine.step()

def state(engine):
    states = engine.optimizer.optimizer.state
    return [{name: value.tolist() for name, value in (own | {"fp32": key}).items()} for key, own in states.items()]

undisturbed = engine()
train(undisturbed, range(3))
undisturbed.save_checkpoint(folder / "checkpoint-3", tag="global_step3")
train(undisturbed, range(3, 6))
loaded = engine(checkpoint={"load_universal": True})
loaded.load_checkpoint(reshard(folder / "checkpoint-3", folder))
own_step_counts(loaded.optimizer.optimizer)
train(loaded, range(3, 6))
print(json.dumps([state(loaded), state(undisturbed)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_continues_from_a_converted_checkpoint_bit_for_bit(tmp_path: Path, stage: int) -> None:
    [rank] = start_ranks(LOADED, 1, stage, tmp_path)
    output, _ = rank.communicate(timeout=500)
    ours, undisturbed = json.loads(output.splitlines()[-1])
    assert ours == undisturbed
    assert {each["step"] for each in ours} == {6.0}


# A stand-in for DeepSpeed's conversion with two workers.
CONVERSION = """
import sys, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from deepspeed.checkpoint import ds_to_universal
from training.run.reshard import convert

def main(arguments):
    with ProcessPoolExecutor(arguments.num_merge_workers) as pool:
        works = [pool.submit(time.sleep, 60) for _ in range(4)]
        print("workers", *pool._processes, flush=True)
        time.sleep(60)

ds_to_universal.main = main
convert(Path("shards"), Path("target"), 2)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")
def test_a_killed_conversion_leaves_no_workers() -> None:
    command = [sys.executable, "-c", CONVERSION]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    line = next(line for line in process.stdout if line.startswith("workers"))
    workers = [int(word) for word in line.split()[1:]]
    process.kill()
    process.wait()
    assert len(workers) == 2
    assert all(map(has_ended, workers))
