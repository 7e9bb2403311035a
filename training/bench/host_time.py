"""Measures the host's time of a step: Python, torch's dispatch and DeepSpeed's hooks, with next to nothing to compute.

python -m training.bench.host_time --documents 8

A GPU that computes faster than the host can start its kernels waits for the host. The host runs the same code on a CPU, so
a GPT-J with all layers of the 6B model, but a tiny width, shows this time without a GPU. Each configuration trains with
our Trainer in a process of its own. They take turns, so that a busy machine slows down all of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import click

from training.console import set_up_console
from training.consts import DEMO

Z2, Z3 = "config/ds_z2_bf16_config.json", "config/ds_z3_bf16_config.json"
BASE = "ZeRO-3, a module at a time"
# DeepSpeed file, and whether blocks are handled as a whole. BASE also has DeepSpeed's timer and its profiler marks on.
CONFIGURATIONS = {
    "no DeepSpeed": (None, False),
    "ZeRO-2": (Z2, True),
    BASE: (Z3, False),
    "ZeRO-3, a block at a time": (Z3, True),
}
LAYERS, WIDTH, HEADS, POSITIONS = 28, 32, 2, 512
STEPS = 5  # of a turn
WARM_UP = 4  # steps; DeepSpeed records the order of the modules in the first two


def measure(documents: int, checkpointing: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step by configuration: "wall", "cpu", and "ratio", of the CPU's time to that of BASE.

    Each is the median of the rounds; the ratio is that of the paired ratios. "cpu" does not count the time for which
    other processes had the CPU.
    """
    context = multiprocessing.get_context("spawn")
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in CONFIGURATIONS}
    lines: dict[str, Connection] = {}
    processes = []
    try:
        for name in CONFIGURATIONS:
            lines[name], other = context.Pipe()
            process = context.Process(
                target=_train, args=(name, documents, checkpointing, other), daemon=True
            )
            process.start()
            other.close()
            processes.append(process)
        for line in lines.values():
            line.recv()
        for _ in range(rounds):
            for name, line in lines.items():
                line.send(STEPS)
                turns[name].append(line.recv())
    except EOFError as error:
        raise click.ClickException("a training failed: see its error above") from error
    finally:
        for process in processes:
            process.kill()
    return {
        name: {
            "wall": median(wall for wall, _ in turns[name]),
            "cpu": median(cpu for _, cpu in turns[name]),
            "ratio": median(own[1] / base[1] for own, base in zip(turns[name], turns[BASE], strict=True)),
        }
        for name in CONFIGURATIONS
    }


def _train(name: str, documents: int, checkpointing: bool, line: Connection) -> None:
    """Trains a configuration, in turns that `line` begins and ends."""
    import torch
    from transformers import GPTJConfig, GPTJForCausalLM

    from training.bench.short_runs import become_the_only_rank
    from training.options.settings import resolve
    from training.options.trainer_options import TrainingOptions
    from training.run import prepare, steps
    from training.run.failures import StopRequest

    torch.set_num_threads(1)
    file, whole = CONFIGURATIONS[name]
    if file:
        become_the_only_rank()
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingOptions(
            input_model=DEMO, training_dataset=(DEMO,), local_output_dir=folder, test_size=8, max_steps=10**6,
            eval_steps=10**6, save_steps=10**6, per_device_train_batch_size=documents,
            deepspeed=file,
        )  # fmt: skip
        settings = replace(resolve(options, 1, "fp32"), precision="fp32")
        if settings.deepspeed is not None:
            del settings.deepspeed["bf16"]  # many CPUs take a hundred times as long for a product in bf16
        if name == BASE:
            assert settings.deepspeed is not None
            settings.deepspeed["timers"] = {"throughput": {"enabled": True}}
        settings = settings.with_plan_choices(checkpointing, None, "packed", whole)
        settings, prepared = prepare.prepare(settings)
        prepared.args.eval_on_start = False
        if name == BASE:
            from deepspeed.utils import nvtx

            nvtx.enable_nvtx = True
        config = GPTJConfig(
            vocab_size=len(prepared.tokenizer), n_positions=POSITIONS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            rotary_dim=WIDTH // HEADS, bos_token_id=0, eos_token_id=0, use_cache=False,
        )  # fmt: skip
        trainer = steps.build_trainer(
            settings, prepared, StopRequest(), load=lambda *_: GPTJForCausalLM(config)
        )
        trainer.add_callback(_turns(line))
        trainer.train()


def _turns(line: Connection) -> Any:
    """A callback of the Trainer that waits for its turn, trains as many steps as arrive, and sends their median times."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        """Waits for its turn between two steps."""

        def __init__(self) -> None:
            self.left, self.times = WARM_UP, [_clock()]

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(_clock())
            self.left -= 1
            if self.left:
                return
            wall, cpu = (
                median(1e3 * (later - now) for now, later in pairwise(clock))
                for clock in zip(*self.times, strict=True)
            )
            line.send((wall, cpu))
            try:
                self.left = line.recv()
            except EOFError:  # the command was stopped
                os._exit(1)
            self.times = [_clock()]

    return Turns()


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def report(result: dict[str, dict[str, float]]) -> str:
    """The result as a text table."""
    lines = [f"{'milliseconds a step':30}{'elapsed':>10}{'CPU':>10}{'of all modules':>18}"]
    lines += [
        f"{name:30}{row['wall']:>10.1f}{row['cpu']:>10.1f}{row['ratio']:>18.2f}"
        for name, row in result.items()
    ]
    return "\n".join(lines)


@click.command()
@click.option(
    "--documents", type=click.IntRange(1), default=8, show_default=True, help="Rows in a packed row."
)
@click.option("--gradient-checkpointing", "checkpointing", is_flag=True, help="Recompute activations.")
@click.option(
    "--rounds", type=click.IntRange(1), default=7, show_default=True, help="Turns of each configuration."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def main(documents: int, checkpointing: bool, rounds: int, as_json: bool) -> None:
    """Measure the host's time of a step without DeepSpeed, with ZeRO-2 and with ZeRO-3."""
    set_up_console()
    result = measure(documents, checkpointing, rounds)
    print(json.dumps(result, indent=2) if as_json else report(result))


if __name__ == "__main__":
    main()
