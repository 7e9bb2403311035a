"""Says how much a tuned model gained over its base, on rows that it never saw and on public benchmarks.

    python -m training.evaluate --model OUT
    python -m training.evaluate --model OUT --rows other.jsonl --limit 200
    python -m training.evaluate --model OUT --tasks hellaswag,arc_easy

The results are a table, and evaluation.json and a section of the model card in the model's folder."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from training.console import set_up_console
from training.consts import MAX_NEW_TOKENS, RUN_FILE
from training.errors import ModelError, TrackingError, printable
from training.evaluate.metrics import missing_extra
from training.evaluate.report import as_table, sections_of, write_evaluation
from training.files import can_write, expanded, path_problem, writable, write_json
from training.options.command_line import CollectedOption, CollectingCommand, PathName, value_problems
from training.options.reporting import tracker_names
from training.pictures import PictureFile, draw_evaluation
from training.storage.copy import MANIFEST_FILE
from training.storage.record import finished_run, read_run_record
from training.tracking.mlflow_evaluation import log_evaluation

logger = logging.getLogger("training")

_option = partial(click.option, cls=CollectedOption)
OPTIONS = (
    _option(
        "--model",
        "tuned",
        required=True,
        help="The tuned model: the output folder of a run, another folder, or a name on the Hub.",
    ),
    _option("--base", help="The model to compare it with.  [default: the one that the run began with]"),
    _option(
        "--rows",
        type=PathName("dataset"),
        metavar="DATASET",
        help="Rows with instruction and output that the model was not trained on: a file, a folder, or a name on the Hub.  "
        "[default: the rows that the run held out]",
    ),
    _option(
        "--limit",
        type=click.IntRange(1),
        metavar="ROWS",
        help="Only the first rows of the seeded order, or the first questions of each task.",
    ),
    _option(
        "--tasks",
        metavar="TASK,...",
        help="Benchmarks of lm-eval, by name or by YAML file. A YAML file can run any code. With --tasks, rows are "
        "evaluated only if --rows names them.",
    ),
    _option(
        "--num-fewshot",
        type=click.IntRange(0),
        metavar="EXAMPLES",
        help="Solved examples before each question of a task.  [default: the task's own number]",
    ),
    _option(
        "--task-prompt",
        type=click.Choice(("dolly", "plain")),
        help="How a task asks: in Dolly's prompt, or as plain text, as most published figures were measured.  [default: dolly]",
    ),
    _option(
        "--max-new-tokens",
        type=click.IntRange(1),
        default=MAX_NEW_TOKENS,
        show_default=True,
        help="Longest answer to a row, in tokens.",
    ),
    _option(
        "--batch-size",
        type=click.IntRange(1),
        default=32,
        show_default=True,
        help="Rows that are answered at once.",
    ),
    _option(
        "--dtype",
        type=click.Choice(("bf16", "fp16", "fp32")),
        help="[default: half precision on a GPU, fp32 on a CPU]",
    ),
    _option("--json", "json_", is_flag=True, help="Print JSON instead of the table."),
    _option(
        "--plot",
        type=PictureFile(),
        metavar="FILE.png",
        help="Draw base and tuned model with their intervals.",
    ),
    _option(
        "--output",
        type=PathName("file"),
        metavar="FILE",
        help="Write the results as JSON into this file, and nothing into the model's folder.",
    ),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code from the models' repositories."),
)


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(OPTIONS):
        function = option(function)
    return function


@click.command(cls=CollectingCommand, context_settings={"max_content_width": 110})
@_with_options
@click.pass_context
def main(ctx: click.Context, **typed: Any) -> None:
    """Compare a tuned model with its base, each figure with a 95% interval.

    Without --tasks: loss and perplexity, exact match, ROUGE-L, stopping and length on held-out rows.
    """
    set_up_console()
    logger.setLevel(logging.INFO)  # progress, on stderr
    if problems := [*value_problems(ctx), *_problems(typed)]:
        raise click.UsageError("\n".join(problems))
    import torch

    try:
        _evaluate(**typed)
    except torch.OutOfMemoryError:
        _end("the GPU ran out of memory. Lower --batch-size or --max-new-tokens")
    except (OSError, ValueError) as error:  # includes DataError, ModelError and OptionsError
        _end(str(error))


def _end(reason: str) -> NoReturn:
    print(f"Cannot evaluate: {printable(reason)}", file=sys.stderr)
    sys.exit(2)


def _problems(typed: dict[str, Any]) -> list[str]:
    """What is wrong with the options, before anything is loaded."""
    problems = []
    for name in ("tuned", "base", "rows", "tasks", "output"):
        if typed.get(name) is not None and not typed[name].strip():  # e.g. from an unset shell variable
            flag = "--model" if name == "tuned" else f"--{name}"
            problems.append(f"{flag} is empty. Give a value, or leave the option out")
    if typed.get("output"):
        target = Path(typed["output"])
        if not can_write(target):
            problems.append(
                f"--output {typed['output']}: cannot be written. Name a file in a folder of your own"
            )
        elif _lies_in_a_model(target, typed["tuned"], typed["base"]):
            problems.append(
                f"--output {typed['output']}: lies in the model's folder, and could replace a file of the model. Name a "
                "file elsewhere"
            )
    if typed.get("tasks") is None:
        problems += [
            f"--{name.replace('_', '-')}: has no effect without --tasks. Leave it out, or name tasks"
            for name in ("num_fewshot", "task_prompt")
            if typed.get(name) is not None
        ]
        problems += missing_extra("rouge_score")
    else:
        packages = ["lm_eval", "rouge_score"] if typed.get("rows") else ["lm_eval"]
        problems += [problem for package in packages for problem in missing_extra(package)]
    return problems


def _lies_in_a_model(file: Path, *models: str | None) -> bool:
    folders = [Path(expanded(model)) for model in models if model]
    return any(folder.is_dir() and folder.resolve() in file.resolve().parents for folder in folders)


def _evaluate(
    tuned: str, base: str | None, json_: bool, plot: Path | None, output: str | None, **typed: Any
) -> None:
    """Evaluates the models, and writes and prints the results. Raises ValueError with words."""
    tuned = expanded(tuned)
    if problem := path_problem(tuned, "model"):
        raise ModelError(f"--model {tuned}: {problem}")
    record = finished_run(Path(tuned)) if os.path.isfile(Path(tuned) / RUN_FILE) else None
    base = base or (record["options"]["input_model"] if record else None)
    if base is None or (record is None and typed["rows"] is None and typed["tasks"] is None):
        raise ModelError(
            f"{tuned}: is not the folder of a run, so its base and its held-out rows are not known. Type --base MODEL, and "
            "--rows FILE or --tasks TASK"
        )
    if problem := path_problem(base, "model"):
        raise ModelError(f"{base}: {problem}. Type --base MODEL to name the base")
    folder = Path(tuned) if record and output is None else None
    if folder and (problem := _not_writable(folder)):
        logger.warning("%s, so the results are only printed. --output FILE writes them into a file", problem)
        folder = None
    with redirect_stdout(sys.stderr):  # some libraries print
        sections = _compare(tuned, base, record, **typed)
    with suppress(BrokenPipeError):  # `| less` was closed; the results are written all the same
        print(json.dumps(sections, indent=2) if json_ else as_table(sections), flush=True)
    try:
        _write(sections, folder, record or {}, output, plot)
    except OSError as error:
        _end(
            f"the results could not be written ({error}). Make room, or write them elsewhere with --output FILE"
        )


def _write(
    sections: dict[str, Any],
    folder: Path | None,
    record: dict[str, Any],
    output: str | None,
    plot: Path | None,
) -> None:
    """Writes the results into the file `output`, or else beside the model in `folder`, and draws them. Raises OSError.

    `record` is that of the run in `folder`, from before the evaluation.
    """
    if folder and read_run_record(folder) != record:
        logger.warning("%s has changed since the evaluation began, so nothing is written into it", folder)
        folder = None
    if output is not None:
        write_json(Path(output), sections)
    elif folder is not None:
        write_evaluation(folder, sections)
        _log(folder, record, sections)
    if plot:
        tables = [
            (title, [(line.label, line.is_share, line.models) for line in lines])
            for title, lines in sections_of(sections)
        ]
        draw_evaluation(tables, plot)


def _log(folder: Path, record: dict[str, Any], sections: dict[str, Any]) -> None:
    """Logs to MLflow if the run did. A failure is a warning: the results are in the folder."""
    options = record["options"]
    names = tracker_names(options.get("report_to") or "")  # older runs have "mlflow": true instead
    if not ("mlflow" in names or options.get("mlflow") or options.get("mlflow_model_name")):
        return
    try:
        log_evaluation(record, folder.name, sections)
    except TrackingError as error:
        logger.warning("The run logs to MLflow, but the evaluation could not be logged: %s", error)


def _compare(
    tuned: str,
    base: str,
    record: dict[str, Any] | None,
    rows: str | None,
    tasks: str | None,
    limit: int | None,
    num_fewshot: int | None,
    task_prompt: str | None,
    max_new_tokens: int,
    batch_size: int,
    dtype: str | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """The sections of evaluation.json that were requested."""
    import transformers

    from training.evaluate.answers import Loading, compare_models
    from training.evaluate.rows import file_rows, held_out_rows
    from training.model.loading import DTYPES
    from training.model.tokenizer import load_tokenizer

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loading = Loading(DTYPES[dtype] if dtype else None, batch_size, max_new_tokens, trust_remote_code)
    sections: dict[str, Any] = {}
    if tasks is not None:
        from training.evaluate.harness import compare_on_tasks, find_tasks

        found = find_tasks(tasks)  # before the rows take their time: a name may be wrong
    if rows is not None:
        sections["file"] = compare_models(file_rows(rows).first(limit), base, tuned, loading)
    elif tasks is None and record is not None:
        held_out = held_out_rows(Path(tuned), record, load_tokenizer(tuned, trust_remote_code))
        sections["held_out"] = compare_models(held_out.first(limit), base, tuned, loading)
    if tasks is not None:
        sections["tasks"] = compare_on_tasks(
            *found, base, tuned, loading, task_prompt or "dolly", limit, num_fewshot
        )
    return sections


def _not_writable(folder: Path) -> str | None:
    """Why nothing is written into a model's folder; None if it is."""
    if (folder / MANIFEST_FILE).is_file():
        return f"{folder} is a published copy, which stays as it was published"
    return None if writable(folder) else f"{folder} cannot be written"


if __name__ == "__main__":
    main()
