"""What the cells of train_dolly ask: widgets, plan, answers, tables."""

from __future__ import annotations

import contextlib
import gc
import html
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.consts import DEFAULT_INPUT_MODEL, DEFAULT_SEED, DEFAULT_TRAINING_DATASET, DEMO, RUN_FILE
from training.errors import MachineError, OptionsError, RunRefusedError, UnfinishedRunError
from training.files import DBFS, local_path
from training.machine.catalogue import FAMILIES, Machine
from training.options.trainer_options import TrainingOptions
from training.plan.presets import RECIPE, preset_options
from training.run.preflight import place_problems

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Choices:
    """What the widgets say, defaults put in.

    Attributes:
        num_gpus: of each node; None for all that there are.
        name: of the run, which is the last part of both folders.
        published: where the finished model is copied; None for nowhere.
        resume: whether `name` is that of a run that was begun before.
    """

    num_gpus: int | None
    num_nodes: int
    gpu_family: str
    input_model: str
    training_dataset: str
    epochs: float
    name: str
    output: Path
    published: str | None
    resume: bool
    mlflow_model_name: str | None

    @property
    def is_demo(self) -> bool:
        return self.input_model == DEMO


def default_training_root() -> str:
    """Databricks' local disk where there is one."""
    return "/local_disk0/dolly_training" if Path("/local_disk0").is_dir() else "~/dolly_training"


def default_output_root() -> str:
    """DBFS where it is mounted; elsewhere a folder beside that of the runs."""
    return f"{DBFS}/dolly_training" if Path(DBFS).is_dir() else "~/dolly_published"


def read_widgets(widgets: Any) -> Choices:
    """What was chosen. Raises RunRefusedError with everything that is wrong with it."""
    problems: list[str] = []
    said = {name: value.strip() for name, value in widgets.getAll().items()}

    def number(name: str, kind: type, default: Any) -> Any:
        if not said[name]:
            return default
        with contextlib.suppress(ValueError):
            if kind(said[name]) > 0:
                return kind(said[name])
        problems.append(f"{name} {said[name]}: expected {'a whole ' if kind is int else 'a '}number above 0")
        return default

    demo = said["gpu_family"] == "cpu"
    model = _name(said["input_model"]) or (DEMO if demo else DEFAULT_INPUT_MODEL)
    root, name, target = local_path(said["local_training_root"]).absolute(), said["resume"], None
    if not said["local_training_root"]:
        problems.append(f"local_training_root is empty. Name a folder, such as {default_training_root()}")
    elif name and not (root / name / RUN_FILE).is_file():
        runs = sorted(file.parent.name for file in root.glob(f"*/{RUN_FILE}"))
        there = f"There are: {', '.join(runs)}" if runs else "There is none"
        problems.append(f"resume {name}: no such run in {root}. {there}. Leave it empty for a new run")
    nodes = number("num_nodes", int, 1)
    if nodes > 1 and root.is_relative_to("/local_disk0"):
        problems.append(
            f"local_training_root {root}: is each node's own. Name a folder that all {nodes} nodes share"
        )
    name = name or time.strftime("dolly__%Y-%m-%dT%H-%M-%S")
    if said["dbfs_output_root"]:
        folder = said["dbfs_output_root"].rstrip("/")
        target = f"{folder}/{name}" if "://" in folder else str(local_path(folder).absolute() / name)
    choices = Choices(
        num_gpus=number("num_gpus", int, None),
        num_nodes=nodes,
        gpu_family=said["gpu_family"],
        input_model=model,
        training_dataset=_name(said["training_dataset"]) or (DEMO if demo else DEFAULT_TRAINING_DATASET),
        epochs=number("epochs", float, RECIPE["epochs"] if model == DEMO else 1.0),
        name=name,
        output=root / name,
        published=target,
        resume=bool(said["resume"]),
        mlflow_model_name=said["mlflow_model_name"] or None,
    )
    if problems:
        raise RunRefusedError("\n".join(problems))
    return choices


def _name(said: str) -> str:
    """A model or dataset; one that is a file or folder here as the command finds it, which runs in another folder."""
    path = Path(said).expanduser()
    return str(path.resolve()) if said not in ("", DEMO) and path.exists() else said


def find_machine(choices: Choices) -> Machine:
    """This machine, which each node is taken to be like. Raises RunRefusedError where the run cannot use it."""
    from training.machine.environment import version_problems
    from training.machine.kernels import kernel_problems
    from training.machine.local import this_machine

    problems = version_problems() or kernel_problems()
    if problems:
        raise RunRefusedError("\n".join(problems))
    try:
        machine = this_machine(choices.output, choices.num_gpus)
    except MachineError as error:
        raise RunRefusedError(f"num_gpus {choices.num_gpus}: {error}. Leave it empty for all") from error
    if machine.is_cpu and choices.gpu_family != "cpu":
        raise RunRefusedError(
            f"gpu_family {choices.gpu_family}: there is no GPU here. Attach the notebook to a machine with GPUs (of a "
            "cluster the driver needs them as well), or choose cpu, which trains the demo"
        )
    if machine.is_cpu:
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # or DeepSpeed warns in every process that it found no other
    return machine


def check_plan(
    options: Mapping[str, Any], recipe: Mapping[str, Any], ranks: int, machine: Machine, family: str
) -> str:
    """The plan of a run by its options and the recipe of its GPU family, as a table.

    Raises RunRefusedError where the run does not fit, with the numbers and what to choose.
    """
    from training.errors import DataError, ModelError
    from training.plan.fit import plan_options
    from training.plan.report import as_table

    def problems_of(recipe: Mapping[str, Any]) -> tuple[str, list[str]]:
        asked = TrainingOptions(**options, **recipe)
        targets = place_problems(asked)
        try:
            plan = plan_options(asked, ranks, machine)
        except OptionsError as error:
            return "", targets + error.problems
        table = as_table(plan, None).removesuffix(f"\n  {plan.command}")  # started below, and shown there
        return table, targets + plan.problems

    try:
        table, problems = problems_of(recipe)
        if not problems:
            return table
        if not machine.is_cpu:
            others = [name for name in FAMILIES if name not in (family, "cpu")]
            fitting = [name for name in others if not problems_of(preset_options(name, ranks))[1]]
            problems += (
                [f"In this notebook: choose gpu_family {fitting[0]}, with which it fits"] if fitting else []
            )
    except (DataError, ModelError) as error:
        raise RunRefusedError(str(error)) from error
    raise RunRefusedError("\n".join([table, "", *problems]).strip())


def how_to_go_on(choices: Choices) -> str:
    """What to type after a run that ended before its time."""
    if (choices.output / RUN_FILE).is_file():
        return f"To go on with this run, type {choices.name} into the widget resume, and run all cells again."
    return "Nothing was trained. When the cause is mended, run all cells again."


def finished_record(choices: Choices) -> dict[str, Any]:
    """The record of the run (training/record.py). Raises RunRefusedError unless it has finished."""
    from training.storage.record import finished_run

    try:
        return finished_run(choices.output)
    except UnfinishedRunError as error:
        raise RunRefusedError(f"{choices.name} has not finished training. {how_to_go_on(choices)}") from error


def held_out_rows(dataset: str, rows: datasets.Dataset, test_size: int, count: int) -> list[dict[str, str]]:
    """Some rows that the run does not train on, `{instruction, input, output}`; `rows` as `prepare_dataset` gives them."""
    from training.data.rows import read_columns
    from training.data.tokens import split_held_out

    columns = read_columns(dataset)
    numbers = split_held_out(rows, test_size, DEFAULT_SEED)[1]["row"][:count]
    return [
        {key: getattr(columns, key)[number - 1] for key in ("instruction", "input", "output")}
        for number in numbers
    ]


def write_prompts(choices: Choices, rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as a file for --sample-prompts, beside the run's folder, which the trainer wants empty. Returns its name."""
    file = choices.output.with_name(f"{choices.name}.prompts.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({key: row[key] for key in ("instruction", "input")}) for row in rows)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def answers(model: str, rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A model's answers to rows with `instruction` and perhaps `input`. It is loaded for them, and its memory given back."""
    import torch
    import transformers

    from training.model.generation import generate_responses, load_model_tokenizer_for_generate, printable

    transformers.utils.logging.disable_progress_bar()
    loaded, tokenizer = load_model_tokenizer_for_generate(model)
    transformers.set_seed(DEFAULT_SEED)
    instructions, inputs = [row["instruction"] for row in rows], [row.get("input") for row in rows]
    given = generate_responses(instructions, inputs, model=loaded, tokenizer=tokenizer)
    given = [printable(answer) for answer in given]
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return given


@dataclass(frozen=True)
class Table:
    """Texts side by side: as HTML in a notebook, below each other on a console."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def _repr_html_(self) -> str:
        style = "text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere"

        def line(kind: str, texts: Sequence[str]) -> str:
            cells = (f'<{kind} style="{style}">{html.escape(text)}</{kind}>' for text in texts)
            return f"<tr>{''.join(cells)}</tr>"

        body = "".join(line("td", row) for row in self.rows)
        return f'<table style="width: 100%">{line("th", self.headings)}{body}</table>'

    def __repr__(self) -> str:
        width = max(map(len, self.headings[1:]), default=0)
        lines = []
        for first, *others in self.rows:
            lines.append(f"{first}")
            for heading, text in zip(self.headings[1:], others, strict=True):
                lines.append(f"  {heading:<{width}}  {' '.join(text.split())}")
        return "\n".join(lines)


def answer_stages(samples: Sequence[Mapping[str, Any]]) -> Table:
    """The entries of samples.jsonl (training/metrics.py): a row for each instruction, a column for each stage."""
    steps = sorted({entry["step"] for entry in samples})
    given: dict[str, dict[int, str]] = {}
    for entry in samples:
        question = f"{entry['instruction']}\n{entry['input']}".strip()
        given.setdefault(question, {})[entry["step"]] = entry["response"]
    rows = [[question, *(stages.get(step, "") for step in steps)] for question, stages in given.items()]
    return Table(["instruction", *(f"step {step:,}" for step in steps)], rows)
