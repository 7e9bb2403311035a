"""training.evaluate: losses and answers of two models on rows, what is written about them, and bad input in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, GPTJForCausalLM, PreTrainedTokenizerBase

from tests.conftest import POSITIONS, jsonl, say_rows
from training.data.held_out import rows_digest, split_held_out
from training.data.ledger import Ledger
from training.data.rows import read_columns
from training.data.tokens import encode_rows, prepare_dataset
from training.errors import DataError
from training.evaluate.__main__ import main
from training.evaluate.answers import EncodedRows, encode_for, greedy_answers, response_losses
from training.evaluate.report import write_evaluation
from training.evaluate.rows import file_rows, held_out_rows
from training.model.loading import load_model

ROWS = [
    {"instruction": "Say AB.", "input": "", "output": "AB", "category": "letters"},
    {"instruction": "Add.", "input": "1 2", "output": "3", "category": "sums"},
    {"instruction": "Say AB again, please.", "input": "", "output": " AB\n", "category": "letters"},
]


@pytest.fixture(scope="module")
def three_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


def evaluate(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [*map(str, words)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def evaluated(
    base_folder: Path, answering_folder: Path, three_rows: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The evaluation of a model that answers "AB" to everything, on three rows."""
    output = tmp_path_factory.mktemp("evaluated") / "evaluation.json"
    words = ["--model", answering_folder, "--base", base_folder, "--rows", three_rows]
    evaluate(*words, "--max-new-tokens", 5, "--output", output)
    return json.loads(output.read_text())["file"]


# --- losses and answers ------------------------------------------------------------------------------


def test_the_loss_of_a_row_is_that_of_stock_transformers_on_the_row_alone(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, rows: str
) -> None:
    columns = read_columns(rows)
    encoded = list(encode_rows(tokenizer, columns, Ledger(rows, POSITIONS)))
    model = load_model(str(base_folder), tokenizer, torch.float32, seed=42).eval()
    found = response_losses(
        model, tokenizer, EncodedRows([ids for _, ids, _ in encoded], [spans[0][0] for *_, spans in encoded])
    )
    for (_, ids, [(start, _)]), loss in list(zip(encoded, found, strict=True))[::7]:
        logits = model(torch.tensor([ids])).logits[0]
        expected = F.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="sum")
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_answers_stop_at_the_end_key_or_are_cut_and_their_length_leaves_the_end_key_out(
    answering_model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerBase, three_rows: str
) -> None:
    _, [encoded] = encode_for(file_rows(three_rows), [(tokenizer, POSITIONS)])
    whole = greedy_answers(answering_model, tokenizer, encoded.prompts, 5, batch_size=2)
    assert (whole.texts, whole.stopped, whole.lengths) == (["AB"] * 3, [True] * 3, [2] * 3)
    cut = greedy_answers(answering_model, tokenizer, encoded.prompts, 2, batch_size=2)
    assert (cut.texts, cut.stopped, cut.lengths) == (["AB"] * 3, [False] * 3, [2] * 3)


def test_an_answer_does_not_depend_on_its_batch_also_where_the_positions_end(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_model(str(base_folder), tokenizer, torch.float32, seed=42).eval()
    key = tokenizer.convert_tokens_to_ids("### Response:\n")
    prompts = [[*range(20, 20 + n), key] for n in (3, 40, POSITIONS - 5, POSITIONS - 9)]
    together = greedy_answers(model, tokenizer, prompts, 12, batch_size=4)
    alone = [greedy_answers(model, tokenizer, [prompt], 12, batch_size=1) for prompt in prompts]
    assert together.texts == [answers.texts[0] for answers in alone]
    assert together.lengths == [answers.lengths[0] for answers in alone]
    assert together.lengths[2] <= 4
    assert together.lengths[3] <= 8


def test_memory_that_does_not_suffice_halves_the_batch(
    answering_model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, generate = [], GPTJForCausalLM.generate

    def short_of_memory(self: Any, ids: torch.Tensor, **how: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        return generate(self, ids, **how)

    monkeypatch.setattr(GPTJForCausalLM, "generate", short_of_memory)
    key = tokenizer.convert_tokens_to_ids("### Response:\n")
    answers = greedy_answers(answering_model, tokenizer, [[20, key]] * 5, 4, batch_size=5)
    assert answers.texts == ["AB"] * 5
    assert sizes == [5, 2, 2, 1]


def test_figures_of_known_answers_are_the_expected_ones(evaluated: dict[str, Any]) -> None:
    tuned = {name: figures["tuned"]["value"] for name, figures in evaluated["metrics"].items()}
    assert tuned["exact_match"] == pytest.approx(2 / 3)
    assert tuned["rouge_l"] == pytest.approx(2 / 3)
    assert tuned["stops"] == 1.0
    assert tuned["length"] == 2.0
    assert evaluated["metrics"]["exact_match"]["difference"]["value"] == pytest.approx(2 / 3)
    sizes = {name: part["rows"] for name, part in evaluated["categories"].items()}
    assert sizes == {"letters": 2, "sums": 1}
    letters = evaluated["categories"]["letters"]["metrics"]
    assert letters["exact_match"]["tuned"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert evaluated["settings"] == {
        "decoding": "greedy",
        "max_new_tokens": 5,
        "dtype": {"base": "float32", "tuned": "float32"},
        "same_tokens": True,
    }


# --- rows --------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Path, dict[str, Any]]:
    """(rows, record) of a run on 60 rows that held out 12."""
    source = jsonl(tmp_path / "own.jsonl", say_rows(60))
    rows, _ = prepare_dataset(source, tokenizer, 100)
    parts = split_held_out(rows, 12, 7)
    options = {"training_dataset": source, "test_size": 12, "seed": 7, "max_length": 100}
    return Path(source), {"options": options, "rows": rows_digest(*parts)}


def test_the_held_out_rows_are_those_of_the_run_in_the_order_of_its_shuffle(
    run: tuple[Path, dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source, record = run
    rows = held_out_rows(tmp_path, record, tokenizer)
    prepared, _ = prepare_dataset(str(source), tokenizer, 100)
    held_out = split_held_out(prepared, 12, 7)[1]
    assert rows.numbers == held_out["row"][:]
    _, [encoded] = encode_for(rows, [(tokenizer, 100)])
    assert encoded.ids == held_out["input_ids"][:]
    assert encoded.starts == [start for [[start, _]] in held_out["response_spans"]]
    first = rows.first(5)
    assert first.numbers == rows.numbers[:5]
    assert first.chosen == "the first 5 of the 12 rows that the run held out (seed 7)"


def test_rows_that_have_changed_or_are_gone_are_refused_in_words(
    run: tuple[Path, dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source, record = run
    lines = source.read_text().splitlines()
    source.write_text("\n".join([lines[-1], *lines[:-1]]))
    with pytest.raises(DataError, match=r"own\.jsonl: has changed since the run was trained .* --rows FILE"):
        held_out_rows(tmp_path, record, tokenizer)
    source.unlink()
    with pytest.raises(DataError, match=r"held out cannot be read: .*no such file.* --rows FILE"):
        held_out_rows(tmp_path, record, tokenizer)


def test_rows_that_a_model_cannot_take_are_left_out_for_both_and_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    texts = [{"instruction": "a", "output": "b" * n} for n in (1, 150, 2)] + [
        {"instruction": "a", "output": " "}
    ]
    rows = file_rows(jsonl(tmp_path / "rows.jsonl", texts))
    kept, encoded = encode_for(rows, [(tokenizer, POSITIONS), (tokenizer, 100)])
    assert sorted(kept.numbers) == [1, 3]
    assert [len(part) for part in encoded] == [2, 2]
    assert kept.dropped == {"empty instruction or output": 1, "longer than a model can take": 1}


# --- what is written ---------------------------------------------------------------------------------


def test_the_section_of_the_card_is_replaced_and_nothing_else_is_touched(
    evaluated: dict[str, Any], tmp_path: Path
) -> None:
    card, record = tmp_path / "README.md", tmp_path / "run.json"
    card.write_text("---\nlicense: other\n---\n# Mine\n\n## Options\n\n| a |\n")
    record.write_text("{}")
    write_evaluation(tmp_path, {"file": evaluated})
    first = card.read_text()
    assert first.startswith(
        "---\nlicense: other\n---\n# Mine\n\n## Options\n\n| a |\n\n<!-- evaluation -->\n## Evaluation\n"
    )
    assert "| exact match | 0.0% [0.0, 0.0] | 66.7% [0.0, 100.0] | +66.7 [0.0, 100.0] |" in first
    card.write_text(first + "\nmy own words\n")
    kept = write_evaluation(
        tmp_path, {"held_out": evaluated | {"rows": evaluated["rows"] | {"chosen": "held-out rows"}}}
    )
    second = card.read_text()
    assert second.count("## Evaluation") == second.count("<!-- evaluation -->") == 1
    assert second.endswith("<!-- end of evaluation -->\n\nmy own words\n")
    assert "held-out rows:" in second
    assert set(kept) == set(json.loads((tmp_path / "evaluation.json").read_text())) == {"file", "held_out"}
    assert record.read_text() == "{}"


def test_text_of_names_and_categories_stays_text_in_the_card(
    evaluated: dict[str, Any], tmp_path: Path
) -> None:
    part = evaluated["categories"]["sums"]
    evil = evaluated | {"categories": {"<script>alert(1)</script>|\n# x": part}, "base": "*a*[b](c)"}
    write_evaluation(tmp_path, {"file": evil})
    text = (tmp_path / "README.md").read_text()
    assert "<script>" not in text
    assert "\\<script\\>alert(1)\\</script\\>\\| \\# x" in text
    assert "\\*a\\*" in text


def test_table_json_and_picture_show_the_same_figures(
    base_folder: Path, answering_folder: Path, three_rows: str, tmp_path: Path
) -> None:
    picture = tmp_path / "evaluation.png"
    words = ["--model", answering_folder, "--base", base_folder, "--rows", three_rows, "--max-new-tokens", 4]
    table = evaluate(*words, "--plot", picture, "--limit", 2).stdout
    assert "the first 2 of the 3 rows of" in table
    assert imread(picture).std() > 0.01
    section = json.loads(evaluate(*words, "--json", "--limit", 2).stdout)["file"]
    assert section["rows"]["count"] == 2
    loss = section["metrics"]["loss"]["base"]
    assert "{value:.4f} [{low:.4f}, {high:.4f}]".format(**loss) in table
    assert not (answering_folder / "evaluation.json").exists(), "it is not the folder of a run"


# --- bad input ---------------------------------------------------------------------------------------


def test_all_bad_options_are_reported_together(tmp_path: Path) -> None:
    words = [
        "--model",
        "x",
        "--limit",
        0,
        "--batch-size",
        0,
        "--num-fewshot",
        2,
        "--base",
        "",
        "--output",
        tmp_path,
    ]
    text = evaluate(*words, "--limits", 3, code=2).output
    for part in (
        "'--limit'",
        "'--batch-size'",
        "--num-fewshot: has no effect without --tasks",
        "--base is empty",
        "--output",
        "--limits",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "/none/there"], "/none/there: no such folder"),
        (["--model", "BASE"], "is not the folder of a run, so its base and its held-out rows are not known. Type --base MODEL"),
        (["--model", "UNFINISHED"], "its training did not finish"),
        (["--model", "BASE", "--base", "/none/there", "--rows", "ROWS"], "/none/there: no such folder"),
        (["--model", "BASE", "--base", "BASE", "--rows", "EMPTY"], "the file is empty"),
        (["--model", "BASE", "--base", "BASE", "--rows", "QUESTIONS"], "no column 'output'"),
        (["--model", "BASE", "--base", "BASE", "--rows", "BLANK"], "no row has an instruction and an output"),
    ],
)  # fmt: skip
def test_input_that_cannot_be_evaluated_is_refused_in_words(
    words: list[str], message: str, base_folder: Path, three_rows: str, tmp_path: Path
) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text(json.dumps({"status": "running", "options": {}}))
    (tmp_path / "empty.jsonl").touch()
    files = {
        "BASE": base_folder,
        "ROWS": three_rows,
        "UNFINISHED": unfinished,
        "EMPTY": tmp_path / "empty.jsonl",
        "QUESTIONS": jsonl(tmp_path / "questions.jsonl", [{"instruction": "a"}]),
        "BLANK": jsonl(tmp_path / "blank.jsonl", [{"instruction": "a", "output": " "}]),
    }
    text = evaluate(*(files.get(word, word) for word in words), code=2).output
    assert message in " ".join(text.split()), text
    assert "Traceback" not in text


def test_a_missing_package_is_named_with_its_extra_before_anything_is_loaded(
    base_folder: Path, three_rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluate.metrics.find_spec", lambda name: None)
    words = ["--model", base_folder, "--base", base_folder]
    text = evaluate(*words, "--rows", three_rows, code=2).output
    assert "the package rouge-score is not installed. Type " in text
    assert "the package lm-eval is not installed. Type " in evaluate(*words, "--tasks", "piqa", code=2).output


def test_models_with_other_tokens_are_compared_by_their_texts_alone(
    answering_folder: Path, three_rows: str, tmp_path: Path
) -> None:
    words = ["--model", answering_folder, "--base", "demo", "--rows", three_rows, "--max-new-tokens", 4]
    output = tmp_path / "evaluation.json"
    table = evaluate(*words, "--output", output).stdout
    assert "the models have other tokens, so loss, perplexity and length cannot be compared" in table
    metrics = json.loads(output.read_text())["file"]["metrics"]
    assert metrics["loss"]["difference"] is None
    assert metrics["loss"]["tuned"]["value"] > 0
    assert metrics["exact_match"]["difference"]["value"] == pytest.approx(2 / 3)


def test_a_published_copy_and_a_read_only_folder_stay_as_they_are(
    answering_folder: Path,
    base_folder: Path,
    three_rows: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(answering_folder, copy)
    (copy / "run.json").write_text(
        json.dumps({"status": "finished", "options": {"input_model": str(base_folder)}})
    )
    (copy / "manifest.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    result = evaluate("--model", copy, "--rows", three_rows, "--max-new-tokens", 3)
    assert (
        "is a published copy, which stays as it was published, so the results are only printed" in caplog.text
    )
    assert "exact match" in result.stdout
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    (copy / "manifest.json").unlink()
    evaluate("--model", copy, "--rows", three_rows, "--max-new-tokens", 3)
    assert (copy / "evaluation.json").is_file()
    assert (copy / "run.json").read_bytes() == before["run.json"]
    assert isinstance(AutoModelForCausalLM.from_pretrained(copy), GPTJForCausalLM)
