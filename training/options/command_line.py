"""The trainer's options as a click command line, and as the words of a command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

import click

from training.options.trainer_options import TrainingOptions


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


def value_problems(ctx: click.Context) -> list[str]:
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
