"""Padded against packed on the user's own hardware: same rows, same weights, side by side.

python -m training.bench --training-dataset rows.jsonl --width 2048 --layers 3 --heads 16

Four recipes take turns, so that a machine whose speed drifts is unfair to none of them:

    dolly           padded to the longest of a random batch, eager attention, gradient checkpointing
    stock           the best of transformers' own Trainer: padded, dealt by `batch_rebalance`, no checkpointing
    packed          ours, no checkpointing
    packed_checkpointed   ours with Dolly's checkpointing, to compare like with like

Where the `trl` package is installed its SFTTrainer, padding-free on eager attention, is one more: the fastest of
its settings that keeps GPT-J's documents apart.

On one rank every recipe computes the same batches. For N ranks it is the slowest rank that a step waits for, so
of each global batch the share with the most computed tokens is what is timed. The steps are not the first ones of
the epoch but spread evenly over how much padding costs them, because a few random ones would be too few."""

from __future__ import annotations

import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import datasets
import torch
from tqdm import tqdm
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedModel
from transformers.trainer_pt_utils import BatchRebalanceSampler

from training.consts import DEFAULT_SEED, IGNORE_INDEX, PAD_TO_MULTIPLE_OF
from training.data.batching import GlobalBatchSampler
from training.data.collator import (
    DataCollatorForCompletionOnlyLM,
    DataCollatorForPackedRows,
    completion_labels,
    count_labels,
)
from training.machine.flops import layer_tokens, model_parameters, training_flops
from training.model.attention import use_packed_attention
from training.model.loss import use_response_loss

RECIPES = ["dolly", "stock", "packed", "packed_checkpointed"]
TRL = "trl"
PASSES = 3


@dataclass
class Timing:
    """What one recipe took for some shares of rows."""

    seconds: float = 0.0
    real_tokens: int = 0
    flops: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.real_tokens / self.seconds


def build_model(
    packed: bool,
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    positions: int,
    dtype: torch.dtype,
    device: str,
) -> PreTrainedModel:
    """A GPT-J with seeded random weights: transformers' own, or the same with our attention and loss."""
    config = GPTJConfig(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        rotary_dim=min(64, width // heads),
        n_positions=positions,
        attn_pdrop=0,
        resid_pdrop=0,
        embd_pdrop=0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DEFAULT_SEED)
        model = GPTJForCausalLM._from_config(config, attn_implementation="eager")
    model = model.to(device=device, dtype=dtype).train()
    if packed:
        use_packed_attention(model)
        use_response_loss(model)
    return model


def sft_trainer(model: PreTrainedModel, tokenizer: Any, rows: int) -> Any:
    """TRL's trainer around `model`, padding-free, with the loss on the response alone."""
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
    trainee: Any, rows: Sequence[dict[str, Any]], recipe: str, pad_token_id: int
) -> tuple[float, float, int]:
    """Forward and backward of one share. Returns (seconds, loss, labels); the gradients stay in the model.

    `trainee` is the model, or TRL's trainer around it.
    """
    model = trainee.model if recipe == TRL else trainee
    if recipe in ("dolly", "packed_checkpointed"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()
    model.zero_grad()  # to None, as the Trainer does
    _wait(model)
    begin = time.perf_counter()
    if recipe == TRL:
        batch = trainee.data_collator(
            [{"input_ids": row["input_ids"], "labels": completion_labels(row)} for row in rows]
        )
    else:
        collator = (
            DataCollatorForPackedRows if recipe.startswith("packed") else DataCollatorForCompletionOnlyLM
        )
        batch = collator(pad_token_id=pad_token_id)(list(rows))
    batch = {
        name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()
    }
    labels = count_labels(batch)
    if recipe == TRL:
        loss = trainee.compute_loss(model, batch, num_items_in_batch=labels)
    else:
        loss = model(**batch, num_items_in_batch=labels).loss
    loss.backward()
    _wait(model)
    return time.perf_counter() - begin, loss.item(), int(labels)


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def packs(recipe: str) -> bool:
    """Whether the recipe computes real tokens only."""
    return recipe == TRL or recipe.startswith("packed")


def computed_tokens(lengths: Sequence[int], packed: bool) -> int:
    """Tokens that a share costs: its own if packed, else every row padded to the longest."""
    if packed or not lengths:
        return sum(lengths)
    return len(lengths) * -(-max(lengths) // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF


def global_shares(recipe: str, lengths: Sequence[int], rows: int, world_size: int) -> list[list[list[int]]]:
    """The full global batches of an epoch, `[step][rank]`, as the recipe deals them. All have the same batches."""
    if recipe == "stock":
        ranks = [
            BatchRebalanceSampler(
                list(lengths), rows * world_size, world_size, 1, seed=DEFAULT_SEED, rank=rank
            )
            for rank in range(world_size)
        ]
        return [list(shares) for shares in zip(*ranks, strict=True)]
    sampler = GlobalBatchSampler(
        lengths,
        rows * world_size,
        world_size=world_size,
        rank=0,
        accumulation=1,
        seed=DEFAULT_SEED,
        deal="packed" if recipe.startswith("packed") else "padded",
    )
    full = len(lengths) // (rows * world_size)
    return [
        sampler.micro_batches(batch)[0]
        for batch, _ in zip(sampler.global_batches(), range(full), strict=False)
    ]


def slowest_share(shares: Sequence[Sequence[int]], lengths: Sequence[int], packed: bool) -> Sequence[int]:
    """The share that its step waits for."""
    return max(shares, key=lambda share: computed_tokens([lengths[row] for row in share], packed))


def typical_steps(shares: list[list[list[int]]], lengths: Sequence[int], steps: int) -> list[int]:
    """Steps that stand for the epoch: spread evenly from the one that padding costs least to the costliest."""

    def waste(step: int) -> float:
        costs = [computed_tokens([lengths[row] for row in share], packed=False) for share in shares[step]]
        return max(costs) / sum(lengths[row] for share in shares[step] for row in share)

    order = sorted(range(len(shares)), key=waste)
    steps = min(steps, len(order))
    return [order[int((i + 0.5) * len(order) / steps)] for i in range(steps)]


def real_token_shares(recipe: str, lengths: Sequence[int], rows: int, world_size: int) -> list[float]:
    """Of what the devices could have computed while they waited for the slowest, the share that is real, per step."""
    packed = packs(recipe)
    shares = []
    for ranks in global_shares(recipe, lengths, rows, world_size):
        costs = [computed_tokens([lengths[row] for row in share], packed) for share in ranks]
        shares.append(sum(lengths[row] for share in ranks for row in share) / (max(costs) * world_size))
    return shares


def measure(
    trainees: dict[str, Any],
    rows: Any,
    plan: list[dict[str, Sequence[int]]],
    pad_token_id: int,
    description: str,
) -> dict[str, Timing]:
    """Runs the recipes in turn over `plan`, which has the rows of every recipe for every step.

    Every step runs PASSES times, the recipes in turn each time, and its fastest counts: what else the machine does
    can only make a step slower, and would fall on one recipe.
    """
    timings = {recipe: Timing() for recipe in trainees}
    parameters = model_parameters(trainees["packed"])
    config = trainees["packed"].config
    with tqdm(total=PASSES * len(plan), desc=description, file=sys.stderr, disable=None) as progress:
        for shares in plan:
            chosen = {recipe: [rows[row] for row in share] for recipe, share in shares.items()}
            fastest = dict.fromkeys(shares, math.inf)
            counted = {}
            for _ in range(PASSES):
                for recipe in shares:
                    seconds, _, counted[recipe] = step(trainees[recipe], chosen[recipe], recipe, pad_token_id)
                    fastest[recipe] = min(fastest[recipe], seconds)
                progress.update()
            for recipe, timing in timings.items():
                lengths = [len(row["input_ids"]) for row in chosen[recipe]]
                timing.seconds += fastest[recipe]
                timing.real_tokens += sum(lengths)
                timing.flops += training_flops(
                    *parameters,
                    config.n_embd,
                    config.n_layer,
                    layer_tokens(sum(lengths), counted[recipe], config.n_layer),
                    counted[recipe],
                    sum(n * n for n in lengths) / 2,
                )
    return timings


def gradient_difference(
    trainees: dict[str, Any], rows: Any, pad_token_id: int
) -> tuple[dict[str, float], dict[str, float]]:
    """By recipe, on the same rows: the loss, and the largest difference of any parameter's gradient to Dolly's.

    The difference is relative to the norm of that parameter's gradient.
    """
    losses, differences = {}, {}
    reference: dict[str, torch.Tensor] = {}
    for recipe, trainee in trainees.items():
        _, losses[recipe], _ = step(trainee, rows, recipe, pad_token_id)
        model = trainee.model if recipe == TRL else trainee
        gradients = {name: p.grad for name, p in model.named_parameters()}
        reference = reference or {name: gradient.clone() for name, gradient in gradients.items()}
        differences[recipe] = max(
            ((gradients[name] - g).norm() / g.norm().clamp(min=1e-30)).item() for name, g in reference.items()
        )
    return losses, differences


def _peak_memory(
    shape: dict[str, Any], rows: list[dict[str, Any]], recipe: str, pad_token_id: int, results: Any
) -> None:
    """In a process of its own: the memory that a step takes beyond weights and gradients, in GiB."""
    model = build_model(recipe.startswith("packed"), **shape)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        step(model, rows, recipe, pad_token_id)
        results.put((torch.cuda.max_memory_allocated() - allocated) / 2**30)
        return
    before = _resident_gib(reset_peak=True)
    step(model, rows, recipe, pad_token_id)
    results.put(_resident_gib("VmHWM") - before)


def _resident_gib(field: str = "VmRSS", reset_peak: bool = False) -> float:
    """Resident memory of this process in GiB, now or (VmHWM) at its peak. Linux can forget a peak, a Mac cannot."""
    if not sys.platform.startswith("linux"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 2**20


def peak_memories(shape: dict[str, Any], rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, float]:
    """Peak memory in GiB of one step by recipe, beyond weights and gradients, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for recipe in tqdm(RECIPES, desc="peak memory", file=sys.stderr, disable=None):
        results = context.SimpleQueue()
        process = context.Process(target=_peak_memory, args=(shape, rows, recipe, pad_token_id, results))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise click.ClickException(
                f"measuring the memory of {recipe} ended with exit code {process.exitcode}"
            )
        peaks[recipe] = results.get()
    return peaks
