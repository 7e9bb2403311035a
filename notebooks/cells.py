"""The functions that the cells of train_dolly call: widgets, plan, answers, tables."""

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
from training.plan.presets import DEMO_RECIPE, preset_options
from training.run.preflight import destination_problems

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Choices:
    """The values of the widgets, with defaults for empty ones.

    Attributes:
        num_gpus: of each node; None for all of them.
        name: of the run, which is the last part of both folders.
        published: where the finished model is copied; None for nowhere.
        resume: whether `name` is that of an earlier run.
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
    """What was chosen. Raises RunRefusedError with every problem of it."""
    problems: list[str] = []
    values = {name: value.strip() for name, value in widgets.getAll().items()}

    def number(name: str, kind: type, default: Any) -> Any:
        if not values[name]:
            return default
        with contextlib.suppress(ValueError):
            if kind(values[name]) > 0:
                return kind(values[name])
        whole = "whole " if kind is int else ""
        problems.append(f"{name} {values[name]}: expected a {whole}number above 0")
        return default

    demo = values["gpu_family"] == "cpu"
    model = _name(values["input_model"]) or (DEMO if demo else DEFAULT_INPUT_MODEL)
    dataset = _name(values["training_dataset"]) or (DEMO if demo else DEFAULT_TRAINING_DATASET)
    root, resumed = local_path(values["local_training_root"]).absolute(), values["resume"]
    if not values["local_training_root"]:
        problems.append(f"local_training_root is empty. Name a folder, such as {default_training_root()}")
    elif resumed and not (root / resumed / RUN_FILE).is_file():
        runs = ", ".join(sorted(file.parent.name for file in root.glob(f"*/{RUN_FILE}")))
        known = f"There are: {runs}" if runs else "There is none"
        problems.append(f"resume {resumed}: no such run in {root}. {known}. Leave it empty for a new run")
    nodes = number("num_nodes", int, 1)
    if nodes > 1 and root.is_relative_to("/local_disk0"):
        problems.append(
            f"local_training_root {root}: is each node's own. Name a folder that all {nodes} nodes share"
        )
    name = resumed or time.strftime("dolly__%Y-%m-%dT%H-%M-%S")
    published = values["dbfs_output_root"].rstrip("/")
    if published:
        published = (
            f"{published}/{name}" if "://" in published else str(local_path(published).absolute() / name)
        )
    choices = Choices(
        num_gpus=number("num_gpus", int, None),
        num_nodes=nodes,
        gpu_family=values["gpu_family"],
        input_model=model,
        training_dataset=dataset,
        epochs=number("epochs", float, DEMO_RECIPE["epochs"] if model == DEMO else 1.0),
        name=name,
        output=root / name,
        published=published or None,
        resume=bool(resumed),
        mlflow_model_name=values["mlflow_model_name"] or None,
    )
    if problems:
        raise RunRefusedError("\n".join(problems))
    return choices


def _name(value: str) -> str:
    """A model or dataset. A file or folder gets its full path, as the command runs in another folder."""
    path = Path(value).expanduser()
    return str(path.resolve()) if value not in ("", DEMO) and path.exists() else value


def find_machine(choices: Choices) -> Machine:
    """This machine; the other nodes are assumed to be like it. Raises RunRefusedError where the run cannot use it."""
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
    if machine.is_cpu:  # or DeepSpeed warns in every process that it found no other accelerator
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return machine


def check_plan(
    options: Mapping[str, Any], recipe: Mapping[str, Any], ranks: int, machine: Machine, family: str
) -> str:
    """The plan of a run as a table, by its options and the recipe of its GPU family.

    Raises RunRefusedError where the run does not fit, with the numbers and what to choose.
    """
    from training.errors import DataError, ModelError
    from training.plan.fit import plan_options
    from training.plan.report import as_table

    def plan_of(recipe: Mapping[str, Any]) -> tuple[str, list[str]]:
        """The table of the plan, and all problems of the run."""
        planned = TrainingOptions(**options, **recipe)
        problems = destination_problems(planned)
        try:
            plan = plan_options(planned, ranks, machine)
        except OptionsError as error:
            return "", problems + error.problems
        table = as_table(plan, None).removesuffix(
            f"\n  {plan.command}"
        )  # the training cell shows the command
        return table, problems + plan.problems

    try:
        table, problems = plan_of(recipe)
        if not problems:
            return table
        others = [] if machine.is_cpu else [name for name in FAMILIES if name not in (family, "cpu")]
        for name in others:
            if not plan_of(preset_options(name, ranks))[1]:
                problems.append(f"In this notebook: choose gpu_family {name}, with which it fits")
                break
    except (DataError, ModelError) as error:
        raise RunRefusedError(str(error)) from error
    raise RunRefusedError("\n".join([table, "", *problems]).strip())


def how_to_go_on(choices: Choices) -> str:
    """What to type after a run that ended before its time."""
    if (choices.output / RUN_FILE).is_file():
        return f"To go on with this run, type {choices.name} into the widget resume, and run all cells again."
    return "Nothing was trained. When the cause is mended, run all cells again."


def finished_record(choices: Choices) -> dict[str, Any]:
    """The record of the run (run.json). Raises RunRefusedError unless it has finished."""
    from training.storage.record import finished_run

    try:
        return finished_run(choices.output)
    except UnfinishedRunError as error:
        raise RunRefusedError(f"{choices.name} has not finished training. {how_to_go_on(choices)}") from error


def held_out_rows(dataset: str, rows: datasets.Dataset, test_size: int, count: int) -> list[dict[str, str]]:
    """The first `count` rows that the run holds out, as {instruction, input, output}; `rows` are `prepare_dataset`'s."""
    from training.data.rows import read_columns
    from training.data.tokens import split_held_out

    columns = read_columns(dataset)
    numbers = split_held_out(rows, test_size, DEFAULT_SEED)[1]["row"][:count]
    return [
        {key: getattr(columns, key)[number - 1] for key in ("instruction", "input", "output")}
        for number in numbers
    ]


def write_prompts(choices: Choices, rows: Sequence[Mapping[str, str]]) -> str:
    """Writes the rows as a file for --sample-prompts, and returns its name.

    It lies beside the run's folder, which must be empty when training starts.
    """
    file = choices.output.with_name(f"{choices.name}.prompts.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({key: row[key] for key in ("instruction", "input")}) for row in rows)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def answers(model: str, rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A model's answers to rows with `instruction` and perhaps `input`. Loads the model, and frees its memory again."""
    import torch
    import transformers

    from training.model.generation import generate_responses, load_model_tokenizer_for_generate, printable

    transformers.utils.logging.disable_progress_bar()
    loaded, tokenizer = load_model_tokenizer_for_generate(model)
    transformers.set_seed(DEFAULT_SEED)
    instructions, inputs = [row["instruction"] for row in rows], [row.get("input") for row in rows]
    texts = generate_responses(instructions, inputs, model=loaded, tokenizer=tokenizer)
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [printable(text) for text in texts]


@dataclass(frozen=True)
class Table:
    """Texts side by side: as HTML in a notebook, below each other on a console."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def _repr_html_(self) -> str:
        style = "text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere"
        rows = []
        for kind, texts in [("th", self.headings), *(("td", row) for row in self.rows)]:
            cells = (f'<{kind} style="{style}">{html.escape(text)}</{kind}>' for text in texts)
            rows.append(f"<tr>{''.join(cells)}</tr>")
        return f'<table style="width: 100%">{"".join(rows)}</table>'

    def __repr__(self) -> str:
        width = max(map(len, self.headings[1:]), default=0)
        lines = []
        for first, *others in self.rows:
            lines.append(first)
            for heading, text in zip(self.headings[1:], others, strict=True):
                lines.append(f"  {heading:<{width}}  {' '.join(text.split())}")
        return "\n".join(lines)


def answer_stages(samples: Sequence[Mapping[str, Any]]) -> Table:
    """The entries of samples.jsonl: a row for each instruction, a column for each stage."""
    steps = sorted({entry["step"] for entry in samples})
    responses: dict[str, dict[int, str]] = {}
    for entry in samples:
        question = f"{entry['instruction']}\n{entry['input']}".strip()
        responses.setdefault(question, {})[entry["step"]] = entry["response"]
    rows = [[question, *(stages.get(step, "") for step in steps)] for question, stages in responses.items()]
    return Table(["instruction", *(f"step {step:,}" for step in steps)], rows)
