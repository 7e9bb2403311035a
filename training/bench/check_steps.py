"""Lines of the GPU check that train a random GPT-J by the product's Trainer: speed, memory, waits, offloading."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from statistics import fmean
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from training.bench.lines import Check, Finding, Setup, serve
from training.bench.random_model import POSITIONS, gptj_config, random_gptj, random_rows
from training.bench.short_runs import (
    become_the_only_rank,
    config_file,
    has_deepspeed,
    planned_gib,
    settings_of,
)
from training.bench.waits import WaitsPerStep, by_owner
from training.consts import DEMO
from training.data.ledger import Ledger
from training.machine.flops import wait_for
from training.model.loading import DTYPES
from training.model.packing import Packing
from training.model.tokenizer import load_tokenizer
from training.options.settings import Settings
from training.run import prepare, steps
from training.run.completion_trainer import CompletionTrainer
from training.run.failures import StopRequest

WARM_UP, TIMED = 4, 8  # steps; DeepSpeed prefetches from the second step on, and torch's allocator grows
OFFLOADED_STEPS = 10
MOST_WAITS = 4  # of our code in a step


def build(setup: Setup, settings: Settings, rows: list[dict[str, Any]], layers: int) -> CompletionTrainer:
    """The product's Trainer for random weights and rows. It neither evaluates nor saves."""
    if settings.deepspeed is not None:
        become_the_only_rank()
    config = gptj_config(setup, layers)
    args = prepare.form_process_group(settings)
    args.eval_strategy, args.save_strategy, args.eval_on_start = IntervalStrategy.NO, SaveStrategy.NO, False
    data = datasets.Dataset.from_list(rows)
    prepared = prepare.Prepared(
        args,
        load_tokenizer(DEMO),
        data,
        data.select([0]),
        Ledger("random", POSITIONS),
        Packing(response_loss=True),
    )

    def load(settings: Settings, prepared: prepare.Prepared) -> PreTrainedModel:
        dtype = torch.float32 if settings.deepspeed is None else DTYPES[settings.precision]
        return random_gptj(config, dtype, setup.device)

    return steps.build_trainer(settings, prepared, StopRequest(), load)


# --- speed and memory ---------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """Times the steps after WARM_UP; only at its two ends the host waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.begin, self.seconds = device, 0.0, math.nan

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM_UP:
            wait_for(self.device)
            self.begin = time.perf_counter()
        elif state.global_step == WARM_UP + TIMED:
            wait_for(self.device)
            self.seconds = (time.perf_counter() - self.begin) / TIMED


def step_time(kind: str | None, setup: Setup, whole_blocks: bool = True) -> Finding:
    """Seconds of a step, real tokens/s, MFU and peak memory of a shipped configuration; None: without DeepSpeed."""
    count = WARM_UP + TIMED
    config = None if kind is None else config_file(kind, setup.precision)
    # The first log line covers the warm-up.
    settings = settings_of(setup, config, max_steps=count, logging_steps=WARM_UP)
    settings = replace(settings, whole_blocks=whole_blocks and kind == "z3")
    trainer = build(setup, settings, random_rows(count * setup.rows, setup.vocabulary), setup.layers)
    clock = Clock(trainer.args.device)
    trainer.add_callback(clock)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "tokens_per_second" in entry][1:]
    losses = [entry["loss"] for entry in logged]
    planned = planned_gib(setup, settings, setup.layers)
    figures = {
        "step_seconds": clock.seconds,
        "tokens_per_second": fmean(entry["tokens_per_second"] for entry in logged),
        "mfu": fmean(entry["mfu"] for entry in logged),
        "peak_memory_gib": max(entry["peak_memory_gib"] for entry in logged),
        # torch counts neither the context nor what its allocator holds in reserve
        "planned_gib": sum(planned.values()) - planned["context and fragmentation"],
        "loss": losses[-1],
        "layers": setup.layers,
    }
    text = (
        f"{clock.seconds:.3f} s a step, {figures['tokens_per_second']:,.0f} real tokens/s, MFU {figures['mfu']:.0%}, "
        f"peak {figures['peak_memory_gib']:.1f} GiB (plan {figures['planned_gib']:.1f}), loss {losses[-1]:.3f}"
    )
    good = trainer.state.global_step == count and all(map(math.isfinite, [clock.seconds, *losses]))
    return Finding(good, text, figures)


# --- waits --------------------------------------------------------------------------------------------


def waits(setup: Setup) -> Finding:
    """The calls of a step in which the host waits for the device: ours at most MOST_WAITS, those of libraries listed."""
    config = config_file("z3", setup.precision) if has_deepspeed() else None
    settings = settings_of(setup, config, max_steps=WARM_UP + 1, logging_steps=WARM_UP + 1)
    trainer = build(setup, settings, random_rows((WARM_UP + 1) * setup.rows, setup.vocabulary), layers=2)
    watch = WaitsPerStep(trainer.args.device)
    trainer.add_callback(watch)
    try:
        trainer.train()
    finally:
        watch.close()
    found = watch.steps()[-1]
    owners = by_owner(found)
    ours = Counter(f"{wait.operation} at {wait.place}" for wait in found if wait.owner == "training")
    libraries = ", ".join(f"{owner} {count}" for owner, count in owners.most_common() if owner != "training")
    text = (
        f"{owners['training']} of this code, limit {MOST_WAITS} ({'; '.join(ours) or 'none'}); "
        f"of libraries: {libraries or 'none'}; a model of 2 layers"
    )
    places = Counter(f"{wait.owner}: {wait.operation} at {wait.place}" for wait in found)
    return Finding(owners["training"] <= MOST_WAITS, text, {"places": places.most_common()})


# --- offloading ---------------------------------------------------------------------------------------


def offload(setup: Setup) -> Finding:
    """Ten steps of the offload recipe on the same rows: the loss must fall, and the loss scale of fp16 must settle."""
    precision = "fp16" if setup.device == "cuda" else "bf16"  # a CPU does not train in fp16
    batch = random_rows(setup.rows, setup.vocabulary)
    rows = list(islice(cycle(batch), OFFLOADED_STEPS * setup.rows))
    config = config_file("z3_offload", precision)
    settings = settings_of(setup, config, max_steps=OFFLOADED_STEPS, lr=1e-4, logging_steps=1)
    trainer = build(setup, settings, rows, layers=2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    scale = float(getattr(trainer.model_wrapped.optimizer, "loss_scale", 1.0))
    skipped = trainer.guard.overflows
    settled = trainer.guard.overflows_in_a_row == 0 and scale >= 1
    good = all(map(math.isfinite, losses)) and losses[-1] < losses[0] and settled
    text = f"{precision}: loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"
    if precision == "fp16":
        text += f", {skipped} of them skipped for an overflow; the loss scale ends at {scale:.0f}"
    else:
        text += "; the loss scale of fp16 needs a GPU"
    return Finding(good, text, {"losses": losses, "scale": scale, "skipped": skipped, "precision": precision})


CHECKS: dict[str, Check] = {
    "zero3-plain": partial(step_time, "z3", whole_blocks=False),
    "zero3": partial(step_time, "z3"),
    "zero2": partial(step_time, "z2"),
    "alone": partial(step_time, None),
    "waits": waits,
    "offload": offload,
}

if __name__ == "__main__":
    serve(CHECKS)
