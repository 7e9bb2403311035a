"""Functions called by the cells of train_dolly.py: read the widgets, check the plan, generate and show answers."""

from __future__ import annotations

import contextlib
import gc
import html
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from notebooks.found import LOCAL_DISK, default_training_root, lost_model_problem
from training.consts import DEFAULT_INPUT_MODEL, DEFAULT_SEED, DEFAULT_TRAINING_DATASET, DEMO, RUN_FILE
from training.data.conversations import prompt_of_row, prompt_text, prompts_of, row_of_prompt
from training.errors import MachineError, OptionsError, RunRefusedError, UnfinishedRunError, printable
from training.files import PathKind, expanded, local_path, path_problem, split_sources
from training.machine.catalogue import FAMILIES, Machine
from training.options.trainer_options import TrainingOptions
from training.options.wording import NOTEBOOK, worded
from training.plan.presets import DEMO_RECIPE, method_of, method_options, preset_options
from training.run.preflight import destination_problems, evaluation_problems
from training.storage.remote import newer_copies

PATHS: dict[str, PathKind] = {
    "input_model": "model",
    "training_dataset": "dataset",
    "local_training_root": "output",
    "dbfs_output_root": "target",
    "checkpoint_root": "target",
}
DATASET_PARTS = ("config", "split", "revision")  # each has the widget dataset_<part>


@dataclass(frozen=True)
class Choices:
    """The values of the widgets, with defaults for empty ones.

    Attributes:
        num_gpus: GPUs per node; None for all.
        dataset_selection: config, split and revision of a dataset on the Hub, without empty ones.
        name: name of the run, the last part of `output` and `published`.
        output: folder that the run trains in.
        test_size: rows held out; None for the default.
        published: folder or URL that the finished model is copied to; None to not copy it.
        checkpoint_to: folder or URL that each checkpoint is copied to; None to not copy them.
        training_dataset: the sources of the rows.
        resume: whether `name` is an earlier run.
        restarts: most times that the run is started again.
        method: key of METHODS, or "auto".
    """

    num_gpus: int | None
    num_nodes: int
    gpu_family: str
    input_model: str
    training_dataset: tuple[str, ...]
    dataset_selection: dict[str, str]
    test_size: int | None
    epochs: float
    name: str
    output: Path
    published: str | None
    checkpoint_to: str | None
    resume: bool
    restarts: int
    mlflow_model_name: str | None
    method: str

    @property
    def dataset_options(self) -> dict[str, Any]:
        """The trainer's options for the dataset."""
        parts = {f"dataset_{key}": text for key, text in self.dataset_selection.items()}
        return {"training_dataset": self.training_dataset} | parts

    @property
    def is_demo(self) -> bool:
        return self.input_model == DEMO


def read_widgets(widgets: Any) -> Choices:
    """Reads and checks the widgets. Raises RunRefusedError with every problem."""
    problems: list[str] = []
    values = {name: value.strip() for name, value in widgets.getAll().items()}

    def number(name: str, kind: type, default: Any, least: int = 1) -> Any:
        return _number(name, values[name], kind, default, least, problems)

    for name, kind in PATHS.items():
        texts = split_sources(values[name]) if kind == "dataset" else (values[name],)
        found = {text: problem for text in texts if text and (problem := path_problem(text, kind))}
        if found:
            problems += [f"{name} {text}: {problem}" for text, problem in found.items()]
            values[name] = default_training_root() if kind == "output" else ""
    demo = values["gpu_family"] == "cpu"
    model = _absolute_path(values["input_model"]) or (DEMO if demo else DEFAULT_INPUT_MODEL)
    typed = values["training_dataset"] or (DEMO if demo else DEFAULT_TRAINING_DATASET)
    sources = tuple(map(_absolute_path, split_sources(typed)))
    root, resumed = local_path(values["local_training_root"]).absolute(), values["resume"]
    if not values["local_training_root"]:
        problems.append(f"local_training_root is empty. Name a folder, such as {default_training_root()}")
    if lost := lost_model_problem(values["dbfs_output_root"], values["mlflow_model_name"]):
        problems.append(lost)
    name = resumed or time.strftime("dolly__%Y-%m-%dT%H-%M-%S")
    checkpoint_to = _run_folder(values["checkpoint_root"], name)
    if resumed and values["local_training_root"] and not (root / resumed / RUN_FILE).is_file():
        problems += _missing_run(root, resumed, checkpoint_to)
    nodes = number("num_nodes", int, 1)
    if nodes > 1 and root.is_relative_to(LOCAL_DISK):
        problems.append(
            f"local_training_root {root} is local to each node. Name a folder that all {nodes} nodes share"
        )
    choices = Choices(
        num_gpus=number("num_gpus", int, None),
        num_nodes=nodes,
        gpu_family=values["gpu_family"],
        input_model=model,
        training_dataset=sources,
        dataset_selection={key: text for key in DATASET_PARTS if (text := values[f"dataset_{key}"])},
        test_size=number("test_size", int, None),
        epochs=number("epochs", float, DEMO_RECIPE["epochs"] if model == DEMO else 1.0),
        name=name,
        output=root / name,
        published=_run_folder(values["dbfs_output_root"], name),
        checkpoint_to=checkpoint_to,
        resume=bool(resumed),
        restarts=number("restarts", int, 0, least=0),
        mlflow_model_name=values["mlflow_model_name"] or None,
        method=values["method"] or "auto",
    )
    if problems:
        raise RunRefusedError("\n".join(problems))
    return choices


def _run_folder(root: str, name: str) -> str | None:
    """The run's folder in a folder or URL of all runs; None if that is empty."""
    if "://" in root:
        return f"{root.rstrip('/')}/{name}"
    return str(local_path(root).absolute() / name) if root else None


def _missing_run(root: Path, name: str, checkpoint_to: str | None) -> list[str]:
    """A problem if the run to continue has no copy of a checkpoint either."""
    try:
        if newer_copies(checkpoint_to, "auto", root / name):
            return []
    except OptionsError as error:
        return [worded(problem, NOTEBOOK) for problem in error.problems]
    runs = ", ".join(sorted(file.parent.name for file in root.glob(f"*/{RUN_FILE}")))
    existing = f"Existing runs: {runs}" if runs else "It has no runs"
    copied = f", and no copy of its checkpoints in {checkpoint_to}" if checkpoint_to else ""
    return [f"resume {name}: no such run in {root}{copied}. {existing}. Leave it empty for a new run"]


def _number(name: str, value: str, kind: type, default: Any, least: int, problems: list[str]) -> Any:
    """The number in a widget: `default` if it is empty; 0 is refused if `least` is 1. Appends to `problems`."""
    if not value:
        return default
    with contextlib.suppress(ValueError):
        number = kind(value)
        if 0 < number < math.inf or (number == 0 and least == 0):
            return number
    words = "number" if kind is float else "whole number"
    problems.append(f"{name} {value}: expected a {words}{' above 0' if least else ', or 0'}")
    return default


def _absolute_path(value: str) -> str:
    """The name of a model or dataset. Paths become absolute, because training runs in another folder."""
    path = Path(expanded(value))
    return str(path.resolve()) if value not in ("", DEMO) and path.exists() else value


def find_machine(choices: Choices) -> Machine:
    """This machine; other nodes are assumed to be equal. Raises RunRefusedError if the run cannot use it."""
    from training.machine.environment import version_problems
    from training.machine.kernels import kernel_problems
    from training.machine.local import this_machine

    problems = version_problems() or kernel_problems()
    if problems:
        raise RunRefusedError("\n".join(problems))
    try:
        machine = this_machine(choices.output, choices.num_gpus)
    except MachineError as error:
        raise RunRefusedError(worded(f"{error}. Leave it empty for all", NOTEBOOK)) from error
    if machine.is_cpu and choices.gpu_family != "cpu":
        raise RunRefusedError(
            f"gpu_family {choices.gpu_family}: this machine has no GPU. Attach the notebook to a machine with GPUs "
            "(in a cluster the driver needs GPUs too), or choose cpu, which trains the demo"
        )
    if machine.is_cpu:  # otherwise DeepSpeed warns in every process that it found no accelerator
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return machine


def choose_recipe(
    choices: Choices, options: Mapping[str, Any], ranks: int, machine: Machine
) -> dict[str, Any]:
    """The recipe of the GPU family and the method. Prints the method if the plan has chosen it.

    With "auto" one GPU gets the first method that fits. Several GPUs train all weights, and so does the demo. A resumed
    run keeps its method.
    """
    from training.plan.request import first_method
    from training.storage.record import read_run_record

    method, former = choices.method, read_run_record(choices.output) if choices.resume else None
    if method == "auto" and former:
        method = method_of(former["options"])
    elif method == "auto" and ranks == 1 and not machine.is_cpu:
        method = first_method(options, choices.gpu_family, machine)  # "full" also if none fits
        print(f"method {method}: the first that fits this GPU" if method != "full" else "method full")
    return method_options(choices.gpu_family, ranks, "full" if method == "auto" else method)


def check_plan(
    options: Mapping[str, Any], recipe: Mapping[str, Any], ranks: int, machine: Machine, family: str
) -> str:
    """The plan of a run as a table, from its options and the recipe of its GPU family.

    Raises RunRefusedError with the numbers and what to choose if the run does not fit.
    """
    from training.errors import DataError, ModelError
    from training.machine.environment import lora_package_problems
    from training.plan.report import as_table
    from training.plan.request import plan_options
    from training.run.identity import recorded_test_size

    def plan_of(recipe: Mapping[str, Any]) -> tuple[str, list[str]]:
        """(table of the plan, problems of the run)."""
        planned = TrainingOptions(**{**recipe, **options})
        problems = destination_problems(planned) + evaluation_problems(planned)
        problems += lora_package_problems(planned.lora > 0, planned.quantize is not None)
        try:
            plan = plan_options(planned, ranks, machine, recorded_test_size(planned))
        except OptionsError as error:
            return "", problems + error.problems
        # The training cell prints the command.
        table = worded(as_table(plan, None, commands=False), NOTEBOOK)
        return table, problems + ([] if planned.force else plan.problems)

    try:
        table, problems = plan_of(recipe)
        if not problems:
            return table
        families = [] if machine.is_cpu else [name for name in FAMILIES if name not in (family, "cpu")]
        kept = {name: recipe[name] for name in ("lora", "quantize") if name in recipe}
        others = {
            f"gpu_family {name}": preset_options(name, ranks, lora=bool(kept)) | kept for name in families
        }
        if families and not kept:
            others |= {f"method {name}": method_options(family, ranks, name) for name in ("lora", "qlora")}
        for name, other in others.items():
            if not plan_of(other)[1]:
                problems.append(f"In this notebook: choose {name}, which fits")
                break
    except (DataError, ModelError) as error:
        raise RunRefusedError(worded(str(error), NOTEBOOK)) from error
    raise RunRefusedError(
        "\n".join([table, "", *(worded(problem, NOTEBOOK) for problem in problems)]).strip()
    )


def resume_advice(choices: Choices) -> str:
    """What to do after a run that ended early."""
    if (choices.output / RUN_FILE).is_file():
        return f"To continue this run, type {choices.name} into the widget resume, and run all cells again."
    return "Nothing was trained. Correct the problem, then run all cells again."


def finished_record(choices: Choices) -> dict[str, Any]:
    """The record of the run (run.json). Raises RunRefusedError unless it has finished."""
    from training.storage.record import finished_run

    try:
        return finished_run(choices.output)
    except UnfinishedRunError as error:
        raise RunRefusedError(
            f"{choices.name} has not finished training. {resume_advice(choices)}"
        ) from error


def prepare_rows(options: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Tokenises the rows of a run, and prints what became of them.

    Returns the first `count` held-out rows as {instruction, input, output}, and history if there is one. Raises
    RunRefusedError if the rows or the model cannot be used.
    """
    from training.data.held_out import held_out_message, held_out_size, split_held_out
    from training.data.sources import places_of, read_sources
    from training.errors import DataError, ModelError
    from training.run.identity import recorded_test_size
    from training.run.prepare import tokenised_rows

    run = TrainingOptions(**options)
    try:
        _, rows, ledger = tokenised_rows(run)
        recorded = recorded_test_size(run)
        test_size = held_out_size(run.test_size, len(rows), recorded)
        columns, starts = read_sources(run.training_dataset, run.dataset_selection)
    except (DataError, ModelError) as error:
        raise RunRefusedError(worded(str(error), NOTEBOOK)) from error
    print(ledger)
    print(worded(held_out_message(test_size, len(rows), run.test_size, recorded), NOTEBOOK))
    held_out = split_held_out(rows, test_size, run.seed)[1]
    prompts = prompts_of(columns)
    return [
        row_of_prompt(prompts[place]) | {"output": columns.output[place]}
        for place in places_of(held_out, starts)[:count]
    ]


def write_prompts(choices: Choices, rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes the rows to a file for --sample-prompts and returns its name.

    The file is beside the run's folder, which must be empty when training starts.
    """
    file = choices.output.with_name(f"{choices.name}.prompts.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({key: row[key] for key in row if key != "output"}) for row in rows)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def generate_answers(model: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A model's answers to the prompts of rows. Loads the model and frees its memory."""
    import torch
    import transformers

    from training.model.generation import answer_prompts, load_model_tokenizer_for_generate

    transformers.utils.logging.disable_progress_bar()
    loaded, tokenizer = load_model_tokenizer_for_generate(model)
    transformers.set_seed(DEFAULT_SEED)
    texts = answer_prompts([prompt_of_row(row) for row in rows], model=loaded, tokenizer=tokenizer)
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return texts


@dataclass(frozen=True)
class Table:
    """A table of texts: HTML in a notebook, lines on a console."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def _repr_html_(self) -> str:
        style = "text-align: left; vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere"
        rows = []
        for kind, texts in [("th", self.headings), *(("td", row) for row in self.rows)]:
            cells = (f'<{kind} style="{style}">{html.escape(printable(text))}</{kind}>' for text in texts)
            rows.append(f"<tr>{''.join(cells)}</tr>")
        return f'<table style="width: 100%">{"".join(rows)}</table>'

    def __repr__(self) -> str:
        width = max(map(len, self.headings[1:]), default=0)
        lines = []
        for first, *cells in self.rows:
            lines.append(first)
            for heading, text in zip(self.headings[1:], cells, strict=True):
                lines.append(f"  {heading:<{width}}  {' '.join(text.split())}")
        return printable("\n".join(lines))


def shown_prompt(row: Mapping[str, Any]) -> str:
    """The text of a row's prompt, with the turns before it."""
    return prompt_text(prompt_of_row(row))


def answers_by_step(samples: Sequence[Mapping[str, Any]]) -> Table:
    """Table of samples.jsonl: one row per prompt, one column per step."""
    steps = sorted({entry["step"] for entry in samples})
    responses: dict[str, dict[int, str]] = {}
    for entry in samples:
        responses.setdefault(shown_prompt(entry), {})[entry["step"]] = entry["response"]
    rows = [[prompt, *(answers.get(step, "") for step in steps)] for prompt, answers in responses.items()]
    return Table(["instruction", *(f"step {step:,}" for step in steps)], rows)
