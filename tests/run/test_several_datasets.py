"""`--training-dataset` given more than once: command line, problems, records, plan, trackers and model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard

from tests.conftest import jsonl, problems_of, resolved, rows_of
from training.consts import DEFAULT_TRAINING_DATASET
from training.data.ledger import Ledger
from training.data.source_names import joined, sources_of
from training.files import split_sources
from training.options.command_line import option_words, parse_words
from training.options.trainer_options import TrainingOptions
from training.plan.__main__ import main as plan
from training.plan.epoch import Lengths, joined_lengths
from training.plan.lookup import dataset_lengths, model_shape
from training.run.identity import differences, new_record
from training.run.model_card import write_model_card
from training.tracking.mlflow_server import tags
from training.tracking.tracker import parameters

HUB = ("tatsu-lab/alpaca", "databricks/databricks-dolly-15k")


def options_of(*sources: str, **more: Any) -> TrainingOptions:
    return TrainingOptions(**{"local_output_dir": "out", "training_dataset": sources, "bf16": True} | more)


def record_of(*sources: str) -> dict[str, Any]:
    """The record of a run, as it is read back from the file."""
    return json.loads(json.dumps(new_record(resolved(options_of(*sources), 8), "rows")))


def older(record: dict[str, Any]) -> dict[str, Any]:
    """The record as an earlier version wrote it, of one source."""
    [source] = record["options"]["training_dataset"]
    return record | {"options": record["options"] | {"training_dataset": source}}


# --- the command line --------------------------------------------------------------------------------


def test_sources_keep_their_order_on_the_command_line_and_back() -> None:
    words = ["--training-dataset", "b/c", "--training-dataset", "demo", "--training-dataset", "x,y.csv"]
    values, problems = parse_words([*words, "--local-output-dir", "out"])
    assert (values["training_dataset"], problems) == (("b/c", "demo", "x,y.csv"), [])
    options = TrainingOptions(**values)
    assert option_words({"training_dataset": options.training_dataset}) == words


def test_one_source_is_typed_and_recorded_as_one() -> None:
    for one in ("demo", ("demo",), ["demo"]):
        options = TrainingOptions(local_output_dir="out", training_dataset=one)
        assert options.training_dataset == ("demo",)
        assert option_words({"training_dataset": one}) == ["--training-dataset", "demo"]


def test_every_source_that_cannot_be_a_path_is_reported() -> None:
    typed = ("https://huggingface.co/datasets/a/b", "demo", "~nobody-here/rows.json", "x\0.json")
    words = [word for source in typed for word in ("--training-dataset", source)]
    values, problems = parse_words([*words, "--local-output-dir", "out"])
    assert [problem.split(": ", 2)[1] for problem in problems] == [typed[0], *typed[2:]]
    assert values["training_dataset"] == ("demo",)


# --- problems ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_rank")
def test_the_problems_of_all_sources_are_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "rows.jsonl", rows_of(4))
    sources = (
        "none.jsonl",
        "",
        "s3://b/c.json",
        "rows.jsonl",
        "a/b",
        "./rows.jsonl",
        "A/b",
        "p,q.csv",
        "x\udce4",
    )
    problems = problems_of(options_of(*sources, bf16=None, dataset_split="test"))
    expected = (
        "--training-dataset number 2 is empty",
        "--training-dataset 'x\\udce4': is not UTF-8",
        "--training-dataset s3://b/c.json: is a URL",
        f"--training-dataset {tmp_path}/none.jsonl: no such file",
        f"--training-dataset {tmp_path}/p,q.csv: no such file",
        "--training-dataset ./rows.jsonl: is the same as rows.jsonl, so rows that are held out would also be trained on",
        "--training-dataset A/b: is the same as a/b",
    )
    found = [problem.replace("dataset none", f"dataset {tmp_path}/none") for problem in problems]
    found = [problem.replace("dataset p,q", f"dataset {tmp_path}/p,q") for problem in found]
    assert len(found) == len(expected), found
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start)
    assert found[4].endswith("For several sources, repeat the option")


@pytest.mark.usefixtures("one_rank")
def test_a_part_of_a_dataset_is_chosen_if_one_of_the_sources_is_on_the_hub() -> None:
    chosen = {"bf16": None, "dataset_split": "test"}
    assert problems_of(options_of("demo", "a/b", **chosen)) == []
    [problem] = problems_of(options_of("demo", "pyproject.toml", **chosen))
    assert problem.startswith(
        "--training-dataset demo, pyproject.toml: are not on the Hub, so --dataset-split would"
    )


# --- several in one text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("a/b", ("a/b",)),
        (" a/b , demo,", ("a/b", "demo")),
        ("a, b.csv", ("a, b.csv",)),
        ("demo,a, b.csv,c", ("demo", "a, b.csv", "c")),
        ("x,a, b.csv , d,e", ("x", "a, b.csv", "d,e")),
        ("d,e,a", ("d,e", "a")),
        ("a,\0,~nobody-here", ("a", "\0", "~nobody-here")),
        ("", ("",)),
        (" , ", (",",)),
    ],
)  # fmt: skip
def test_commas_separate_sources_except_in_a_path_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, sources: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a, b.csv").touch()
    (tmp_path / "d,e").mkdir()
    assert split_sources(text) == sources


# --- records, trackers, card -------------------------------------------------------------------------


def test_the_record_has_a_list_and_an_older_one_with_a_text_is_read_alike() -> None:
    record, one = record_of(*HUB), record_of("demo")
    assert record["options"]["training_dataset"] == list(HUB)
    assert sources_of(record["options"]["training_dataset"]) == HUB
    assert sources_of(older(one)["options"]["training_dataset"]) == ("demo",)
    assert differences(older(one), one) == []
    assert parameters(older(one)) == parameters(one)
    assert tags(older(one)) == tags(one)
    assert parameters(one)["training_dataset"] == "demo"


def test_a_resume_with_other_rows_names_the_sources_of_the_run() -> None:
    [difference] = differences(record_of(*HUB), record_of("demo") | {"rows": "other"})
    assert "(it was tatsu-lab/alpaca, databricks/databricks-dolly-15k)" in difference


def test_trackers_get_the_sources_as_one_text() -> None:
    record = record_of(*HUB)
    assert parameters(record)["training_dataset"] == tags(record)["dataset"] == joined(HUB)


def test_the_card_lists_every_dataset_of_the_hub_and_each_licence(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    result = {"steps": 3, "held_out_loss": {"before": 2.0, "after": 1.0}}
    write_model_card(tmp_path, record_of(*HUB, str(tmp_path / "rows.jsonl")) | result, Ledger("x", 8))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.datasets, card.data.license, card.data.language) == (list(HUB), "other", None)
    text = " ".join(card.text.split())
    assert (
        "`tatsu-lab/alpaca` (licence: cc-by-nc-4.0), `databricks/databricks-dolly-15k` (licence: cc-by-sa-3.0)"
        in text
    )
    assert "All licences apply to every use of the model. Alpaca's forbids commercial use" in text
    assert f"| `training_dataset` | `{joined(HUB)}, {tmp_path}/rows.jsonl` |" in text


def test_the_card_of_an_older_record_is_the_same(tmp_path: Path) -> None:
    result = {"steps": 3, "held_out_loss": {"before": 2.0, "after": 1.0}}
    cards = []
    for record in (record_of("demo"), older(record_of("demo"))):
        write_model_card(tmp_path, record | result, Ledger("demo", 8), name="m")
        cards.append((tmp_path / "README.md").read_text())
    assert cards[0] == cards[1]


# --- the plan ----------------------------------------------------------------------------------------


def test_the_plan_counts_the_rows_tokens_and_response_share_of_all_sources() -> None:
    # 2 rows of 10 tokens, half of them responses, and one of 60 with 45: 55 of 80.
    both = joined_lengths([Lengths("a", np.array([10, 10]), 0.5), Lengths("b", np.array([60]), 0.75)])
    assert (both.source, both.tokens.tolist(), both.response_share) == ("a, b", [10, 10, 60], 55 / 80)


def test_the_plan_joins_alpacas_figures_with_those_of_a_file(tmp_path: Path) -> None:
    file, model = jsonl(tmp_path / "rows.jsonl", rows_of(40)), model_shape("demo")
    alpaca, own = (dataset_lengths(options_of(source), model) for source in (DEFAULT_TRAINING_DATASET, file))
    both = dataset_lengths(options_of(DEFAULT_TRAINING_DATASET, file), model)
    assert len(own.tokens) == 40
    assert both.tokens.tolist() == [*alpaca.tokens, *own.tokens]


def test_the_plan_names_several_sources_and_repeats_them_in_its_command(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", rows_of(40))
    words = [
        "--machine",
        "8xH100",
        "--model",
        "demo",
        "--training-dataset",
        "demo",
        "--training-dataset",
        file,
    ]
    result = CliRunner().invoke(plan, [*words, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["datasets"] == ["demo", file]
    assert f"--training-dataset demo --training-dataset {file}" in answer["command"]
    table = CliRunner().invoke(plan, words).stdout
    assert f"an epoch of demo, {file}\n" in table
    one = CliRunner().invoke(plan, words[:6]).stdout
    assert "an epoch\n" in one


def test_the_plan_reports_all_missing_sources(tmp_path: Path) -> None:
    words = ["--machine", "8xH100", "--model", "demo", "--training-dataset", "none.jsonl"]
    result = CliRunner().invoke(
        plan, [*words, "--training-dataset", "gone.csv", "--training-dataset", "gone.csv"]
    )
    for problem in ("none.jsonl: no such file", "gone.csv: no such file", "gone.csv: is named twice"):
        assert problem in result.output
