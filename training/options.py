"""Every option once: name, default, unit, help; and the checks that tell all faults in one message."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from fractions import Fraction
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from training.checks import WRITER_FILES
from training.consts import (
    DEFAULT_INPUT_MODEL,
    DEFAULT_LEARNING_RATE,
    DEFAULT_SEED,
    DEFAULT_TEST_SIZE,
    DEFAULT_TRAINING_DATASET,
    DEMO,
    RUN_FILE,
    SAMPLE_TOKENS,
)
from training.publish import local_path, target_faults, writable

# Beyond these a number is a slip of the keyboard; 10,000 steps an hour for ten years are fewer.
MOST_EPOCHS, MOST_STEPS = 10_000, 10**9

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


class OptionsError(ValueError):
    """The options cannot be used together, or not on this machine. `faults` holds every reason."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        super().__init__("\n".join(f"  - {fault}" for fault in faults))


def _option(default: Any, group: str, help: str, **click_settings: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, **click_settings})


class AutoOrCount(click.ParamType):
    """ "auto", or a number of at least one."""

    name = "auto or a number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else click.IntRange(1).convert(value, param, ctx)


@dataclass(kw_only=True)
class TrainingOptions:
    """The options of `training.trainer`, one field an option. The command line is made from these fields."""

    input_model: str = _option(
        DEFAULT_INPUT_MODEL,
        "Model and data",
        f"Base model: a name on the Hub, a local folder, or '{DEMO}'.",
        metavar="MODEL",
    )
    training_dataset: str = _option(
        DEFAULT_TRAINING_DATASET,
        "Model and data",
        f"A name on the Hub, a .json, .jsonl, .csv or .parquet file, or '{DEMO}'.",
        metavar="DATASET",
    )
    max_length: int | None = _option(
        None,
        "Model and data",
        "Longest row, in tokens.  [default: what the model can hold]",
        type=click.IntRange(8),
        metavar="TOKENS",
    )
    keep_truncated: bool = _option(
        False,
        "Model and data",
        "Keep rows whose response is cut at --max-length. They teach the model not to stop.",
    )
    max_dropped_fraction: float = _option(
        0.1,
        "Model and data",
        "Stop when more than this share of the rows is unusable.",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
    )
    test_size: int = _option(
        DEFAULT_TEST_SIZE,
        "Model and data",
        "Rows held out for the held-out loss.",
        type=click.IntRange(1),
        metavar="ROWS",
    )
    seed: int = _option(
        DEFAULT_SEED,
        "Model and data",
        "Seed of the split, the order and the new rows.",
        type=click.IntRange(0, 2**32 - 1),
        metavar="NUMBER",
    )
    trust_remote_code: bool = _option(
        False,
        "Model and data",
        "Run Python code that the model's repository brings. Off unless you trust it.",
    )

    epochs: float = _option(
        3.0,
        "Training",
        "Times to go through the rows.",
        type=click.FloatRange(0, MOST_EPOCHS, min_open=True),
        metavar="EPOCHS",
    )
    max_steps: int | None = _option(
        None,
        "Training",
        "Stop after this many optimizer steps, whatever --epochs says.",
        type=click.IntRange(1, MOST_STEPS),
        metavar="STEPS",
    )
    lr: float = _option(
        DEFAULT_LEARNING_RATE,
        "Training",
        "Learning rate of AdamW.",
        type=click.FloatRange(0, min_open=True),
        metavar="RATE",
    )
    lr_scheduler_type: str = _option(
        "constant", "Training", "How the rate moves. Dolly's is constant.", type=click.Choice(SCHEDULES)
    )
    warmup_steps: int = _option(
        0, "Training", "Steps in which the rate rises to --lr.", type=click.IntRange(0), metavar="STEPS"
    )
    weight_decay: float = _option(
        0.0, "Training", "Weight decay of AdamW.", type=click.FloatRange(0), metavar="DECAY"
    )
    per_device_train_batch_size: int = _option(
        8, "Training", "Rows a device computes at once.", type=click.IntRange(1), metavar="ROWS"
    )
    per_device_eval_batch_size: int = _option(
        8, "Training", "Held-out rows a device computes at once.", type=click.IntRange(1), metavar="ROWS"
    )
    batching: str = _option(
        "packed",
        "Training",
        "packed: real tokens only, dealt evenly to the devices; padded: Dolly's way. The gradients are the same.",
        type=click.Choice(("packed", "padded")),
    )
    max_tokens_per_device: int | str = _option(
        "auto",
        "Training",
        "Split a device's packed rows into parts of at most this many tokens. auto: only if they do not fit whole.",
        type=AutoOrCount(),
        metavar="auto|TOKENS",
    )
    gradient_accumulation_steps: int = _option(
        1,
        "Training",
        "Batches a device computes before each optimizer step.",
        type=click.IntRange(1),
        metavar="BATCHES",
    )
    gradient_checkpointing: str = _option(
        "auto",
        "Training",
        "Recompute activations in the backward pass: less memory, a third more work. auto: only where memory is "
        "short without it. Without a value: on.",
        type=click.Choice(("auto", "on", "off")),
        is_flag=False,
        flag_value="on",
    )

    bf16: bool | None = _option(
        None,
        "Precision and devices",
        "Train in bfloat16.  [default: what --deepspeed says, else what the device can]",
    )
    fp16: bool | None = _option(
        None, "Precision and devices", "Train in float16, for GPUs without bfloat16 (V100)."
    )
    deepspeed: str | None = _option(
        None,
        "Precision and devices",
        "DeepSpeed JSON; config/ has one for each GPU family.",
        is_flag=False,
        flag_value="",
        metavar="FILE",
    )
    deepspeed_config: str | None = _option(
        None, "Precision and devices", "The same, as Spark's launcher writes it.", metavar="FILE"
    )
    local_rank: int = _option(
        -1,
        "Precision and devices",
        "Written by the launcher; the environment is what counts.",
        flag="--local_rank",
        metavar="RANK",
    )

    rank_timeout: int = _option(
        1800,
        "Precision and devices",
        "Seconds that a rank waits for the others before the run ends.",
        type=click.IntRange(10),
        metavar="SECONDS",
    )

    local_output_dir: str = _option(
        MISSING,
        "Output",
        "Folder for model, checkpoints and logs, on a local disk: new, or with --resume that of a run.",
        required=True,
        metavar="FOLDER",
    )
    dbfs_output_dir: str | None = _option(
        None,
        "Output",
        "Where the finished model is copied: DBFS, a Volume, any folder, or a URL such as s3://bucket/folder.",
        metavar="TARGET",
    )
    logging_steps: int = _option(
        10, "Output", "Steps between two lines of the log.", type=click.IntRange(1), metavar="STEPS"
    )
    eval_steps: int = _option(
        100,
        "Output",
        "Steps between two measurements of the held-out loss.",
        type=click.IntRange(1),
        metavar="STEPS",
    )
    sample_prompts: str | None = _option(
        None,
        "Output",
        "Instructions that the model answers as it trains, before the first step and at the last one as well: a .txt "
        "file with one a line, or a .json or .jsonl file with instruction and input. The answers are greedy, and at "
        f"most {SAMPLE_TOKENS} tokens long.",
        metavar="FILE",
    )
    sample_every: str | None = _option(
        None,
        "Output",
        "Steps (100) or epochs (1epoch, 0.5epochs) between two rounds of answers to --sample-prompts.  "
        "[default: 1epoch]",
        metavar="STEPS|EPOCHS",
    )
    save_steps: int = _option(
        200, "Output", "Steps between two checkpoints.", type=click.IntRange(1), metavar="STEPS"
    )
    save_total_limit: int = _option(
        2, "Output", "Checkpoints to keep.", type=click.IntRange(1), metavar="CHECKPOINTS"
    )
    resume: str = _option(
        "never",
        "Output",
        "never: a new run. auto: go on from the newest whole checkpoint in --local-output-dir, if there is one. "
        "Or a checkpoint's folder.",
        metavar="never|auto|FOLDER",
    )
    force: bool = _option(
        False,
        "Output",
        "Train though the plan says that it does not fit, or with --resume though the options differ from the run's.",
    )
    final_model: str = _option(
        "last",
        "Output",
        "Which checkpoint becomes the model: the last, or the best by held-out loss.",
        type=click.Choice(("last", "best")),
    )
    max_shard_size: str = _option(
        "5GB", "Output", "Largest weight file of the finished model, as in 5GB or 500MB.", metavar="SIZE"
    )

    mlflow: bool = _option(
        False, "MLflow", "Log parameters, figures and the finished model to the active tracking URI."
    )
    mlflow_model_name: str | None = _option(
        None,
        "MLflow",
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


# --- the command line --------------------------------------------------------------------------------


class GroupedCommand(click.Command):
    """A command whose --help shows its options under the headings of their groups."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = {"--no-gradient-checkpointing": "--gradient-checkpointing=off"}  # as Dolly's command had it
        return super().parse_args(ctx, [words.get(word, word) for word in args])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        names = {f.name: f.metadata["group"] for f in fields(TrainingOptions)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record:
                groups.setdefault(names.get(parameter.name or "", "Other"), []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


class CollectedOption(click.Option):
    """An option whose bad value does not end the parsing, so that all bad values are told at once."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().process_value(ctx, value)
        except click.BadParameter as error:  # a missing value is one as well
            error.param = error.param or self
            ctx.meta.setdefault(__name__, []).append(error.format_message())
            return self.get_default(ctx) if not self.required else None


def value_faults(ctx: click.Context) -> list[str]:
    """The values that the command line could not take: no number, out of range, missing."""
    return list(ctx.meta.get(__name__, []))


def click_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a click command with one option for every field of TrainingOptions."""
    for option_field in reversed(fields(TrainingOptions)):
        settings = dict(option_field.metadata)
        settings.pop("group")
        flag = settings.pop("flag", "--" + option_field.name.replace("_", "-"))
        if option_field.name == "deepspeed_config":
            flag = "--deepspeed_config"
        if option_field.type == "bool" and not option_field.default:
            settings |= {"is_flag": True, "show_default": False}
        elif str(option_field.type).startswith("bool"):
            flag += f"/--no-{flag[2:]}"
        elif "type" not in settings:
            settings["type"] = int if option_field.type == "int" else str
        if option_field.default is not MISSING:
            settings["default"] = option_field.default
            settings.setdefault("show_default", option_field.default is not None)
        function = click.option(flag, option_field.name, cls=CollectedOption, **settings)(function)
    return function


def option_words(chosen: Mapping[str, Any]) -> list[str]:
    """The words of the command line for options by their names: {"lr": 1e-5} gives ["--lr", "1e-05"]. None is left out.

    Raises KeyError for a name that is no option.
    """
    defaults = {option.name: option.default for option in fields(TrainingOptions)}
    words = []
    for name, value in chosen.items():
        flag, default = "--" + name.replace("_", "-"), defaults[name]
        if value is None or (value is False and default is False):  # an option without a --no-
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, float):
            short = f"{value:g}"
            words += [flag, short if float(short) == value else repr(value)]
        else:
            words += [flag, str(value)]
    return words


# --- what the options come to ------------------------------------------------------------------------


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The DeepSpeed configuration. Raises OptionsError where there is no such file or no JSON object in it."""
    try:
        if Path(path).exists() and not Path(path).is_file():  # to read a pipe may wait for ever
            raise OSError(0, "Is a folder, a pipe or a device, no file")
        config = json.loads(Path(path).read_text(), object_pairs_hook=_no_key_twice)
    except OSError as error:
        shipped = (
            ", ".join(sorted(str(file) for file in Path("config").glob("ds_*.json"))) or "config/ds_*.json"
        )
        raise OptionsError(
            [f"--deepspeed {path}: {error.strerror or error}. Shipped are: {shipped}"]
        ) from error
    except (ValueError, RecursionError) as error:
        raise OptionsError([f"--deepspeed {path}: broken JSON: {error}"]) from error
    if not isinstance(config, dict):
        raise OptionsError([f"--deepspeed {path}: expected a JSON object, found a {type(config).__name__}"])
    return config


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key!r} stands twice")
    return dict(pairs)


def _enabled(config: dict[str, Any], precision: str) -> bool | None:
    """What the DeepSpeed JSON says of a precision: True, False, or None where it leaves it open."""
    section = config.get(precision)
    value = section.get("enabled") if isinstance(section, dict) else None
    return value if isinstance(value, bool) else None


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether the DeepSpeed configuration keeps the optimizer in host memory."""
    zero = config.get("zero_optimization")
    return isinstance(zero, dict) and bool(zero.get("offload_optimizer"))


def precision_of(options: TrainingOptions) -> str:
    """ "bf16", "fp16" or "fp32": the options first, then the DeepSpeed JSON, then what the device does best."""
    for name in ("bf16", "fp16"):
        if getattr(options, name):
            return name
    config = read_deepspeed_json(options.deepspeed_json) if options.deepspeed_json else {}
    for name in ("bf16", "fp16"):
        if _enabled(config, name) and getattr(options, name) is None:
            return name
    if options.bf16 is False or options.fp16 is False or options.deepspeed_json:
        return "fp32"
    import torch

    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def steps_between_samples(options: TrainingOptions, steps_per_epoch: int) -> Fraction:
    """`--sample-every` in steps, which need not be whole. Raises OptionsError where it is neither steps nor epochs."""
    every = options.sample_every or "1epoch"
    epochs = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9}) ?epochs?", every)
    steps = re.fullmatch(r"[0-9]{1,9}", every)
    number = Fraction(epochs.group(1) if epochs else every) if epochs or steps else Fraction(0)
    if not number:
        raise OptionsError(
            [f"--sample-every {every}: expected steps, such as 100, or epochs, such as 1epoch or 0.5epochs"]
        )
    return number * steps_per_epoch if epochs else number


def world_size() -> int:
    """Ranks of this run, as its launcher wrote it into the environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """RANK, not LOCAL_RANK: Spark's launcher gives every rank the local rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def find_faults(options: TrainingOptions) -> list[str]:
    """Everything wrong with the options on this machine, each with what to type instead. Loads nothing."""
    faults = plain_faults(options)
    config: dict[str, Any] = {}
    if options.deepspeed is not None and not options.deepspeed_json:
        faults.append("--deepspeed names no file. Type --deepspeed config/ds_z3_bf16_config.json")
    if options.deepspeed and options.deepspeed_config and options.deepspeed != options.deepspeed_config:
        faults.append(
            f"--deepspeed {options.deepspeed} and --deepspeed_config {options.deepspeed_config}: give one"
        )
    if options.deepspeed_json:
        try:
            config = read_deepspeed_json(options.deepspeed_json)
        except OptionsError as error:
            faults += error.faults
        faults += _deepspeed_faults(options, config)
    faults += _precision_faults(options, config)
    faults += _device_faults()
    faults += sampling_faults(options)
    return faults + target_faults_of(options)


def target_faults_of(options: TrainingOptions) -> list[str]:
    """Why what training makes could not be written where it shall go: output, published copy, MLflow.

    It does not depend on the ranks, so that notebook and flow can ask it before they start any.
    """
    faults = []
    if options.logs_to_mlflow:
        faults += tracking_faults("--mlflow-model-name", options.mlflow_model_name or None)
        faults += _large_file_faults(options)
    if not is_main_process():  # the other ranks may see what rank 0 has already begun to write
        return faults
    for flag, folder, check in (
        ("--local-output-dir", options.local_output_dir, _output_faults),
        ("--dbfs-output-dir", options.dbfs_output_dir, _publishing_faults),
        ("--resume", options.resume, _resume_faults),
    ):
        if not (folder or "").strip():  # told already, or not asked for
            continue
        try:
            faults += check(options)
        except (OSError, RuntimeError, ValueError) as error:
            # a folder above it may not be entered, too long a name, ~nobody, links in a circle, a null byte
            reason = error.strerror if isinstance(error, OSError) else error
            faults.append(f"{flag} {folder}: cannot be written ({reason}). Name a folder of your own")
    return faults


def plain_faults(options: TrainingOptions) -> list[str]:
    """What is wrong with the options by themselves, on whatever machine they are used."""
    faults = []
    for option in fields(options):
        value = getattr(options, option.name)
        if isinstance(value, float) and not math.isfinite(value):  # click's ranges let nan and inf pass
            faults.append(f"--{option.name.replace('_', '-')} {value}: expected a finite number")
        if isinstance(value, str) and option.name not in ("deepspeed", "deepspeed_config"):
            flag = f"--{option.name.replace('_', '-')}"
            if not value.strip():  # of a shell variable that was never set
                faults.append(f"{flag} is empty. Give a value, or leave the option out")
            elif not value.isascii() and value.encode(errors="replace").decode() != value:
                # The model card is written when all is trained, and UTF-8 could not hold it.
                faults.append(f"{flag} {value!r}: is not UTF-8. Rename the file or folder")
    if options.lr_scheduler_type == "constant" and options.warmup_steps:
        faults.append(
            f"--lr-scheduler-type constant has no warm-up, so --warmup-steps {options.warmup_steps} would be "
            "ignored. Type --lr-scheduler-type constant_with_warmup"
        )
    if options.batching == "padded" and options.max_tokens_per_device != "auto":
        faults.append(
            f"--max-tokens-per-device {options.max_tokens_per_device} splits packed rows, and --batching padded has none. "
            "Lower --per-device-train-batch-size and raise --gradient-accumulation-steps instead"
        )
    if not re.fullmatch(r"[1-9][0-9]{0,8}(KB|MB|GB)", options.max_shard_size):
        faults.append(f"--max-shard-size {options.max_shard_size}: expected a size such as 5GB or 500MB")
    return faults


def _deepspeed_faults(options: TrainingOptions, config: dict[str, Any]) -> list[str]:
    faults = []
    if "RANK" not in os.environ:
        faults.append(
            f"--deepspeed {options.deepspeed_json} needs a launcher. "
            "Type deepspeed --num_gpus N --module training.trainer ... instead of python -m training.trainer ..."
        )
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        faults.append(
            "ACCELERATE_USE_CPU is set, and silently switches DeepSpeed off. Type unset ACCELERATE_USE_CPU"
        )
    if "scheduler" in config:
        faults.append(
            f"{options.deepspeed_json} has a 'scheduler', which would override --lr-scheduler-type "
            f"{options.lr_scheduler_type} and --warmup-steps silently. Remove it from the JSON"
        )
    return faults + (_json_faults(options, config) if config else [])


def _json_faults(options: TrainingOptions, config: dict[str, Any]) -> list[str]:
    """What transformers, accelerate or DeepSpeed would refuse after loading the model, or change in silence."""
    file = options.deepspeed_json
    faults = []
    found = dict(config)
    for outer, inner in (
        ("optimizer", "params"),
        ("zero_optimization", "offload_optimizer"),
        ("zero_optimization", "offload_param"),
    ):
        found[f"{outer}.{inner}"] = _object(config.get(outer)).get(inner) or {}
    for name in ("bf16", "fp16", "optimizer", "zero_optimization", *(name for name in found if "." in name)):
        if name in found and not isinstance(found[name], dict):
            faults.append(f"{file} sets {name} {found[name]!r}, expected an object {{...}}")
    for name in ("bf16", "fp16"):
        enabled = _object(config.get(name)).get("enabled", "auto")
        if enabled not in (True, False, "auto") or type(enabled) in (int, float):
            faults.append(f'{file} sets {name}.enabled {enabled!r}, expected true, false or "auto"')

    parameters = _object(found["optimizer.params"])
    rows, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    for section, key, flag, value, unsaid in (
        # `unsaid` is what DeepSpeed takes where the file does not name the key; None: nothing it could work with
        (config, "train_micro_batch_size_per_gpu", "--per-device-train-batch-size", rows, None),
        (config, "gradient_accumulation_steps", "--gradient-accumulation-steps", accumulation, 1),
        (
            config,
            "train_batch_size",
            "the product with all ranks",
            rows * accumulation * world_size(),
            "auto",
        ),
        (config, "gradient_clipping", "the recipe's", 1.0, "auto"),
        (parameters, "lr", "--lr", options.lr, 1e-3),
        (parameters, "weight_decay", "--weight-decay", options.weight_decay, 0.0),
        (parameters, "betas", "the recipe's", [0.9, 0.999], "auto"),
        (parameters, "eps", "the recipe's", 1e-8, "auto"),
    ):
        if section is parameters and "optimizer" not in config:
            continue
        written = section.get(key, unsaid)
        if isinstance(written, bool) or written not in ("auto", value):
            says = f"sets {key} {written!r}" if key in section else f"leaves out {key}"
            faults.append(f'{file} {says}, but {flag} is {value}. Write "auto"')
    if isinstance(config.get("optimizer"), dict) and not isinstance(config["optimizer"].get("type"), str):
        faults.append(f"{file} has an 'optimizer' without a 'type'. Write \"AdamW\", or remove the section")
    zero = _object(config.get("zero_optimization"))
    stage = zero.get("stage")
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        faults.append(f"{file} sets zero_optimization.stage {stage!r}, expected 3 (or 0, 1, 2)")
    if stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        faults.append(
            f"{file} would save an empty model: "
            "set zero_optimization.stage3_gather_16bit_weights_on_model_save to true"
        )
    both = _enabled(config, "bf16") and _enabled(config, "fp16")  # told with the precision
    return faults if faults or both else _refusals(options, config)


def _refusals(options: TrainingOptions, config: dict[str, Any]) -> list[str]:
    """DeepSpeed's own reading of the JSON; its sections take an "auto" for their default by themselves."""
    from deepspeed.runtime.config import DeepSpeedConfig

    copy = {key: value for key, value in config.items() if (key, value) != ("gradient_clipping", "auto")}
    copy |= {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    try:
        DeepSpeedConfig(json.loads(json.dumps(copy)))
    except Exception as error:  # assertions, pydantic's, missing attributes
        reason = " ".join(str(error).split())
        return [f"{options.deepspeed_json}: DeepSpeed refuses it ({type(error).__name__}: {reason})"]
    return []


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _precision_faults(options: TrainingOptions, config: dict[str, Any]) -> list[str]:
    if options.bf16 and options.fp16:
        return ["--bf16 and --fp16 exclude each other. Give one of them"]
    if _enabled(config, "bf16") and _enabled(config, "fp16"):
        return [f"{options.deepspeed_json} enables both bf16 and fp16. Remove one of them from the JSON"]
    faults = []
    for name in ("bf16", "fp16"):
        asked, written = getattr(options, name), _enabled(config, name)
        if asked is not None and written is not None and asked != written:
            faults.append(
                f"--{'' if asked else 'no-'}{name}, but {options.deepspeed_json} has {name}.enabled {str(written).lower()}. "
                "Leave the option out, or choose another file from config/"
            )
    other = {"bf16": "fp16", "fp16": "bf16"}
    for name in other:
        if getattr(options, name) and _enabled(config, other[name]):
            faults.append(
                f"--{name}, but {options.deepspeed_json} trains in {other[name]}. Leave --{name} out"
            )
    if faults:
        return faults
    import torch

    try:
        precision = precision_of(options)
    except OptionsError:  # an unreadable JSON is told already
        return []
    cuda = torch.cuda.is_available()
    if precision == "fp16" and not cuda:
        return ["fp16 needs a CUDA GPU, and there is none here. Use config/ds_z3_bf16_config.json, or --bf16"]
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return [
            f"{torch.cuda.get_device_name()} cannot compute in bf16. "
            "Use --deepspeed config/ds_z3_fp16_offload_config.json, or --fp16"
        ]
    return []


def _device_faults() -> list[str]:
    import torch

    gpus = torch.cuda.device_count()
    if gpus > 1 and world_size() == 1:
        return [
            f"{gpus} GPUs are visible, but one rank was started. "
            f"Type deepspeed --num_gpus {gpus} --module training.trainer ..., or export CUDA_VISIBLE_DEVICES=0"
        ]
    return []


def sampling_faults(options: TrainingOptions) -> list[str]:
    """What is wrong with the instructions that the model shall answer as it trains; reads their file."""
    faults = []
    if options.sample_every is not None and options.sample_every.strip():
        if options.sample_prompts is None:
            faults.append(
                f"--sample-every {options.sample_every}, but nothing is asked. Add --sample-prompts FILE, or leave it out"
            )
        try:
            steps_between_samples(options, 1)
        except OptionsError as error:
            faults += error.faults
    if is_main_process() and (options.sample_prompts or "").strip():  # rank 0 reads them for all
        from training.rows import DataError, read_prompts

        try:
            read_prompts(str(options.sample_prompts))
        except DataError as error:
            faults.append(f"--sample-prompts {error}")
    return faults


def _output_faults(options: TrainingOptions) -> list[str]:
    output, faults = local_path(options.local_output_dir), []
    if output.resolve().parts[:2] in (("/", "dbfs"), ("/", "Volumes")):
        faults.append(
            f"--local-output-dir {options.local_output_dir}: training writes at random places, which DBFS and Volumes refuse. "
            "Name a local disk here (on Databricks /local_disk0/...), and this folder with --dbfs-output-dir"
        )
    elif output.exists() and not output.is_dir():
        faults.append(f"--local-output-dir {output}: is a file. Name a new folder")
    elif output.is_dir() and _holds_something(output) and not (options.resume != "never" and _is_run(output)):
        go_on = ", or type --resume auto to go on with its run" if _is_run(output) else ""
        faults.append(
            f"--local-output-dir {output}: is not empty, and nothing in it shall be lost. Name a new folder{go_on}"
        )
    elif not writable(output):
        faults.append(f"--local-output-dir {output}: cannot be written. Name a folder of your own")
    return faults


def _publishing_faults(options: TrainingOptions) -> list[str]:
    target, output = str(options.dbfs_output_dir), None
    if "://" not in target:
        local_path(target).resolve()  # raises where links go in a circle
    with suppress(OSError, RuntimeError, ValueError):  # told of the local output
        output = local_path(options.local_output_dir or "").resolve()
    return [f"--dbfs-output-dir {fault}" for fault in target_faults(target, output)]


def tracking_uri() -> str | None:
    """Where MLflow logs to: MLFLOW_TRACKING_URI, or Databricks' own; None where neither is there."""
    on_databricks = "databricks" if os.environ.get("DATABRICKS_RUNTIME_VERSION") else None
    return os.environ.get("MLFLOW_TRACKING_URI") or on_databricks


def tracking_faults(flag: str, name: str | None) -> list[str]:
    """Why nothing could be logged to MLflow, or registered under `name`, which was given by `flag`. Asks no server."""
    if find_spec("mlflow") is None:
        return ["MLflow is not installed. Type pip install '.[mlflow]', or leave --mlflow out"]
    faults = []
    uri = tracking_uri()
    part = r"[^\s/:.]{1,255}"
    if name is not None and not re.fullmatch(rf"{part}(\.{part}\.{part})?", name):
        faults.append(f"{flag} {name!r}: expected one word, or catalog.schema.model for Unity Catalog")
    elif name and uri and uri.startswith("databricks") and name.count(".") != 2:
        faults.append(f"{flag} {name!r}: Databricks expects catalog.schema.model")
    expected = "expected http(s)://HOST:PORT, databricks or sqlite:////FILE"
    if uri is None:
        return [
            *faults,
            "MLFLOW_TRACKING_URI is not set, so there is nowhere to log to. Type export MLFLOW_TRACKING_URI=http://HOST:PORT",
        ]
    # Where it has more than an address, the rest may be a password, in whatever place a slip of the hand has put it.
    hidden = uri if re.fullmatch(r"[\w.+:/~\[\]-]*", uri) else f"{uri.partition(':')[0][:5]}..."
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018  (raises for a port that is none)
    except ValueError:  # its words repeat a part of the value
        return [*faults, f"MLFLOW_TRACKING_URI {hidden}: is no address; {expected}"]
    if parts.scheme in ("http", "https"):
        if not parts.hostname:
            faults.append(f"MLFLOW_TRACKING_URI {hidden}: names no host; {expected}")
        if parts.password is not None:
            faults.append(
                f"MLFLOW_TRACKING_URI {hidden}: holds a password. "
                "Leave it out, and export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if parts.query or parts.fragment:
            faults.append(
                f"MLFLOW_TRACKING_URI {hidden}: has something behind its address. Leave it out; a token is given by "
                "MLFLOW_TRACKING_TOKEN"
            )
    elif not _is_store(uri, parts.scheme):
        faults.append(f"MLFLOW_TRACKING_URI {hidden}: MLflow has no store of that kind; {expected}")
    return faults


def _is_store(uri: str, scheme: str) -> bool:
    known = ("", "file", "databricks", "sqlite", "postgresql", "mysql", "mssql")
    plugins = {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}
    return uri == "databricks" or scheme.split("+")[0] in known or scheme in plugins


def _large_file_faults(options: TrainingOptions) -> list[str]:
    """S3 takes 5 GiB at most in one request, and not every way from MLflow to a store splits a file."""
    size = re.fullmatch(r"([1-9][0-9]{0,8})(KB|MB|GB)", options.max_shard_size)
    if size and int(size[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[size[2]] > 5 * 2**30:
        return [
            f"--max-shard-size {options.max_shard_size}: MLflow's stores take no file above 5GB. Type 5GB"
        ]
    return []


def _resume_faults(options: TrainingOptions) -> list[str]:
    if options.resume in ("never", "auto") or Path(options.resume).expanduser().is_dir():
        return []
    return [f"--resume {options.resume}: no such folder. Type never, auto, or a checkpoint's folder"]


def _holds_something(folder: Path) -> bool:
    return any(file.name not in WRITER_FILES for file in folder.iterdir())


def _is_run(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file()
