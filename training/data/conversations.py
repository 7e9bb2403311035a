"""Conversations of several turns: OpenAI's `messages`, ShareGPT's `conversations`, and pairs of questions and answers.

A turn of a message list is one message, counted from 1. Dolly's prompt has no roles: a system message is put before the
next question, as in the chat template (`training/data/prompt.py`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from training.data.prompt import GAP, TEXT_PARTS, question
from training.data.table import (
    CONVERSATIONS,
    HISTORY,
    Table,
    is_unicode,
    named,
    short,
    short_repr,
    text_of,
)
from training.errors import DataError

if TYPE_CHECKING:
    from training.data.columns import Columns

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# OpenAI's roles first, then ShareGPT's.
ROLES = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "assistant": ASSISTANT,
         "human": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT}  # fmt: skip
TOOL_ROLES = ("tool", "function", "observation", "function_call", "tool_call")
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
# Why a conversation cannot be used, as the ledger counts it.
NO_MESSAGES = "no list of messages"
BAD_ROLE = "unknown role"
TOOL_CALL = "tool call"
NO_TEXT = "content that is not text"
BAD_ORDER = "roles do not alternate"
NO_ANSWER = "no assistant turn"
NO_QUESTION = "no question"
NO_LOSS = "message without a loss"
LOSS_KEYS = ("weight", "train")  # of OpenAI and of Axolotl; 0 or false asks for no loss


class Turn(NamedTuple):
    """A question and its answer.

    `system` comes before the question. It is "" or ends with a blank line, so `system + question` is what is asked.
    """

    question: str
    answer: str
    system: str = ""


History = tuple[Turn, ...]  # the turns before the last one


class Prompt(NamedTuple):
    """What a model is asked: the last question, and the turns before it."""

    instruction: str
    input: str = ""
    history: History = ()


class Conversation(NamedTuple):
    """The answered turns, and what follows the last answer: system messages, and a question (None without one)."""

    turns: History
    system: str
    question: str | None


class ConversationError(ValueError):
    """A conversation that cannot be rendered as Dolly's prompt.

    Attributes:
        reason: one of the reasons above.
        turn: the number of the message, from 1; None if it is the conversation as a whole.
    """

    def __init__(self, reason: str, message: str, turn: int | None = None) -> None:
        super().__init__(message)
        self.reason, self.turn = reason, turn

    @property
    def place(self) -> str:
        """What follows the row in a message: ", turn 3" or ""."""
        return "" if self.turn is None else f", turn {self.turn}"


def conversation_of(messages: Any) -> Conversation:
    """Questions and answers of a list of messages, `{"role", "content"}` or `{"from", "value"}`.

    Raises ConversationError if roles are unknown or do not alternate, or if a content is not text.
    """
    if not isinstance(messages, list | tuple):
        is_json = isinstance(messages, str) and messages.lstrip().startswith(("[", "{"))
        advice = ". If it is JSON text, write what json.loads gives" if is_json else ""
        raise ConversationError(NO_MESSAGES, f"{short_repr(messages)} is not a list of messages{advice}")
    turns: list[Turn] = []
    system, asked = "", None
    for number, message in enumerate(messages, start=1):
        role, text = _role_and_text(message, number)
        if role == SYSTEM:
            if asked is not None:
                raise ConversationError(
                    BAD_ORDER, "a system message stands between a question and its answer", number
                )
            system += text + GAP if text.strip() else ""
        elif (role == USER) == (asked is not None):  # no answer before this question, or no question before
            raise ConversationError(BAD_ORDER, _disorder(role, bool(turns)), number)
        elif role == USER:
            asked = text
        else:
            turns.append(Turn(str(asked), text, system))
            system, asked = "", None
    return Conversation(tuple(turns), system, asked)


def _disorder(role: str, begun: bool) -> str:
    if role == ASSISTANT and not begun:
        return "the assistant speaks before the user. Begin with a user message"
    return f"two {role} messages in a row. Join them into one"


def _role_and_text(message: Any, number: int) -> tuple[str, str]:
    """The role, as one of three, and the content of a message."""
    if not isinstance(message, dict):
        raise ConversationError(
            NO_MESSAGES, f"{short_repr(message)} is not a message with role and content", number
        )
    name = message.get("role") if message.get("role") not in (None, "") else message.get("from")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    known = name.strip().lower() if isinstance(name, str) else ""
    if known in TOOL_ROLES or any(_given(message.get(key)) for key in TOOL_KEYS):
        raise ConversationError(
            TOOL_CALL, "a tool call, but Dolly's prompt has no tools. Leave the conversation out", number
        )
    role = ROLES.get(known)
    if role is None:
        raise ConversationError(
            BAD_ROLE,
            f"the role is {'missing' if name is None else short(repr(name))}, expected system, user or assistant "
            "(ShareGPT: system, human or gpt)",
            number,
        )
    silent = next((key for key in LOSS_KEYS if _is_zero(message.get(key))), None)
    if role == ASSISTANT and silent:
        raise ConversationError(
            NO_LOSS,
            f"has {silent} {text_of(message[silent])}, but the loss is on every assistant message. Remove it",
            number,
        )
    return role, _content(content, number)


def _content(content: Any, number: int) -> str:
    """The text of a content: a string, or a list of text parts, which are joined."""
    parts = content if isinstance(content, list | tuple) else [content]
    texts = []
    for part in parts:
        if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
            part = part.get("text")
        text = None if part is None else text_of(part)
        if text is None:
            found = f"a part of type {short(repr(part['type']))}" if isinstance(part, dict) and "type" in part else (
                "missing" if part is None else short_repr(part)
            )  # fmt: skip
            raise ConversationError(NO_TEXT, f"the content is {found}, expected text", number)
        if not is_unicode(text):
            raise ConversationError(NO_TEXT, "the content has half of a surrogate pair", number)
        texts.append(text)
    return "".join(texts)


def _given(value: Any) -> bool:
    """Whether a key has a value. Parquet files have each key in each message."""
    return value is not None and value not in ("", [], {})


def _is_zero(weight: Any) -> bool:
    """Whether a weight is 0, as a number of JSON or of Parquet, or false."""
    try:
        return weight is not None and float(weight) == 0
    except (TypeError, ValueError, OverflowError):
        return False


_KNOWN_KEYS = {"role", "content", "from", "value", *LOSS_KEYS, *TOOL_KEYS}


def other_keys(messages: Any) -> set[str]:
    """Keys of messages that are not read, such as "name"."""
    given = (
        (key, value) for message in messages if isinstance(message, dict) for key, value in message.items()
    )
    return {str(key) for key, value in given if key not in _KNOWN_KEYS and _given(value)}


def history_of(value: Any) -> tuple[History, str]:
    """(turns, system messages after them) of a history: a list of messages, or of pairs [question, answer].

    A missing or empty value is no history. Raises ConversationError, also if the last question has no answer.
    """
    if not _given(value):
        return (), ""
    if isinstance(value, list | tuple) and all(isinstance(pair, list | tuple) for pair in value):
        if wrong := next((n for n, pair in enumerate(value, start=1) if len(pair) != 2), None):
            raise ConversationError(
                NO_MESSAGES,
                f"has {len(value[wrong - 1])} texts, expected a pair [question, answer]",
                wrong,
            )
        return tuple(Turn(*(_content(text, n) for text in pair)) for n, pair in enumerate(value, start=1)), ""
    turns, system, asked = conversation_of(value)
    if asked is not None:
        raise ConversationError(
            NO_ANSWER, "the last question has no answer. End the history with an answer", len(value)
        )
    return turns, system


def prompt_of(instruction: str, input: str | None = None, history: Any = ()) -> Prompt:
    """A prompt after a history: OpenAI messages, or pairs [question, answer]. Raises DataError."""
    if not isinstance(instruction, str):  # callers of chat pipelines pass messages here
        raise DataError(
            f"instruction: {short_repr(instruction)}, expected text. Earlier turns go into history"
        )
    try:
        turns, system = history_of(history)
    except ConversationError as error:
        raise DataError(f"history{error.place}: {error}") from error
    return Prompt(system + instruction, input or "", turns)


def messages_of(prompt: Prompt) -> list[dict[str, str]]:
    """OpenAI messages of a prompt, from which the chat template renders the same text."""
    messages = []
    for turn in prompt.history:
        if turn.system:
            messages.append({"role": SYSTEM, "content": turn.system.removesuffix(GAP)})
        messages.append({"role": USER, "content": turn.question})
        messages.append({"role": ASSISTANT, "content": turn.answer})
    return [*messages, {"role": USER, "content": question(prompt.instruction, prompt.input)}]


def without_first_turns(prompt: Prompt, count: int) -> Prompt:
    """The prompt without its first `count` turns. Their system messages go before the first turn that stays."""
    system = "".join(turn.system for turn in prompt.history[:count])
    rest = prompt.history[count:]
    if rest:
        return prompt._replace(history=(rest[0]._replace(system=system + rest[0].system), *rest[1:]))
    return prompt._replace(instruction=system + prompt.instruction, history=())


def turns_of(prompt: Prompt, answer: str = "") -> list[tuple[str, str, str]]:
    """(instruction, input, output) of each turn; `answer` is the output of the last."""
    earlier = [(turn.system + turn.question, "", turn.answer) for turn in prompt.history]
    return [*earlier, (prompt.instruction, prompt.input, answer)]


def row_of_prompt(prompt: Prompt) -> dict[str, Any]:
    """The prompt as a row of a JSON file, which `read_prompts` reads as this prompt.

    {"instruction", "input"}, and "history" with OpenAI messages if there is one.
    """
    row: dict[str, Any] = {"instruction": prompt.instruction, "input": prompt.input}
    return row | {HISTORY: messages_of(prompt)[:-1]} if prompt.history else row


def prompt_of_row(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row that `row_of_prompt` made. The row may have other columns. Raises DataError."""
    return prompt_of(row["instruction"], row["input"], row.get(HISTORY))


def prompt_text(prompt: Prompt) -> str:
    """A prompt for people: the instruction and the input; after a history each message begins with its role."""
    last = f"{prompt.instruction}\n{prompt.input}".strip()
    if not prompt.history:
        return last
    return messages_text([*messages_of(prompt)[:-1], {"role": USER, "content": last}])


def messages_text(messages: Iterable[Mapping[str, str]]) -> str:
    """OpenAI messages for people: each begins on a new line with its role."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def prompts_of(columns: Columns) -> list[Prompt]:
    """What each row asks last, after the turns before it."""
    histories = columns.history or [()] * len(columns)
    return [Prompt(*row) for row in zip(columns.instruction, columns.input, histories, strict=True)]


def row_turns(columns: Columns, row: int) -> list[tuple[str, str, str]]:
    """(instruction, input, output) of each turn of a row, by its place from 0."""
    if not columns.history:  # most datasets: as fast as possible
        return [(columns.instruction[row], columns.input[row], columns.output[row])]
    prompt = Prompt(columns.instruction[row], columns.input[row], columns.history[row])
    return turns_of(prompt, columns.output[row])


def read_turns(tables: Sequence[Table], columns: Columns, required: Collection[str]) -> set[str]:
    """Adds conversations, and the turns before a row, to `columns`. Returns the names of the columns that were read.

    A row with an instruction and an output of its own is not a conversation; its column 'history' is read. A column of
    that name without any list is something else.
    """
    read: set[str] = set()
    keys: set[str] = set()
    histories: list[History] = [()] * len(columns)
    conversations: set[int] = set()  # places of rows
    has_history = any(
        isinstance(value, list)
        for table in tables
        if table.names.count(HISTORY) == 1
        for value in table.values(HISTORY)
    )
    start = 0
    for table in tables:
        for name in (*CONVERSATIONS, HISTORY) if has_history else CONVERSATIONS:
            values = table.values(name) if table.names.count(name) == 1 else []
            for place, value in enumerate(map(_by_message, values), start):
                own = all(getattr(columns, key)[place].strip() for key in required)
                if value is None or own != (name == HISTORY) or place in conversations:
                    continue
                read.add(name)
                if name != HISTORY:
                    conversations.add(place)
                try:
                    histories[place] = _set_turns(columns, place, value, name == HISTORY, required)
                    keys |= other_keys(value)
                except ConversationError as error:
                    columns.unusable[place] = error
                    columns.instruction[place] = columns.input[place] = columns.output[place] = ""
        start += table.count
    if any(histories):
        columns.history = histories
    if keys:
        columns.not_read.append(f"{named('key', sorted(keys))} of messages")
    return read


def add_system_prompts(columns: Columns, prompts: Sequence[str]) -> None:
    """Puts each row's prompt before its first question. A blank prompt, or a row without a question, is passed over."""
    for place, prompt in enumerate(prompts):
        if not prompt.strip() or not columns.instruction[place].strip():
            continue
        if columns.history and columns.history[place]:
            first, *others = columns.history[place]
            first = first._replace(system=_after_system(prompt, first.system))
            columns.history[place] = (first, *others)
        else:
            columns.instruction[place] = _after_system(prompt, columns.instruction[place])


def _after_system(system: str, text: str) -> str:
    """The text after a system prompt. It is not put there twice."""
    prompt = system + GAP
    return text if text.startswith(prompt) else prompt + text


def _by_message(value: Any) -> Any:
    """A list of messages from lists by key, {"role": [...], "content": [...]}, as `datasets` writes a Sequence."""
    if isinstance(value, dict) and not {"role", "from"}.isdisjoint(value):
        lists = list(value.values())
        if all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
            return [dict(zip(value, message, strict=True)) for message in zip(*lists, strict=True)]
    return value


def _set_turns(
    columns: Columns, place: int, value: Any, is_history: bool, required: Collection[str]
) -> History:
    """Sets the last turn of a row from its conversation, and returns the turns before it."""
    if is_history:
        turns, system = history_of(value)
        columns.instruction[place] = system + columns.instruction[place]
        return turns
    conversation = conversation_of(value)
    is_prompt = "output" not in required
    if is_prompt and conversation.question is not None:
        columns.instruction[place] = conversation.system + conversation.question
        return conversation.turns
    if is_prompt and (conversation.system or not conversation.turns):
        raise ConversationError(NO_QUESTION, "no question. End with a user message")
    if not conversation.turns:
        raise ConversationError(NO_ANSWER, "no assistant turn, so there is nothing to learn")
    *history, last = conversation.turns
    columns.instruction[place], columns.output[place] = last.system + last.question, last.answer
    if conversation.question is not None or conversation.system:
        columns.unanswered.append(place + 1)
    return tuple(history)
