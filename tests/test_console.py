"""Whatever a row, an answer, a file or a server holds, the terminal shows it harmlessly, also one that knows only ASCII."""

from __future__ import annotations

import inspect
import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from notebooks.cells import answers_by_step
from tests.conftest import jsonl, python, write
from training import errors, pictures
from training.console import set_up_console, typed_text
from training.data.ledger import Ledger
from training.errors import DataError, OptionsError, TrainingFailedError, first_line, printable
from training.run.model_card import write_model_card

# Colour, window title, clear screen; right-to-left override; zero-width space; half of a surrogate pair.
NASTY = "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J \u202eevil\u202c \u200bz \ud800 \x9b2J $x_{$ | ` « é"
HARMFUL = set("\x1b\x07\x9b\u202e\u202c\u200b\ud800")


def test_only_what_could_mislead_is_replaced() -> None:
    assert printable("Bel\x1b[2J\x07l\r\nÄé\t«日本» 👍") == "Bel\ufffd[2J\ufffdl\ufffd\nÄé\t«日本» 👍"
    assert printable("une question\u00a0?\u3000\u202f.") == "une question ?  ."
    assert not HARMFUL & set(printable(NASTY))
    assert printable(NASTY).encode()


def test_a_typed_text_is_read_as_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [typed_text(word) for word in ("Größe", "half \udcc3", "\ud800")] == [
        "Größe",
        "half \udcc3",
        "\ud800",
    ]
    monkeypatch.setattr(os, "fsencode", lambda word: word.encode("ascii", "surrogateescape"))
    assert typed_text("Gr\udcc3\udcb6\udcc3\udc9fe") == "Größe"


def test_every_error_and_log_message_is_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]
    assert len(shown) > 12
    for kind in shown:
        assert not HARMFUL & set(str(kind(NASTY))), kind
    assert not HARMFUL & set("".join(OptionsError(NASTY).problems) + first_line(ValueError(NASTY)))
    assert not HARMFUL & set("".join(TrainingFailedError(NASTY)._render_traceback_()))

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    set_up_console(logging.INFO)
    logging.getLogger("some.library").warning("the server says %s", NASTY)
    logging.getLogger("some.library").error("failed", exc_info=DataError(NASTY))
    print("no log: é")
    sys.stdout.flush()
    text = sys.stdout.buffer.getvalue().decode("ascii")
    assert r"the server says \ufffd[31mred" in text
    assert r"no log: \xe9" in text
    assert not HARMFUL & set(text)


def test_notebook_model_card_and_pictures_show_any_text(tmp_path: Path) -> None:
    samples = [{"step": 1, "instruction": NASTY, "input": "", "response": f"<b>{NASTY}"}]
    table = answers_by_step(samples)
    for text in (table._repr_html_(), repr(table)):
        assert "[31mred" in text
        assert not HARMFUL & set(text)
    assert "<b>" not in table._repr_html_()
    turns = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Rhine"}]
    chat = {"step": 1, "instruction": "Why?", "input": "", "history": turns, "response": "a"}
    rows = answers_by_step([chat, {"step": 1, "instruction": "Why?", "input": "", "response": "b"}]).rows
    assert rows == [["user: Name a river.\nassistant: The Rhine\nuser: Why?", "a"], ["Why?", "b"]]

    options = {"input_model": f"{NASTY}\nmodel", "training_dataset": NASTY.replace("\ud800", "")}
    losses = {"held_out_loss": {"before": 2.0, "after": 1.0}}
    record = {"options": options, "steps": 3, "world_size": 1, "precision": "bf16"} | losses
    write_model_card(tmp_path, record, Ledger(NASTY, 10))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert not HARMFUL & set(card)
    [row] = [line for line in card.splitlines() if line.startswith("| `input_model`")]
    assert row.count("`") == 4
    assert row.replace("\\|", "").count("|") == 3
    assert "\nmodel" not in card

    entries = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    pictures.draw_demo(entries, [(NASTY,) * 4], "half", tmp_path / "demo.png")
    pictures.draw_run(entries, NASTY, str(tmp_path / "run.png"))
    pictures.draw_plan({"weights": 1.0}, 2.0, "A100", {"steps": 1.0}, "hours", NASTY, tmp_path / "memory.png")


COMMANDS = """
import sys
from training import demo, generate, notebook, publish, trainer
from training.bench.__main__ import main as bench
from training.evaluate.__main__ import main as evaluate
from training.plan.__main__ import main as plan
from training.tracking.progress import print_line

rows, out = sys.argv[1:]

def run(command, *words, code=0):
    try:
        command.main([*words])
    except SystemExit as end:
        assert (end.code or 0) == code, (command.name, end.code)

run(trainer.main, *f"--input-model demo --training-dataset {rows} --test-size 2 --max-steps 1".split(),
    "--sample-prompts", rows, "--local-output-dir", out)
run(generate.main, "--model", out, "--max-new-tokens", "8", "Gr\\udcc3\\udcb6\\udcc3\\udc9fe?")  # Größe, in UTF-8
run(publish.main, "--model", out, "--to", out + "-\\udcc3\\udca9")  # é
named = rows.replace("rows.jsonl", "\\udcc3\\udca9.jsonl")
run(trainer.main, "--training-dataset", named, "--local-output-dir", out + "-none", code=2)
run(plan, "--input-model", "demo", "--training-dataset", rows, "--machine", "8xA100-40GB", "--test-size", "2")
run(bench, "--training-dataset", "\\udcc2\\udcab none \\x1b[2J.jsonl", code=2)
demo.subprocess.run = lambda *words, **how: type("Ended", (), {"returncode": 0})
run(demo.main, "--local-output-dir", out)
run(evaluate, "--model", out, "--max-new-tokens", "8")
print_line("« ended »")
"""


@pytest.mark.slow
def test_no_command_fails_or_harms_on_a_terminal_that_knows_only_ascii(tmp_path: Path) -> None:
    nasty = NASTY.replace("\ud800", "")  # such rows are refused
    texts = [{"instruction": f"Say {n} {nasty}", "input": "", "output": f"{nasty} {n}"} for n in range(8)]
    rows, out = jsonl(tmp_path / "rows.jsonl", texts), tmp_path / "out"
    (tmp_path / "é.jsonl").write_text("{}")
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    script = write(tmp_path / "commands.py", COMMANDS)
    paths = {"PYTHONPATH": str(Path(__file__).parents[1])}
    result: Any = python(script, rows, out, env=os.environ | paths | ascii_only, text=False)
    text = result.stdout.decode("ascii") + result.stderr.decode()  # click's own errors are always UTF-8
    assert result.returncode == 0, text
    assert r"\xab ended \xbb" in text
    assert r"/\udcc3\udca9.jsonl': is not UTF-8. Type export PYTHONUTF8=1" in text
    assert r"\xab\ufffd[31mred\ufffd[0m" in text, "the row as the model sees it"
    assert not HARMFUL & set(text)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {entry["instruction"] for entry in samples} == {row["instruction"] for row in texts}, (
        "kept as it is"
    )
