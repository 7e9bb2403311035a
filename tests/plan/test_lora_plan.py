"""The plan of adapters (LoRA) and of a base in 4 bits: sizes, time, the nearest change, and measured activations."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, GPTJConfig, GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from tests.conftest import resolved
from tests.plan.peak import peak_bytes
from tests.plan.test_memory import LONG_BF16, small_batch, small_gptj
from training.consts import GIB, ROOT
from training.errors import OptionsError
from training.machine.catalogue import find_machine
from training.machine.flops import training_flops
from training.model.adapter import Lora, add_adapter
from training.options.settings import Settings
from training.options.trainer_options import TrainingOptions
from training.plan.__main__ import main
from training.plan.adapter import NF4_BYTES, adapter_of, frozen_bytes, trained_parameters
from training.plan.epoch import alpaca_lengths
from training.plan.fit import Plan, plan_run
from training.plan.lookup import model_shape
from training.plan.memory import activation_bytes, host_memory, loss_bytes, state_bytes
from training.plan.model_shape import ModelShape, gptj_shape, neox_shape
from training.plan.presets import preset_options
from training.plan.timing import host_seconds

ZERO_2, ZERO_3 = "config/ds_z2_bf16_config.json", "config/ds_z3_bf16_config.json"
GPTJ = model_shape("EleutherAI/gpt-j-6B")


def lora_settings(ranks: int = 1, precision: str = "bf16", **options: Any) -> Settings:
    chosen = TrainingOptions(**{"local_output_dir": "OUTPUT", "lora": 16, "save_steps": 200} | options)
    return replace(resolved(chosen, ranks, "a10"), precision=precision)


def lora_plan(machine: str, **options: Any) -> Plan:
    place = find_machine(machine)
    preset = preset_options(place.family, place.count, lora=True)
    chosen = TrainingOptions(**{"local_output_dir": "OUTPUT", "epochs": 1.0, "lora": 16} | preset | options)
    return plan_run(resolved(chosen, place.count, place.family), alpaca_lengths(), GPTJ, place)


def plan_cli(*words: object) -> dict[str, Any]:
    return json.loads(CliRunner().invoke(main, [*map(str, words), "--json"]).output)


# --- sizes -------------------------------------------------------------------------------------------

GPTJ_CONFIG = GPTJConfig(vocab_size=60, n_positions=32, n_embd=32, n_layer=3, n_head=4, rotary_dim=8)
NEOX_CONFIG = GPTNeoXConfig(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=32,
)
LLAMA_CONFIG = LlamaConfig(
    vocab_size=60, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip


def folder_shape(config: PreTrainedConfig, folder: Any) -> ModelShape:
    config.save_pretrained(folder)
    return model_shape(str(folder))


@pytest.mark.parametrize(
    ("config", "tied"),
    [(GPTJ_CONFIG, False), (NEOX_CONFIG, False), (LLAMA_CONFIG, False), (LLAMA_CONFIG, True)],
    ids=["gptj", "neox", "llama", "tied"],
)
@pytest.mark.parametrize("targets", ["all", "two names"])
def test_the_trained_parameters_are_those_that_training_adds(config, tied, targets, tmp_path):
    config.tie_word_embeddings = tied
    names = {"gptj": "q_proj,mlp.fc_out", "gpt_neox": "query_key_value,dense", "llama": "q_proj,down_proj"}
    chosen = "all" if targets == "all" else names[config.model_type]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    add_adapter(model, Lora(4, 8.0, targets=chosen), [57, 58, 59], seed=0)
    settings = lora_settings(lora=4, lora_targets=chosen)
    shape = folder_shape(config, tmp_path)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert trained_parameters(shape, settings) == sum(tensor.numel() for tensor in trained.values())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert shape.parameters == frozen


def test_the_built_in_shapes_have_the_layers_of_the_models(tmp_path):
    for config, built_in in (
        (GPTJ_CONFIG, gptj_shape("x", 3, 32, 4, 60)),
        (NEOX_CONFIG, neox_shape("x", 2, 32, 4, 60)),
    ):
        found = folder_shape(config, tmp_path)
        assert set(built_in.linears) == set(found.linears)
        assert (built_in.head_bias, built_in.tied) == (found.head_bias, False)


def test_gptj_at_rank_16_trains_33_million_parameters():
    # 28 blocks of 4 square layers and 2 between 4096 and 16384; 3 rows in embedding and head, and 3 biases
    matrices = 28 * 16 * (4 * 2 * 4096 + 2 * (4096 + 16384))
    assert trained_parameters(GPTJ, lora_settings()) == matrices + 3 * (2 * 4096 + 1) == 33_054_723


def test_a_layer_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(
        OptionsError, match=r"--lora-targets q_prj: .*no linear layer of that name. Type q_proj"
    ):
        adapter_of(GPTJ, lora_settings(lora_targets="q_prj,v_proj"))


# --- memory ------------------------------------------------------------------------------------------


def test_state_of_an_adapter_is_16_bytes_a_parameter_and_2_for_frozen_ones():
    trained = trained_parameters(GPTJ, lora_settings())
    assert state_bytes(GPTJ, lora_settings()) == {
        "frozen weights": 2 * GPTJ.parameters,
        "adapter": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
    }
    assert state_bytes(GPTJ, lora_settings(precision="fp32"))["frozen weights"] == 4 * GPTJ.parameters
    for stage, file in ((2, ZERO_2), (3, ZERO_3)):
        assert state_bytes(GPTJ, lora_settings(4, deepspeed=file)) == {
            "frozen weights": 2 * GPTJ.parameters / (4 if stage == 3 else 1),
            "adapter": 2 * trained / (4 if stage == 3 else 1),
            "gradients": 2 * trained / 4,
            "optimizer": 12 * trained / 4,
        }


def test_weights_in_4_bits_have_scales_and_embedding_and_head_stay_in_16():
    settings = lora_settings(quantize="nf4")
    linear = 28 * 12 * 4096**2
    expected = NF4_BYTES * linear + 2 * (GPTJ.parameters - linear)
    assert frozen_bytes(GPTJ, settings) == expected
    assert expected / GIB == pytest.approx(3.48, abs=0.01)


def test_weights_in_4_bits_have_the_bytes_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(1024, 1024)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    held = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert NF4_BYTES * weight.numel() == pytest.approx(held, rel=0.001)


def test_a_frozen_head_has_no_gradient():
    trained = loss_bytes(GPTJ, 1000, 500, 2, packed=True)
    assert trained - loss_bytes(GPTJ, 1000, 500, 2, packed=True, frozen=True) == 2 * 4096 * 50400


def test_a_checkpoint_of_gptj_at_rank_16_is_below_1_gib():
    plan = lora_plan("g5.2xlarge", save_steps=200, save_total_limit=2)
    assert plan.disk_gib["checkpoints"] == pytest.approx(3 * 12 * 33_054_723 / GIB)
    assert plan.disk_gib["checkpoints"] / 3 < 0.4
    merged = 2 * GPTJ.parameters + 2 * 4096 * 50400 + 4 * 33_054_723  # and the adapter with its head
    assert plan.disk_gib["model"] == merged / GIB, "the merged model is in the run's precision"
    assert plan.settings.checkpoint_seconds < 5
    assert plan.emergency_save_fits


def test_host_memory_holds_the_base_to_load_and_to_merge():
    host = host_memory(GPTJ, lora_settings())
    assert host["loading"] == pytest.approx(3 + 2 * GPTJ.parameters / GIB)
    assert host["merging"] == pytest.approx(3 + (2 * GPTJ.parameters + 4 * 4096 * 16384) / GIB)
    quantized = host_memory(GPTJ, lora_settings(quantize="nf4"))
    assert quantized["loading"] < 4
    assert quantized["merging"] == host["merging"], "never into weights of 4 bits"


# --- time --------------------------------------------------------------------------------------------


def test_frozen_weights_save_a_third_of_their_work():
    full = training_flops(120, 0, 2, 1, 1000, 0, 0)
    assert training_flops(120, 0, 2, 1, 1000, 0, 0, adapters=0) == full * 4 / 6
    full, frozen = (lora_plan("8xA100-40GB", lora=rank).step_seconds["compute"] for rank in (0, 1))
    assert 0.66 < frozen / full < 0.7


def test_adapters_on_several_gpus_send_only_their_gradients():
    steps = {
        file: lora_plan("4xA10", deepspeed=file, gradient_checkpointing="on").step_seconds["gathering"]
        for file in (ZERO_2, ZERO_3)
    }
    assert steps[ZERO_2] < 0.1
    assert steps[ZERO_3] > 2, "12 GB for the forward and for the backward pass at 6 GB/s"


def test_the_host_queues_the_matrices_of_adapters_too():
    settings, machine = lora_settings(), find_machine("p5.4xlarge")
    few = lora_settings(lora_targets="q_proj,v_proj")
    alone = host_seconds(GPTJ, machine, replace(settings, options=replace(settings.options, lora=0)))
    assert host_seconds(GPTJ, machine, few) - alone == pytest.approx(1.3 * 56 * 0.17e-3)
    assert host_seconds(GPTJ, machine, settings) - alone == pytest.approx(1.3 * 168 * 0.17e-3)


def test_weights_in_4_bits_take_longer_than_in_16():
    plain, packed = lora_plan("g5.2xlarge"), lora_plan("g5.2xlarge", quantize="nf4")
    assert "unpacking" not in {name for name, value in plain.step_seconds.items() if value}
    assert 1.0 < packed.step_seconds["unpacking"] / plain.step_seconds["compute"] + 1 < 1.5


# --- the nearest change ------------------------------------------------------------------------------

ON_ONE = (
    "python -m training.trainer --epochs 1 --per-device-train-batch-size 16 --gradient-accumulation-steps 4"
)


def test_full_tuning_on_one_small_gpu_does_not_fit_and_lora_is_named_with_its_command():
    for machine in ("1xRTX-4090", "1xA6000", "a2-highgpu-1g"):
        answer = plan_cli("--machine", machine, "--deepspeed", ZERO_3)
        assert answer["fits"] is False
        assert any("Type --lora 16 " in problem for problem in answer["faults"]), machine
        assert answer["nearest"] == {"machine": find_machine(machine).name,
                                     "command": f"{ON_ONE} --lora 16 --local-output-dir OUTPUT"}  # fmt: skip


def test_a_host_of_16_gib_is_too_small_to_merge_and_the_next_size_is_named():
    text = CliRunner().invoke(main, ["--machine", "g5.xlarge"]).output
    assert "DOES NOT FIT" in text
    assert text.rstrip().endswith(
        f"This run fits on g5.2xlarge:\n  {ON_ONE} --lora 16 --local-output-dir OUTPUT"
    )
    assert text[text.index("DOES NOT FIT") :].rstrip() in (ROOT / "docs" / "plan.md").read_text()
    lora = plan_cli("--machine", "g5.xlarge", "--lora", 16)
    [problem] = lora["faults"]
    assert problem.startswith(
        "host memory: 14.5 GiB are needed while merging, 0.2 more than the 14.4 of g5.xlarge"
    )
    assert problem.endswith("It fits on g5.2xlarge")
    assert plan_cli("--machine", "g5.2xlarge", "--lora", 16)["fits"] is True


def test_a_base_that_is_too_large_in_16_bits_is_loaded_in_4():
    large = "--machine", "g5.2xlarge", "--model", "EleutherAI/pythia-12b"
    answer = plan_cli(*large, "--lora", 16)
    [problem] = answer["faults"]
    assert "Type --quantize nf4" in problem
    options = "--per-device-train-batch-size 16 --gradient-accumulation-steps 4 --lora 16 --quantize nf4"
    for words in (large, (*large, "--lora", 16)):
        command = plan_cli(*words)["nearest"]["command"]
        assert command.startswith("python -m training.trainer --input-model EleutherAI/pythia-12b ")
        assert options in command, words


def test_options_that_keep_full_tuning_come_before_adapters():
    answer = plan_cli("--machine", "4xA10", "--deepspeed", ZERO_3)
    assert answer["nearest"]["command"].count("--lora ") == 0
    assert "offload" in answer["nearest"]["command"]


@pytest.mark.parametrize(
    "machine", ["g5.2xlarge", "1xL4", "1xRTX-3090", "1xL40S", "a2-highgpu-1g", "a3-highgpu-1g"]
)
def test_one_gpu_of_24_gb_or_more_trains_adapters_without_deepspeed(machine):
    answer = plan_cli("--machine", machine, "--lora", 16)
    assert answer["fits"] is True
    assert (answer["method"], answer["trained_parameters"]) == ("lora", 33_054_723)
    assert answer["command"].startswith("python -m training.trainer --epochs 1 ")
    assert "--deepspeed" not in answer["command"]


def test_several_gpus_keep_the_whole_frozen_weights_or_share_them_if_they_are_too_large():
    assert ZERO_2 in plan_cli("--machine", "4xA10", "--lora", 16)["command"]
    large = plan_cli("--machine", "4xA10", "--lora", 16, "--model", "EleutherAI/pythia-12b")
    [problem] = large["faults"]
    assert f"Type --deepspeed {ZERO_3}" in problem
    assert preset_options("v100", 4, lora=True)["deepspeed"] == "config/ds_z3_fp16_config.json"


def test_a_deepspeed_file_without_which_the_run_fits_is_left_out():
    small = replace(find_machine("1xA10G"), gpu_memory_gib=14.0)
    settings = lora_settings(deepspeed=ZERO_2, per_device_train_batch_size=1, save_total_limit=1)
    plan = plan_run(settings, alpaca_lengths(), GPTJ, small)
    assert plan.changes == {"GPU memory": "Leave out --deepspeed"}
    assert plan.nearest is not None
    assert "--deepspeed" not in plan.nearest.command


def test_adapters_on_a_model_without_linear_layers_are_refused_and_not_suggested():
    other, small = replace(GPTJ, linears=()), find_machine("1xA10G")
    with pytest.raises(OptionsError, match=r"--lora: a gptj model has no linear layers\. Leave out --lora"):
        plan_run(lora_settings(), alpaca_lengths(), other, small)
    plan = plan_run(lora_settings(lora=0), alpaca_lengths(), other, small)
    assert plan.problems
    assert "--lora" not in " ".join(plan.problems)


# --- against measurements ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(256, 8, 8, 512), (256, 2, 8, 20_000)], ids=["deep", "large vocabulary"])
@pytest.mark.parametrize("dtype", [torch.float32, LONG_BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["no checkpointing", "checkpointing"])
def test_predicted_activations_of_adapters_are_within_a_quarter_of_the_measured_peak(
    checkpointing, dtype, shape
):
    width, layers, heads, vocabulary = shape
    model = small_gptj(*shape, dtype=dtype)
    batch = small_batch(model, packed=True)
    add_adapter(model, Lora(16, 32.0), [vocabulary - 3, vocabulary - 2, vocabulary - 1], seed=0)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # the plan counts gradients separately

    def step() -> None:
        model(**batch, num_items_in_batch=torch.tensor(100)).loss.backward()

    step()
    measured = peak_bytes(step)
    facts = gptj_shape("small", layers, width, heads, vocabulary)
    adapter = adapter_of(facts, lora_settings())
    predicted = sum(
        activation_bytes(
            facts, batch["input_ids"].numel(), 176, batch["shift_labels"].numel(), dtype.itemsize, True,
            checkpointing, adapter,
        )
    )  # fmt: skip
    print(
        f"\n{predicted / 2**20:.1f} MiB predicted, {measured / 2**20:.1f} measured: {predicted / measured:.2f}"
    )
    assert 0.75 < predicted / measured < 1.25
