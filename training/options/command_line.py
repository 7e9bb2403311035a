"""Click options generated from TrainingOptions, and TrainingOptions converted back to command-line words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from typing import Any

import click

from training.files import PathKind, expanded, path_problem
from training.options.other_names import advice_for
from training.options.trainer_options import TrainingOptions, flag_of


class PathName(click.ParamType):
    """A file or folder, or what else the option may name (`files.path_problem`). The value is text with ~ expanded."""

    def __init__(self, kind: PathKind) -> None:
        self.kind, self.name = kind, kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value.strip() and (problem := path_problem(value, self.kind)):
            self.fail(f"{value}: {problem}", param, ctx)
        return expanded(value)


class CollectingCommand(click.Command):
    """A command that stores unknown options and misplaced values, so that its callback reports all problems together."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True
        left, problems = list(args), ctx.meta.setdefault(__name__, [])
        # click stops at the first problem of the words. It converts no value before they are parsed.
        while True:
            try:
                extra = super().parse_args(ctx, list(left))
                break
            except click.NoSuchOption as error:
                typed = _remove(left, error.option_name, ctx, with_value=True)
                problems.append(f"No such option '{typed}'. {advice_for(typed, self._flags(ctx))}")
            except click.BadOptionUsage as error:
                _remove(left, error.option_name, ctx, with_value=False)
                problems.append(error.format_message())
        problems += [_extra_problem(word, left, self._flags(ctx, only_switches=True)) for word in extra]
        return []

    def _flags(self, ctx: click.Context, only_switches: bool = False) -> list[str]:
        """The names of the options; `only_switches`: of those that take no value."""
        names = (
            name
            for option in self.get_params(ctx)
            if not only_switches or getattr(option, "is_flag", False)
            for name in (*option.opts, *option.secondary_opts)
        )
        return [name for name in names if name.startswith("-")]


def _remove(words: list[str], flag: str, ctx: click.Context, with_value: bool) -> str:
    """Removes a flag from the words, and the value after it. Returns the flag as it was typed."""
    normalize = ctx.token_normalize_func or str
    for at, word in enumerate(words):
        typed = word.split("=")[0]
        prefix = typed[: len(typed) - len(typed.lstrip("-"))]
        same = prefix + normalize(typed.lstrip("-")) == flag
        if prefix and (same or (prefix == "-" and word.startswith(flag))):  # click names -lr as -l
            following = words[at + 1 : at + 2]
            has_value = with_value and "=" not in word and following and not _is_flag(following[0])
            del words[at : at + 1 + bool(has_value)]
            return typed
    # click reads the value of an option that may have none, as in --deepspeed=-x, as an option of its own.
    at = next(at for at, word in enumerate(words) if word.partition("=")[2].startswith(flag))
    return words.pop(at)


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-[0-9.]+(e-?[0-9]+)?", word)


def _extra_problem(word: str, words: list[str], switches: list[str]) -> str:
    """Why a word that is no option and no value of one is refused."""
    before = next((first for first, second in pairwise(words) if second == word and first in switches), None)
    if before:
        other = f"--no-{before[2:]}"
        choices = f"{before} or {other}" if other in switches else f"{before} alone"
        return f"{before} takes no value, but {word!r} follows it. Type {choices}"
    return f"{word!r} belongs to no option. Put quotation marks around a value that has spaces"


class CheckedCommand(CollectingCommand):
    """A command whose callback runs only if every word and every value could be parsed, and no path is empty."""

    def invoke(self, ctx: click.Context) -> Any:
        empty = [  # e.g. from an unset shell variable; it would be the working folder
            f"{option.opts[0]} is empty. Give a value"
            for option in self.params
            if isinstance(option.type, PathName) and not str(ctx.params[str(option.name)]).strip()
        ]
        if problems := value_problems(ctx) + empty:
            raise click.UsageError("\n".join(problems), ctx)
        return super().invoke(ctx)


class GroupedCommand(CollectingCommand):
    """A command whose --help lists the options by group."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        aliases = {"--no-gradient-checkpointing": "--gradient-checkpointing=off"}  # Dolly v1's spelling
        if not has_option(args, "report_to"):
            # The spelling of earlier versions, as in a flow that is resumed.
            aliases["--mlflow"] = "--report-to=tensorboard,mlflow"
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


# click's words for the kind of a value, and ours.
_KINDS = {
    "float range": "number",
    "integer range": "whole number",
    "float": "number",
    "integer": "whole number",
}


class CollectedOption(click.Option):
    """An option that stores its error instead of ending the parsing, so that all bad values are reported together."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        default = None if self.required else self.get_default(ctx)
        # The value of an option that was not typed is a mark of click's.
        if not self.multiple or not isinstance(value, list | tuple):
            return self._converted(ctx, value, default)
        return tuple(part for one in value for part in self._converted(ctx, (one,), ())) or default

    def _converted(self, ctx: click.Context, value: Any, otherwise: Any) -> Any:
        """The value, or `otherwise` if it is refused."""
        try:
            return super().process_value(ctx, value)
        except click.BadParameter as error:  # includes MissingParameter
            error.param = error.param or self
            message = error.format_message()
            for theirs, plain in _KINDS.items():
                message = message.replace(f"is not a valid {theirs}", f"is not a {plain}")
            ctx.meta.setdefault(__name__, []).append(message)
            return otherwise


def value_problems(ctx: click.Context) -> list[str]:
    """Problems of the command line: unknown options, and values that are missing, not a number or out of range."""
    return list(ctx.meta.get(__name__, []))


def parse_words(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(values of the fields, problems) of the trainer's options in these words.

    The last value of an option counts, and all values of one that can be repeated.

    Raises click.UsageError if the words cannot be taken apart.
    """
    command = click.command(cls=GroupedCommand)(click_options(lambda **values: None))
    context = command.make_context("training.trainer", list(words))
    return context.params, value_problems(context)


def has_option(words: Sequence[str], name: str) -> bool:
    """Whether these words of a command line set the option of a field, as in --seed 1 or --seed=1."""
    return any(word.partition("=")[0] == flag_of(name) for word in words)


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
    if kind := settings.pop("path", None):
        settings["type"] = PathName(kind)
    if settings.get("multiple"):
        settings["help"] += " Can be repeated."
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

    An option with several values is repeated.

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
        elif isinstance(value, list | tuple):
            words += [word for one in value for word in (flag, str(one))]
        else:
            words += [flag, str(value)]
    return words
