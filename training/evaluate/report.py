"""Shows an evaluation as a table, and writes it beside the model: evaluation.json and a section of the model card."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.consts import DEFAULT_SEED, EVALUATION_FILE
from training.errors import first_line, printable
from training.evaluate.intervals import RESAMPLES
from training.evaluate.metrics import METRICS
from training.files import write_file, write_json

logger = logging.getLogger(__name__)

CARD = "README.md"
BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"
HEADINGS = ("base", "tuned", "tuned - base")
LABELS = {metric.name: metric.label for metric in METRICS}
# Metrics that are shares, with those of lm-eval, and the digits of the others.
SHARES = {metric.name for metric in METRICS if metric.percent} | {"acc", "acc_norm", "f1", "mc1", "mc2"}
DIGITS = {"loss": 4, "perplexity": 2, "length": 1}


@dataclass(frozen=True)
class Line:
    """A line of a table: the words for a metric, its name, and {"base", "tuned", "difference"} with intervals."""

    label: str
    metric: str
    models: Mapping[str, Any]

    @property
    def is_share(self) -> bool:
        return self.metric in SHARES


def sections_of(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, list[Line]]]:
    """(title, lines) of each table of an evaluation: rows, sources, categories, tasks."""
    for kind in ("held_out", "file"):
        if section := evaluation.get(kind):
            yield section["rows"]["chosen"], _lines(section["metrics"])
            # An evaluation of an older version has no sources.
            for noun, parts in (("source", section.get("sources", {})), ("category", section["categories"])):
                for name, part in parts.items():
                    yield f"{noun} {name or 'none'}, {part['rows']:,} rows", _lines(part["metrics"])
    if section := evaluation.get("tasks"):
        lines = [
            Line(f"{task} {metric}", metric.split()[0], models)
            for task, part in section["tasks"].items()
            for metric, models in part["metrics"].items()
        ]
        yield f"benchmarks of lm-eval, {section['settings']['prompt']}", lines


def _lines(metrics: Mapping[str, Any]) -> list[Line]:
    return [Line(LABELS[name], name, models) for name, models in metrics.items()]


def notes_of(evaluation: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know."""
    notes = []
    for kind in ("held_out", "file"):
        section = evaluation.get(kind)
        if not section:
            continue
        settings, rows = section["settings"], section["rows"]
        notes.append(f"base: {section['base']}; tuned: {section['tuned']}")
        notes.append(f"greedy answers, at most {settings['max_new_tokens']:,} tokens, in Dolly's prompt")
        notes.append(
            "a base was never trained on Dolly's control tokens: it stops by itself if it writes EOS, or one by chance"
        )
        notes += [f"{count:,} rows are left out: {reason}" for reason, count in rows["left_out"].items()]
        if conversations := rows.get("conversations"):
            notes.append(
                f"{conversations:,} rows are conversations: only their last answer is scored, also in the loss"
            )
        if shortened := rows.get("shortened"):
            notes.append(
                f"{shortened:,} conversations are longer than a model can take: their last turns are left out"
            )
        if not settings["same_tokens"]:
            notes.append(
                "the models have other tokens, so loss, perplexity and length cannot be compared; the metrics of texts can"
            )
    if section := evaluation.get("tasks"):
        notes.append(f"benchmarks: base {section['base']}; tuned {section['tuned']}")
        notes += section["notes"]
    return [
        *dict.fromkeys(notes),
        f"in brackets: 95% intervals from {RESAMPLES:,} bootstrap samples of the rows (seed {DEFAULT_SEED}); the "
        "difference is paired",
    ]


def tables_of(evaluation: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """(title, rows) of each table; a row is (label, base, tuned, difference) as text."""
    return [
        (title, [(line.label, *_cells(line)) for line in lines]) for title, lines in sections_of(evaluation)
    ]


def as_table(evaluation: Mapping[str, Any]) -> str:
    """The evaluation as text for a terminal."""
    lines: list[str] = []
    for title, rows in tables_of(evaluation):
        labels, *columns = zip(("", *HEADINGS), *rows, strict=True)
        width = max(18, *map(len, labels))
        widths = [max(map(len, column)) for column in columns]
        lines += [f"{title}:" if not lines else f"\n{title}:"]
        for label, *texts in [("", *HEADINGS), *rows]:
            line = "".join(f"  {text:<{size}}" for text, size in zip(texts, widths, strict=True))
            lines.append(f"  {label:<{width}}{line}".rstrip())
    return printable("\n".join([*lines, "", *notes_of(evaluation)]))


def as_markdown(evaluation: Mapping[str, Any]) -> str:
    """The evaluation as the section of a model card."""
    lines = ["## Evaluation"]
    for title, rows in tables_of(evaluation):
        lines += ["", f"{_markdown(title)}:", "", f"| | {' | '.join(HEADINGS)} |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(map(_markdown, row))} |" for row in rows]
    notes = "\n".join(f"- {_markdown(note)}" for note in notes_of(evaluation))
    return f"{chr(10).join(lines)}\n\n{notes}"


def _markdown(text: str) -> str:
    """Text of a file or a model's name, which must not become Markdown or HTML."""
    return re.sub(r"([\\`*_{}<>|#~])|\n", lambda match: f"\\{match[1]}" if match[1] else " ", printable(text))


def _cells(line: Line) -> list[str]:
    """The texts of base, tuned and difference: 12.5% [10.0, 15.2]; of a difference +3.1 [1.0, 5.2], in points."""
    factor, digits = (100, 1) if line.is_share else (1, DIGITS.get(line.metric, 3))
    texts = []
    for name in ("base", "tuned", "difference"):
        interval = line.models.get(name)
        if interval is None:
            texts.append("-")
            continue
        sign, unit = ("+", "") if name == "difference" else ("", "%" * line.is_share)
        text = f"{factor * interval['value']:{sign},.{digits}f}{unit}"
        if interval["low"] is not None:
            text += f" [{factor * interval['low']:,.{digits}f}, {factor * interval['high']:,.{digits}f}]"
        texts.append(text)
    return texts


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The evaluation.json in a model's folder; {} if it is missing. What is damaged in it is left out, with a warning."""
    file = folder / EVALUATION_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        sections = dict(content)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        logger.warning("%s: cannot be read (%s), so it counts as missing", file, first_line(error))
        return {}
    damaged = sorted(kind for kind, section in sections.items() if not _is_section(kind, section))
    if damaged:
        logger.warning(
            "%s: %s is no result of an evaluation, so it counts as missing", file, " and ".join(damaged)
        )
    return {kind: section for kind, section in sections.items() if kind not in damaged}


def _is_section(kind: str, section: Any) -> bool:
    """Whether a part of evaluation.json can be shown."""
    try:
        notes_of({kind: section})
        return bool(tables_of({kind: section}))
    except (KeyError, TypeError, AttributeError, ValueError):
        return False


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other evaluation writes into the folder. The lock ends with the process, and leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_evaluation(folder: Path, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Writes evaluation.json and the section of the model card into a model's folder. Raises OSError.

    Sections of an earlier evaluation that are not computed anew are kept. run.json is not touched: it stays as it was
    published.
    """
    with _one_at_a_time(folder):
        evaluation = read_evaluation(folder) | dict(sections)
        write_json(folder / EVALUATION_FILE, evaluation)
        _write_card(folder / CARD, f"{BEGIN}\n{as_markdown(evaluation)}\n{END}")
    return evaluation


def _write_card(card: Path, section: str) -> None:
    """Replaces the section of a model card, or appends it. A card that is no text stays as it is, with a warning."""
    try:
        former = card.read_text(encoding="utf-8")
    except FileNotFoundError:
        former = ""
    except (OSError, ValueError) as error:
        logger.warning("%s: cannot be read (%s), so it does not show the evaluation", card, first_line(error))
        return
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if pattern.search(former):
        content = pattern.sub(lambda match: section, former, count=1)
    else:
        content = f"{former.rstrip()}\n\n{section}\n".lstrip()
    write_file(card, content)
