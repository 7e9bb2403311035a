"""lm-eval in Dolly's prompt: the ids of training, where the stock model class fails; else the stock's numbers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GPTJForCausalLM, PreTrainedTokenizerBase

from tests.conftest import jsonl
from tests.model.tokenizer_kinds import KINDS
from training.data.encoding import encode_text, encode_turns
from training.evaluate import harness
from training.evaluate.__main__ import main
from training.evaluate.harness import DollyModel, compare_results, run_tasks
from training.model.generation import load_model_tokenizer_for_generate
from training.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

QUESTIONS: list[dict[str, Any]] = [
    {"q": "Which river?", "choices": ["Rhine", "Po", "Elbe"], "answer": 0},
    {"q": "Say ### End and go on.", "choices": ["AB", "A", "go on"], "answer": 2},
    {"q": "Is it so?\n", "choices": ["yes", "no", "perhaps"], "answer": 1},
    {"q": "How many?", "choices": ["one", "two", "three"], "answer": 2},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: answer
{more}
"""
CHOICE = """
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
BEGUN = CHOICE + 'gen_prefix: "Answer:"\n'
GENERATION = """
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task(tmp_path: Path) -> Any:
    """Writes a task of four questions and returns its YAML file."""
    data = jsonl(tmp_path / "questions.jsonl", QUESTIONS)

    def write(name: str, more: str = CHOICE, kind: str = "multiple_choice") -> str:
        file = tmp_path / f"{name}.yaml"
        file.write_text(TASK.format(name=name, data=data, kind=kind, more=more))
        return str(file)

    return write


@cache
def manager() -> TaskManager:
    return TaskManager(include_defaults=False)


def stock(folder: Path, file: str, **how: Any) -> dict[str, Any]:
    """The results of the stock harness on a folder."""
    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)
    return simple_evaluate(model, tasks=[file], task_manager=manager(), bootstrap_iters=0, **how)


def ours(folder: Path, file: str, prompt: str) -> dict[str, Any]:
    model, tokenizer = load_model_tokenizer_for_generate(str(folder), torch.float32)
    return run_tasks(DollyModel(model, tokenizer, 4, prompt), [file], manager())


def scores(results: dict[str, Any], task: str) -> list[list[float]]:
    """The log-likelihood of each choice of each question."""
    return [[answer[0] for answer in sample["filtered_resps"]] for sample in results["samples"][task]]


@pytest.mark.parametrize(
    ("name", "more", "prompt"),
    [("plain", CHOICE, "plain"), ("begun", BEGUN, "plain"), ("begun", BEGUN, "dolly")],
)
def test_where_no_context_ends_in_white_space_the_numbers_are_those_of_the_stock_harness(
    name: str, more: str, prompt: str, random_folder: Path, task: Any
) -> None:
    file = task(name, more)
    expected = stock(random_folder, file, apply_chat_template=prompt == "dolly")
    found = ours(random_folder, file, prompt)
    assert found["results"][name]["acc,none"] == expected["results"][name]["acc,none"]
    assert found["results"][name]["acc_norm,none"] == expected["results"][name]["acc_norm,none"]
    for mine, theirs in zip(scores(found, name), scores(expected, name), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_in_dollys_prompt_the_stock_harness_fails_and_ours_scores_the_ids_of_training(
    random_folder: Path, task: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = task("asked")
    with pytest.raises(AssertionError):
        stock(random_folder, file, apply_chat_template=True)
    found = ours(random_folder, file, "dolly")
    model = GPTJForCausalLM.from_pretrained(random_folder).eval()
    key = tokenizer.convert_tokens_to_ids("### Response:\n")
    for question, sample in zip(QUESTIONS, found["samples"]["asked"], strict=True):
        # The chat template writes "###  End", so that the text stays text.
        text = (
            question["q"].replace("### End", "###  End").strip("\n")
            if question is QUESTIONS[1]
            else question["q"]
        )
        [[(head, body, _)]] = encode_turns(tokenizer, [[(text, None, "")]])
        for choice, (score, _) in zip(question["choices"], sample["filtered_resps"], strict=True):
            [continuation] = encode_text(tokenizer, [choice])
            prompt = [*head, *body, key]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *continuation]])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(continuation) - 1)
            expected = sum(logits[place, id].item() for place, id in zip(places, continuation, strict=True))
            assert score == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", list(KINDS))
def test_with_every_kind_of_tokenizer_prompt_and_answer_have_the_ids_of_training(
    kind: str, tmp_path: Path
) -> None:
    KINDS[kind](tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    model = SimpleNamespace(tokenizer=tokenizer, in_dolly_prompt=True)
    key = tokenizer.convert_tokens_to_ids("### Response:\n")
    for question, answer in (
        ("Name a river.", "The Rhine"),
        ("the identity\n", "- def f(x):\n"),
        ("x", " Berlin"),
    ):
        turns = [{"role": "user", "content": question}]
        context = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        [[(head, body, _)]] = encode_turns(tokenizer, [[(question, None, "")]])
        [expected] = encode_text(tokenizer, [answer])
        assert DollyModel._encode_pair(model, context, answer) == ([*head, *body, key], expected)
        prompt, continuation = DollyModel._encode_pair(model, context + "The answer: ", answer)
        [begun, whole] = encode_text(tokenizer, ["The answer:", "The answer: " + answer])
        assert prompt == [*head, *body, key, *begun]
        assert prompt[-len(begun) :] + continuation == whole


def test_solved_examples_are_earlier_turns_in_dollys_prompt(
    random_folder: Path, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = []
    encode = DollyModel._encode_pair
    monkeypatch.setattr(
        DollyModel, "_encode_pair", lambda self, *pair: contexts.append(pair[0]) or encode(self, *pair)
    )
    file = task("shots")
    model, tokenizer = load_model_tokenizer_for_generate(str(random_folder), torch.float32)
    results = run_tasks(DollyModel(model, tokenizer, 4, "dolly"), [file], manager(), limit=1, num_fewshot=2)
    assert results["n-shot"]["shots"] == 2
    assert {context.count("### Response:\n") for context in contexts} == {3}
    assert {context.count("\n\n### End") for context in contexts} == {2}
    assert all(context.endswith("### Response:\n") for context in contexts)


def test_generated_answers_stop_at_the_end_key_and_are_greedy(answering_folder: Path, task: Any) -> None:
    file = task("written", GENERATION, "generate_until")
    first, second = (ours(answering_folder, file, "dolly") for _ in range(2))
    answers = [sample["filtered_resps"] for sample in first["samples"]["written"]]
    assert answers == [sample["filtered_resps"] for sample in second["samples"]["written"]]
    assert answers == [["AB"]] * 4


def test_the_command_prints_the_harness_values_with_intervals(
    answering_folder: Path, random_folder: Path, task: Any, tmp_path: Path
) -> None:
    output = tmp_path / "evaluation.json"
    words = [
        "--model",
        answering_folder,
        "--base",
        random_folder,
        "--tasks",
        task("asked"),
        "--output",
        output,
    ]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    section = json.loads(output.read_text())["tasks"]
    found = section["tasks"]["asked"]
    for name, folder in (("base", random_folder), ("tuned", answering_folder)):
        value = ours(folder, task("asked"), "dolly")["results"]["asked"]["acc,none"]
        interval = found["metrics"]["acc"][name]
        assert interval["value"] == value
        assert interval["low"] <= value <= interval["high"]
    assert found["num_fewshot"] == 0
    assert section["settings"]["prompt"] == "in Dolly's prompt"
    assert "benchmarks of lm-eval, in Dolly's prompt:" in result.stdout
    assert "held" not in result.stdout, "no rows were evaluated"


def test_a_figure_of_any_number_type_is_kept() -> None:
    numbers = (np.float32(0.5), np.int64(2), 0.25, 1)
    results = {"results": {"own": {f"metric {number!r},none": number for number in numbers}}}
    metrics = compare_results(results, results, "own")
    assert [metric["tuned"]["value"] for metric in metrics.values()] == [0.5, 2, 0.25, 1]
    json.dumps(metrics)


def test_an_unknown_task_is_refused_with_the_nearest_names(
    answering_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_folders(include_defaults: bool) -> TaskManager:  # under coverage all 14,000 tasks take a minute
        assert include_defaults
        tasks = Path(lm_eval.tasks.__file__).parent
        folders = [str(tasks / name) for name in ("hellaswag", "piqa")]
        return TaskManager(include_path=folders, include_defaults=False)

    monkeypatch.setattr(harness, "TaskManager", two_folders)
    words = ["--model", answering_folder, "--base", answering_folder, "--tasks", "helaswag,none.yaml,piqa"]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 2
    assert (
        "--tasks helaswag: lm-eval 0.4.13 has no such task. The nearest names are hellaswag" in result.output
    )
    assert "--tasks none.yaml: no such file" in result.output
    assert "piqa:" not in result.output


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("doc_to_text: '{{q'", "TemplateSyntaxError"),
        ("doc_to_text: '{{nothing}}'", "'nothing' is undefined"),
        ("doc_to_text: [1", "ParserError"),
        ("unsafe_code: true", "runs code that the model writes"),
    ],
)
def test_a_task_that_cannot_be_run_is_named_with_the_reason(
    line: str, words: str, answering_folder: Path, tmp_path: Path
) -> None:
    data = jsonl(tmp_path / "q.jsonl", [{"q": "Capital of France?"}])
    (tmp_path / "t.yaml").write_text(
        f"task: t\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_choice: [Paris, Rome]\ndoc_to_target: 0\n"
        f"metric_list:\n  - metric: acc\n{'' if 'doc_to_text' in line else 'doc_to_text: q'}\n{line}\n"
    )
    words_typed = ["--model", answering_folder, "--base", answering_folder, "--tasks", tmp_path / "t.yaml"]
    result = CliRunner().invoke(main, list(map(str, words_typed)))
    assert result.exit_code == 2, result.output
    assert f"--tasks {tmp_path / 't.yaml'}" in result.output
    assert words in result.output
