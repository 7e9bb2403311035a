"""Device memory, host memory and disk: the formulas against hand-computed cases and against measurements."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM

from tests.conftest import resolved, settings_of_a_run
from tests.plan.peak import peak_bytes
from tests.starts import run, torchrun
from training import consts
from training.consts import GIB, LOSS_CHUNK_BYTES
from training.data.collator import DataCollatorForCompletionOnlyLM, DataCollatorForPackedRows
from training.model.attention import use_packed_attention
from training.model.loss import use_response_loss
from training.options.deepspeed import LARGEST_BUCKET, Zero
from training.options.settings import Settings
from training.options.trainer_options import TrainingOptions
from training.plan.adapter import trained_parameters
from training.plan.epoch import Lengths, alpaca_lengths, epoch_load
from training.plan.lookup import model_shape
from training.plan.memory import (
    activation_bytes,
    auto_max_tokens_per_device,
    device_memory,
    disk,
    host_memory,
    layer_bytes,
    loss_bytes,
    offloaded_gradient_bytes,
    state_bytes,
    with_fastest_choices,
)
from training.plan.model_shape import ModelShape, gptj_shape

BF16, BF16_OFFLOAD = "config/ds_z3_bf16_config.json", "config/ds_z3_bf16_offload_config.json"
ZERO_2 = "config/ds_z2_bf16_config.json"
GPTJ = model_shape("EleutherAI/gpt-j-6B")
TINY = gptj_shape("tiny", layers=2, width=8, heads=2, vocabulary=100)
OFFLOAD = Zero(stage=3, offload_optimizer=True, pinned=True)


# --- a device ----------------------------------------------------------------------------------------


def test_model_state_is_16_bytes_a_parameter_divided_by_the_ranks_only_with_zero3():
    parts, shard = state_bytes(TINY, settings_of_a_run(ranks=4)), TINY.parameters / 4
    assert parts == {"weights": 2 * shard, "gradients": 2 * shard, "optimizer": 12 * shard}
    offloaded = state_bytes(TINY, settings_of_a_run(ranks=4, zero=OFFLOAD))
    assert offloaded == {"weights": 2 * shard, "gradients": 0, "optimizer": 0}
    for precision in ("fp32", "bf16"):
        alone = state_bytes(TINY, settings_of_a_run(ranks=2, zero=Zero(), precision=precision))
        assert alone == {part: n * TINY.parameters for part, n in zip(parts, (4, 4, 8), strict=True)}


def test_layer_bytes_match_a_hand_computed_case():
    # packed, 16 bit, 10 tokens of width 8: 7 x 8 + 2 x 32 numbers of 2 bytes a token
    assert layer_bytes(TINY, 10, 5, 2, packed=True) == 10 * 2 * (56 + 64)
    # padded: 4 x 8 + 5 x 32 of 2 bytes, query and key 2 x 8 of 4, scores of 2 heads over 5 keys of 4 + 2 bytes
    assert layer_bytes(TINY, 10, 5, 2, packed=False) == 10 * (2 * (32 + 160) + 64 + 2 * 5 * 6)


def test_loss_bytes_match_a_hand_computed_case():
    assert loss_bytes(TINY, 10, 5, 2, packed=False) == 12 * 10 * 100
    assert loss_bytes(TINY, 10, 5, 2, packed=True) == 5 * 100 * (4 + 2) + 2 * 8 * (100 + 5)
    assert LOSS_CHUNK_BYTES == consts.LOSS_CHUNK_BYTES
    chunked = loss_bytes(GPTJ, 10**6, 10**5, 2, packed=True) - 2 * 4096 * (50400 + 10**5)
    assert chunked == pytest.approx(1.5 * LOSS_CHUNK_BYTES, rel=0.01), (
        "only one chunk of logits exists at a time"
    )


def test_checkpointing_keeps_the_inputs_of_all_layers_and_the_tensors_of_one():
    deep = replace(TINY, layers=10, vocabulary=1)
    inputs, layer = 10 * 100 * 8 * 2, layer_bytes(deep, 100, 50, 2, packed=True)
    activations, logits = activation_bytes(deep, 100, 50, 50, 2, packed=True, checkpointing=True)
    assert (activations, logits) == (inputs + layer + 4 * 100 * 8 * 2, 0)
    activations, _ = activation_bytes(deep, 100, 50, 50, 2, packed=True, checkpointing=False)
    assert activations == 10 * layer + 4 * 100 * 8 * 2


def memory(settings: Settings, tokens: int = 8, rows: int = 100) -> dict[str, float]:
    lengths = Lengths("alike", np.full(rows, tokens), 0.5)
    return device_memory(GPTJ, settings, epoch_load(lengths, settings), 0.5)


def test_gathered_layers_are_limited_by_max_live_parameters():
    settings = settings_of_a_run(ranks=8, checkpointing=True)
    embedding = 50400 * 4096  # the largest parameter
    assert memory(settings)["gathered layers"] == 2 * (1e9 + embedding) / GIB
    few = settings_of_a_run(ranks=8, checkpointing=True, zero=Zero(stage=3, live_parameters=1e8))
    assert memory(few)["gathered layers"] == 2 * (1e8 + embedding) / GIB
    assert memory(replace(settings, ranks=1))["gathered layers"] == 0, "a single rank gathers nothing"
    plain = settings_of_a_run(ranks=8, checkpointing=True, zero=Zero())
    assert memory(plain)["gathered layers"] == 2 * GPTJ.parameters / GIB


def test_float32_gradients_of_the_optimizer_step_count_beyond_freed_activations():
    parts = memory(settings_of_a_run(ranks=2, per_device_train_batch_size=1, test_size=1, checkpointing=True))
    freed = sum(
        parts[part] for part in ("gathered layers", "activations", "logits and loss", "communication")
    )
    bucket = 2 * 4096**2 / GIB  # stays
    assert parts["optimizer step"] == pytest.approx(
        6e9 / GIB - (freed - bucket)
    )  # a sub-group has 1e9 parameters
    assert (
        memory(settings_of_a_run(ranks=2, per_device_train_batch_size=1, test_size=1, zero=OFFLOAD))[
            "optimizer step"
        ]
        == 0
    )


def test_zero_2_holds_whole_weights_two_buckets_and_copies_its_whole_shard_of_the_gradients():
    zero = Zero(stage=2, bucket=1e8, sub_group=1e3)
    run = {"per_device_train_batch_size": 1, "test_size": 1, "checkpointing": True}
    parts = memory(settings_of_a_run(ranks=2, zero=zero, **run))
    share = GPTJ.parameters / 2
    expected = {"weights": 4 * share, "gradients": 2 * share, "optimizer": 12 * share, "gathered layers": 0}
    assert {part: parts[part] for part in expected} == {part: n / GIB for part, n in expected.items()}
    twice = memory(settings_of_a_run(ranks=2, zero=zero, gradient_accumulation_steps=2, **run))
    assert twice["gradients"] == 2 * parts["gradients"], (
        "those of earlier micro-steps are kept beside the new ones"
    )
    assert parts["communication"] == 2 * (2 * 1e8 + 50400 * 4096) / GIB
    freed = sum(parts[part] for part in ("activations", "logits and loss", "communication"))
    assert parts["optimizer step"] == pytest.approx(6 * share / GIB - freed)
    on_cpu = device_memory(TINY, settings_of_a_run(ranks=2, zero=zero, checkpointing=True),
                           epoch_load(alpaca_lengths(), settings_of_a_run(ranks=2)), 0.5, cpu=True)  # fmt: skip
    assert on_cpu["communication"] == 2 * (2 * TINY.parameters + 100 * 8) / GIB, "only written pages count"


def test_a_token_budget_limits_activations_down_to_one_row():
    whole = settings_of_a_run(ranks=8, checkpointing=False, test_size=1)
    sizes = [
        memory(replace(whole, max_tokens=n), tokens=100)["activations"] for n in (None, 10**6, 400, 100, 50)
    ]
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3] == sizes[4]


def test_communication_counts_buckets_and_copies_by_stage():
    block, embedding, one = GPTJ.block, 50400 * 4096, 4096**2
    plain = settings_of_a_run(ranks=8)
    whole = replace(plain, whole_blocks=True)
    assert memory(plain)["communication"] == 2 * (one + embedding) / GIB
    # bucket, its copy, the largest gradient; a prefetched block and a parameter beyond nine tenths of it
    assert memory(whole)["communication"] == 2 * (2 * block + embedding + int(0.9 * block) + 4 * one) / GIB
    assert memory(replace(whole, ranks=1))["communication"] == 2 * (2 * block + embedding) / GIB
    stage_2 = settings_of_a_run(ranks=8, zero=Zero(stage=2))
    assert memory(stage_2)["communication"] == 2 * (2 * one + embedding) / GIB
    assert memory(replace(stage_2, whole_blocks=True))["communication"] == 2 * (2 * block + embedding) / GIB
    typed = settings_of_a_run(ranks=8, zero=Zero(stage=3, bucket=5e7, prefetch=4e7))
    assert memory(typed)["communication"] == 2 * (5e7 + embedding) / GIB
    assert (
        memory(replace(typed, whole_blocks=True))["communication"]
        == 2 * (1e8 + embedding + 4e7 + 4 * one) / GIB
    )


# --- auto --------------------------------------------------------------------------------------------


def test_the_auto_token_budget_is_the_most_that_fits_and_none_if_everything_fits():
    settings = settings_of_a_run(ranks=8, checkpointing=False)
    load = epoch_load(alpaca_lengths(), settings)

    def total(tokens: int) -> float:
        return sum(device_memory(GPTJ, replace(settings, max_tokens=tokens), load, 0.57).values())

    budget = auto_max_tokens_per_device(GPTJ, settings, load, 0.57, memory_gib=18.5)
    assert load.peak_row < budget < load.peak_tokens
    assert total(budget) <= 18.5 < total(budget + 16)
    assert auto_max_tokens_per_device(GPTJ, settings, load, 0.57, memory_gib=39.4) is None
    assert auto_max_tokens_per_device(GPTJ, settings, load, 0.57, memory_gib=1.0) == load.peak_row
    padded = replace(settings, batching="padded")
    assert auto_max_tokens_per_device(GPTJ, padded, epoch_load(alpaca_lengths(), padded), 0.57, 1.0) is None


def test_the_fastest_choice_that_fits_is_taken_and_the_smallest_always_remains():
    settings = settings_of_a_run(ranks=8, checkpointing="auto", per_device_train_batch_size=32)
    load = epoch_load(alpaca_lengths(), settings)

    def total(checkpointing: bool, whole: bool) -> float:
        choice = replace(settings, checkpointing=checkpointing, whole_blocks=whole)
        return sum(device_memory(GPTJ, choice, load, 0.57).values())

    def choice(gib: float, model: ModelShape = GPTJ, **changes: Any) -> tuple[Any, Any]:
        chosen = with_fastest_choices(model, replace(settings, **changes), load, 0.57, gib)
        return chosen.checkpointing, chosen.whole_blocks

    order = [(False, True), (False, False), (True, True), (True, False)]
    needs = [total(*pair) for pair in order]
    assert needs == sorted(needs, reverse=True)
    for pair, gib in zip(order, needs, strict=True):
        assert choice(gib) == pair, "what fitted without whole blocks fits as before"
    assert choice(1.0) == (True, False)
    assert choice(99.0, checkpointing=True) == (True, True)
    assert choice(99.0, checkpointing=False, whole_blocks=False) == (False, False), (
        "a resumed run keeps its choice"
    )
    assert choice(99.0, replace(GPTJ, checkpointing=False)) == (False, True)
    # Blocks that are no units, or too large, are handled a module at a time.
    for block in (0, LARGEST_BUCKET + 1):
        assert choice(99.0, replace(GPTJ, block=block)) == (False, False)
    file = {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 10**6}}
    for config in (None, file):
        assert choice(999.0, deepspeed=config) == (False, False)


# --- host and disk -----------------------------------------------------------------------------------


def test_host_memory_of_offloaded_optimizers_and_of_loading_without_zero():
    training = host_memory(GPTJ, settings_of_a_run(ranks=8, zero=OFFLOAD))["training"]
    # a rank's shard of 0.756e9 parameters: float32 gradients 3.03e9 -> 2^32 bytes, 16-bit 1.51e9 -> 2^31
    expected = 12 * GPTJ.parameters + 8 * (2**32 + 2**31) + 2 * GPTJ.parameters
    assert training == pytest.approx(expected / GIB + 8 * 3.0)
    on_two_machines = host_memory(GPTJ, settings_of_a_run(ranks=16, zero=OFFLOAD), local_ranks=8)["training"]
    assert on_two_machines == pytest.approx(
        (6 * GPTJ.parameters + 8 * (2**31 + 2**30) + 2 * GPTJ.parameters) / GIB + 24
    )
    whole = host_memory(GPTJ, settings_of_a_run(ranks=16, zero=Zero(stage=2)), local_ranks=8)["loading"]
    expected = 4 * GPTJ.parameters + 8 * 2 * GPTJ.parameters  # the file once, 16-bit weights of each rank
    assert whole == pytest.approx(expected / GIB + 24)
    loading = host_memory(GPTJ, settings_of_a_run(ranks=8, zero=Zero()))["loading"]
    assert loading == pytest.approx(
        8 * (4 * GPTJ.parameters / GIB + 3.0)
    )  # the cause of Dolly v1's exit code -9


def test_an_offloaded_optimizer_has_one_gradient_buffer_per_sub_group_and_a_flat_one():
    settings = settings_of_a_run(ranks=1, zero=replace(OFFLOAD, sub_group=1000))
    assert offloaded_gradient_bytes(replace(TINY, parameters=2500), settings) == [4000, 4000, 2000, 5000]
    assert offloaded_gradient_bytes(replace(TINY, parameters=1000), settings) == [4000, 2000]


def test_disk_counts_download_model_and_one_checkpoint_more_than_are_kept():
    settings = settings_of_a_run(ranks=8, save_total_limit=2, save_steps=200)
    parts = disk(GPTJ, settings, steps=797)
    assert parts["checkpoints"] == 3 * 12 * GPTJ.parameters / GIB
    assert parts["model"] == 2 * GPTJ.parameters / GIB
    assert parts["cache"] == pytest.approx(4 * GPTJ.parameters / GIB + 0.5)
    assert disk(GPTJ, settings, steps=150)["checkpoints"] == 12 * GPTJ.parameters / GIB, (
        "one checkpoint, at the last step"
    )
    assert disk(TINY, settings, steps=150)["cache"] == 0.5, "a local model is not downloaded"
    for stage, bytes_a_parameter in ((0, 12), (1, 14), (2, 14), (3, 12)):
        found = settings_of_a_run(ranks=1, zero=Zero(stage=stage), precision="bf16").checkpoint_bytes
        assert found == bytes_a_parameter, stage


# --- against measurements ----------------------------------------------------------------------------

LENGTHS = [97, 176, 61, 143, 88, 120, 72, 104]


def small_gptj(width: int, layers: int, heads: int, vocabulary: int, dtype: torch.dtype) -> GPTJForCausalLM:
    config = GPTJConfig(
        vocab_size=vocabulary, n_positions=1024, n_embd=width, n_layer=layers, n_head=heads,
        rotary_dim=16, bos_token_id=0, eos_token_id=0, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return GPTJForCausalLM(config).to(dtype).train()


def small_batch(
    model: GPTJForCausalLM, packed: bool, lengths: Iterable[int] = LENGTHS
) -> dict[str, torch.Tensor]:
    ids = [torch.randint(model.config.vocab_size, (length,)).tolist() for length in lengths]
    rows = [{"input_ids": row, "response_spans": [[int(0.45 * len(row)), len(row)]]} for row in ids]
    if not packed:
        return DataCollatorForCompletionOnlyLM(0)(rows)
    use_packed_attention(model)
    use_response_loss(model)
    return DataCollatorForPackedRows(0)(rows)


def saved_bytes(layers: int, packed: bool, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps for the backward pass, without weights; shared storage is counted once."""
    model = small_gptj(64, layers, 4, 50, dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**small_batch(model, packed), num_items_in_batch=torch.tensor(10))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_predicted_layer_bytes_are_within_4_percent_of_what_autograd_keeps(packed, dtype):
    gc.disable()  # a freed storage's address must not be reused during the count
    try:
        measured = saved_bytes(4, packed, dtype) - saved_bytes(3, packed, dtype)
    finally:
        gc.enable()
    shape = gptj_shape("small", 1, 64, 4, 50)
    tokens = sum(LENGTHS) if packed else 8 * 176
    assert layer_bytes(shape, tokens, 176, dtype.itemsize, packed) == pytest.approx(measured, rel=0.04)


# Without instructions for bf16 it takes five minutes. The layer's bytes in bf16 are compared above.
LONG_BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.long)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(256, 8, 8, 512), (256, 2, 8, 20_000)], ids=["deep", "large vocabulary"])
@pytest.mark.parametrize("dtype", [torch.float32, LONG_BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["no checkpointing", "checkpointing"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_predicted_activations_and_logits_are_within_a_quarter_of_the_measured_peak(
    packed, checkpointing, dtype, shape
):
    model = small_gptj(*shape, dtype=dtype)
    batch = small_batch(model, packed)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # the plan counts gradients separately

    def step() -> None:
        model(**batch, num_items_in_batch=torch.tensor(100)).loss.backward()

    step()
    measured = peak_bytes(step)
    width, layers, heads, vocabulary = shape
    tokens = batch["input_ids"].numel()
    labels = batch["shift_labels"].numel() if packed else tokens
    facts = gptj_shape("small", layers, width, heads, vocabulary)
    predicted = sum(activation_bytes(facts, tokens, 176, labels, dtype.itemsize, packed, checkpointing))
    print(
        f"\n{predicted / 2**20:.1f} MiB predicted, {measured / 2**20:.1f} measured: {predicted / measured:.2f}"
    )
    assert 0.75 < predicted / measured < 1.25


# width, layers, heads, vocabulary; of the last also no limit, modules one by one, and the rank of adapters
SHAPES = [(128, 2, 4, 1000), (256, 4, 8, 10_000), (256, 4, 8, 10_000, 0, 0, 16)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize(
    "config",
    [pytest.param(BF16, id="on device"), pytest.param(BF16_OFFLOAD, id="offloaded", marks=pytest.mark.long)],
)
def test_predicted_model_state_is_within_10_percent_of_real_zero_ranks(config, ranks, tmp_path):
    shapes = [",".join(map(str, shape)) for shape in SHAPES]
    files = [config, ZERO_2] if config == BF16 else [config]
    result = run(torchrun(ranks, "tests.plan.measure_memory"), ",".join(files), tmp_path / "bytes", *shapes)
    assert result.returncode == 0, result.stdout
    for rank in range(ranks):
        measured = json.loads((tmp_path / f"bytes.rank{rank}").read_text())
        for (file, shape), sizes in zip(product(files, SHAPES), measured, strict=True):
            compare_with_measured(
                file, ranks, gptj_shape("small", shape[1], shape[0], *shape[2:4]), sizes, shape[6:]
            )


def compare_with_measured(
    file: str, ranks: int, facts: ModelShape, sizes: dict[str, Any], lora: Iterable[int] = ()
) -> None:
    options = TrainingOptions(local_output_dir="x", deepspeed=file, lora=sum(lora))
    settings = resolved(options, ranks, "cpu")
    # The ranks' device is the CPU, so offloaded state is also counted as device memory.
    held = settings.deepspeed["zero_optimization"] | {"offload_optimizer": {}}
    on_device = replace(settings, deepspeed=settings.deepspeed | {"zero_optimization": held})
    trained = trained_parameters(facts, settings)
    assert sizes["parameters"] == facts.parameters + (trained if settings.lora else 0)
    predicted = state_bytes(facts, on_device)
    if settings.lora:
        predicted["weights"] = predicted["frozen weights"] + predicted["adapter"]
    for part in ("weights", "gradients", "optimizer"):
        print(f"{file}, width {facts.width}, {part}: {predicted[part] / sizes[part]:.3f}")
        assert predicted[part] == pytest.approx(sizes[part], rel=0.1), (file, part)
    if settings.zero.offload_optimizer:
        buffers = sizes["float32 gradients"] + sizes["gradients"]
        assert sum(offloaded_gradient_bytes(facts, settings)) == pytest.approx(buffers, rel=0.1)
    elif (
        settings.precision == "bf16"
    ):  # the copies of the gradients in the optimizer step; one sub-group holds all
        assert sizes["step"] == pytest.approx(6 * trained / ranks, rel=0.05)
    if settings.zero.stage == 2:  # gradients to their owner, weights to all
        assert sizes["sent"] == pytest.approx(2 * 2 * trained * (1 - 1 / ranks), rel=0.01)


@pytest.mark.slow
def test_real_zero3_ranks_gather_layers_up_to_max_live_parameters(tmp_path):
    limit = 1_000_000
    result = run(torchrun(2, "tests.plan.measure_memory"), BF16, tmp_path / "bytes", f"256,8,8,1000,{limit}")
    assert result.returncode == 0, result.stdout
    for rank in range(2):
        (sizes,) = json.loads((tmp_path / f"bytes.rank{rank}").read_text())
        print(f"rank {rank}: {sizes['gathered'] / limit:.2f} times the limit is gathered at once")
        assert sizes["parameters"] > 5 * limit
        # The limit is exceeded by one parameter; the largest has 4 x 256^2.
        assert sizes["gathered"] == pytest.approx(limit + 4 * 256**2, rel=0.1)
