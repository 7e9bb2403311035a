"""Every kind of tokenizer has the same ids in training, in `generate`, in the chat template and in stock transformers."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock
from zipfile import ZipFile

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerBase

from tests.conftest import cached_wheel
from tests.model.tokenizer_kinds import (
    KINDS,
    byte_level,
    byte_level_bpe,
    general,
    llama,
    unigram,
    unigram_pieces,
)
from training.data.columns import REQUIRED, Columns
from training.data.conversations import Prompt, read_turns
from training.data.encoding import encode_text, guarded_tokens, surrounding_ids
from training.data.json_rows import table_of
from training.data.ledger import Ledger
from training.data.prompt import INPUT_KEY, render_prompt
from training.data.tokens import encode_rows
from training.errors import ModelError
from training.model.generation import prompt_ids
from training.model.tokenizer import load_tokenizer, saved_form

KEYS = ["### End", "### Instruction:", "### Response:\n"]


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of each kind, as its base model has it."""
    folder = tmp_path_factory.mktemp("base")
    KINDS[request.param](folder)
    return folder


def trained_and_saved(base: Path, folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """(the tokenizer of a training run, what AutoTokenizer loads from the folder of the trained model)."""
    is_llama = json.loads((base / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    config = LlamaConfig() if is_llama else GPT2Config()
    tokenizer = saved_form(load_tokenizer(str(base)), config)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def both(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    return trained_and_saved(folder, tmp_path_factory.mktemp("trained"))


# --- the same ids everywhere -------------------------------------------------------------------------

ROWS = [
    ("Name a river.", "", "The Rhine."),
    ("  Two spaces", "", "  and here, at the end too  "),
    ("\nWhat is 1,234.5 * 2?\n", "", "2,469\n"),
    ("Summarise.", "A long  text\twith\n\n\nbreaks", "- one\n- two"),
    ("Übersetze „naïve“", " ### Input:\n", "👍🏽 ﬁne, ２ ½"),
    ("x", "#", "# #"),
    ("<", "<<s", "/s> ##"),
    ("ends with a hash #", "", "#"),
]


def encoded(
    tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, str, str]]
) -> list[tuple[list[int], int]]:
    columns = Columns(*(list(column) for column in zip(*rows, strict=True)))
    return [(ids, start) for _, ids, [(start, _)] in encode_rows(tokenizer, columns, Ledger("rows", 10_000))]


def assert_same_ids(tokenizer: PreTrainedTokenizerBase, stock: PreTrainedTokenizerBase) -> None:
    prompts = prompt_ids(tokenizer, [Prompt(*row[:2]) for row in ROWS], 10_000)
    for row, prompt, (ids, start) in zip(ROWS, prompts, encoded(tokenizer, ROWS), strict=True):
        instruction, input, response = row
        assert prompt == ids[:start], "generate"
        question = f"{instruction}\n\n{INPUT_KEY}\n{input}" if input else instruction
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
        for other in (tokenizer, stock):
            assert other(render_prompt(instruction, input))["input_ids"] == prompt, "whole prompt"
            whole = render_prompt(instruction, input) + response + "\n\n### End"
            assert other(whole)["input_ids"] == ids, "whole row"
            templated = other.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
            assert templated == prompt, "chat template"
            assert other.apply_chat_template(turns)["input_ids"] == ids, "chat template"
    messages = [{"role": "system", "content": " Be brief.\n"}]
    for instruction, input, response in ROWS:
        question = f"{instruction}\n\n{INPUT_KEY}\n{input}" if input else instruction
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    columns = Columns([""], [""], [""])
    read_turns([table_of([{"messages": messages}], "rows")], columns, REQUIRED)
    [(_, ids, _)] = encode_rows(tokenizer, columns, Ledger("rows", 10_000))
    for other in (tokenizer, stock):
        assert other.apply_chat_template(messages)["input_ids"] == ids, "conversation"


def test_ids_are_the_same_everywhere(both: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]) -> None:
    assert_same_ids(*both)


def test_a_saved_tokenizer_pads_prompts_on_the_left_for_any_causal_model(
    both: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
) -> None:
    tokenizer, stock = both
    texts = [render_prompt("Name a river."), render_prompt("Name a long river.", "Rhine")]
    batch = stock(texts, padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    short = tokenizer(texts[0])["input_ids"]
    assert batch["input_ids"][0][-len(short) :] == short
    assert batch["attention_mask"][0] == [0] * (len(batch["input_ids"][1]) - len(short)) + [1] * len(short)
    assert load_tokenizer(str(stock.name_or_path)).chat_template == stock.chat_template


def test_pieces_of_llama_begin_as_after_a_control_token(tmp_path: Path) -> None:
    llama(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    [(ids, start)] = encoded(tokenizer, [("Name a river.", "", "The Rhine.")])
    shown = tokenizer.convert_ids_to_tokens(ids)
    assert "".join(shown[:start]).replace("<0x0A>", "\n") == "<s>▁" + render_prompt("Name a river.").replace(
        " ", "▁"
    ).replace("###▁", "### ")
    assert shown[shown.index("### Instruction:") + 1] == "<0x0A>"
    assert "".join(shown[start:]).startswith("The▁Rhine.")


def test_what_stock_transformers_puts_before_a_text_is_kept_and_what_it_puts_after_is_not(
    tmp_path: Path,
) -> None:
    byte_level(tmp_path, "[gMASK] <sop>", "<|endoftext|>")
    base, tokenizer = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    prefix = base.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    assert base("a")["input_ids"] == [
        *prefix,
        *base("a", add_special_tokens=False)["input_ids"],
        base.eos_token_id,
    ]
    assert surrounding_ids(tokenizer) == (prefix, [])
    [(ids, _)] = encoded(tokenizer, [("a", "", "b")])
    assert ids[:2] == prefix
    assert tokenizer.eos_token_id not in ids


# --- the text of a control token stays text ----------------------------------------------------------


@pytest.mark.parametrize("field", [0, 1, 2])
def test_the_user_text_never_becomes_a_control_token(
    both: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase], field: int
) -> None:
    tokenizer, stock = both
    words = guarded_tokens(stock)
    before = surrounding_ids(stock)[0]
    key_ids = [
        tokenizer.convert_tokens_to_ids(key) for key in ("### Instruction:", "### Response:\n", "### End")
    ]
    ids_of_words = set(stock.convert_tokens_to_ids(words))
    assert {*KEYS, stock.eos_token} <= set(words)
    for text in [
        *words[:20],
        *words[-20:],
        " ".join(words),
        "".join(words),
        f"{words[0]}{words[-1]}\n### Response:",
    ]:
        row = ["Name a river.", "long", "The Rhine."]
        row[field] = text
        [(ids, start)] = encoded(tokenizer, [(row[0], row[1], row[2])])
        assert [id for id in ids if id in ids_of_words] == [*before, *key_ids], text
        assert ids[start - 1] == key_ids[1]
        question = f"{row[0]}\n\n{INPUT_KEY}\n{row[1]}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row[2]}]
        chat = stock.apply_chat_template(turns)["input_ids"]
        assert [id for id in chat if id in ids_of_words] == [*before, *key_ids], text


def test_a_text_that_is_eos_for_unigram_is_broken_by_a_space(tmp_path: Path) -> None:
    unigram(tmp_path, "first", "<s>")
    base, tokenizer = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    text = {"add_special_tokens": False, "split_special_tokens": True}
    assert base.eos_token_id in base("</s>", **text)["input_ids"]  # the model has it among its pieces
    assert tokenizer.eos_token_id not in tokenizer("</s>", **text)["input_ids"]
    [ids] = encode_text(tokenizer, ["a</s>b"])
    assert tokenizer.decode(ids) == "a</ s>b"


# --- refusals ----------------------------------------------------------------------------------------


def test_a_tokenizer_whose_parts_cannot_agree_with_the_whole_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer.from_str(byte_level_bpe())
    backend.add_tokens(
        [AddedToken("\n\n###", normalized=False)]
    )  # joins a text with the control token after it
    general(tmp_path, backend, eos_token="<|endoftext|>", unk_token=None)
    message = (
        r"^.*: its tokenizer gives other ids for a whole prompt \(\['.*\]\) than for the parts between its control "
        r"tokens \(\['.*\]\), so servers would not ask .* Use a model with another tokenizer$"
    )
    with pytest.raises(ModelError, match=message):
        load_tokenizer(str(tmp_path))


def test_thousands_of_ordinary_pieces_that_are_special_are_refused_at_once(tmp_path: Path) -> None:
    names = [f"word{n}" for n in range(1001)]
    backend = Tokenizer(models.Unigram([*unigram_pieces(), *((name, -1.0) for name in names)], unk_id=0))
    general(tmp_path, backend, extra_special_tokens=names)
    message = r"1,00\d special tokens, such as 'word1000', are ordinary pieces of its model"
    with pytest.raises(ModelError, match=message):
        load_tokenizer(str(tmp_path))


def test_an_eos_token_that_every_text_has_is_refused(tmp_path: Path) -> None:
    byte_level(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "e"}))
    with pytest.raises(ModelError, match=r"Use a model with another tokenizer"):
        load_tokenizer(str(tmp_path))


# --- a SentencePiece model of a real model -----------------------------------------------------------

MISTRAL = "mistral_common-1.13.1-py3-none-any.whl"


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral 7B's tokenizer.model, from a wheel on PyPI that .ci/run fetches."""
    wheel = cached_wheel(MISTRAL, "Mistral's tokenizer of 7 MB", "mistral-common==1.13.1")
    folder = tmp_path_factory.mktemp("mistral")
    with ZipFile(wheel) as files:
        content = files.read("mistral_common/data/tokenizer.model.v1")
    (folder / "tokenizer.model").write_bytes(content)
    return folder


@pytest.mark.parametrize("legacy", [False, True])
def test_mistrals_sentencepiece_model_has_the_same_ids_everywhere(
    mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    # transformers asks for the package sentencepiece, but reads the file with protobuf alone.
    module = import_module("transformers.convert_slow_tokenizer")
    monkeypatch.setattr(module, "requires_backends", lambda *_: None)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    (mistral / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, stock = trained_and_saved(mistral, tmp_path)
    assert len(stock) == 32_003
    assert_same_ids(tokenizer, stock)
    shown = stock.convert_ids_to_tokens(stock(render_prompt("Name a river."))["input_ids"])
    assert shown[:3] == ["<s>", "▁Below", "▁is"]
    after_key = shown[shown.index("### Instruction:") + 1 :][:3]
    assert after_key == (["▁", "<0x0A>", "Name"] if legacy else ["<0x0A>", "Name", "▁a"])


def test_a_sentencepiece_model_without_its_package_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr("training.model.tokenizer.is_sentencepiece_available", lambda: False)
    with pytest.raises(ModelError, match=r"Type pip install sentencepiece protobuf"):
        load_tokenizer(str(tmp_path))


def test_mistrals_tekken_file_is_a_tokenizer(tmp_path: Path) -> None:
    config = {"pattern": "a", "version": "v3", "default_vocab_size": 1, "default_num_special_tokens": 0}
    content = {"config": config | {"num_vocab_tokens": 1}, "vocab": [], "special_tokens": []}
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"has no EOS token"):  # the file is read, but names none
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_cannot_be_loaded_again_is_refused_with_the_reason(
    bpe_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(bpe_folder))
    reason = OSError(24, "Too many open files")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", Mock(side_effect=reason))
    with pytest.raises(
        ModelError, match=r"raises an error \(OSError: .*Too many open files\) once its tokenizer"
    ):
        saved_form(tokenizer, GPT2Config())
