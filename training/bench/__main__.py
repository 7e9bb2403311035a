"""Benchmarks padded against packed training on this machine, with the same rows and weights.

python -m training.bench --training-dataset rows.jsonl --width 2048 --layers 3 --heads 16"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import datasets
import torch
import transformers

from training.bench.measure import POSITIONS, Choices, compare, model_config
from training.bench.shares import ALL_RECIPES, LORA, PEFT
from training.console import set_up_console
from training.consts import DEMO, GIB
from training.data.tokens import prepare_sources
from training.errors import DataError, ModelError, first_line
from training.machine.environment import lora_package_problems
from training.machine.local import free_host_gib
from training.model.loading import DTYPES, MOST_LAYERS
from training.model.packing import packing_of
from training.model.tokenizer import load_tokenizer
from training.options.command_line import PathName
from training.pictures import PictureFile
from training.plan.model_shape import gptj_shape


def report(result: dict[str, Any]) -> str:
    """The result as a text table."""
    recipes = [recipe for recipe in ALL_RECIPES if recipe in result]
    lines = [f"{'':40}" + "".join(f"{recipe:>20}" for recipe in recipes)]

    def line(title: str, cells: Sequence[str]) -> None:
        lines.append(f"{title:40}" + "".join(f"{cell:>20}" for cell in cells))

    def values(title: str, key: str, text: Callable[[Any], str]) -> None:
        line(title, [text(result[recipe][key]) for recipe in recipes])

    n = result["world_size"]
    for mode, title in (("one_rank", "1 rank"), ("slowest_rank", f"slowest of {n} ranks")):
        speeds = result[mode]["tokens_per_second"]
        line(f"real tokens/s, {title}", [f"{speeds[recipe]:,.0f}" for recipe in recipes])
        line("  times dolly", [f"{speeds[recipe] / speeds['dolly']:.2f}" for recipe in recipes])
        if PEFT in recipes:
            line(
                "  times peft",
                [f"{speeds[name] / speeds[PEFT]:.2f}" if name in (LORA, PEFT) else "-" for name in recipes],
            )
    values("MFU, 1 rank", "mfu", "{:.2f}".format)
    values("peak memory, GiB", "peak_memory_gib", lambda gib: "-" if gib is None else f"{gib:.2f}")
    values("loss", "loss", "{:.6f}".format)
    values("largest gradient difference from dolly", "relative_gradient_difference", "{:.1e}".format)
    values(f"real share of computed tokens, {n} ranks", "real_token_share", "{:.0%}".format)
    if PEFT in recipes:
        lines.append(
            "lora: our adapters on packed rows; peft: get_peft_model in the stock Trainer on padded rows. Their gradients are "
            "compared with each other"
        )
    lines.append(
        f"MFU is relative to the measured matrix-product rate, {result['matmul_gflops']:,.0f} GFLOP/s; memory excludes "
        "weights and gradients; gradient differences are relative to the gradient's norm"
    )
    return "\n".join(lines)


def plot(shares: dict[str, list[float]], world_size: int, path: Path) -> None:
    """Draws the share of real tokens at every step of an epoch, by recipe, into an image file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    names = {"dolly": "padded, as Dolly", "stock": "padded, batch_rebalance", "packed": "packed"}
    for recipe, name in names.items():
        values = shares[recipe]
        label = f"{name}: {fmean(values):.0%}"
        axes.plot(range(1, len(values) + 1), values, marker=".", linewidth=1, label=label)
    axes.set(
        xlabel="step",
        ylabel="real tokens, share of what the devices could compute",
        ylim=(0, 1.05),
        title=f"Every step waits for the slowest of {world_size} ranks",
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def _prepare(choices: Choices, sources: tuple[str, ...], name: str) -> tuple[Choices, Any, Any]:
    """(choices with the vocabulary size filled in, tokenizer, tokenised rows).

    Raises click.UsageError with every problem.
    """
    problems = _problems(choices)
    tokenizer: Any = None
    rows: Any = None
    try:
        tokenizer = load_tokenizer(name)
        rows, _ = prepare_sources(sources, tokenizer, POSITIONS)
    except (DataError, ModelError) as error:
        problems.append(str(error))
    problems += lora_package_problems(choices.lora > 0, quantize=False)
    batch, ranks, vocabulary = choices.batch, choices.world_size, choices.vocabulary
    if rows and len(rows) < batch * ranks:
        problems.append(
            f"{len(rows):,} rows are fewer than one global batch of {batch} x {ranks}. "
            "Type a smaller --batch or --world-size"
        )
    if tokenizer and vocabulary and vocabulary < len(tokenizer):
        problems.append(
            f"--vocab {vocabulary} is less than the tokenizer's {len(tokenizer):,} entries. "
            f"Type --vocab {len(tokenizer)}"
        )
    if not problems:
        choices = replace(choices, vocabulary=vocabulary or len(tokenizer))
        problems = _memory_problems(choices)
    if problems:
        raise click.UsageError("\n".join(problems))
    return choices, tokenizer, rows


def _problems(choices: Choices) -> list[str]:
    """Problems of the model's shape, the device and the precision. Tries a computation on the device."""
    problems, device, precision = [], choices.device, choices.precision
    try:
        if torch.device(device).type == "cpu" and precision == "fp16":
            problems.append(
                "--precision fp16: a CPU computes it too slowly to compare. Type --precision bf16 or fp32"
            )
        else:
            torch.ones(1, device=device, dtype=DTYPES[precision]).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        problems.append(
            f"--device {device}: cannot be used here in {precision} ({reason}). Type --device cpu"
        )
    if choices.width % choices.heads or (choices.width // choices.heads) % 2:
        problems.append(f"--width {choices.width}: expected --heads {choices.heads} times an even head size")
    else:
        problems += _architecture_problems(choices)
    return problems


def _architecture_problems(choices: Choices) -> list[str]:
    """A problem if the architecture is unknown, cannot have this shape, or cannot be packed."""
    expected = (
        "Type --architecture gptj, llama, gpt_neox or another model type of transformers that can be packed"
    )
    if choices.architecture not in transformers.CONFIG_MAPPING:
        return [f"--architecture {choices.architecture} is not a model type of transformers. {expected}"]
    try:
        packing = packing_of(model_config(replace(choices, vocabulary=1024, layers=4)))
    except Exception as error:  # of the config's own checks
        return [f"--architecture {choices.architecture}: {first_line(error)}. {expected}"]
    if packing.obstacle:
        return [f"--architecture {choices.architecture} cannot be packed: {packing.obstacle}. {expected}"]
    return []


def _memory_problems(choices: Choices) -> list[str]:
    """A problem if the padded and the packed model and their gradients exceed the free memory."""
    shape = gptj_shape("benchmark", choices.layers, choices.width, choices.heads, choices.vocabulary or 0)
    needed = 2 * 2 * shape.parameters * DTYPES[choices.precision].itemsize / GIB
    on_gpu = torch.device(choices.device).type == "cuda"
    free = torch.cuda.mem_get_info(choices.device)[0] / GIB if on_gpu else free_host_gib()
    if needed <= free:
        return []
    return [
        f"--width {choices.width}, --layers {choices.layers} and {choices.vocabulary:,} entries need {needed:,.0f} GiB "
        f"for two models and their gradients, but only {free:,.0f} are free. Type a smaller value for one of them"
    ]


@click.command()
@click.option(
    "--training-dataset",
    type=PathName("dataset"),
    default=(DEMO,),
    show_default=True,
    multiple=True,
    help="Dataset, as in the trainer's --training-dataset. Can be repeated.",
)
@click.option(
    "--tokenizer", "name", default=DEMO, show_default=True, help="Name or folder of the tokenizer's model."
)
@click.option(
    "--architecture", default="gptj", show_default=True, help="Model type of transformers, such as llama."
)
@click.option("--width", type=click.IntRange(8), default=512, show_default=True, help="Width of the model.")
@click.option(
    "--layers", type=click.IntRange(1, MOST_LAYERS), default=4, show_default=True, help="Layers of the model."
)
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True, help="Attention heads.")
@click.option(
    "--vocab", "vocabulary", type=click.IntRange(1), help="Embedding rows.  [default: the tokenizer's]"
)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Rows per rank and step.")
@click.option(
    "--world-size", type=click.IntRange(1), default=8, show_default=True, help="Number of ranks to simulate."
)
@click.option(
    "--steps", type=click.IntRange(1), default=4, show_default=True, help="Steps to time per recipe."
)
@click.option("--precision", type=click.Choice(list(DTYPES)), default="fp32", show_default=True)
@click.option("--device", help="Device to use.  [default: the GPU if there is one]")
@click.option("--lora", type=click.IntRange(0), default=0, help="Rank of adapters to compare with peft's.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@click.option(
    "--plot",
    "picture",
    type=PictureFile(),
    metavar="FILE.png",
    help="Draw the share of real tokens at every step.",
)
def main(
    training_dataset: tuple[str, ...],
    name: str,
    device: str | None,
    as_json: bool,
    picture: Path | None,
    **typed: Any,
) -> None:
    """Compare padded and packed training on this machine."""
    set_up_console()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    choices, tokenizer, rows = _prepare(Choices(device=device, **typed), training_dataset, name)
    result, shares = compare(choices, tokenizer, rows)
    if picture:
        plot(shares, choices.world_size, picture)
    print(json.dumps(result, indent=2) if as_json else report(result))


if __name__ == "__main__":
    main()
