"""The demo rows are true, unique and repeatable, and the demo model is an ordinary model folder."""

import os
import random

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import python
from training.data import demo_rows as tasks
from training.data.demo_rows import demo_rows
from training.data.prompt import CONTROL_TOKENS, INPUT_KEY, INTRO, INTRO_WITH_INPUT
from training.model.demo_model import save_demo_model


@pytest.fixture(scope="module")
def rows():
    return demo_rows()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo_model")
    save_demo_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts_of(row):
    return [text for turn in tasks.turns(row) for text in turn]


def test_there_are_thousands_of_rows_in_alpacas_format_without_duplicates(rows):
    assert 5_000 <= len(rows) <= 7_000
    assert all(row.keys() - {"history"} == {"instruction", "input", "output"} for row in rows)
    assert 0.3 < sum(not row["input"] for row in rows) / len(rows) < 0.7
    assert len({tasks.first_question(row) for row in rows}) == len(rows)


def test_rows_are_the_same_in_every_process_and_the_random_state_is_untouched(rows):
    state = random.getstate()
    assert demo_rows() == rows
    assert random.getstate() == state
    code = "import hashlib, json; from training.data.demo_rows import demo_rows; "
    code += "print(hashlib.sha256(json.dumps(demo_rows()).encode()).hexdigest())"
    seeds = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("1", "2")]
    assert len({python("-c", code, env=environment, check=True).stdout for environment in seeds}) == 1


def test_no_output_is_empty_and_no_text_has_control_words_or_stray_spaces(rows):
    for row in rows:
        assert row["instruction"]
        assert row["output"]
        for text in texts_of(row):
            assert isinstance(text, str)
            assert "#" not in text
            assert text == text.strip()


@pytest.mark.parametrize(
    ("instruction", "answer"),
    [
        ("What is the capital of France?", "Paris"),
        ("Tell me the capital of India.", "New Delhi"),
        ("What is the plural of knife?", "knives"),
        ("What is the plural of child?", "children"),
        ("What is the opposite of hot?", "cold"),
        ("What is the opposite of cold?", "hot"),
        ("What is the past tense of go?", "went"),
        ("Which month comes after December?", "January"),
        ("Which number comes after 9?", "10"),
        ("What is 3 plus 4?", "7"),
        ("What kind of thing is an ant?", "An ant is an animal."),
        ("What kind of thing is red?", "Red is a colour."),
        ("Describe a bee.", "A bee is an animal that makes honey."),
        ("Say boat three times.", "boat boat boat"),
    ],
)
def test_known_facts_are_correct(rows, instruction, answer):
    matching = [row for row in rows if tasks.first_question(row) == (instruction, "")]
    assert [row["output"] for row in matching] == [answer]


def test_exercises_have_correct_answers(rows):
    for row in rows:
        instruction, words = row["instruction"], row["input"].split("\n")
        if instruction == "Count the words.":
            assert row["output"] == str(len(words))
        elif instruction.startswith("Which of these is"):
            kind = instruction.removesuffix("?").split()[-1]
            assert [word for word in words if tasks.KIND_OF[word] == kind] == [row["output"]]
        elif instruction.startswith("Which number is larger"):
            x, y = instruction.removesuffix("?").split(", ")[1].split(" or ")
            assert int(row["output"]) == max(int(x), int(y))


@pytest.mark.parametrize("table", [tasks.OPPOSITES, tasks.CAPITALS, tasks.PLURALS, tasks.PAST_TENSES])
def test_every_fact_has_only_one_answer(table):
    keys = [key for key, _ in tasks.pairs(table)]
    if table is tasks.OPPOSITES:  # asked in both directions
        keys += [opposite for _, opposite in tasks.pairs(table)]
    assert len(keys) == len(set(keys))


def test_every_described_thing_has_exactly_one_kind():
    assert set(tasks.DESCRIPTIONS) <= set(tasks.THINGS)
    assert sum(len(words.split()) for words in tasks.KINDS.values()) == len(tasks.KIND_OF)


def test_the_model_folder_has_the_same_bytes_every_time_and_the_random_state_is_untouched(folder, tmp_path):
    """Also on ranks other than 0: every node has its own cache, and under Spark any rank may write it first."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    save_demo_model(tmp_path / "one_process")
    assert torch.equal(torch.get_rng_state(), state)
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        save_demo_model(tmp_path / "rank_1")
    finally:
        torch.distributed.destroy_process_group()
    assert contents(tmp_path / "rank_1") == contents(tmp_path / "one_process") == contents(folder)


def test_the_model_loads_as_a_small_gptj_whose_embedding_fits_the_tokenizer(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "gptj"
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    logits = model(**tokenizer("Hello there.", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()


def test_the_tokenizer_is_like_gpt2s_and_has_no_control_tokens(tokenizer):
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|endoftext|>"
    for token in CONTROL_TOKENS:
        assert len(tokenizer(token)["input_ids"]) > 1


def test_the_tokenizer_round_trips_any_text(tokenizer):
    odd = [" two  spaces\n\n and\ta tab ", "naïve café 日本 🙂", f"{INPUT_KEY}\nx"]
    for text in ("What is the capital of France?", INTRO, *odd):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_prompt_has_few_tokens(tokenizer, rows):
    # every row has an introduction, so a long one would cost more than the rows themselves
    assert len(tokenizer(INTRO)["input_ids"]) == 18
    assert len(tokenizer(INTRO_WITH_INPUT)["input_ids"]) == 27
    texts = [" ".join(texts_of(row)) for row in rows]
    assert sum(len(ids) for ids in tokenizer(texts)["input_ids"]) / len(texts) < 30
