"""Parameters of the flow: options of the trainer, and the user's own files, whose names Metaflow does not keep."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from metaflow import Parameter

from training.consts import DEMO, SAMPLE_INSTRUCTIONS
from training.data.demo_rows import demo_rows
from training.data.formats import suffix_of
from training.data.source_names import joined
from training.errors import OptionsError
from training.files import expanded, local_path, path_problem
from training.options.command_line import has_option, parse_words
from training.options.trainer_options import TrainingOptions, flag_of

# Parameters that are files: the folder of the run that keeps the file, and its suffix if nothing else tells it.
FILES = {"training_file": ("rows", ".csv"), "sample_prompts": ("prompts", ".txt")}


def option(name: str, default: str = "", parameter: Any = Parameter, **settings: Any) -> Any:
    """A flow parameter for an option of the trainer, with its help. `default`: shown if the flow's default differs."""
    known = TrainingOptions.__dataclass_fields__[name]
    kinds: dict[str, Any] = {"int": {"type": int}, "float": {"type": float}}
    kind = kinds.get(known.type.split()[0], {})  # the first of "int | None"
    several = "multiple" in known.metadata
    shown: Any = default or known.default
    if several:
        shown = joined(shown)
    note = "" if shown is None else f"  [default: {shown}]"
    help = known.metadata["help"] + (" Several are separated by commas." if several else "")
    return parameter(flag_of(name)[2:], help=help + note, **kind, **settings)


def typed_names(context: Any = None) -> str:
    """The names of the user's files on this command line, as JSON. Metaflow calls it when a run is started."""
    values = {name: _typed_value(sys.argv, flag_of(name)) for name in FILES}
    return json.dumps({name: value for name, value in values.items() if value is not None})


def several_nodes(words: list[str]) -> bool:
    """Whether a command line of the flow requests more nodes than one."""
    return _typed_value(words, "--num-nodes") not in (None, "1")


def _typed_value(words: list[str], flag: str) -> str | None:
    """The last value of an option on a command line, as in --seed 1 or --seed=1; None without it."""
    value = None
    for word, following in pairwise([*words, ""]):
        name, equals, text = word.partition("=")
        if name == flag:
            value = text if equals else following
    return value


def file_in_run(folder: str, parameter: str, content: bytes, name: str | None) -> str:
    """Where a run keeps a user's file: under its own name if that is known, else with a suffix that fits the content."""
    kept, suffix = FILES[parameter]
    return f"{folder}/{kept}/{Path(name).name}" if name else f"{folder}/{kept}{suffix_of(content, suffix)}"


def default_prompts(demo: bool) -> bytes:
    """The default sample prompts: Dolly's five, or some of the demo's rows, the last of them after an earlier turn."""
    if not demo:
        return json.dumps([{"instruction": instruction} for instruction in SAMPLE_INSTRUCTIONS]).encode()
    rows = demo_rows()
    chosen = [*rows[:: len(rows) // 5], next(row for row in rows if "history" in row)]
    prompts = [{key: value for key, value in row.items() if key != "output"} for row in chosen]
    return json.dumps(prompts).encode()


def parse_options(words: list[str], more: str, problems: list[str]) -> TrainingOptions:
    """Parses the trainer's options from a command line, in which the last value counts. Appends to `problems`.

    The sources of rows in `more` replace those in `words`. Existing paths become absolute, because the command runs in
    another folder. Raises OptionsError with all problems if the command line cannot be parsed.
    """
    try:
        typed = shlex.split(more)
        values, wrong = parse_words([*_without_sources(words, typed), *typed])
    except (click.UsageError, ValueError) as error:  # an unknown option, an unclosed quote
        reason = error.format_message() if isinstance(error, click.UsageError) else error
        raise OptionsError(*problems, f"--trainer-options {more!r}: {reason}") from error
    problems += wrong
    for name in ("input_model", "sample_prompts", "deepspeed", "resume"):
        values[name] = values[name] and _absolute(values[name])
    values["training_dataset"] = tuple(map(_absolute, values["training_dataset"]))
    for name in ("dbfs_output_dir", "checkpoint_to"):
        if values[name] and "://" not in values[name]:
            with suppress(RuntimeError):  # ~nobody: reported by destination_problems
                values[name] = str(local_path(values[name]).absolute())
    return TrainingOptions(**values)


def _without_sources(words: list[str], typed: list[str]) -> list[str]:
    """`words` without --training-dataset and its values, if `typed` has some: they would be added to them."""
    if not has_option(typed, "training_dataset"):
        return words
    flag = flag_of("training_dataset")
    return [word for before, word in pairwise(["", *words]) if flag not in (before, word)]


def _absolute(name: str) -> str:
    """The absolute path of what exists; other names as they are."""
    path = os.path.expanduser(name)
    is_path = path not in (DEMO, "auto", "never") and os.path.exists(path)
    return str(Path(path).absolute()) if is_path else name


def changed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options (names of TrainingOptions) that differ from the trainer's defaults."""
    defaults = {field.name: field.default for field in fields(TrainingOptions)}
    return {name: value for name, value in options.items() if value != defaults[name]}


def runs_folder(root: str | None) -> Path:
    """The absolute folder of the runs. Raises OptionsError if there can be no such folder."""
    folder = expanded(root or "~/dolly_training")
    if problem := path_problem(folder, "output"):
        raise OptionsError(f"--local-training-root {root}: {problem}")
    return Path(folder).absolute()
