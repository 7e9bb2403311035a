"""Every option of the trainer once: name, default, unit, help."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import click

from training.consts import (
    DEFAULT_INPUT_MODEL,
    DEFAULT_LEARNING_RATE,
    DEFAULT_SEED,
    DEFAULT_TEST_SIZE,
    DEFAULT_TRAINING_DATASET,
    DEMO,
    SAMPLE_TOKENS,
)
from training.errors import OptionsError

# Beyond these a number is a slip of the keyboard; 10,000 steps an hour for ten years are fewer.
MOST_EPOCHS, MOST_STEPS = 10_000, 10**9
MOST_ROWS = 1024  # at once, and batches in a step: together a million rows a device


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves, by transformers' name. `decays`: the rate depends on where the run ends."""

    warms_up: bool
    decays: bool


SCHEDULES = {
    "constant": Schedule(warms_up=False, decays=False),
    "constant_with_warmup": Schedule(warms_up=True, decays=False),
    "linear": Schedule(warms_up=True, decays=True),
    "cosine": Schedule(warms_up=True, decays=True),
}


def flag_of(name: str) -> str:
    """The option of a field: "max_length" gives "--max-length"."""
    return "--deepspeed_config" if name == "deepspeed_config" else "--" + name.replace("_", "-")


def _option(group: str, default: Any, help: str, **click_settings: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, **click_settings})


# One for each heading of --help.
_data, _training, _devices, _output, _mlflow = (
    partial(_option, group)
    for group in ("Model and data", "Training", "Precision and devices", "Output", "MLflow")
)


class AutoOrCount(click.ParamType):
    """ "auto", or a number of at least one."""

    name = "auto or a number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else click.IntRange(1).convert(value, param, ctx)


@dataclass(kw_only=True, frozen=True)
class TrainingOptions:
    """The options of `training.trainer`, one field an option. The command line is made from these fields."""

    input_model: str = _data(
        DEFAULT_INPUT_MODEL, f"Base model: a name on the Hub, a local folder, or '{DEMO}'.", metavar="MODEL"
    )
    training_dataset: str = _data(
        DEFAULT_TRAINING_DATASET,
        f"A name on the Hub, a .json, .jsonl, .csv or .parquet file, or '{DEMO}'.",
        metavar="DATASET",
    )
    max_length: int | None = _data(
        None,
        "Longest row, in tokens.  [default: what the model can hold]",
        type=click.IntRange(8),
        metavar="TOKENS",
    )
    keep_truncated: bool = _data(
        False, "Keep rows whose response is cut at --max-length. They teach the model not to stop."
    )
    max_dropped_fraction: float = _data(
        0.1,
        "Stop when more than this share of the rows is unusable.",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
    )
    test_size: int = _data(
        DEFAULT_TEST_SIZE, "Rows held out for the held-out loss.", type=click.IntRange(1), metavar="ROWS"
    )
    seed: int = _data(
        DEFAULT_SEED,
        "Seed of the split, the order and the new rows.",
        type=click.IntRange(0, 2**32 - 1),
        metavar="NUMBER",
    )
    trust_remote_code: bool = _data(
        False, "Run Python code that the model's repository brings. Off unless you trust it."
    )

    epochs: float = _training(
        3.0,
        "Times to go through the rows.",
        type=click.FloatRange(0, MOST_EPOCHS, min_open=True),
        metavar="EPOCHS",
    )
    max_steps: int | None = _training(
        None,
        "Stop after this many optimizer steps, whatever --epochs says.",
        type=click.IntRange(1, MOST_STEPS),
        metavar="STEPS",
    )
    lr: float = _training(
        DEFAULT_LEARNING_RATE,
        "Learning rate of AdamW.",
        type=click.FloatRange(0, min_open=True),
        metavar="RATE",
    )
    lr_scheduler_type: str = _training(
        "constant", "How the rate moves. Dolly's is constant.", type=click.Choice(list(SCHEDULES))
    )
    warmup_steps: int = _training(
        0, "Steps in which the rate rises to --lr.", type=click.IntRange(0), metavar="STEPS"
    )
    weight_decay: float = _training(0.0, "Weight decay of AdamW.", type=click.FloatRange(0), metavar="DECAY")
    per_device_train_batch_size: int = _training(
        8, "Rows a device computes at once.", type=click.IntRange(1, MOST_ROWS), metavar="ROWS"
    )
    per_device_eval_batch_size: int = _training(
        8, "Held-out rows a device computes at once.", type=click.IntRange(1, MOST_ROWS), metavar="ROWS"
    )
    batching: str = _training(
        "packed",
        "packed: real tokens only, dealt evenly to the devices; padded: Dolly's way. The gradients are the same.",
        type=click.Choice(("packed", "padded")),
    )
    max_tokens_per_device: int | str = _training(
        "auto",
        "Split a device's packed rows into parts of at most this many tokens. auto: only if they do not fit whole.",
        type=AutoOrCount(),
        metavar="auto|TOKENS",
    )
    gradient_accumulation_steps: int = _training(
        1,
        "Batches a device computes before each optimizer step.",
        type=click.IntRange(1, MOST_ROWS),
        metavar="BATCHES",
    )
    gradient_checkpointing: str = _training(
        "auto",
        "Recompute activations in the backward pass: less memory, a third more work. auto: only where memory is "
        "short without it. Without a value: on.",
        type=click.Choice(("auto", "on", "off")),
        is_flag=False,
        flag_value="on",
    )

    bf16: bool | None = _devices(
        None, "Train in bfloat16.  [default: what --deepspeed says, else what the device can]"
    )
    fp16: bool | None = _devices(None, "Train in float16, for GPUs without bfloat16 (V100).")
    deepspeed: str | None = _devices(
        None,
        "DeepSpeed JSON; config/ has one for each GPU family.",
        is_flag=False,
        flag_value="",
        metavar="FILE",
    )
    deepspeed_config: str | None = _devices(None, "The same, as Spark's launcher writes it.", metavar="FILE")
    local_rank: int = _devices(
        -1, "Written by the launcher; the environment is what counts.", flag="--local_rank", metavar="RANK"
    )

    rank_timeout: int = _devices(
        1800,
        "Seconds that a rank waits for the others before the run ends.",
        type=click.IntRange(10),
        metavar="SECONDS",
    )

    local_output_dir: str = _output(
        MISSING,
        "Folder for model, checkpoints and logs, on a local disk: new, or with --resume that of a run.",
        required=True,
        metavar="FOLDER",
    )
    dbfs_output_dir: str | None = _output(
        None,
        "Where the finished model is copied: DBFS, a Volume, any folder, or a URL such as s3://bucket/folder.",
        metavar="TARGET",
    )
    logging_steps: int = _output(
        10, "Steps between two lines of the log.", type=click.IntRange(1), metavar="STEPS"
    )
    eval_steps: int = _output(
        100, "Steps between two measurements of the held-out loss.", type=click.IntRange(1), metavar="STEPS"
    )
    sample_prompts: str | None = _output(
        None,
        "Instructions that the model answers as it trains, before the first step and at the last one as well: a .txt "
        "file with one a line, or a .json or .jsonl file with instruction and input. The answers are greedy, and at "
        f"most {SAMPLE_TOKENS} tokens long.",
        metavar="FILE",
    )
    sample_every: str | None = _output(
        None,
        "Steps (100) or epochs (1epoch, 0.5epochs) between two rounds of answers to --sample-prompts.  "
        "[default: 1epoch]",
        metavar="STEPS|EPOCHS",
    )
    save_steps: int = _output(200, "Steps between two checkpoints.", type=click.IntRange(1), metavar="STEPS")
    save_total_limit: int = _output(2, "Checkpoints to keep.", type=click.IntRange(1), metavar="CHECKPOINTS")
    resume: str = _output(
        "never",
        "never: a new run. auto: go on from the newest whole checkpoint in --local-output-dir, if there is one. "
        "Or a checkpoint's folder.",
        metavar="never|auto|FOLDER",
    )
    force: bool = _output(
        False,
        "Train though the plan says that it does not fit, or with --resume though the options differ from the run's.",
    )
    final_model: str = _output(
        "last",
        "Which checkpoint becomes the model: the last, or the best by held-out loss.",
        type=click.Choice(("last", "best")),
    )
    max_shard_size: str = _output(
        "5GB", "Largest weight file of the finished model, as in 5GB or 500MB.", metavar="SIZE"
    )

    mlflow: bool = _mlflow(
        False, "Log parameters, figures and the finished model to the active tracking URI."
    )
    mlflow_model_name: str | None = _mlflow(
        None,
        "Register the finished model under this name, catalog.schema.model for Unity Catalog. Implies --mlflow.",
        metavar="NAME",
    )

    @property
    def deepspeed_json(self) -> str | None:
        """The DeepSpeed file, by whichever of the two options it came."""
        return self.deepspeed or self.deepspeed_config or None

    @property
    def logs_to_mlflow(self) -> bool:
        return self.mlflow or self.mlflow_model_name is not None


def steps_between_samples(options: TrainingOptions, steps_per_epoch: int) -> Fraction:
    """`--sample-every` in steps, which need not be whole. Raises OptionsError where it is neither steps nor epochs."""
    every = options.sample_every or "1epoch"
    epochs = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9}) ?epochs?", every)
    steps = re.fullmatch(r"[0-9]{1,9}", every)
    number = Fraction(epochs.group(1) if epochs else every) if epochs or steps else Fraction(0)
    if not number:
        raise OptionsError(
            f"--sample-every {every}: expected steps, such as 100, or epochs, such as 1epoch or 0.5epochs"
        )
    return number * steps_per_epoch if epochs else number
