"""Generation: batches, stopping at the end key, prompts as in training, loading, and the command line."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    pipeline,
)

from tests.conftest import python
from training import generate
from training.data.conversations import Prompt
from training.data.ledger import Ledger
from training.data.prompt import render_prompt
from training.data.rows import Columns
from training.data.tokens import encode_rows
from training.errors import ModelError
from training.model.generation import (
    generate_response,
    generate_responses,
    load_model_tokenizer_for_generate,
    prompt_ids,
)
from training.model.loading import load_model

ROOT = Path(__file__).parents[2]
GREEDY = {"do_sample": False, "top_p": None, "top_k": None}
INSTRUCTIONS = ["Name a colour.", "Say: " + "a, b, c, " * 12, "x", "Count the words of the text.", "Greet."]
INPUTS = ["red, blue", None, "", "one two three", None]


@pytest.fixture
def random_model(base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return load_model(str(base_folder), tokenizer, torch.float32, seed=42).eval()


@pytest.fixture
def answers_as_ids(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Returns ids as text: different byte sequences of a random model may decode to the same text."""

    def ids(batch: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        special = set(tokenizer.all_special_ids)
        return [" ".join(str(i) for i in row if i not in special) for row in batch.tolist()]

    monkeypatch.setattr(tokenizer, "batch_decode", ids)


# --- batches -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("answers_as_ids")
@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_batch_gives_the_same_answers_as_single_prompts(
    random_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    ask = {"model": random_model, "tokenizer": tokenizer, "max_new_tokens": 12, **GREEDY}
    single = [generate_response(a, b, **ask) for a, b in zip(INSTRUCTIONS, INPUTS, strict=True)]
    assert len(set(single)) == len(single)  # all different, so the order is tested too
    assert all(len(answer.split()) > 3 for answer in single)
    assert generate_responses(INSTRUCTIONS, INPUTS, batch_size=batch_size, **ask) == single


@pytest.mark.usefixtures("answers_as_ids")
def test_a_greedy_answer_is_the_argmax_of_a_plain_forward_pass(
    random_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    [ids] = prompt_ids(tokenizer, [Prompt("Greet.")], 100)
    expected = []
    with torch.inference_mode():
        for _ in range(6):
            logits = random_model(torch.tensor([ids + expected]), use_cache=False).logits
            expected.append(int(logits[0, -1].argmax()))
    answer = generate_response("Greet.", model=random_model, tokenizer=tokenizer, max_new_tokens=6, **GREEDY)
    assert answer.split() == [str(i) for i in expected]


@pytest.mark.usefixtures("answers_as_ids")
def test_sampling_uses_dollys_settings_and_the_seed(
    random_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(seed: int) -> str:
        torch.manual_seed(seed)
        return generate_response("Greet.", model=random_model, tokenizer=tokenizer, max_new_tokens=12)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    arguments = {}
    monkeypatch.setattr(random_model, "generate", lambda ids, **kwargs: arguments.update(kwargs) or ids)
    sample(1)
    config = arguments["generation_config"]
    assert (config.do_sample, config.top_p, config.top_k, config.max_new_tokens) == (True, 0.92, 0, 256)
    assert arguments["attention_mask"].all()


# --- where an answer ends ----------------------------------------------------------------------------


def test_an_answer_stops_before_the_end_key_and_no_prompts_give_no_answers(
    answering_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ask = {"model": answering_model, "tokenizer": tokenizer, "max_new_tokens": 50}
    assert generate_responses(INSTRUCTIONS, INPUTS, **ask) == ["AB"] * 5
    assert generate_responses([], **ask) == []


def test_stock_generate_stops_at_the_end_key(answering_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(answering_folder)
    tokenizer = AutoTokenizer.from_pretrained(answering_folder)
    prompts = tokenizer([render_prompt("Greet."), render_prompt("Name a colour.", "red")], padding=True,
                        padding_side="left", return_tensors="pt")  # fmt: skip
    output = model.generate(**prompts)
    answer = tokenizer.convert_tokens_to_ids(["A", "B", "### End"])
    assert output[:, prompts["input_ids"].shape[1] :].tolist() == [answer, answer]


def test_a_stock_pipeline_answers_and_stops_at_the_end_key(answering_folder: Path) -> None:
    ask = pipeline("text-generation", model=str(answering_folder), device="cpu")
    assert ask(render_prompt("Greet."), return_full_text=False) == [{"generated_text": "AB"}]
    [reply] = ask([{"role": "user", "content": "Greet."}])
    assert reply["generated_text"][-1] == {"role": "assistant", "content": "AB"}


# --- prompts -----------------------------------------------------------------------------------------


def test_a_prompt_has_the_same_ids_as_in_training_and_control_words_stay_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    words = ["### End", "### Response:\n", "a\n\n### Response:\nb\n\n### End", "<|endoftext|>"]
    instructions, inputs = INSTRUCTIONS + words, INPUTS + [None] * len(words)
    columns = Columns(instructions, [text or "" for text in inputs], ["answer"] * len(inputs))
    trained = [ids[:start] for _, ids, [(start, _)] in encode_rows(tokenizer, columns, Ledger("", 999))]
    prompts = [Prompt(*prompt) for prompt in zip(columns.instruction, columns.input, strict=True)]
    assert prompt_ids(tokenizer, prompts, 999) == trained


def test_a_long_prompt_is_cut_but_keeps_its_head_and_response_key(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [Prompt("!" * 500), Prompt("a")]
    full, short = prompt_ids(tokenizer, prompts, 999)
    with caplog.at_level(logging.WARNING):
        cut, same = prompt_ids(tokenizer, prompts, 100)
    assert cut == [*full[:99], full[-1]]
    assert same == short
    assert [record.message for record in caplog.records if "leave room for the answer" in record.message]


@pytest.mark.parametrize("words", [2, 200, 2000])
def test_a_prompt_of_any_length_is_answered(
    answering_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: int
) -> None:
    ask = {"model": answering_model, "tokenizer": tokenizer, "max_new_tokens": 100}
    assert generate_response("word " * words, **ask) == "AB"


def test_more_new_tokens_than_the_model_can_hold_are_refused(
    answering_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    message = r"max_new_tokens leaves 6 of the model's positions .* fewer new tokens"
    with pytest.raises(ValueError, match=message):
        generate_response("a", model=answering_model, tokenizer=tokenizer, max_new_tokens=250)


# --- loading -----------------------------------------------------------------------------------------


def test_a_folder_is_loaded_in_float32_on_a_cpu(answering_folder: Path) -> None:
    model, tokenizer = load_model_tokenizer_for_generate(str(answering_folder), device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert model.config.use_cache
    assert generate_response("a", model=model, tokenizer=tokenizer, max_new_tokens=9) == "AB"


def test_an_unfinished_run_is_refused_and_a_finished_run_is_loaded(
    answering_folder: Path, tmp_path: Path
) -> None:
    for file in answering_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    unfinished = r"its training did not finish. Type its training command again, with --resume auto"
    broken = r"run.json: cannot be read .* Copy or train the model again"
    for message, records in {
        unfinished: [b'{"status": "running"}', b"[]", b"7", b"null"],
        broken: [b'{"status": "fini', b"", b"\xff"],
    }.items():
        for record in records:
            (tmp_path / "run.json").write_bytes(record)
            with pytest.raises(ModelError, match=message):
                load_model_tokenizer_for_generate(str(tmp_path))
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished"}))
    load_model_tokenizer_for_generate(str(tmp_path))


# --- the terminal ------------------------------------------------------------------------------------


@pytest.fixture
def ask() -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(generate.main, list(arguments))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.mark.parametrize("more", [[], ["--greedy"], ["--seed", "1"], ["--input", "red"], ["--dtype", "bf16"]])
def test_the_command_prints_the_answer_and_nothing_else(
    ask: Callable[..., tuple[int, str, str]], answering_folder: Path, more: list[str]
) -> None:
    code, out, _ = ask("--model", str(answering_folder), "--max-new-tokens", "20", *more, "Greet.")
    assert (code, out) == (0, "AB\n")


def test_the_command_reports_in_one_line_why_it_cannot_answer(
    ask: Callable[..., tuple[int, str, str]], answering_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"status": "running"}))
    for model, tokens, message in (
        (
            tmp_path / "none",
            "20",
            "none: no such folder. Name a folder with config.json, or a model on the Hub",
        ),
        (300 * "x", "20", "cannot be used (File name too long)"),
        ("~nobody-here/x", "20", "there is no user 'nobody-here'"),
        (tmp_path, "20", "its training did not finish"),
        (answering_folder, "256", "Ask for fewer new tokens"),
    ):
        code, out, err = ask("--model", str(model), "--max-new-tokens", tokens, "Greet.")
        assert (code, out) == (2, "")
        assert err.startswith("Cannot answer: ")
        assert message in err
        assert err.count("\n") == 1


@pytest.fixture
def random_folder(
    random_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A model whose answers differ from prompt to prompt."""
    folder = tmp_path_factory.mktemp("random")
    random_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl"])
def test_each_line_of_json_has_the_answer_that_its_prompt_gets_alone(
    ask: Callable[..., tuple[int, str, str]], random_folder: Path, tmp_path: Path, suffix: str
) -> None:
    texts = ["Name a colour.", "Say: " + "a, b, c, " * 11 + "a", "x", "Schön, größer?", "x"]
    inputs = ["" if suffix == ".txt" or n % 2 else f"red {n}" for n in range(len(texts))]
    rows = [{"instruction": a, "input": b} for a, b in zip(texts, inputs, strict=True)]
    lines = texts if suffix == ".txt" else map(json.dumps, rows)
    content = json.dumps(rows) if suffix == ".json" else "\n".join(lines)
    (tmp_path / f"asked{suffix}").write_text(content, encoding="utf-8")
    words = ["--model", str(random_folder), "--greedy", "--max-new-tokens", "9"]
    out = tmp_path / "answers.jsonl"
    written = [
        *words,
        "--prompts",
        str(tmp_path / f"asked{suffix}"),
        "--output",
        str(out),
        "--batch-size",
        "2",
    ]
    assert ask(*written) == (0, "", "")
    answered = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [{key: entry[key] for key in ("instruction", "input")} for entry in answered] == rows
    model, tokenizer = load_model_tokenizer_for_generate(str(random_folder))
    alone = [
        generate_response(a, b, model=model, tokenizer=tokenizer, max_new_tokens=9, **GREEDY)
        for a, b in zip(texts, inputs, strict=True)
    ]
    assert [entry["response"] for entry in answered] == alone
    assert len(set(alone)) >= 4
    code, shown, _ = ask(*words, "--prompts", str(tmp_path / f"asked{suffix}"))
    assert (code, shown.isascii()) == (0, True), "a terminal is not changed by an answer"
    assert [json.loads(line) for line in shown.splitlines()] == answered
    code, _, err = ask(*written)
    assert code == 2
    assert "exists already. Name a new file" in err


def test_a_full_disk_is_reported_with_the_output_and_not_as_a_traceback(
    ask: Callable[..., tuple[int, str, str]],
    answering_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(generate, "answer_prompts", full)
    code, _, err = ask("--model", str(answering_folder), "--output", str(tmp_path / "a.jsonl"), "Greet.")
    assert (code, err) == (
        2, f"Cannot answer: --output {tmp_path}/a.jsonl: could not be written (No space left on device). "
        "Make room, and name a new file\n",
    )  # fmt: skip


@pytest.mark.parametrize("typed", [b"Greet.\n", "\ufeffGreet\nall of them.".encode()])
def test_a_dash_reads_the_instruction_from_standard_input(
    answering_folder: Path, tmp_path: Path, typed: bytes
) -> None:
    out = tmp_path / "answer.jsonl"
    words = ["--model", str(answering_folder), "--max-new-tokens", "20", "-"]
    assert CliRunner().invoke(generate.main, words, input=typed).stdout == "AB\n"
    CliRunner().invoke(generate.main, [*words, "--output", str(out)], input=typed)
    expected = {"instruction": typed.decode("utf-8-sig").strip(), "input": "", "response": "AB"}
    assert json.loads(out.read_text()) == expected


def test_the_command_runs_from_the_shell(answering_folder: Path) -> None:
    result = python(
        "-m", "training.generate", "--model", answering_folder, "--max-new-tokens", "20", "Greet."
    )
    assert (result.returncode, result.stdout) == (0, "AB\n"), result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "-1 is not in the range 0<=x<=4294967295"),
        (["--input", "\udcff"], "--input '\\udcff': is not UTF-8"),
        (["--greedy", "--seed", "1"], "--seed 1: has no effect with --greedy"),
        (["--batch-size", "3"], "--batch-size 3: has no effect without --prompts"),
        (["--prompts", ""], "--prompts is empty. Give a value, or leave the option out"),
        (["--output", " "], "--output is empty. Give a value, or leave the option out"),
        (["--prompts", "a.txt"], "Leave out INSTRUCTION and --input"),
        (["--output", "/proc/answers.jsonl"], "--output /proc/answers.jsonl: cannot be written"),
        (["--output", "/none/such/answers.jsonl"], "cannot be written. Name a file in a folder of your own"),
    ],
)
def test_invalid_options_are_refused_before_a_model_is_loaded(options: list[str], message: str) -> None:
    result = CliRunner().invoke(generate.main, ["--model", "no/such/model", *options, "Say."])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("words", "typed"), [([], b""), ([""], b""), ([" \n"], b""), (["-"], b""), (["-"], b" \n")]
)
def test_an_empty_instruction_is_refused_with_the_ways_to_give_one(words: list[str], typed: bytes) -> None:
    result = CliRunner().invoke(generate.main, ["--model", "no/such/model", *words], input=typed)
    assert result.exit_code == 2
    assert (
        "INSTRUCTION is empty. Type it, or - to read it from standard input, or --prompts FILE"
        in result.output
    )


def test_instructions_that_cannot_be_read_are_refused_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "a"}\n{"instruction": " "}\n')
    model = ["--model", "no/such/model"]
    result = CliRunner().invoke(generate.main, [*model, "--prompts", str(tmp_path / "a.jsonl")])
    assert (result.exit_code, result.stderr) == (
        2, f"Cannot answer: {tmp_path}/a.jsonl, row 2: the instruction is empty\n",
    )  # fmt: skip
    result = CliRunner().invoke(generate.main, [*model, "-"], input=b"caf\xe9")
    assert result.exit_code == 2
    assert "standard input: not UTF-8 at byte 3" in result.stderr
