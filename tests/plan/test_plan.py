"""The plan: what fits, the advice, the printed command, the published runs, and the command line."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from transformers import GPTNeoXConfig, OpenAIGPTConfig, OPTConfig, T5Config

from tests.conftest import ONE_OF_EACH, jsonl, resolved, rows_of, settings_of_a_run
from training.consts import GIB
from training.errors import OptionsError
from training.machine.catalogue import find_machine
from training.machine.local import this_machine
from training.options.trainer_options import TrainingOptions
from training.plan.__main__ import main
from training.plan.epoch import Lengths, alpaca_lengths
from training.plan.fit import Plan, plan_run
from training.plan.lookup import model_shape
from training.plan.model_shape import gptj_shape
from training.plan.presets import preset_options
from training.plan.report import as_json, as_table
from training.plan.request import plan_options

ROOT = Path(__file__).parents[2]
BF16, BF16_OFFLOAD = "config/ds_z3_bf16_config.json", "config/ds_z3_bf16_offload_config.json"
FP16, FP16_OFFLOAD = "config/ds_z3_fp16_config.json", "config/ds_z3_fp16_offload_config.json"
ZERO_2 = "config/ds_z2_bf16_config.json"
ONE = " --per-device-train-batch-size 16 --gradient-accumulation-steps 4, without --deepspeed"  # device, with adapters
GPTJ = model_shape("EleutherAI/gpt-j-6B")
# Published times of one epoch of Dolly's padded recipe: machine, DeepSpeed configuration, hours.
PUBLISHED = [
    # README of databrickslabs/dolly
    ("8xA100-40GB", BF16, 0.5),
    ("4xA10", BF16_OFFLOAD, 7.0),
    ("8xV100-32GB", FP16_OFFLOAD, 3.5),
    # Outerbounds, Training a Large Language Model With Metaflow, Featuring Dolly; the second is a tenth of ten epochs
    ("p3dn.24xlarge", FP16_OFFLOAD, 3.25),
    ("3xA100-80GB", FP16_OFFLOAD, 3.0),
]
DOLLY = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_tokens_per_device": None,
         "batching": "padded", "gradient_checkpointing": "on"}  # fmt: skip


def dolly_plan(
    machine: str,
    num_gpus: int | None = None,
    lengths: Lengths | None = None,
    machine_changes: dict[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """The plan of Dolly's run with other options, or with other values of the machine."""
    changed = replace(find_machine(machine), **machine_changes or {})
    ranks = num_gpus or changed.count
    chosen = (
        preset_options(changed.family, ranks) | {"max_tokens_per_device": "auto", "epochs": 1.0} | options
    )
    settings = resolved(TrainingOptions(local_output_dir="OUTPUT", **chosen), ranks, changed.family)
    return plan_run(settings, lengths or alpaca_lengths(), GPTJ, changed)


def run_cli(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# --- what fits, and the advice -----------------------------------------------------------------------


@pytest.mark.parametrize("host_gb", [48, 128])
def test_eight_ranks_with_offload_do_not_fit_on_a_small_host(host_gb):
    small = dolly_plan(
        "8xV100-32GB", machine_changes={"host_gib": host_gb * 1e9 / GIB}, deepspeed=FP16_OFFLOAD
    )
    assert list(small.shortages) == ["host memory"]
    needed = max(small.host_memory_gib.values())
    advice = f"It fits on 8xV100-32GB, on one V100-32GB, with --lora 16 --quantize nf4{ONE}"
    assert small.changes["host memory"] == (advice if host_gb == 48 else f"Type --deepspeed {FP16}")
    none = dolly_plan("8xV100-32GB", machine_changes={"host_gib": 8.0}, deepspeed=FP16_OFFLOAD)
    assert none.changes["host memory"] == f"Use a machine with {math.ceil(needed)} GiB of free host memory"
    assert dolly_plan("8xV100-32GB", machine_changes={"host_gib": needed + 1}, deepspeed=FP16_OFFLOAD).fits


def test_each_shortage_has_its_own_advice():
    short = dolly_plan("8xA100-40GB", machine_changes={"disk_gib": 200.0, "host_gib": 30.0}, save_steps=200)
    host, disk = short.problems
    assert host.startswith("host memory: 46.5 GiB are needed")
    assert disk == (
        "disk: 237.2 GiB are needed for checkpoints, model and cache, 37.2 more than the 200.0 of 8xA100-40GB. "
        "Type --save-total-limit 1"
    )
    tiny_disk = dolly_plan("8xA100-40GB", machine_changes={"disk_gib": 100.0}, save_steps=200)
    assert tiny_disk.problems[0].endswith(
        "Name a folder on a disk with 238 GiB free: --local-output-dir FOLDER"
    )


@pytest.mark.parametrize(
    ("machine", "options", "advice"),
    [
        ("8xA100-40GB", {"gradient_checkpointing": "off", "batching": "padded"}, "Type --gradient-checkpointing on"),
        (
            "8xA100-40GB",
            {"per_device_train_batch_size": 128, "batching": "padded"},
            "Type --per-device-train-batch-size 32 --gradient-accumulation-steps 4",
        ),
        (
            "8xA100-40GB",
            {"per_device_train_batch_size": 2048, "max_tokens_per_device": None, "gradient_checkpointing": "on"},
            r"Type --max-tokens-per-device \d+",
        ),
        ("2xA10", {"deepspeed": None, "bf16": True}, f"Type --deepspeed {BF16_OFFLOAD}"),
        ("a2-highgpu-2g", {}, f"Type --deepspeed {BF16_OFFLOAD}"),
        ("4xA10", {"deepspeed": ZERO_2}, f"Type --deepspeed {BF16_OFFLOAD}"),
        ("a2-highgpu-4g", {"deepspeed": ZERO_2}, f"Type --deepspeed {BF16}"),
        ("a2-highgpu-1g", {}, f"Type --lora 16{ONE}"),
    ],
)  # fmt: skip
def test_the_advice_is_the_smallest_change_of_options_that_makes_the_run_fit(machine, options, advice):
    failed = dolly_plan(machine, **options)
    assert "GPU memory" in failed.shortages
    change = failed.changes["GPU memory"]
    assert re.fullmatch(advice, change), change
    typed = dict(re.findall(r"--([\w-]+) ([^\s,]+)", change))
    fixed = options | {
        name.replace("-", "_"): int(value) if value.isdigit() else value for name, value in typed.items()
    }
    if "without --deepspeed" in change:
        fixed["deepspeed"] = None
    more_gpus = re.match(r"It fits on (\d+)", change)
    count = int(more_gpus[1]) if more_gpus else find_machine(machine).count
    assert "GPU memory" not in dolly_plan(machine, count, machine_changes={"count": count}, **fixed).shortages


def test_memory_that_other_processes_use_is_named_with_what_to_do():
    busy = dolly_plan("8xA100-40GB", machine_changes={"gpu_memory_gib": 9.4, "taken_gib": 30.0})
    assert busy.shortages["GPU memory"].endswith(
        "more than its free 9.4, because other processes use 30.0 (nvidia-smi lists them)"
    )
    advice = "It fits on these GPUs if the other processes on them end"
    assert busy.changes["GPU memory"] == advice, "before offloading, which is ten times as slow"
    too_small = dolly_plan("4xA10", deepspeed=BF16, machine_changes={"gpu_memory_gib": 20, "taken_gib": 2})
    assert too_small.changes["GPU memory"] == f"Type --deepspeed {BF16_OFFLOAD}"


def test_more_ranks_than_gpus_are_planned_on_several_machines():
    one, two = (dolly_plan("8xV100-32GB", num_gpus=ranks, deepspeed=FP16_OFFLOAD) for ranks in (8, 16))
    assert two.settings.ranks == 16
    assert two.host_memory_gib["training"] < one.host_memory_gib["training"], "host memory is per machine"


def test_checkpointing_and_token_budget_are_set_automatically_on_small_gpus():
    tight = dolly_plan("8xA100-40GB", machine_changes={"gpu_memory_gib": 18.0})
    assert tight.fits
    assert tight.settings.checkpointing is True
    assert tight.settings.max_tokens is None
    long_rows = Lengths("long", np.full(10_000, 2000), 0.5)
    split = dolly_plan("8xA100-40GB", lengths=long_rows, per_device_train_batch_size=64)
    assert split.fits
    assert split.settings.checkpointing is True
    assert 2000 <= split.settings.max_tokens < 64 * 2000
    assert "--max-tokens-per-device" not in split.command, "the trainer makes the same choice"
    assert not dolly_plan(
        "8xA100-40GB", lengths=long_rows, per_device_train_batch_size=64, max_tokens_per_device=None
    ).fits, "None means no split"


def test_activations_are_reported_with_and_without_checkpointing():
    for checkpointing in ("on", "off"):
        plan = dolly_plan("8xA100-40GB", gradient_checkpointing=checkpointing)
        expected = plan.gpu_memory_gib["activations"] + plan.gpu_memory_gib["logits and loss"]
        word = "with" if checkpointing == "on" else "without"
        assert plan.activations_gib[f"{word} checkpointing"] == pytest.approx(expected)
        assert plan.activations_gib["with checkpointing"] < plan.activations_gib["without checkpointing"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_machine_and_model_size_can_be_planned(name):
    machine = find_machine(name)
    models = (GPTJ, model_shape("EleutherAI/pythia-12b"), gptj_shape("tiny", 2, 8, 2, 100))
    for model, batching in product(models, ("packed", "padded")):
        chosen = preset_options(machine.family, machine.count, batching)
        options = TrainingOptions(local_output_dir="x", **chosen)
        plan = plan_run(resolved(options, machine.count, machine.family), alpaca_lengths(), model, machine)
        assert plan.fits == (plan.problems == [])
        assert 0 < plan.hours["expected"] < 1000
        assert plan.hours["expected"] == pytest.approx(sum(plan.run_seconds.values()) / 3600)


# --- the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "ranks", "options", "launcher", "expected"),
    [
        ("8xA100-40GB", 8, {}, "deepspeed --num_gpus 8 --module",
         {"deepspeed": BF16, "gradient_accumulation_steps": 1, "epochs": 1.0}),
        ("8xA100-40GB", 8, {"gradient_checkpointing": "on"}, "deepspeed", {"gradient_checkpointing": "on"}),
        ("8xA100-40GB", 8, {"max_tokens_per_device": 700, "lr": 2e-5}, "deepspeed",
         {"max_tokens_per_device": 700, "lr": 2e-5}),
        ("2xA10", 2, {}, "deepspeed", {"deepspeed": BF16_OFFLOAD, "per_device_train_batch_size": 16}),
        ("8xV100-32GB", 8, {"batching": "padded"}, "deepspeed", {"deepspeed": FP16, "batching": "padded"}),
        ("8xA100-40GB", 8, {"bf16": False, "fp16": True, "deepspeed": None}, "torchrun --nproc_per_node=8 -m",
         {"fp16": True, "bf16": False}),
        ("8xA100-40GB", 1, {"deepspeed": None}, "CUDA_VISIBLE_DEVICES=0 python -m", {}),
        ("g5.xlarge", 1, {"deepspeed": None, "lora": 16}, "python -m", {"lora": 16, "lr": None, "lora_alpha": None}),
    ],
)  # fmt: skip
def test_the_command_starts_every_rank_and_the_trainer_can_parse_it(
    machine, ranks, options, launcher, expected
):
    from training.trainer import main as trainer

    command = dolly_plan(machine, ranks, **options).command
    start, words = command.split(" training.trainer ")
    assert start.startswith(launcher)
    assert ("--gradient-checkpointing" in words) == ("gradient_checkpointing" in options), "only if requested"
    params = trainer.make_context("trainer", words.split()).params
    assert expected | {"local_output_dir": "OUTPUT"} == {
        name: params[name] for name in [*expected, "local_output_dir"]
    }
    if not options and ranks == 8:
        assert words == f"--epochs 1 --deepspeed {BF16} --local-output-dir OUTPUT"


# --- the shipped DeepSpeed files ---------------------------------------------------------------------


def compared(machine: str, *more: object) -> tuple[dict[str, Any], str]:
    """(the plan as JSON, as a table)"""
    words = ["--machine", machine, *more]
    return json.loads(run_cli(*words, "--json").stdout), run_cli(*words).output


def test_the_plan_compares_the_shipped_files_and_names_the_fastest_that_fits():
    answer, chosen = compared("8xA100-40GB")
    files = answer["deepspeed_files"]
    assert list(files) == [ZERO_2, BF16, BF16_OFFLOAD]
    assert all(file["fits"] for file in files.values())
    assert files[ZERO_2]["hours"] < files[BF16]["hours"] < files[BF16_OFFLOAD]["hours"]
    assert (
        files[ZERO_2]["gpu_memory_gib"]
        > files[BF16]["gpu_memory_gib"]
        > files[BF16_OFFLOAD]["gpu_memory_gib"]
    )
    assert files[BF16]["hours"] == answer["hours"]["expected"], "ZeRO-3 is the default"
    assert answer["fastest_deepspeed_file"] == ZERO_2
    assert f"\nThe fastest that fits: type --deepspeed {ZERO_2}\n" in chosen
    assert f"--deepspeed {BF16} " in chosen.splitlines()[-1]
    _, other = compared("8xA100-40GB", "--deepspeed", ZERO_2)
    assert "\nThe run uses the fastest that fits.\n" in other
    assert f"--deepspeed {ZERO_2} " in other.splitlines()[-1]


def test_files_that_do_not_fit_are_marked_and_not_named():
    answer, table = compared("4xA10")
    assert [file["fits"] for file in answer["deepspeed_files"].values()] == [False, False, True]
    assert answer["fastest_deepspeed_file"] == BF16_OFFLOAD
    assert len(re.findall(rf"^  ({ZERO_2}|{BF16}) .* does not fit$", table, re.MULTILINE)) == 2
    answer, table = compared("g5.xlarge")
    assert answer["fastest_deepspeed_file"] is None
    assert "fastest" not in table


def test_v100_trains_without_offload_where_that_fits():
    answer, _ = compared("8xV100-32GB")
    files = answer["deepspeed_files"]
    assert list(files) == [FP16, FP16_OFFLOAD]
    assert files[FP16]["hours"] < files[FP16_OFFLOAD]["hours"]
    assert answer["fastest_deepspeed_file"] == FP16
    assert f"--deepspeed {FP16} " in answer["command"]
    few = dolly_plan("8xV100-32GB", num_gpus=2)
    assert few.changes["GPU memory"] == f"Type --deepspeed {FP16_OFFLOAD}"
    assert dolly_plan("8xV100-32GB", num_gpus=2, deepspeed=FP16_OFFLOAD).fits


def test_there_is_nothing_to_compare_on_a_cpu_or_in_a_typed_precision(tmp_path):
    demo = {
        "input_model": "demo",
        "training_dataset": "demo",
        "local_output_dir": "OUTPUT",
        "deepspeed": BF16,
    }
    here = replace(this_machine(tmp_path, 2), flops=1e11)
    assert plan_options(TrainingOptions(**demo), 2, here).files == {}
    typed = TrainingOptions(**demo, per_device_train_batch_size=8, bf16=True)
    assert plan_options(typed, 8, find_machine("8xA100-40GB")).files == {}


# --- the command line --------------------------------------------------------------------------------


def test_dollys_run_is_planned_in_seconds_without_network_or_torch():
    code = (
        "import sys, time, socket\n"
        "socket.socket.connect = lambda *_: sys.exit('the plan used the network')\n"
        "from click.testing import CliRunner\n"
        "from training.plan.__main__ import main\n"
        "result = CliRunner().invoke(main, ['--machine', '8xA100-40GB', '--json', '--price', '32.77'])\n"
        "assert 'torch' not in sys.modules, 'a built-in model and Alpaca need no torch'\n"
        "assert time.process_time() < 5, time.process_time()\n"
        "print(result.output)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["fits"] is True
    assert answer["faults"] == []
    assert answer["model"] == "EleutherAI/gpt-j-6B"
    assert (answer["gradient_checkpointing"], answer["max_tokens_per_device"]) == (False, None)
    assert (answer["global_batch_rows"], answer["steps_per_epoch"]) == (64, 797)
    for kind in ("gpu_memory_gib", "disk_gib"):
        parts = [value for key, value in answer[kind].items() if key not in ("total", "available")]
        assert answer[kind]["total"] == pytest.approx(sum(parts)), kind
    host = answer["host_memory_gib"]
    assert host["total"] == max(host["loading"], host["training"])
    hours = answer["hours"]
    assert hours["low"] < hours["expected"] < hours["high"]
    assert answer["cost"]["expected"] == pytest.approx(32.77 * hours["expected"])
    assert sum(answer["run_seconds"].values()) == pytest.approx(3600 * hours["expected"])
    assert answer["command"].startswith("deepspeed --num_gpus 8 --module training.trainer")
    assert answer["steps"] == 797


@pytest.mark.parametrize(
    ("options", "steps"), [(["--epochs", 10], 7970), (["--epochs", 0.5], 399), (["--max-steps", 100], 100)]
)
def test_time_and_price_are_those_of_the_complete_run_and_its_parts(options, steps):
    machine = ["--machine", "8xA100-40GB", "--price", 32.77]
    answer = json.loads(run_cli(*machine, *options, "--json").output)
    assert answer["steps"] == steps
    assert answer["run_seconds"]["steps"] == pytest.approx(steps * sum(answer["step_seconds"].values()))
    for bound in ("low", "expected", "high"):
        assert answer["cost"][bound] == pytest.approx(32.77 * answer["hours"][bound])
    table = run_cli(*machine, *options).output
    unit, size = ("hours", 3600) if answer["hours"]["expected"] >= 2 else ("minutes", 60)
    assert f"the run of {steps:,} steps, {unit}\n" in table
    for name, seconds in answer["run_seconds"].items():
        assert bool(seconds) == bool(re.search(rf"^  {name} +{seconds / size:,.1f}$", table, re.MULTILINE))
    assert re.search(rf"^  total +{3600 * answer['hours']['expected'] / size:,.1f}$", table, re.MULTILINE)
    assert f"{answer['cost']['expected']:,.2f}, between {answer['cost']['low']:,.2f}" in table
    assert " ".join(map(str, options)) in answer["command"]


def test_a_short_run_has_sensible_units_and_a_singular_step(tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", rows_of(20))
    table = run_cli(
        "--machine", "8xH100", "--model", "demo", "--training-dataset", rows, "--test-size", 2
    ).output
    assert "  1 step of " in table
    assert "the run of 1 step, seconds\n" in table
    assert not re.search(r"\b1 steps| 0\.00 s|\b0 seconds", table), table


def test_a_run_that_does_not_fit_ends_with_code_1_and_the_option_that_makes_it_fit(tmp_path):
    picture = tmp_path / "memory.png"
    short = run_cli("--machine", "4xA10", "--deepspeed", BF16, "--price", 8, "--plot", picture)
    assert short.exit_code == 1, "so that `plan && train` stops"
    plan = dolly_plan("4xA10", deepspeed=BF16)
    (problem,) = plan.problems
    needed = sum(plan.gpu_memory_gib.values())
    assert f"{needed:.1f} GiB are needed on each A10G, {needed - 22:.1f} more than its 22.0" in problem
    assert problem.endswith(f"Type --deepspeed {BF16_OFFLOAD}")
    for words in ("DOES NOT FIT", "GPU memory: ", f"Type --deepspeed {BF16_OFFLOAD}", "optimizer", "of 22.0"):
        assert words in short.output
    assert "at 8 an hour it costs" in short.output
    fits = run_cli("--machine", "4xA10", "--plot", tmp_path / "fits.png")
    assert fits.exit_code == 0
    assert "FITS, with" in fits.output
    assert dolly_plan("4xA10").command in fits.output
    assert dolly_plan("2xA10").fits
    for file in (picture, tmp_path / "fits.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_a_model_that_cannot_be_packed_is_planned_with_padded_rows_and_a_warning(tmp_path):
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    plans = {}
    for config in (OPTConfig(**sizes, ffn_dim=3072), GPTNeoXConfig(**sizes, intermediate_size=3072)):
        config.save_pretrained(tmp_path / config.model_type)
        options = TrainingOptions(
            local_output_dir="OUTPUT",
            input_model=str(tmp_path / config.model_type),
            per_device_train_batch_size=8,
        )
        plans[config.model_type] = plan_options(options, 8, find_machine("8xA100-40GB"))
    padded, packed = plans["opt"], plans["gpt_neox"]
    assert (padded.settings.batching, padded.settings.max_tokens) == ("length", None)
    assert (packed.settings.batching, packed.warning) == ("packed", "")
    assert padded.load.real_tokens == packed.load.real_tokens == packed.load.computed_tokens
    # rows of similar length together: 79% of the tokens that 8 ranks compute are real (docs/packing.md)
    assert 0.75 < padded.load.real_tokens / padded.load.paced_tokens < 0.85
    assert padded.activations_gib["without checkpointing"] > packed.activations_gib["without checkpointing"]
    more = padded.load.paced_tokens / packed.load.paced_tokens
    assert padded.warning.endswith(f"The devices compute {more:.1f} times as many tokens")
    assert f"WARNING: {padded.warning}" in as_table(padded, None)
    assert as_json(padded, None)["warnings"] == [padded.warning]
    assert "WARNING" not in as_table(packed, None)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--machine", "p4d.24xlrge"], "Nearest: p4d.24xlarge"),
        (["--machine", "8xH100", "--num-gpus", 0], "--num-gpus 0: at least one device is needed"),
        (["--num-gpus", -1], "--num-gpus -1: at least one device is needed"),
        (["--machine", "8xH100", "--num-gpus", 9], "--num-gpus 9: 8xH100 has 8"),
        (["--machine", "8xH100", "--deepspeed", "none.json"], "Available are"),
        (["--machine", "8xH100", "--deepspeed", "odd.json"], "sets zero_optimization 7, expected an object"),
        (["--local-output-dir", "~nobody-of-that-name/x"], "Name a folder of your own"),
        (["--machine", "8xH100", "--input-model", "not/looked-up", "--training-dataset", "none.jsonl"], "none.jsonl: no such file"),
        (["--machine", "8xH100", "--model", "demo", "--training-dataset", "one.jsonl"],
         "1 row, but at least 2 are needed: one to train on and one to hold out"),
        (["--machine", "8xH100", "--model", "demo", "--training-dataset", "one.jsonl", "--dataset-split", "test"],
         "one.jsonl: is not on the Hub, so --dataset-split would be ignored. Leave it out"),
        (["--machine", "8xH100", "--input-model", "/no/such/model"], "/no/such/model: no such folder"),
        (["--machine", "8xH100", "--input-model", "./negative"], "vocab_size is -1, expected 1 to"),
        (["--machine", "8xH100", "--input-model", "./t5"], "t5 model is not a causal language model"),
        (["--machine", "8xH100", "--batching", "padded", "--max-tokens-per-device", 9], "splits packed rows"),
        (["--machine", "8xV100-32GB", "--deepspeed", BF16], f"cannot compute in bf16. Type --deepspeed {FP16}"),
        (["--machine", "8xV100-32GB", "--num-gpus", 2, "--deepspeed", ZERO_2],
         f"a V100-32GB cannot compute in bf16. Type --deepspeed {FP16_OFFLOAD}"),
        (["--machine", "8xH100", "--test-size", 60000], "--test-size 60000 is more than half of the 52,002 rows. Type --test-size 1000"),
        (["--machine", "8xH100", "--epochs", "nan"], "--epochs nan: expected a finite number"),
        (["--machine", "8xH100", "--epochs", "1e300"], "1e+300 is not in the range 0<x<=10000"),
        (["--machine", "8xH100", "--price", "inf"], "--price inf: expected a finite number"),
        (["--machine", "8xH100", "--plot", "/no/such/folder/a.png"], "in a folder that exists"),
        (["--machine", "8xH100", "--plot", "a.xyz"], "ends in .png, .pdf or .svg"),
        (["--machine", "8xH100", "--plot", f"{300 * 'x'}.png"], "in a folder that exists and can be written"),
        (["--machine", "8xH100", "--deepspeed", ""], "--deepspeed is empty. Give a value"),
        (["--machine", ""], "--machine is empty. Give a value"),
        (["--gpu-memory", 24], "--gpu-memory: also type --gpu-flops, in TFLOP/s in bf16, such as 165"),
        (["--gpu-flops", 165], "--gpu-flops: also type --gpu-memory, in GiB, such as 24"),
        (["--host-memory", 64], "--host-memory: also type --gpu-memory"),
        (["--gpu-memory", 0, "--gpu-flops", 165], "0 is not in the range"),
        (["--gpu-memory", "nan", "--gpu-flops", 165], "--gpu-memory nan: expected a finite number"),
        (["--gpu-memory", 24, "--gpu-flops", 165, "--host-memory", "nan"], "--host-memory nan: expected a finite"),
        (["--machine", "1xL4", "--gpu-memory", 24], "--machine 1xL4: has its own figures. Leave out --gpu-memory, or"),
        (["--machine", "8xH100", "--gradient-accumulation-steps", "1" + 19 * "0"], "1<=x<=1024"),
    ],
)  # fmt: skip
def test_invalid_options_are_reported_without_a_traceback(typed, message, tmp_path, monkeypatch):
    (tmp_path / "odd.json").write_text('{"zero_optimization": 7}')
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "one.jsonl", rows_of(1))
    T5Config().save_pretrained(tmp_path / "t5")
    GPTNeoXConfig(vocab_size=-1).save_pretrained(tmp_path / "negative")
    result = run_cli(*typed)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_ones_own_machine_is_planned_like_a_known_one_with_the_same_figures():
    known = json.loads(run_cli("--machine", "2xRTX-4090", "--json").output)
    own = "--gpu-memory", 23.6, "--gpu-flops", 165.2, "--num-gpus", 2, "--host-memory", 128
    described = json.loads(run_cli(*own, "--json").output)
    for key in ("fits", "hours", "gpu_memory_gib", "host_memory_gib", "command"):
        assert described[key] == known[key], key
    assert "2 x GPU of 23.6 GiB" in run_cli(*own).output


def test_the_demo_is_planned_on_this_machine(tmp_path):
    picture = tmp_path / "memory.png"
    result = run_cli(
        "--input-model", "demo", "--training-dataset", "demo", "--test-size", 100, "--json", "--plot", picture
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["gpu"], answer["num_gpus"], answer["global_batch_rows"]) == ("CPU", 2, 64)
    assert 0 < answer["hours"]["expected"] < 24, "this machine may be busy"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (
        "CPU rank" in run_cli("--input-model", "demo", "--training-dataset", "demo", "--num-gpus", 1).output
    )


def test_a_model_too_large_for_this_machine_is_short_of_host_memory(tmp_path):
    small = replace(this_machine(tmp_path, 2), host_gib=4.0)
    options = TrainingOptions(local_output_dir="x", **preset_options("cpu", 2))
    plan = plan_run(resolved(options, 2, small.family), alpaca_lengths(), GPTJ, small)
    assert "host memory" in plan.shortages
    assert "GPU memory" not in plan.shortages


def test_a_model_in_a_folder_and_rows_in_a_file_can_be_planned(tmp_path, base_folder):
    file = jsonl(tmp_path / "rows.jsonl", rows_of(40))
    rows = ["--training-dataset", file, "--test-size", 10]
    result = run_cli("--machine", "8xH100", "--input-model", base_folder, *rows, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["fits"]
    assert answer["steps_per_epoch"] == 1
    assert f"--training-dataset {file}" in answer["command"]


def test_predictions_are_within_a_factor_of_1_5_of_published_runs_and_match_the_docs():
    page = (ROOT / "docs" / "plan.md").read_text()
    assert run_cli("--machine", "8xA100-40GB", "--price", 21.96).output.rstrip() in page
    assert dolly_plan("4xA10", deepspeed=BF16).problems[0] in page
    rows = [line for line in page.splitlines() if re.search(r"\| \d\.\d\d \[[12]\] \|", line)]
    for (machine, deepspeed, hours), row in zip(PUBLISHED, rows, strict=True):
        padded, packed = dolly_plan(machine, deepspeed=deepspeed, **DOLLY), dolly_plan(machine)
        theirs, ours = padded.hours["expected"], packed.hours["expected"]
        assert 1 / 1.5 < theirs / hours < 1.5, machine
        assert padded.fits
        assert packed.fits
        assert dolly_plan(machine, batching="padded").fits
        assert ours < theirs
        figures = re.findall(r"\d+\.\d\d", row.split("`", 2)[-1].split("an epoch")[-1])
        assert figures == [f"{figure:.2f}" for figure in (hours, theirs, theirs / hours, ours)], machine
        for option in re.findall(
            r"--per-device-train-batch-size \d+|--gradient-accumulation-steps \d+|--deepspeed \S+json",
            row,
        ):
            assert option in packed.command, machine


@pytest.mark.parametrize("gib", [0.85, 0.9, 0.95, 1.0])
def test_the_token_budget_on_a_cpu_leaves_memory_for_saving(gib):
    demo, machine = (
        model_shape("demo"),
        replace(this_machine(".", 1), host_gib=gib, disk_gib=1000.0, flops=1e11),
    )
    options = TrainingOptions(
        local_output_dir="OUTPUT", per_device_train_batch_size=512, max_tokens_per_device="auto"
    )
    rows = Lengths("rows", np.full(5000, 50), 0.1)
    assert plan_run(resolved(options, 1, machine.family), rows, demo, machine).fits


def test_a_model_without_gradient_checkpointing_is_planned_without_it_and_refused_with_it(tmp_path):
    OpenAIGPTConfig(n_embd=64, n_layer=2, n_head=2).save_pretrained(tmp_path)
    shape = model_shape(str(tmp_path))
    assert not shape.checkpointing
    machine, auto = find_machine("4xA10"), settings_of_a_run(ranks=4, per_device_train_batch_size=8)
    plan = plan_run(auto, alpaca_lengths(), replace(shape, layers=10**6), machine)
    assert not plan.fits
    assert plan.settings.checkpointing is False
    assert "--gradient-checkpointing" not in str(plan.changes)
    with pytest.raises(
        OptionsError, match="--gradient-checkpointing on: transformers has none for openai-gpt models"
    ):
        plan_run(replace(auto, checkpointing=True), alpaca_lengths(), shape, machine)
