"""Padded against packed on the user's own hardware: same rows, same weights, side by side.

python -m training.bench --training-dataset rows.jsonl --width 2048 --layers 3 --heads 16"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import datasets
import torch
import transformers

from training.bench.measure import (
    RECIPES,
    TRL,
    build_model,
    global_shares,
    gradient_difference,
    measure,
    packs,
    peak_memories,
    real_token_shares,
    sft_trainer,
    slowest_share,
    typical_steps,
)
from training.consts import DEMO, GIB
from training.data.tokens import prepare_dataset
from training.errors import DataError, ModelError
from training.machine.flops import matmul_flops_per_second
from training.machine.local import free_host_gib
from training.model.loading import DTYPES
from training.model.tokenizer import load_tokenizer
from training.pictures import PictureFile
from training.plan.model_shape import gptj_shape


def report(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    recipes = [recipe for recipe in [*RECIPES, TRL] if recipe in result]
    lines = [f"{'':40}" + "".join(f"{recipe:>20}" for recipe in recipes)]

    def line(name: str, values: Sequence[str]) -> None:
        lines.append(f"{name:40}" + "".join(f"{value:>20}" for value in values))

    n = result["world_size"]
    for place, title in (("one_rank", "1 rank"), ("slowest_rank", f"slowest of {n} ranks")):
        speeds = [result[place]["tokens_per_second"][recipe] for recipe in recipes]
        line(f"real tokens/s, {title}", [f"{speed:,.0f}" for speed in speeds])
        line("  times dolly", [f"{speed / speeds[0]:.2f}" for speed in speeds])
    line("MFU, 1 rank", [f"{result[recipe]['mfu']:.2f}" for recipe in recipes])
    memories = [result[recipe]["peak_memory_gib"] for recipe in recipes]
    line("peak memory, GiB", ["-" if memory is None else f"{memory:.2f}" for memory in memories])
    line("loss", [f"{result[recipe]['loss']:.6f}" for recipe in recipes])
    line(
        "largest gradient difference to dolly",
        [f"{result[r]['relative_gradient_difference']:.1e}" for r in recipes],
    )
    line(
        f"real tokens of those computed, {n} ranks", [f"{result[r]['real_token_share']:.0%}" for r in recipes]
    )
    lines.append(
        f"MFU is of the measured matrix-product rate, {result['matmul_gflops']:,.0f} GFLOP/s; memory is beyond "
        "weights and gradients; a gradient's difference is relative to its norm"
    )
    return "\n".join(lines)


def plot(shares: dict[str, list[float]], world_size: int, path: Path) -> None:
    """Share of real tokens at every step of an epoch, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    names = {"dolly": "padded, as Dolly", "stock": "padded, batch_rebalance", "packed": "packed"}
    for recipe, name in names.items():
        values = shares[recipe]
        axes.plot(
            range(1, len(values) + 1), values, marker=".", linewidth=1, label=f"{name}: {fmean(values):.0%}"
        )
    axes.set(
        xlabel="step",
        ylabel="real tokens, of what the devices could compute",
        ylim=(0, 1.05),
        title=f"Every step waits for the slowest of {world_size} ranks",
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _device_problems(device: str, precision: str) -> list[str]:
    """Why nothing could be computed in this precision on this device, which is tried."""
    try:
        if torch.device(device).type == "cpu" and precision == "fp16":
            return [
                "--precision fp16: a CPU computes it too slowly to compare. Type --precision bf16 or fp32"
            ]
        torch.ones(1, device=device, dtype=DTYPES[precision]).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        return [f"--device {device}: cannot be used here in {precision} ({reason}). Type --device cpu"]
    return []


def _memory_problems(
    vocabulary: int, width: int, layers: int, heads: int, dtype: torch.dtype, device: str
) -> list[str]:
    """Whether the padded and the packed model and their gradients exceed what is free."""
    parameters = gptj_shape("benchmark", layers, width, heads, vocabulary).parameters
    needed = 2 * 2 * parameters * dtype.itemsize / GIB
    on_gpu = torch.device(device).type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] / GIB if on_gpu else free_host_gib()
    if needed <= free:
        return []
    return [
        f"--width {width}, --layers {layers} and {vocabulary:,} entries need {needed:,.0f} GiB for two models and their "
        f"gradients, and {free:,.0f} are free. Make one of them smaller"
    ]


@click.command()
@click.option("--training-dataset", default=DEMO, show_default=True, help="As the trainer's.")
@click.option(
    "--tokenizer", "tokenizer_name", default=DEMO, show_default=True, help="A model's name or folder."
)
@click.option("--width", type=click.IntRange(8), default=512, show_default=True, help="Of the model.")
@click.option("--layers", type=click.IntRange(1), default=4, show_default=True)
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True)
@click.option(
    "--vocab", type=click.IntRange(1), default=None, help="Embedding rows.  [default: the tokenizer's]"
)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Rows a rank and step.")
@click.option("--world-size", type=click.IntRange(1), default=8, show_default=True, help="Ranks to simulate.")
@click.option(
    "--steps", type=click.IntRange(1), default=4, show_default=True, help="Steps to time of each kind."
)
@click.option("--precision", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
@click.option("--device", default=None, help="[default: the GPU if there is one]")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of the table.")
@click.option(
    "--plot",
    "picture",
    type=PictureFile(),
    metavar="FILE.png",
    help="Draw the share of real tokens, step by step.",
)
def main(
    training_dataset: str,
    tokenizer_name: str,
    width: int,
    layers: int,
    heads: int,
    vocab: int | None,
    batch: int,
    world_size: int,
    steps: int,
    precision: str,
    device: str | None,
    as_json: bool,
    picture: Path | None,
) -> None:
    """Compare padded and packed training on this machine."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    problems = _device_problems(device, precision)
    if width % heads or (width // heads) % 2:
        problems.append(f"--width {width} is not --heads {heads} times an even head size")
    tokenizer: Any = None
    rows: Any = None
    try:
        tokenizer = load_tokenizer(tokenizer_name)
        rows, _ = prepare_dataset(training_dataset, tokenizer, 2048)
    except (DataError, ModelError) as error:
        problems.append(str(error))
    if rows and len(rows) < batch * world_size:
        problems.append(f"{len(rows):,} rows are fewer than one global batch of {batch} x {world_size}")
    if tokenizer and vocab is not None and vocab < len(tokenizer):
        problems.append(f"--vocab {vocab} is less than the tokenizer's {len(tokenizer):,} entries")
    if not problems:
        problems += _memory_problems(vocab or len(tokenizer), width, layers, heads, DTYPES[precision], device)
    if problems:
        raise click.UsageError("\n".join(problems))
    lengths = rows["length"][:]

    shape: dict[str, Any] = {
        "vocabulary": vocab or len(tokenizer),
        "width": width,
        "layers": layers,
        "heads": heads,
        "positions": 2048,
        "dtype": DTYPES[precision],
        "device": device,
    }
    pad = tokenizer.pad_token_id
    one = {recipe: global_shares(recipe, lengths, batch, 1) for recipe in [*RECIPES, TRL]}
    many = {recipe: global_shares(recipe, lengths, batch, world_size) for recipe in [*RECIPES, TRL]}
    steps_one, steps_many = (typical_steps(shares["dolly"], lengths, steps) for shares in (one, many))
    peaks = peak_memories(shape, [rows[row] for row in one["dolly"][0][0]], pad)

    padded_model, packed_model = build_model(False, **shape), build_model(True, **shape)
    trainees: dict[str, Any] = {
        recipe: packed_model if recipe.startswith("packed") else padded_model for recipe in RECIPES
    }
    if importlib.util.find_spec("trl"):
        trainees[TRL] = sft_trainer(build_model(False, **shape), tokenizer, batch)
    losses, differences = gradient_difference(trainees, [rows[row] for row in one["dolly"][0][0]], pad)
    matmul = matmul_flops_per_second(torch.device(device), DTYPES[precision], tokens=1024, width=4096)
    on_one = measure(
        trainees, rows, [{r: one[r][i][0] for r in trainees} for i in steps_one], pad, "one rank"
    )
    on_many = measure(
        trainees,
        rows,
        [{r: slowest_share(many[r][i], lengths, packs(r)) for r in trainees} for i in steps_many],
        pad,
        f"slowest of {world_size} ranks",
    )
    matmul = max(
        matmul, matmul_flops_per_second(torch.device(device), DTYPES[precision], tokens=1024, width=4096)
    )
    shares = {recipe: real_token_shares(recipe, lengths, batch, world_size) for recipe in trainees}
    # A step of N ranks takes as long as its slowest share, whatever rows the recipe put there.
    tokens_many = sum(lengths[row] for i in steps_many for share in many["dolly"][i] for row in share)
    speeds = {
        "one_rank": {recipe: on_one[recipe].tokens_per_second for recipe in trainees},
        "slowest_rank": {recipe: tokens_many / on_many[recipe].seconds for recipe in trainees},
    }
    result: dict[str, Any] = {
        "rows": len(rows),
        "world_size": world_size,
        "steps": {"one_rank": len(steps_one), "slowest_rank": len(steps_many)},
        "precision": precision,
        "device": device,
        "threads": torch.get_num_threads(),
        "matmul_gflops": matmul / 1e9,
        "max_relative_gradient_difference": differences["packed"],
    }
    for place, by_recipe in speeds.items():
        result[place] = {
            "tokens_per_second": by_recipe,
            "ratio": by_recipe["packed"] / by_recipe["dolly"],
            "ratio_to_stock": by_recipe["packed"] / by_recipe["stock"],
            "ratio_like_for_like": by_recipe["packed_checkpointed"] / by_recipe["dolly"],
        }
    for recipe in trainees:
        result[recipe] = {
            "loss": losses[recipe],
            "relative_gradient_difference": differences[recipe],
            "mfu": on_one[recipe].flops / on_one[recipe].seconds / matmul,
            "peak_memory_gib": peaks.get(recipe),
            "real_token_share": fmean(shares[recipe]),
        }
    if picture:
        plot(shares, world_size, picture)
    print(json.dumps(result, indent=2) if as_json else report(result))


if __name__ == "__main__":
    main()
