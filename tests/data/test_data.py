"""Rows to token ids: the same ids as Dolly, control words in user text, the ledger, the cache and the split."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import GPT2TokenizerFast, PreTrainedTokenizerBase

from tests.conftest import jsonl, rows_of
from training.data import ledger, tokens
from training.data.ledger import Ledger
from training.data.prompt import render_prompt
from training.data.rows import Columns, read_columns
from training.data.tokens import encode_rows, prepare_dataset
from training.errors import DataError
from training.model.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[3] / "shared"
EOS = "<|endoftext|>"
PLAIN = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a colour.\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a colour.\n\n### Input:\nred, blue\n\n### Response:\n"
)
KEYS = ["### End", "### Instruction:", "### Response:\n"]
MIXED = ["a\n\n### Response:\nb\n\n### End", "### Response:\n### Response:\n", "#### End"]
CONTROL_WORDS = [*KEYS, EOS, *MIXED]


def dollys_tokenizer(folder: Path, fillers: int = 0) -> PreTrainedTokenizerBase:
    """The BPE with Dolly's control tokens, added without code of this project."""
    tokenizer = GPT2TokenizerFast.from_pretrained(str(folder))
    tokenizer.add_tokens([f"<|extratoken_{n}|>" for n in range(1, fillers + 1)])
    tokenizer.add_special_tokens({"extra_special_tokens": KEYS})
    return tokenizer


def encoded(
    tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, str, str]], max_length: int = 10_000
) -> list[tuple[int, list[int], int]]:
    """(row number, input ids, start of the response) of rows of one turn."""
    columns = Columns(*(list(column) for column in zip(*rows, strict=True)))
    kept = list(encode_rows(tokenizer, columns, Ledger("rows", max_length)))
    assert all(end == len(ids) for _, ids, [(_, end)] in kept)
    return [(number, ids, start) for number, ids, [(start, _)] in kept]


# --- the prompt and its ids --------------------------------------------------------------------------


def test_the_prompt_is_alpacas_word_for_word() -> None:
    assert render_prompt("Name a colour.") == PLAIN
    assert render_prompt("Name a colour.", "") == PLAIN
    assert render_prompt("Name a colour.", "red, blue") == WITH_INPUT


def test_control_tokens_have_dollys_order(bpe_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    base = len(GPT2TokenizerFast.from_pretrained(str(bpe_folder)))
    assert tokenizer.convert_tokens_to_ids(KEYS) == [base, base + 1, base + 2]


@pytest.mark.parametrize("output", ["Red.", " two  spaces ", "line\n\nline\n", "ünï✓", "#", "###", "\n"])
@pytest.mark.parametrize("input", ["", "red, blue", " ", "#", "\n\n"])
def test_ids_are_dollys_on_literal_rows(
    bpe_folder: Path, tokenizer: PreTrainedTokenizerBase, input: str, output: str
) -> None:
    prompt = WITH_INPUT.replace("red, blue", input) if input.strip() else PLAIN
    expected = dollys_tokenizer(bpe_folder)(prompt + output + "\n\n### End")["input_ids"]
    if not output.strip():
        assert encoded(tokenizer, [("Name a colour.", input, output)]) == []
        return
    [(number, ids, start)] = encoded(tokenizer, [("Name a colour.", input, output)])
    assert number == 1
    assert ids == expected
    assert tokenizer.decode(ids[:start]) == prompt
    assert tokenizer.decode(ids[start:]) == output + "\n\n### End"


def test_ids_are_dollys_on_1500_rows_of_alpaca_with_gpt_js_vocabulary(tmp_path: Path) -> None:
    if not SHARED.exists():
        pytest.skip("../shared does not exist")
    dolly = dollys_tokenizer(SHARED / "gpt2-bpe", fillers=143)
    fillers = GPT2TokenizerFast.from_pretrained(str(SHARED / "gpt2-bpe"))
    fillers.add_tokens([f"<|extratoken_{n}|>" for n in range(1, 144)])
    fillers.save_pretrained(tmp_path)
    ours = load_tokenizer(str(tmp_path))
    assert ours.convert_tokens_to_ids(KEYS) == [50400, 50401, 50402]
    source = SHARED / "data" / "alpaca_1500.jsonl"
    texts = [json.loads(line)["text"] for line in source.read_text().split("\n") if line]
    assert len(texts) == 1500
    kept = list(encode_rows(ours, read_columns(str(source)), Ledger("alpaca", 2048)))
    dropped = {n for n, text in enumerate(texts, start=1) if not text.split("### Response:\n", 1)[1].strip()}
    assert {number for number, _, _ in kept} == set(range(1, 1501)) - dropped
    expected = dolly([f"{texts[number - 1]}\n\n### End" for number, _, _ in kept])["input_ids"]
    assert [ids for _, ids, _ in kept] == expected
    assert all(
        ids[start - 1] == 50402 and ids[-1] == 50400 and end == len(ids) for _, ids, [(start, end)] in kept
    )


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
@pytest.mark.parametrize("words", CONTROL_WORDS)
def test_control_words_in_a_row_stay_text(tokenizer: PreTrainedTokenizerBase, field: str, words: str) -> None:
    row = {"instruction": "Name a colour.", "input": "red", "output": "Red."} | {field: words}
    [(_, ids, start)] = encoded(tokenizer, [(row["instruction"], row["input"], row["output"])])
    assert [ids.count(key) for key in tokenizer.convert_tokens_to_ids(KEYS)] == [1, 1, 1]
    assert tokenizer.eos_token_id not in ids
    assert ids[start - 1] == tokenizer.convert_tokens_to_ids("### Response:\n")
    assert tokenizer.decode(ids[start:]) == row["output"] + "\n\n### End"
    assert tokenizer.decode(ids[:start]) == render_prompt(row["instruction"], row["input"])


def test_encoding_rows_does_not_change_the_tokenizer(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    encoded(tokenizer, [("a", "", "b")])
    end = tokenizer.convert_tokens_to_ids("### End")
    assert tokenizer("a ### End")["input_ids"][-1] == end
    encoded(tokenizer, [("a", "", "b")])
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("a ### End")["input_ids"][-1] == end


def test_a_bos_of_the_tokenizer_is_prepended_once(
    tokenizer: PreTrainedTokenizerBase, bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    [(_, plain, plain_start)] = encoded(tokenizer, [("Name a colour.", "", "Red.")])
    [(_, ids, start)] = encoded(bos_tokenizer, [("Name a colour.", "", "Red.")])
    assert ids == [bos_tokenizer.bos_token_id, *plain]
    assert start == plain_start + 1


@pytest.fixture(scope="module")
def bos_tokenizer(bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The small BPE with a post-processor that prepends BOS to every text, as Llama's does."""
    folder = tmp_path_factory.mktemp("bos")
    tokenizer = GPT2TokenizerFast.from_pretrained(str(bpe_folder))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{EOS} $A", pair=f"{EOS} $A $B", special_tokens=[(EOS, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder))


def test_the_sample_marks_exactly_the_supervised_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    [(_, ids, start)] = encoded(tokenizer, [("Name a colour.", "red, blue", "Red , don 't ask .")])
    assert (
        tokens.marked_sample(tokenizer, ids, [(start, len(ids))])
        == f"{WITH_INPUT}«Red , don 't ask .\n\n### End»"
    )


# --- the chat template -------------------------------------------------------------------------------


def templated(tokenizer: PreTrainedTokenizerBase, *turns: tuple[str, Any], prompt: bool = True) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def test_the_chat_template_renders_all_turns_and_refuses_unknown_roles(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    question = ("user", "Name a colour.")
    assert templated(tokenizer, question) == PLAIN
    assert templated(tokenizer, ("user", "Name a colour.\n\n### Input:\nred, blue")) == WITH_INPUT
    assert templated(tokenizer, question, ("assistant", "Red."), question) == f"{PLAIN}Red.\n\n### End{PLAIN}"
    with pytest.raises(Exception, match="roles system, user and assistant, not tool"):
        templated(tokenizer, ("tool", "Be kind."))


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_is_put_before_the_next_instruction(
    tokenizer: PreTrainedTokenizerBase, role: str
) -> None:
    question, system = ("user", "Name a colour."), (role, "Be brief.")
    asked = render_prompt("Be brief.\n\nName a colour.")
    assert templated(tokenizer, system, question) == asked
    assert templated(tokenizer, (role, ""), (role, " \n"), (role, []), question) == PLAIN
    assert (
        templated(tokenizer, system, question, ("assistant", "Red."), question)
        == f"{asked}Red.\n\n### End{PLAIN}"
    )
    both = render_prompt("Be brief.\n\nBe kind.\n\nName a colour.", "red, blue")
    assert (
        templated(tokenizer, system, (role, "Be kind."), ("user", f"Name a colour.{INPUT}red, blue")) == both
    )
    with pytest.raises(Exception, match="send a user message after it"):
        templated(tokenizer, question, system)


INPUT = "\n\n### Input:\n"


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_parts_of_text_are_joined_and_other_content_is_refused(
    tokenizer: PreTrainedTokenizerBase, role: str
) -> None:
    def shown(content: Any) -> str:
        return templated(tokenizer, (role, content), ("user", "Go on."), prompt=False)

    def part(text: Any, kind: str = "text") -> dict[str, Any]:
        return {"type": kind, "text": text}

    expected = shown("Name a river.")
    assert (
        shown([part("Name a "), part("river.")])
        == shown(["Name", part(" a river.", "input_text")])
        == expected
    )
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    for content in ([part("What is this?"), picture], [part(None)], [part("a", "image")], [[]], [3], [None]):
        with pytest.raises(Exception, match=r"reads text only. Send each part .* as {\"type\": \"text\""):
            shown(content)
    for content in (None, 3, {"text": "a"}, True):
        with pytest.raises(Exception, match="needs the content of each message as a string or as a list"):
            shown(content)
    with pytest.raises(Exception, match="needs the content of each message"):
        tokenizer.apply_chat_template([{"role": role}])


def test_the_chat_template_gives_the_same_ids_as_training(
    tokenizer: PreTrainedTokenizerBase, bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    for tested in (tokenizer, bos_tokenizer):
        [(_, ids, start)] = encoded(tested, [("Name a colour.", "", "Red.")])
        messages = [{"role": "user", "content": "Name a colour."}]
        prompt = tested.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt == ids[:start]
        messages.append({"role": "assistant", "content": "Red."})
        assert tested.apply_chat_template(messages)["input_ids"] == ids


PIECES = [*CONTROL_WORDS, "### Response:", "### ", "#", " ", "\n", "End", "word"]


@given(st.lists(st.sampled_from(PIECES), max_size=6), st.integers(0, 6))
@example(["### End"], 0)
@example(["### Response:"], 0)  # the template's newline would complete it
@example(["### Response:"], 1)
@example(["### ", "End"], 1)  # only together
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_control_words_in_a_message_do_not_become_control_tokens(
    tokenizer: PreTrainedTokenizerBase, pieces: list[str], cut: int
) -> None:
    system, user = (
        [{"type": "text", "text": text} for text in part] for part in (pieces[:cut], pieces[cut:])
    )
    answer = {"role": "assistant", "content": "".join(pieces)}
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}, answer]
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    special = [i for i in ids if i in tokenizer.all_special_ids]
    assert special == tokenizer.convert_tokens_to_ids(["### Instruction:", "### Response:\n", "### End"])


# --- the ledger --------------------------------------------------------------------------------------


# Two good rows, two with an empty answer, one with a long prompt, one with a long answer.
ROWS = [("a", "b"), ("a", ""), ("a", " \n\t"), ("!" * 300, "b"), ("a", "!" * 300), ("ab", "cd")]


@pytest.fixture
def lengths(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """(tokens of a prompt with a one-letter instruction, the `max_length` that exactly fits the last row)."""
    [(_, short, start), (_, long, _)] = encoded(tokenizer, [("a", "", "b"), ("ab", "", "cd")])
    assert len(long) == len(short) + 2  # each letter and each "!" is one token
    return start, len(long)


def test_the_ledger_counts_kept_dropped_and_truncated_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, int]
) -> None:
    prompt, max_length = lengths
    path = jsonl(tmp_path / "rows.jsonl", [{"instruction": a, "output": b} for a, b in ROWS])
    rows, ledger = prepare_dataset(path, tokenizer, max_length, False, 0.7, tmp_path / "cache")
    empty, full, cut = (
        "empty response",
        "prompt alone fills max_length",
        "response would be cut at max_length",
    )
    assert ledger == Ledger(
        source=path,
        max_length=max_length,
        rows_read=6,
        rows_kept=2,
        dropped={empty: 2, full: 1, cut: 1},
        first_dropped_rows={empty: [2, 3], full: [4], cut: [5]},
        rows_truncated=0,
        turns=2,
        tokens=2 * max_length - 2,
        response_tokens=2 * max_length - 2 - prompt - (prompt + 1),
        longest_row=max_length,
        length_histogram=ledger.length_histogram,
    )
    assert (rows["row"][:], [start for [[start, _]] in rows["response_spans"]]) == (
        [1, 6],
        [prompt, prompt + 1],
    )
    assert [len(ids) for ids in rows["input_ids"]] == [max_length - 2, max_length]
    assert [end for [[_, end]] in rows["response_spans"]] == rows["length"][:]
    assert "dropped 2: empty response (first rows: 2, 3)" in str(ledger)
    ledger.save(tmp_path / "ledger.json")
    assert Ledger(**json.loads((tmp_path / "ledger.json").read_text())) == ledger

    rows, ledger = prepare_dataset(path, tokenizer, max_length, True, 0.7, tmp_path / "cache")
    assert (ledger.rows_kept, ledger.rows_truncated) == (3, 1)
    assert rows["row"][:] == [1, 5, 6]
    assert rows[1]["input_ids"] == encoded(tokenizer, [("a", "", "!" * 300)])[0][1][:max_length]
    assert tokenizer.convert_tokens_to_ids("### End") not in rows[1]["input_ids"]


def test_a_row_of_exactly_max_length_is_kept_and_a_cut_row_needs_one_response_token(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    columns = Columns(["a"], [""], ["b"])
    [(_, ids, [(start, end)])] = encode_rows(tokenizer, columns, Ledger("", 999))
    complete, cut, none = Ledger("", len(ids)), Ledger("", start + 1), Ledger("", start)
    assert list(encode_rows(tokenizer, columns, complete)) == [(1, ids, [(start, end)])]
    [shorter] = encode_rows(tokenizer, columns, cut, keep_truncated=True)
    assert shorter == (1, ids[: start + 1], [(start, start + 1)])
    assert list(encode_rows(tokenizer, columns, none, keep_truncated=True)) == []
    assert (complete.rows_truncated, cut.rows_truncated) == (0, 1)
    assert none.dropped == {"prompt alone fills max_length": 1}


def test_the_ledger_lists_the_first_ten_dropped_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    ledger = Ledger("", 999)
    list(encode_rows(tokenizer, Columns(["a"] * 5000, [""] * 5000, [""] * 4999 + ["b"]), ledger))
    assert ledger.first_dropped_rows == {"empty response": list(range(1, 11))}
    assert ledger.dropped == {"empty response": 4999}


def test_the_histogram_counts_each_row_once() -> None:
    sizes = tokens.np.array([1, 32, 33, 2048, 2049, 5000])
    assert ledger.length_histogram(sizes) == {"<=32": 2, "<=64": 1, "<=2048": 1, ">2048": 2}
    assert ledger.length_histogram(sizes[:0]) == {}


def test_too_many_dropped_rows_are_refused_with_the_reason(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def kept(empty: int, **limit: float) -> int:
        path = jsonl(tmp_path / "rows.jsonl", rows_of(10 - empty) + rows_of(empty, output=""))
        return prepare_dataset(path, tokenizer, 256, cache_root=tmp_path / "cache", **limit)[1].rows_kept

    assert kept(1) == 9
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError, match=r"2 of 10 rows would be dropped, more than 10%") as error:
            kept(2)
        assert "empty response (first rows: 9, 10)" in str(error.value)
        assert "--max-dropped-fraction" in str(error.value)
    assert kept(2, max_dropped_fraction=0.2) == 8
    with pytest.raises(DataError, match="10 of 10 rows would be dropped"):
        kept(10, max_dropped_fraction=1)


# --- the cache and the split -------------------------------------------------------------------------


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry per call that tokenises rows: whether the garbage collector was enabled."""
    calls: list[bool] = []
    real = tokens.encode_rows
    monkeypatch.setattr(tokens, "encode_rows", lambda *args: calls.append(gc.isenabled()) or real(*args))
    return calls


def test_rows_are_tokenised_once_and_then_read_from_the_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, encodings: list[bool]
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", rows_of(20))
    first, first_ledger = prepare_dataset(path, tokenizer, 256, cache_root=tmp_path / "cache")
    second, second_ledger = prepare_dataset(path, tokenizer, 256, cache_root=tmp_path / "cache")
    assert len(encodings) == 1
    assert first[:] == second[:]
    assert first_ledger == second_ledger
    assert [ids for _, ids, _ in encoded(tokenizer, [(f"Say {n}.", "", f"{n}") for n in range(20)])] == list(
        first["input_ids"]
    )


def test_garbage_collection_is_paused_while_rows_are_tokenised(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, encodings: list[bool]
) -> None:
    file = jsonl(tmp_path / "rows.jsonl", rows_of(3))
    prepare_dataset(file, tokenizer, 64, cache_root=tmp_path / "cache")
    assert encodings == [False]
    assert gc.isenabled()

    monkeypatch.setattr(tokens, "encode_rows", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_dataset(file, tokenizer, 64, cache_root=tmp_path / "other")
    assert gc.isenabled()


def test_everything_that_changes_the_ids_changes_the_cache_key(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    bos_tokenizer: PreTrainedTokenizerBase,
    encodings: list[bool],
) -> None:
    path, cache = jsonl(tmp_path / "rows.jsonl", rows_of(20)), tmp_path / "cache"
    longer = load_tokenizer(tokenizer.name_or_path)
    longer.add_tokens(["Say"])
    prepare_dataset(path, tokenizer, 256, cache_root=cache)
    prepare_dataset(path, tokenizer, 255, cache_root=cache)
    prepare_dataset(path, tokenizer, 256, keep_truncated=True, cache_root=cache)
    prepare_dataset(path, longer, 256, cache_root=cache)
    with_bos, _ = prepare_dataset(path, bos_tokenizer, 256, cache_root=cache)
    assert with_bos[0]["input_ids"][0] == bos_tokenizer.bos_token_id
    jsonl(tmp_path / "rows.jsonl", rows_of(21))
    assert len(prepare_dataset(path, tokenizer, 256, cache_root=cache)[0]) == 21
    assert len(encodings) == 6


def test_a_renamed_file_and_tokenizer_truncation_do_not_change_the_cache_key(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, encodings: list[bool]
) -> None:
    first = jsonl(tmp_path / "rows.jsonl", rows_of(20))
    prepare_dataset(first, tokenizer, 256, cache_root=tmp_path / "cache")
    tokenizer("long " * 50, truncation=True, max_length=4)  # leaves its truncation in the Rust tokenizer
    second = jsonl(tmp_path / "renamed.jsonl", rows_of(20))
    _, ledger = prepare_dataset(second, tokenizer, 256, cache_root=tmp_path / "cache")
    assert len(encodings) == 1
    assert ledger.source == second


def test_a_cache_left_by_a_killed_writer_is_not_used(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = jsonl(tmp_path / "rows.jsonl", rows_of(20)), tmp_path / "cache"

    def killed(self: Ledger, path: Path) -> None:
        path.write_text('{"source": "half of')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "save", killed)
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # a killed process cleans nothing
        with pytest.raises(KeyboardInterrupt):
            prepare_dataset(path, tokenizer, 256, cache_root=cache)
    assert len(list(cache.iterdir())) == 1
    rows, ledger = prepare_dataset(path, tokenizer, 256, cache_root=cache)
    assert len(rows) == ledger.rows_kept == 20


CACHED = ["ledger.json", "state.json", "dataset_info.json", "data-00000-of-00001.arrow"]
INVALID_LEDGERS = ["7", "[]", '{"rows_kept": 20}', '{"source": 1, "max_length": 2}']


@pytest.mark.parametrize(
    ("file", "remaining"),
    [
        *((name, cut) for name in CACHED for cut in (None, 0, 100)),
        *(("ledger.json", text) for text in INVALID_LEDGERS),
    ],
)
def test_a_damaged_cache_is_written_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, file: str, remaining: int | str | None
) -> None:
    path, cache = jsonl(tmp_path / "rows.jsonl", rows_of(20)), tmp_path / "cache"
    first, ledger = prepare_dataset(path, tokenizer, 256, cache_root=cache)
    rows = first[:]
    [folder] = cache.iterdir()
    original = (folder / file).read_bytes()
    assert len(original) > 100
    (folder / file).unlink()
    if remaining is not None:
        (folder / file).write_bytes(
            remaining.encode() if isinstance(remaining, str) else original[:remaining]
        )
    again, ledger_again = prepare_dataset(path, tokenizer, 256, cache_root=cache)
    assert again[:] == rows
    assert ledger_again == ledger
    assert list(cache.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_is_reported_with_the_fix(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", rows_of(20))
    (tmp_path / "a_file").touch()
    with pytest.raises(DataError, match=r"a_file/cache: .* cannot be written .* export HF_DATASETS_CACHE="):
        prepare_dataset(path, tokenizer, 256, cache_root=tmp_path / "a_file" / "cache")

    def full(self: Ledger, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Ledger, "save", full)
    with pytest.raises(DataError, match=r"No space left on device\). Make room"):
        prepare_dataset(path, tokenizer, 256, cache_root=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_named_demo_does_not_replace_the_demo_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").touch()
    keys = []
    real = tokens._fingerprint
    monkeypatch.setattr(tokens, "_fingerprint", lambda *args: keys.append(real(*args)) or keys[-1])
    prepare_dataset("demo", tokenizer, 512, max_dropped_fraction=1, cache_root=tmp_path / "cache")
    (tmp_path / "demo").unlink()
    prepare_dataset("demo", tokenizer, 512, max_dropped_fraction=1, cache_root=tmp_path / "cache")
    assert keys[0] == keys[1]


def test_two_concurrent_writers_of_one_cache_do_not_corrupt_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = jsonl(tmp_path / "rows.jsonl", rows_of(20)), tmp_path / "cache"
    real = Ledger.save

    def overtaken(self: Ledger, path_: Path) -> None:
        monkeypatch.setattr(Ledger, "save", real)
        prepare_dataset(path, tokenizer, 256, cache_root=cache)
        real(self, path_)

    monkeypatch.setattr(Ledger, "save", overtaken)
    rows, _ = prepare_dataset(path, tokenizer, 256, cache_root=cache)
    assert len(rows) == 20
    assert len(list(cache.iterdir())) == 1
