"""An evaluation of conversations: the last answer is scored after the turns before it, and several sources have tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from transformers import PreTrainedTokenizerBase

from tests.conftest import POSITIONS, jsonl
from tests.evaluate.test_written import SECTION
from training.data.conversations import Turn
from training.data.held_out import rows_digest, split_held_out
from training.data.prompt import GAP, render_prompt
from training.data.tokens import prepare_dataset
from training.evaluate.__main__ import main
from training.evaluate.answers import Loading, compare_models, encode_for, response_losses
from training.evaluate.report import as_markdown, as_table, read_evaluation, sections_of
from training.evaluate.rows import file_rows, held_out_rows
from training.model.loading import load_model
from training.tracking.mlflow_evaluation import evaluation_figures

USER, ASSISTANT = "user", "assistant"
SYSTEM = "Be brief."


def messages(*texts: str, system: str | None = None) -> dict[str, Any]:
    """A row whose texts are those of the user and the assistant in turn."""
    turns = [{"role": (USER, ASSISTANT)[number % 2], "content": text} for number, text in enumerate(texts)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns]}


THREE_TURNS = messages("Say A.", "A", "Say B.", "B", "Say AB.", "AB", system=SYSTEM)
FIRST = f"{render_prompt(SYSTEM + GAP + 'Say A.')}A\n\n### End"
SECOND = f"{FIRST}{render_prompt('Say B.')}B\n\n### End"
THIRD = f"{SECOND}{render_prompt('Say AB.')}AB\n\n### End"


def test_the_last_answer_is_scored_after_the_turns_before_it(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = jsonl(tmp_path / "rows.jsonl", [THREE_TURNS])
    rows, [encoded] = encode_for(file_rows(source), [(tokenizer, POSITIONS)])
    assert tokenizer.decode(encoded.ids[0]) == THIRD
    assert tokenizer.decode(encoded.prompts[0]) == f"{SECOND}{render_prompt('Say AB.')}"
    assert rows.columns.output == ["AB"]
    model = load_model(str(base_folder), tokenizer, torch.float32, seed=42).eval()
    [loss] = response_losses(model, tokenizer, encoded)
    [ids], [start] = encoded.ids, encoded.starts
    logits = model(torch.tensor([ids])).logits[0]
    expected = F.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="sum")
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert tokenizer.decode(ids[start:]) == "AB\n\n### End"


@pytest.mark.parametrize(("turns", "text", "answer"), [(3, THIRD, "AB"), (2, SECOND, "B"), (1, FIRST, "A")])
def test_the_answer_of_the_last_turn_that_fits_into_both_models_is_scored(
    turns: int, text: str, answer: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    short = {"instruction": "Say A.", "output": "A"}
    rows = file_rows(jsonl(tmp_path / "rows.jsonl", [THREE_TURNS, short]))
    limit = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    for models in (
        [(tokenizer, POSITIONS), (tokenizer, limit)],
        [(tokenizer, limit), (tokenizer, POSITIONS)],
    ):
        kept, encoded = encode_for(rows, models)
        place = kept.numbers.index(1)
        for of_model in encoded:
            assert tokenizer.decode(of_model.ids[place]) == text
        assert kept.columns.output[place] == answer
        assert len(kept.columns.history[place]) == turns - 1
        assert kept.shortened == (turns < 3)
        other = kept.numbers.index(2)
        assert (kept.columns.instruction[other], kept.columns.history[other]) == ("Say A.", ())
    with_run = replace(rows, max_length=limit)
    assert encode_for(with_run, [(tokenizer, POSITIONS)])[0].columns == kept.columns, "training kept no more"


def test_the_held_out_conversations_of_a_run_are_found_with_their_turns(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = jsonl(
        tmp_path / "rows.jsonl",
        [messages("Say A.", "A", f"Say {n}.", f"{n}") for n in range(40)],
    )
    parts = split_held_out(prepare_dataset(source, tokenizer, POSITIONS)[0], 8, 7)
    options = {"training_dataset": source, "test_size": 8, "seed": 7, "max_length": POSITIONS}
    rows = held_out_rows(tmp_path, {"options": options, "rows": rows_digest(*parts)}, tokenizer)
    kept, [encoded] = encode_for(rows, [(tokenizer, POSITIONS)])
    assert encoded.ids == parts[1]["input_ids"][:]
    assert encoded.starts == [spans[-1][0] for spans in parts[1]["response_spans"][:]]
    assert kept.columns.history == [(Turn("Say A.", "A"),)] * 8
    assert rows.first(3).columns.history == [(Turn("Say A.", "A"),)] * 3
    assert kept.columns.output == [f"{number - 1}" for number in kept.numbers]


def test_the_held_out_rows_of_two_sources_have_their_turns_and_the_label_of_their_source(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    chat = [messages("Say A.", "A", f"Say {n}.", f"{n}") for n in range(20)]
    plain = [{"instruction": f"Write {n}.", "output": f"{n}", "category": "sums"} for n in range(20)]
    sources = [jsonl(tmp_path / "plain.jsonl", plain), jsonl(tmp_path / "chat.jsonl", chat)]
    options = {"training_dataset": sources, "test_size": 10, "seed": 7, "max_length": POSITIONS}
    rows = held_out_rows(tmp_path, {"options": options}, tokenizer)
    kept, [encoded] = encode_for(rows, [(tokenizer, POSITIONS)])
    assert set(kept.sources) == {"plain", "chat"}
    for place, source in enumerate(kept.sources):
        number = kept.numbers[place] - 1
        is_chat = source == "chat"
        assert kept.columns.history[place] == ((Turn("Say A.", "A"),) if is_chat else ())
        assert kept.columns.category[place] == ("" if is_chat else "sums")
        asked = render_prompt(f"Say {number}." if is_chat else f"Write {number}.")
        before = f"{render_prompt('Say A.')}A\n\n### End" if is_chat else ""
        assert tokenizer.decode(encoded.ids[place]) == f"{before}{asked}{number}\n\n### End"


def test_rows_that_training_would_not_use_are_left_out_and_counted(tmp_path: Path) -> None:
    tool = messages("Say A.", "A")
    tool["messages"][1]["tool_calls"] = [{"id": "1"}]
    rows = file_rows(
        jsonl(
            tmp_path / "rows.jsonl",
            [
                messages("Say A.", "A", "Say B.", " "),
                messages("Say A.", " ", "Say B.", "B"),
                tool,
                messages("Say A."),
                messages("Say A.", "A", "Say B."),
                THREE_TURNS,
            ],
        )
    )
    assert sorted(rows.numbers) == [5, 6]
    assert rows.dropped == {"empty instruction or output": 2, "tool call": 1, "no assistant turn": 1}
    assert rows.columns.output[rows.numbers.index(5)] == "A", "the question without an answer is left out"


@pytest.fixture(scope="module")
def evaluated(
    base_folder: Path, answering_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A model that answers "AB" to everything, on four rows of two sources; two of them are conversations."""
    source = jsonl(
        tmp_path_factory.mktemp("rows") / "rows.jsonl",
        [
            THREE_TURNS,
            messages("Say AB.", "AB", "Say B.", "B"),
            {"instruction": "Say AB.", "output": "AB"},
            {"instruction": "And again?", "output": "AB", "history": [["Say AB.", "AB"]]},
        ],
    )
    rows = file_rows(source)
    labels = [("chat", "chat", "alpaca", "alpaca")[number - 1] for number in rows.numbers]
    rows = replace(rows, sources=labels)
    assert rows.first(2).sources == labels[:2]
    loading = Loading(max_new_tokens=5)
    return {"file": compare_models(rows, str(base_folder), str(answering_folder), loading)}


def test_each_source_has_a_table_of_its_own(evaluated: dict[str, Any]) -> None:
    section = evaluated["file"]
    exact = {
        name: part["metrics"]["exact_match"]["tuned"]["value"] for name, part in section["sources"].items()
    }
    assert exact == {"alpaca": 1.0, "chat": 0.5}
    assert section["metrics"]["exact_match"]["tuned"]["value"] == 0.75
    assert section["categories"] == {}
    titles = [title for title, _ in sections_of(evaluated)]
    assert titles[1:] == ["source alpaca, 2 rows", "source chat, 2 rows"]
    assert "source alpaca, 2 rows:" in as_table(evaluated)
    assert "source alpaca, 2 rows:" in as_markdown(evaluated)
    figures = evaluation_figures(evaluated)
    assert figures["evaluation/file/sources/chat/exact_match/tuned"] == 0.5
    assert figures["evaluation/file/exact_match/tuned"] == 0.75


def test_the_notes_say_that_only_the_last_answer_of_a_conversation_is_scored(
    evaluated: dict[str, Any], tmp_path: Path
) -> None:
    words = "3 rows are conversations: only their last answer is scored, also in the loss"
    assert words in as_table(evaluated)
    assert words in as_markdown(evaluated)
    shortened = SECTION | {"rows": SECTION["rows"] | {"conversations": 1, "shortened": 1}}
    assert "1 conversations are longer than a model can take: their last turns are left out" in as_table(
        {"file": shortened}
    )
    older = {"file": SECTION}
    assert [title for title, _ in sections_of(older)] == ["two rows"], "an evaluation of an older version"
    assert "conversations" not in as_table(older)
    (tmp_path / "evaluation.json").write_text(json.dumps({"file": evaluated["file"], "held_out": SECTION}))
    assert set(read_evaluation(tmp_path)) == {"file", "held_out"}


def test_the_command_takes_conversations(base_folder: Path, answering_folder: Path, tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "rows.jsonl", [THREE_TURNS])
    words = [
        "--model",
        answering_folder,
        "--base",
        base_folder,
        "--rows",
        rows,
        "--max-new-tokens",
        5,
        "--json",
    ]
    result = CliRunner().invoke(main, [*map(str, words)])
    assert result.exit_code == 0, result.output
    section = json.loads(result.stdout)["file"]
    assert section["rows"]["conversations"] == 1
    assert section["metrics"]["exact_match"]["tuned"]["value"] == 1.0
