"""Puts advice into the words of the command that was typed: notebook and flow have other names for the options.

Every message is written in the trainer's options. `worded` renames them where the message is shown:

    trainer   Type --test-size 30                   Type --max-length 512
    notebook  Type 30 in the widget test_size       Type options["max_length"] = 512 (options: the cell "Does it fit?")
    flow      Type --test-size 30                   Type --trainer-options '--max-length 512'
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import Field, fields
from typing import Any

import click

from training.options.trainer_options import TrainingOptions, flag_of

# Environment variable that tells the ranks which command was typed; unset: the trainer.
COMMAND = "DOLLY_COMMAND"
NOTEBOOK, FLOW = "notebook", "flow"
CELL = "Does it fit?"  # the notebook's cell that sets the options

_DATASET = ("training_dataset", "dataset_config", "dataset_split", "dataset_revision", "test_size")
# Options that are widgets of the notebook. A line of its cell sets any other one.
WIDGETS = {
    **{
        name: name for name in ("input_model", *_DATASET, "epochs", "num_gpus", "resume", "mlflow_model_name")
    },
    "local_output_dir": "local_training_root",
    "dbfs_output_dir": "dbfs_output_root",
    "checkpoint_to": "checkpoint_root",
}
# Options that are parameters of the flow under their own name. Any other one goes into --trainer-options.
_LORA = ("lora", "lora_alpha", "lora_dropout", "lora_targets", "quantize")
PARAMETERS = ("input_model", *_DATASET, "epochs", "max_steps", "lr", "seed", *_LORA, "sample_every")
_FLOW_NAMES = {
    **{name: flag_of(name) for name in (*PARAMETERS, "num_gpus", "sample_prompts")},
    "local_output_dir": "--local-training-root",
    "dbfs_output_dir": "--dbfs-output-root",
}

_FIELDS: dict[str, Field[Any]] = {field.name: field for field in fields(TrainingOptions)}
# An option that is not in quotes, and the next word without its punctuation, which may be the value.
_OPTION = re.compile(r"(?<![\w'\"-])--(no-)?([a-z0-9]+(?:-[a-z0-9]+)*)(?![\w=-])(?: (?!--)(\S*[^\s.,;:)]))?")


def worded(text: str, command: str | None = None) -> str:
    """`text` with the options as `command` calls them; the default is the command that started this process."""
    command = command or os.environ.get(COMMAND)
    rename = {NOTEBOOK: _in_notebook, FLOW: _in_flow}.get(command or "")
    if rename is None:
        return text

    def replace(match: re.Match[str]) -> str:
        negated, flag, word = match.groups()
        name = flag.replace("-", "_")
        if name not in _FIELDS and name != "num_gpus":
            return match[0]
        if word and not _is_value(name, word):
            return f"{rename(name, '', bool(negated))} {word}"
        return rename(name, word or "", bool(negated))

    lines = []
    text = text.replace(", without --deepspeed", "")  # notebook and flow choose the file by the method
    for line in text.split("\n"):
        renamed = _OPTION.sub(replace, line).replace("' --trainer-options '", " ")  # neighbours in one string
        renamed = re.sub(r'(options\["\w+"\] = \S+) (?=options\[)', r"\1, ", renamed)
        where = f' (options: the cell "{CELL}")' if renamed.count("options[") > line.count("options[") else ""
        lines.append(renamed + where)
    return "\n".join(lines)


def _is_value(name: str, word: str) -> bool:
    """Whether the word after an option is its value: a placeholder such as N, or one that the option accepts."""
    if name in _FIELDS and str(_FIELDS[name].type).startswith("bool"):
        return False
    kind: Any = _FIELDS[name].metadata.get("type") if name in _FIELDS else click.INT
    if word.isupper() or kind is None:  # otherwise a name or a path
        return word.isupper() or word in ("auto", "never") or re.search(r"[/.\d]", word) is not None
    try:
        kind.convert(word.replace(",", ""), None, None)
    except click.UsageError:
        return False
    return True


def _in_flow(name: str, value: str, negated: bool) -> str:
    if name == "resume" and value in ("", "auto"):
        return "resume instead of run" if value else "resume"
    if name in _FLOW_NAMES:
        return f"{_FLOW_NAMES[name]} {value}".rstrip()
    flag = f"--no-{flag_of(name)[2:]}" if negated else flag_of(name)
    return f"--trainer-options '{f'{flag} {value}'.rstrip()}'"


def _in_notebook(name: str, value: str, negated: bool) -> str:
    if (name, value) == ("resume", "auto"):
        return "the run's name in the widget resume"
    if name in WIDGETS:
        return f"{value} in the widget {WIDGETS[name]}" if value else f"the widget {WIDGETS[name]}"
    if str(_FIELDS[name].type).startswith("bool"):
        return f'options["{name}"] = {not negated}'
    if not value:
        return f'options["{name}"]'
    is_number = re.fullmatch(r"[\d.,e+-]*\d", value) is not None
    literal = value.replace(",", "") if is_number or value.isupper() else json.dumps(value)
    return f'options["{name}"] = {literal}'
