"""Questions after earlier turns: the ids of the chat template, whole turns left out, and files of conversations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import jsonl, write
from tests.model.tokenizer_kinds import KINDS
from training import generate
from training.consts import GREEDY
from training.data.conversations import Prompt, Turn, messages_of, prompt_of
from training.errors import DataError, printable
from training.model.generation import answer_prompts, generate_response, generate_responses, prompt_ids
from training.model.loading import load_model
from training.model.tokenizer import load_tokenizer

SYSTEM = {"role": "system", "content": "Answer in one word."}
RIVER = [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Rhine"}]
CITY = [{"role": "user", "content": "A city there?"}, {"role": "assistant", "content": "Köln\n"}]
SHORTEN = [
    {"role": "user", "content": "Shorten.\n\n### Input:\nA long text"},
    {"role": "assistant", "content": " x"},
]
ASK = {"role": "user", "content": "  And now?\n"}
CONVERSATIONS = [
    [ASK],
    [SYSTEM, ASK],
    [*RIVER, ASK],
    [SYSTEM, *RIVER, *CITY, ASK],
    [*RIVER, SYSTEM, *SHORTEN, SYSTEM, SYSTEM, ASK],
    [SYSTEM, *SHORTEN, *RIVER, {"role": "user", "content": "Count.\n\n### Input:\none two"}],
]


# --- token ids ---------------------------------------------------------------------------------------


def prompt_of_messages(messages: list[dict[str, str]]) -> Prompt:
    """The prompt of a conversation that ends with a user message."""
    *history, asked = messages
    return prompt_of(asked["content"], None, history)


@pytest.mark.parametrize("kind", ["byte-level", "byte-level with BOS", "llama", "metaspace first in a sequence",
                                  "unigram first with NFKC"])  # fmt: skip
def test_a_prompt_after_a_history_has_the_ids_of_the_chat_template(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "base")
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    tokenizer.save_pretrained(tmp_path / "saved")
    prompts = [prompt_of_messages(messages) for messages in CONVERSATIONS]
    for other in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        expected = [
            other.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            for messages in CONVERSATIONS
        ]
        assert prompt_ids(tokenizer, prompts, 10_000) == expected


def test_a_history_may_be_messages_or_pairs_and_its_control_words_stay_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    pairs = [["Name a river.", "The Rhine"], ["A city there?", "Köln\n"]]
    ours, theirs = prompt_of("Why?", "red", pairs), prompt_of("Why?", "red", [*RIVER, *CITY])
    assert ours == theirs
    end, response = tokenizer.convert_tokens_to_ids(["### End", "### Response:\n"])
    nasty = prompt_of("a", None, [["b ### End", "### Response:\n c ### End"]])
    [ids] = prompt_ids(tokenizer, [nasty], 999)
    assert (ids.count(end), ids.count(response)) == (1, 2)


# --- turns that are left out -------------------------------------------------------------------------


def test_the_oldest_turns_are_left_out_and_their_system_message_stays(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    whole = prompt_of_messages([SYSTEM, *RIVER, *CITY, *RIVER, ASK])
    expected = [prompt_of_messages([SYSTEM, *rest, ASK]) for rest in ([*CITY, *RIVER], RIVER, [])]
    sizes = [len(ids) for ids in prompt_ids(tokenizer, [whole, *expected], 10_000)]
    assert not caplog.records
    for room, left_out in ((sizes[0], 0), (sizes[0] - 1, 1), (sizes[1], 1), (sizes[1] - 1, 2), (sizes[3], 3)):
        caplog.clear()
        kept = whole if not left_out else expected[left_out - 1]
        assert prompt_ids(tokenizer, [whole], room) == prompt_ids(tokenizer, [kept], 10_000)
        warned = [record.message for record in caplog.records]
        words = (
            f"the first {left_out} of 3 turns before a question were left out, to leave room for the answer"
        )
        assert warned == ([words] if left_out else [])


def test_a_question_too_long_without_any_turn_is_cut_at_its_end(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    question = Prompt("!" * 500)
    [full] = prompt_ids(tokenizer, [question], 999)
    [cut] = prompt_ids(tokenizer, [question._replace(history=(Turn("a", "b"),))], 100)
    assert cut == [*full[:99], full[-1]]
    assert ["left out" in record.message for record in caplog.records] == [True, False]


# --- answers -----------------------------------------------------------------------------------------


@pytest.fixture
def random_model(base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return load_model(str(base_folder), tokenizer, torch.float32, seed=42).eval()


def test_an_answer_follows_its_history_alone_and_in_a_batch(
    random_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ask: dict[str, Any] = {"model": random_model, "tokenizer": tokenizer, "max_new_tokens": 9, **GREEDY}
    histories = [[], [SYSTEM], RIVER, [["Name a river.", "The Rhine"]], [SYSTEM, *RIVER, *CITY]]
    alone = [generate_response("And now?", history=history, **ask) for history in histories]
    assert generate_responses(["And now?"] * 5, histories=histories, batch_size=3, **ask) == alone
    assert alone[0] == generate_response("And now?", **ask)
    assert alone[2] == alone[3]
    assert len(set(alone)) == 4


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([{"role": "tool", "content": "x"}], "history, turn 1: a tool call"),
        (
            [*RIVER, {"role": "judge", "content": "x"}],
            "history, turn 3: the role is 'judge', expected system",
        ),
        ([*RIVER, ASK], "history, turn 3: the last question has no answer"),
        ([["a"]], "turn 1: has 1 texts, expected a pair"),
        ("a", "history: str 'a' is not a list of messages"),
    ],
)
def test_a_history_that_cannot_be_used_is_refused_with_its_turn(
    answering_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, history: Any, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        generate_response("a", history=history, model=answering_model, tokenizer=tokenizer)


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def ask(
    random_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Callable[..., str]:
    """Runs the command greedily with a model whose answers differ from prompt to prompt."""
    random_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--greedy", "--max-new-tokens", "9"]

    def run(*more: str) -> str:
        result = CliRunner().invoke(generate.main, [*words, *more])
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([SYSTEM, *RIVER]),
        json.dumps({"messages": [SYSTEM, *RIVER], "id": 7}),
        json.dumps({"messages": RIVER, "system": SYSTEM["content"]}),
        json.dumps({"messages": [SYSTEM, *RIVER], "system": SYSTEM["content"]}),
        json.dumps({"conversations": [{"from": "system", "value": SYSTEM["content"]},
                                      {"from": "human", "value": "Name a river."},
                                      {"from": "gpt", "value": "The Rhine"}]}),
        "\n".join(map(json.dumps, [SYSTEM, *RIVER])),
        json.dumps({"instruction": f"{SYSTEM['content']}\n\nName a river.", "input": "", "response": "The Rhine"}),
    ],
    ids=["messages", "an object", "a system prompt beside", "the same in both", "ShareGPT", "a line for each message", "an answer"],
)  # fmt: skip
def test_the_command_answers_after_the_conversation_of_a_file(
    ask: Callable[..., str], random_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    content: str,
) -> None:  # fmt: skip
    expected = generate_response(
        "And now?",
        "red",
        history=[SYSTEM, *RIVER],
        model=random_model,
        tokenizer=tokenizer,
        max_new_tokens=9,
        **GREEDY,
    )
    file = write(tmp_path / "chat.json", content)
    assert ask("--history", file, "--input", "red", "And now?") == f"{printable(expected)}\n"


def test_an_answer_that_was_written_continues_as_a_history(ask: Callable[..., str], tmp_path: Path) -> None:
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    ask("--output", str(first), "--input", "red", "Name a colour.")
    ask("--output", str(second), "--history", str(first), "Another?")
    answers = [json.loads(file.read_text()) for file in (first, second)]
    assert list(answers[0]) == ["instruction", "input", "response"]
    assert answers[1]["history"] == [
        {"role": "user", "content": "Name a colour.\n\n### Input:\nred"},
        {"role": "assistant", "content": answers[0]["response"]},
    ]
    assert ask("--history", str(second), "Why?")
    assert json.loads(ask("--prompts", str(second))) == answers[1], "asked again, with its history"


def test_a_file_of_prompts_takes_conversations_and_histories(
    ask: Callable[..., str], random_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [
        {"messages": [SYSTEM, *RIVER, ASK]},
        {"messages": [*RIVER, *CITY]},  # its last question is asked again
        {"instruction": "Count.", "input": "one", "history": RIVER},
        {"instruction": "Count.", "input": "one", "history": []},
        {"instruction": "Count.", "history": [["Name a river.", "The Rhine"]]},
    ]
    prompts = [
        prompt_of_messages([SYSTEM, *RIVER, ASK]),
        prompt_of_messages([*RIVER, CITY[0]]),
        prompt_of("Count.", "one", RIVER),
        prompt_of("Count.", "one"),
        prompt_of("Count.", None, RIVER),
    ]
    loaded: dict[str, Any] = {"model": random_model, "tokenizer": tokenizer, "max_new_tokens": 9, **GREEDY}
    answers = [
        json.loads(line) for line in ask("--prompts", jsonl(tmp_path / "asked.jsonl", rows)).splitlines()
    ]
    assert [answer["response"] for answer in answers] == answer_prompts(prompts, **loaded)
    assert answers[0]["history"] == messages_of(prompts[0])[:-1] == [SYSTEM, *RIVER]
    assert ["history" in answer for answer in answers] == [True, True, True, False, True]
    again = ask("--prompts", jsonl(tmp_path / "again.jsonl", answers))
    assert [json.loads(line) for line in again.splitlines()] == answers, "what was written can be read"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the file is empty"),
        ("[]", "has no messages"),
        ('{"messages": null}', "has no messages"),
        ('[{"role": "user", "content": "a"},', "line 1: broken JSON"),
        (
            json.dumps([*RIVER, ASK]),
            ", turn 3: the last question has no answer. End the history with an answer",
        ),
        (json.dumps([*RIVER, *RIVER[::-1]]), ", turn 3: two assistant messages in a row"),
        (json.dumps([{"role": "tool", "content": "1"}]), ", turn 1: a tool call"),
        (json.dumps([{"messages": RIVER}] * 2), "holds 2 rows, expected the messages of one conversation"),
        (json.dumps({"messages": "hello"}), "str 'hello' is not a list of messages"),
        ("7", "is not an object"),
    ],
)
def test_a_file_of_history_that_cannot_be_used_is_refused_with_its_turn(
    tmp_path: Path, content: str, words: str
) -> None:
    file = write(tmp_path / "chat.json", content)
    result = CliRunner().invoke(generate.main, ["--model", "no/such/model", "--history", file, "Say."])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Cannot answer: {file}")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "judge", "content": "a"}]}, "row 2, turn 1: the role is 'judge'"),
        ({"messages": [SYSTEM]}, "row 2: no question"),
        ({"messages": [*RIVER, SYSTEM]}, "row 2: no question"),
        ({"messages": [*RIVER, *RIVER[1:]]}, "row 2, turn 3: two assistant messages in a row"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "row 2, turn 1: the content is a part",
        ),
        ({"instruction": "a", "history": [*RIVER, ASK]}, "row 2, turn 3: the last question has no answer"),
        ({"instruction": "a", "history": "b"}, "row 2: history is str 'b', expected a list of messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "row 2: the instruction is empty"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused_with_file_row_and_turn(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    file = jsonl(tmp_path / "asked.jsonl", [{"messages": [ASK]}, row])
    result = CliRunner().invoke(generate.main, ["--model", "no/such/model", "--prompts", file])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Cannot answer: {file}, {words}"), result.stderr


def test_a_history_is_of_one_instruction_only(tmp_path: Path) -> None:
    result = CliRunner().invoke(generate.main, ["--model", "x", "--history", "a.json", "--prompts", "b.txt"])
    assert result.exit_code == 2
    assert "--prompts has histories of its own, in the column history. Leave out --history" in result.output
