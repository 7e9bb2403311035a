"""Definition of every trainer option: name, default, unit and help."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any

import click

from training.consts import (
    DEFAULT_INPUT_MODEL,
    DEFAULT_SEED,
    DEFAULT_TEST_SIZE,
    DEFAULT_TRAINING_DATASET,
    DEMO,
    LEARNING_RATES,
    SAMPLE_TOKENS,
)
from training.files import expanded
from training.options.reporting import TENSORBOARD, TRACKERS

# Larger numbers are typing errors: ten years at 10,000 steps an hour are fewer than 10**9 steps.
MAX_EPOCHS, MAX_STEPS = 10_000, 10**9
DEFAULT_RANK_TIMEOUT = 1800  # seconds
MAX_BATCH = 1024  # rows of a batch, and batches of a step: together a million rows per device


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule of transformers. `decays`: the rate depends on the last step of the run."""

    warms_up: bool
    decays: bool


SCHEDULES = {
    "constant": Schedule(warms_up=False, decays=False),
    "constant_with_warmup": Schedule(warms_up=True, decays=False),
    "linear": Schedule(warms_up=True, decays=True),
    "cosine": Schedule(warms_up=True, decays=True),
}


def flag_of(name: str) -> str:
    """The command-line flag of a field: "max_length" gives "--max-length"."""
    return "--deepspeed_config" if name == "deepspeed_config" else "--" + name.replace("_", "-")


def _option(group: str, default: Any, help: str, **click_settings: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, **click_settings})


# One per heading of --help.
_data, _training, _lora, _devices, _output, _trackers = (
    partial(_option, group)
    for group in (
        "Model and data",
        "Training",
        "Adapters (LoRA)",
        "Precision and devices",
        "Output",
        "Trackers",
    )
)


class AutoOrCount(click.ParamType):
    """ "auto" or a positive integer."""

    name = "auto or a number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else click.IntRange(1).convert(value, param, ctx)


@dataclass(kw_only=True, frozen=True)
class TrainingOptions:
    """The options of `training.trainer`, one field per option. The command line is generated from these fields."""

    input_model: str = _data(
        DEFAULT_INPUT_MODEL,
        f"Base model: a name on the Hub, a local folder, or '{DEMO}'.",
        metavar="MODEL",
        path="model",
    )
    training_dataset: tuple[str, ...] = _data(
        (DEFAULT_TRAINING_DATASET,),
        f"A name on the Hub, a .json, .jsonl, .csv or .parquet file, a folder of them, or '{DEMO}'. Rows have instruction, "
        "input and output, or messages.",
        metavar="DATASET",
        path="dataset",
        multiple=True,
    )
    dataset_config: str | None = _data(
        None, "Configuration of a dataset on the Hub that has several.", metavar="NAME"
    )
    dataset_split: str | None = _data(
        None, "Split of a dataset on the Hub to train on.  [default: train]", metavar="SPLIT"
    )
    dataset_revision: str | None = _data(
        None, "Commit, branch or tag of a dataset on the Hub.  [default: the newest]", metavar="REVISION"
    )
    max_length: int | None = _data(
        None,
        "Longest row, in tokens.  [default: the model's limit]",
        type=click.IntRange(8),
        metavar="TOKENS",
    )
    keep_truncated: bool = _data(
        False, "Keep rows whose response is cut off at --max-length. They teach the model not to stop."
    )
    max_dropped_fraction: float = _data(
        0.1,
        "Refuse to train if more than this share of the rows is unusable.",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
    )
    drop_unusable: bool = _data(
        False,
        "Leave out conversations that cannot be used, as with tool calls, instead of refusing the dataset. They count "
        "for --max-dropped-fraction.",
    )
    test_size: int | None = _data(
        None,
        f"Rows held out for the held-out loss.  [default: a tenth of the rows, at most {DEFAULT_TEST_SIZE:,}]",
        type=click.IntRange(1),
        metavar="ROWS",
    )
    seed: int = _data(
        DEFAULT_SEED,
        "Seed of the held-out split, the row order and the new embedding rows.",
        type=click.IntRange(0, 2**32 - 1),
        metavar="NUMBER",
    )
    trust_remote_code: bool = _data(
        False, "Run Python code from the model's repository. Use it only if you trust that code."
    )

    epochs: float = _training(
        3.0,
        "Passes over the training rows.",
        type=click.FloatRange(0, MAX_EPOCHS, min_open=True),
        metavar="EPOCHS",
    )
    max_steps: int | None = _training(
        None,
        "Stop after this many optimizer steps; overrides --epochs.",
        type=click.IntRange(1, MAX_STEPS),
        metavar="STEPS",
    )
    lr: float | None = _training(
        None,
        f"Learning rate of AdamW.  [default: {LEARNING_RATES['full']:g}, with --lora {LEARNING_RATES['lora']:g}]",
        type=click.FloatRange(0, min_open=True),
        metavar="RATE",
    )
    lr_scheduler_type: str = _training(
        "constant", "Learning-rate schedule; Dolly v1 used constant.", type=click.Choice(list(SCHEDULES))
    )
    warmup_steps: int = _training(
        0, "Steps over which the learning rate rises to --lr.", type=click.IntRange(0), metavar="STEPS"
    )
    weight_decay: float = _training(0.0, "Weight decay of AdamW.", type=click.FloatRange(0), metavar="DECAY")
    per_device_train_batch_size: int = _training(
        8, "Rows in a device's batch.", type=click.IntRange(1, MAX_BATCH), metavar="ROWS"
    )
    per_device_eval_batch_size: int = _training(
        8, "Held-out rows in a device's batch.", type=click.IntRange(1, MAX_BATCH), metavar="ROWS"
    )
    batching: str = _training(
        "packed",
        "packed: no padding, equal token counts per device. padded: as in Dolly v1. The gradients are the same.",
        type=click.Choice(("packed", "padded")),
    )
    max_tokens_per_device: int | str = _training(
        "auto",
        "Split a device's packed rows into parts of at most this many tokens. auto: split only if they do not fit.",
        type=AutoOrCount(),
        metavar="auto|TOKENS",
    )
    gradient_accumulation_steps: int = _training(
        1,
        "Batches of a device per optimizer step.",
        type=click.IntRange(1, MAX_BATCH),
        metavar="BATCHES",
    )
    gradient_checkpointing: str = _training(
        "auto",
        "Recompute activations in the backward pass: less memory, a third more compute. auto: only if memory would "
        "not suffice. Without a value: on.",
        type=click.Choice(("auto", "on", "off")),
        is_flag=False,
        flag_value="on",
    )

    lora: int = _lora(
        0,
        "Train adapters of this rank on the frozen base model, and the control tokens. 0: train every weight.",
        type=click.IntRange(0),
        metavar="RANK",
    )
    lora_alpha: float | None = _lora(
        None,
        "The adapters' output is multiplied by this number divided by their rank.  [default: twice the rank]",
        type=click.FloatRange(0, min_open=True),
        metavar="ALPHA",
    )
    lora_dropout: float = _lora(
        0.0,
        "Share of an adapter's inputs that are set to zero in training.",
        type=click.FloatRange(0, 1, max_open=True),
        metavar="SHARE",
    )
    lora_targets: str = _lora(
        "all",
        "Layers that get adapters: all linear layers of the blocks, or names separated by commas, such as q_proj,v_proj.",
        metavar="all|NAMES",
    )
    quantize: str | None = _lora(
        None, "Load the frozen base model in 4 bits, on one GPU.", type=click.Choice(("nf4",))
    )

    bf16: bool | None = _devices(
        None, "Train in bfloat16.  [default: set by --deepspeed, else by what the device supports]"
    )
    fp16: bool | None = _devices(None, "Train in float16, for GPUs without bfloat16 (V100).")
    deepspeed: str | None = _devices(
        None,
        "DeepSpeed JSON; see config/ for one per GPU family.",
        is_flag=False,
        flag_value="",
        metavar="FILE",
        path="file",
    )
    deepspeed_config: str | None = _devices(
        None, "Same as --deepspeed; passed by Spark's launcher.", metavar="FILE", path="file"
    )
    local_rank: int = _devices(
        -1,
        "Passed by the launcher and ignored; the rank comes from the environment.",
        flag="--local_rank",
        metavar="RANK",
    )
    rank_timeout: int = _devices(
        DEFAULT_RANK_TIMEOUT,
        "Seconds a rank waits for the other ranks before the run fails.",
        type=click.IntRange(10),
        metavar="SECONDS",
    )

    local_output_dir: str = _output(
        MISSING,
        "Folder for model, checkpoints and logs, on a local disk: a new one, or with --resume that of the run.",
        required=True,
        metavar="FOLDER",
        path="output",
    )
    dbfs_output_dir: str | None = _output(
        None,
        "Copy the finished model to DBFS, a Volume, any folder, s3://bucket/folder, or hf://OWNER/MODEL on the Hub.",
        metavar="TARGET",
        path="target",
    )
    checkpoint_to: str | None = _output(
        None,
        "Also copy each checkpoint to DBFS, a Volume, any folder, or a URL such as s3://bucket/folder, in the background. "
        "--resume auto continues from there on another machine.",
        metavar="TARGET",
        path="target",
    )
    logging_steps: int = _output(10, "Steps between log lines.", type=click.IntRange(1), metavar="STEPS")
    eval_steps: int = _output(
        100, "Steps between evaluations of the held-out loss.", type=click.IntRange(1), metavar="STEPS"
    )
    sample_prompts: str | None = _output(
        None,
        "Instructions that the model answers during training, and before the first and after the last step: a .txt "
        "file with one per line, or a .json or .jsonl file with instruction, input and history, or messages. The "
        f"answers are greedy, at most {SAMPLE_TOKENS} tokens long.",
        metavar="FILE",
        path="file",
    )
    sample_every: str | None = _output(
        None,
        "Steps (100) or epochs (1epoch, 0.5epochs) between answers to --sample-prompts.  [default: 1epoch]",
        metavar="STEPS|EPOCHS",
    )
    save_steps: int | None = _output(
        None,
        "Steps between checkpoints, in place of --save-every. The held-out loss is computed at each.",
        type=click.IntRange(1),
        metavar="STEPS",
    )
    save_every: str | None = _output(
        None,
        "Time between checkpoints: 90s, 10min or 1h. It becomes a number of steps once the first steps were timed.  "
        "[default: a quarter of the run, at most 10min, or longer so that saving takes at most 5% of the run; with --final-model best 200 steps]",
        metavar="TIME",
    )
    save_total_limit: int = _output(2, "Checkpoints to keep.", type=click.IntRange(1), metavar="CHECKPOINTS")
    resume: str = _output(
        "never",
        "never: start a new run. auto: continue from the newest complete checkpoint in --local-output-dir or "
        "--checkpoint-to, if any. Or the folder of a checkpoint.",
        metavar="never|auto|FOLDER",
        path="checkpoint",
    )
    force: bool = _output(
        False,
        "Train even if the plan says that the run does not fit, or resume even if the options differ from the run's.",
    )
    final_model: str = _output(
        "last",
        "Checkpoint that becomes the model: the last, or the one with the best held-out loss.",
        type=click.Choice(("last", "best")),
    )
    evaluate: bool = _output(
        False,
        "At the end compare the model with its base on the held-out rows. The plan leaves this time out.",
    )
    max_shard_size: str = _output(
        "5GB", "Largest weight file of the finished model, such as 5GB or 500MB.", metavar="SIZE"
    )

    report_to: str = _trackers(
        TENSORBOARD,
        f"Where figures are logged: {', '.join(TRACKERS)}, with commas, or none. MLflow also gets the model.",
        metavar="TRACKERS",
    )
    mlflow_model_name: str | None = _trackers(
        None,
        "Register the finished model in MLflow under this name (Unity Catalog: catalog.schema.model). Adds mlflow to "
        "--report-to.",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value, several = getattr(self, option.name), "multiple" in option.metadata
            if several:  # a single one may be text
                value = tuple(map(expanded, (value,) if isinstance(value, str) else value))
            elif "path" in option.metadata and isinstance(value, str):
                value = expanded(value)
            object.__setattr__(self, option.name, value)

    @property
    def deepspeed_json(self) -> str | None:
        """The DeepSpeed file, from --deepspeed or --deepspeed_config."""
        return self.deepspeed or self.deepspeed_config or None

    @property
    def dataset_selection(self) -> dict[str, str]:
        """The part of a dataset on the Hub that was chosen: config, split and revision, without those left out."""
        chosen = (self.dataset_config, self.dataset_split, self.dataset_revision)
        pairs = zip(("config", "split", "revision"), chosen, strict=True)
        return {key: value for key, value in pairs if value is not None}
