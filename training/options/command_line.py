"""Click options generated from TrainingOptions, and TrainingOptions converted back to command-line words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

import click

from training.options.trainer_options import TrainingOptions, flag_of


class GroupedCommand(click.Command):
    """A command whose --help lists the options by group."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        aliases = {"--no-gradient-checkpointing": "--gradient-checkpointing=off"}  # Dolly v1's spelling
        return super().parse_args(ctx, [aliases.get(arg, arg) for arg in args])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        group_of = {f.name: f.metadata["group"] for f in fields(TrainingOptions)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record:
                groups.setdefault(group_of.get(parameter.name or "", "Other"), []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


class CollectedOption(click.Option):
    """An option that stores its error instead of ending the parsing, so that all bad values are reported together."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().process_value(ctx, value)
        except click.BadParameter as error:  # includes MissingParameter
            error.param = error.param or self
            ctx.meta.setdefault(__name__, []).append(error.format_message())
            return self.get_default(ctx) if not self.required else None


def value_problems(ctx: click.Context) -> list[str]:
    """Errors of the values on the command line: not a number, out of range, missing."""
    return list(ctx.meta.get(__name__, []))


def click_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a click command with one option per field of TrainingOptions."""
    return some_click_options(*(option.name for option in fields(TrainingOptions)))(function)


def some_click_options(*names: str, **defaults: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator that adds the options of these fields, in this order, and those in `defaults`.

    `defaults` replaces the defaults of the fields. With None the command chooses the value itself.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        known = {option.name: option for option in fields(TrainingOptions)}
        for name in reversed([*names, *(name for name in defaults if name not in names)]):
            function = _click_option(known[name], defaults.get(name, known[name].default))(function)
        return function

    return decorate


def _click_option(option: Field[Any], default: Any) -> Callable[..., Any]:
    settings = dict(option.metadata)
    settings.pop("group")
    flag = settings.pop("flag", flag_of(option.name))
    if option.type == "bool" and not option.default:
        settings |= {"is_flag": True, "show_default": False}
    elif str(option.type).startswith("bool"):
        flag += f"/--no-{flag[2:]}"
    elif "type" not in settings:
        settings["type"] = int if option.type == "int" else str
    if default is not MISSING:
        settings |= {"default": default, "required": False}
        settings.setdefault("show_default", default is not None)
    return click.option(flag, option.name, cls=CollectedOption, **settings)


def option_words(chosen: Mapping[str, Any]) -> list[str]:
    """Command-line words of options: {"lr": 1e-5} gives ["--lr", "1e-05"]. Options of value None are left out.

    Raises KeyError for an unknown option.
    """
    defaults = {option.name: option.default for option in fields(TrainingOptions)}
    words = []
    for name, value in chosen.items():
        flag, default = flag_of(name), defaults[name]
        if value is None or (value is False and default is False):  # it has no --no- form
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, float):
            short = f"{value:g}"
            words += [flag, short if float(short) == value else repr(value)]
        else:
            words += [flag, str(value)]
    return words
