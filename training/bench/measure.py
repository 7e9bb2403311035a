"""Measures speed, memory, loss and gradients of the benchmark's recipes on the same rows and weights.

On one rank every recipe computes the same batches. A step of N ranks waits for its slowest rank, so only the share with
the most computed tokens is timed for each global batch. The timed steps are spread evenly over all steps sorted by the
cost of their padding, because a few random steps would not be representative."""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import datasets
import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.bench.adapters import adapter_gradients, copy_adapter, our_lora, pefts_lora
from training.bench.shares import (
    ALL_RECIPES,
    LORA,
    PEFT,
    RECIPES,
    TRL,
    global_shares,
    real_token_shares,
    slowest_share,
    typical_steps,
)
from training.consts import DEFAULT_SEED, IGNORE_INDEX
from training.data.collator import (
    DataCollatorForCompletionOnlyLM,
    DataCollatorForPackedRows,
    completion_labels,
    count_labels,
)
from training.machine.flops import (
    adapter_parameters,
    layer_tokens,
    matmul_flops_per_second,
    model_parameters,
    training_flops,
    wait_for,
)
from training.machine.local import peak_memory_gib
from training.model.loading import DTYPES
from training.model.packing import packing_of

PASSES = 3  # runs of each timed step
POSITIONS = 2048


@dataclass(frozen=True)
class Choices:
    """The options of the benchmark: model shape, batches and device.

    `architecture` is transformers' model_type. `vocabulary` is the number of embedding rows, None until the tokenizer is
    loaded. `lora` is the rank of adapters to compare as well; 0: none.
    """

    architecture: str
    width: int
    layers: int
    heads: int
    vocabulary: int | None
    batch: int
    world_size: int
    steps: int
    precision: str
    device: str
    lora: int = 0


@dataclass
class Timing:
    """Time of one recipe over its timed shares, and the FLOPs that they need."""

    seconds: float = 0.0
    flops: float = 0.0


def compare(
    choices: Choices, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """(the results, and for each recipe the share of real tokens at every step of an epoch)."""
    lengths, pad, ranks = rows["length"][:], tokenizer.pad_token_id, choices.world_size
    first = [rows[row] for row in global_shares("dolly", lengths, choices.batch, 1)[0][0]]
    peaks = peak_memories(choices, first, pad)
    trainees = build_trainees(choices, tokenizer)
    losses, differences = gradient_difference(trainees, first, pad)
    matmul = _matmul_rate(choices)
    result: dict[str, Any] = {
        "rows": len(rows),
        "world_size": ranks,
        "steps": {},
        "precision": choices.precision,
        "device": choices.device,
        "threads": torch.get_num_threads(),
        "max_relative_gradient_difference": differences["packed"],
    }
    timings = {}
    for mode, count, title in (
        ("one_rank", 1, "one rank"),
        ("slowest_rank", ranks, f"slowest of {ranks} ranks"),
    ):
        shares = {name: global_shares(name, lengths, choices.batch, count) for name in trainees}
        steps = typical_steps(shares["dolly"], lengths, choices.steps)
        slowest = [
            {name: slowest_share(shares[name][i], lengths, ALL_RECIPES[name].real_only) for name in trainees}
            for i in steps
        ]
        timings[mode] = measure(trainees, rows, slowest, pad, title)
        # The step takes as long as its slowest share, so it counts all tokens of the global batch.
        tokens = sum(lengths[row] for i in steps for share in shares["dolly"][i] for row in share)
        speeds = {name: tokens / timing.seconds for name, timing in timings[mode].items()}
        result["steps"][mode] = len(steps)
        result[mode] = {
            "tokens_per_second": speeds,
            "ratio": speeds["packed"] / speeds["dolly"],
            "ratio_to_stock": speeds["packed"] / speeds["stock"],
            "ratio_like_for_like": speeds["packed_checkpointed"] / speeds["dolly"],
        }
        if choices.lora:
            result[mode]["ratio_to_peft"] = speeds[LORA] / speeds[PEFT]
    matmul = max(matmul, _matmul_rate(choices))
    result["matmul_gflops"] = matmul / 1e9
    real = {name: real_token_shares(name, lengths, choices.batch, ranks) for name in trainees}
    for name, timing in timings["one_rank"].items():
        result[name] = {
            "loss": losses[name],
            "relative_gradient_difference": differences[name],
            "mfu": timing.flops / timing.seconds / matmul,
            "peak_memory_gib": peaks.get(name),
            "real_token_share": fmean(real[name]),
        }
    return result, real


def _matmul_rate(choices: Choices) -> float:
    device, dtype = torch.device(choices.device), DTYPES[choices.precision]
    return matmul_flops_per_second(device, dtype, tokens=1024, width=4096)


# --- models and steps ---------------------------------------------------------------------------------


def model_config(choices: Choices) -> PreTrainedConfig:
    """The config of the benchmark's model. Raises ValueError for an unknown architecture or sizes it does not take."""
    config = AutoConfig.for_model(
        choices.architecture,
        vocab_size=choices.vocabulary,
        hidden_size=choices.width,
        num_hidden_layers=choices.layers,
        num_attention_heads=choices.heads,
        max_position_embeddings=POSITIONS,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    sizes = {
        "rotary_dim": min(64, choices.width // choices.heads),  # of GPT-J
        "intermediate_size": 4 * choices.width,
        "num_key_value_heads": choices.heads,
    }
    dropouts = ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout")
    for name, value in (sizes | dict.fromkeys(dropouts, 0.0)).items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def build_model(choices: Choices, packed: bool) -> PreTrainedModel:
    """A model with seeded random weights: transformers' own, or with our attention and loss if `packed`.

    transformers' own GPT-J has eager attention, as in Dolly's run.
    """
    config = model_config(choices)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DEFAULT_SEED)
        eager = {"attn_implementation": "eager"} if choices.architecture == "gptj" else {}
        model = AutoModelForCausalLM.from_config(config, **eager)
    model = model.to(device=choices.device, dtype=DTYPES[choices.precision]).train()
    if packed:
        packing_of(config).prepare(model)
    return model


def build_trainee(choices: Choices, name: str) -> Any:
    """The model of a recipe, or the trainer for it."""
    model = build_model(choices, ALL_RECIPES[name].packed)
    if name == LORA:
        return our_lora(model, choices.lora)
    return pefts_lora(model, choices.lora, choices.batch) if name == PEFT else model


def build_trainees(choices: Choices, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The models of all recipes by name, with equal weights, or the trainers for them. Recipes share a model if they can."""
    padded, packed = build_model(choices, False), build_model(choices, True)
    trainees: dict[str, Any] = {name: packed if recipe.packed else padded for name, recipe in RECIPES.items()}
    if importlib.util.find_spec("trl"):
        trainees[TRL] = sft_trainer(build_model(choices, False), tokenizer, choices.batch)
    if choices.lora:
        trainees |= {name: build_trainee(choices, name) for name in (LORA, PEFT)}
        copy_adapter(trainees[LORA], trainees[PEFT].model)
    return trainees


def sft_trainer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> Any:
    """TRL's SFTTrainer for `model`: padding-free, with completion-only loss."""
    from trl import SFTConfig, SFTTrainer

    row = {"input_ids": [0, 0], "labels": [IGNORE_INDEX, 0]}
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=rows,
            padding_free=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            use_cpu=model.device.type == "cpu",
            bf16=False,
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list([row]),
        processing_class=tokenizer,
    )


def step(
    trainee: Any, rows: Sequence[dict[str, Any]], name: str, pad_token_id: int
) -> tuple[float, float, int]:
    """Runs forward and backward of one share. Returns (seconds, loss, labels); the gradients stay in the model.

    `trainee` is the model, or the Trainer of TRL or transformers for it.
    """
    model = _model_of(trainee)
    if ALL_RECIPES[name].checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()
    model.zero_grad()  # to None, as the Trainer does
    wait_for(model.device)
    start = time.perf_counter()
    if name == TRL:
        batch = trainee.data_collator(
            [{"input_ids": row["input_ids"], "labels": completion_labels(row)} for row in rows]
        )
    else:
        packed = ALL_RECIPES[name].packed
        collator = DataCollatorForPackedRows if packed else DataCollatorForCompletionOnlyLM
        batch = collator(pad_token_id=pad_token_id)(list(rows))
    batch = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
    labels = count_labels(batch)
    if model is not trainee:
        loss = trainee.compute_loss(model, batch, num_items_in_batch=labels)
    else:
        loss = model(**batch, num_items_in_batch=labels).loss
    loss.backward()
    wait_for(model.device)
    return time.perf_counter() - start, loss.item(), int(labels)


def _model_of(trainee: Any) -> Any:
    return trainee.model if hasattr(trainee, "compute_loss") else trainee


# --- measurements -------------------------------------------------------------------------------------


def measure(
    trainees: dict[str, Any],
    rows: datasets.Dataset,
    steps: list[dict[str, Sequence[int]]],
    pad_token_id: int,
    description: str,
) -> dict[str, Timing]:
    """Times the recipes alternately on `steps`: for each step, the rows of every recipe.

    Alternating spreads drifts of the machine's speed over all recipes. Every step runs PASSES times and the fastest
    counts, because other load on the machine can only slow a step down.
    """
    timings = {name: Timing() for name in trainees}
    parameters = model_parameters(trainees["packed"])
    adapters = {name: adapter_parameters(_model_of(trainee)) for name, trainee in trainees.items()}
    config = trainees["packed"].config
    width, depth = config.hidden_size, config.num_hidden_layers
    with tqdm(total=PASSES * len(steps), desc=description, file=sys.stderr, disable=None) as progress:
        for shares in steps:
            step_rows = {name: [rows[row] for row in share] for name, share in shares.items()}
            fastest = dict.fromkeys(shares, math.inf)
            labels = {}
            for _ in range(PASSES):
                for name in shares:
                    seconds, _, labels[name] = step(trainees[name], step_rows[name], name, pad_token_id)
                    fastest[name] = min(fastest[name], seconds)
                progress.update()
            for name, timing in timings.items():
                lengths = [len(row["input_ids"]) for row in step_rows[name]]
                tokens = layer_tokens(sum(lengths), labels[name], depth)
                scores = sum(n * n for n in lengths) / 2
                timing.seconds += fastest[name]
                timing.flops += training_flops(
                    *parameters, width, depth, tokens, labels[name], scores, adapters=adapters[name]
                )
    return timings


def gradient_difference(
    trainees: dict[str, Any], rows: Sequence[dict[str, Any]], pad_token_id: int
) -> tuple[dict[str, float], dict[str, float]]:
    """By recipe, on the same rows: the loss, and the largest difference of a parameter's gradient from Dolly's.

    The difference is relative to the norm of Dolly's gradient of that parameter. Adapters are compared with peft's.
    """
    losses, differences = {}, {}
    references: dict[str, dict[str, torch.Tensor]] = {}
    for name in sorted(trainees, key=lambda name: name == LORA):  # after peft
        _, losses[name], _ = step(trainees[name], rows, name, pad_token_id)
        model = _model_of(trainees[name])
        is_adapter = name in (LORA, PEFT)
        gradients = (
            adapter_gradients(model) if is_adapter else {key: p.grad for key, p in model.named_parameters()}
        )
        reference = references.setdefault(
            PEFT if is_adapter else "dolly", {key: gradient.clone() for key, gradient in gradients.items()}
        )
        differences[name] = max(
            ((gradients[key] - g).norm() / g.norm().clamp(min=1e-30)).item() for key, g in reference.items()
        )
    return losses, differences


def peak_memories(choices: Choices, rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, float]:
    """Peak memory of one step in GiB, without weights and gradients, by recipe. Each runs in a fresh process."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    names = [*RECIPES, *((LORA, PEFT) if choices.lora else ())]
    for name in tqdm(names, desc="peak memory", file=sys.stderr, disable=None):
        results = context.SimpleQueue()
        process = context.Process(target=_peak_memory, args=(choices, rows, name, pad_token_id, results))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise click.ClickException(
                f"measuring the memory of {name} ended with exit code {process.exitcode}"
            )
        peaks[name] = results.get()
    return peaks


def _peak_memory(
    choices: Choices, rows: list[dict[str, Any]], name: str, pad_token_id: int, results: Any
) -> None:
    """Puts the peak memory of a step, without weights and gradients, into `results`. Runs in its own process."""
    trainee = build_trainee(choices, name)
    model = _model_of(trainee)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform.startswith("linux"):  # macOS cannot reset the peak
        Path("/proc/self/clear_refs").write_text("5")  # proc(5)
    before = peak_memory_gib(on_gpu)
    step(trainee, rows, name, pad_token_id)
    results.put(peak_memory_gib(on_gpu) - before)
