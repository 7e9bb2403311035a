"""The prompt: its words and layout, rendered as text, as token ids and as a chat template.

This file is the only place to edit the prompt. The wording is Stanford Alpaca's, byte for byte.

A prompt is tokenised in pieces, and the control tokens are inserted between them by id. A user's "### End" therefore
stays ordinary text, and the start of the response is known without a search. The ids are the same as for the whole
prompt at once, because added tokens split the text before the byte-pair merges run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

INTRO = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
INTRO_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
INSTRUCTION_KEY = "### Instruction:"
INPUT_KEY = "### Input:"  # ordinary text, as in Dolly
RESPONSE_KEY = "### Response:\n"  # the newline is part of the token
END_KEY = "### End"

# Added to the tokenizer in this order. In GPT-J they get the ids 50400, 50401 and 50402.
CONTROL_TOKENS = (END_KEY, INSTRUCTION_KEY, RESPONSE_KEY)

# The layout of a row. The question is the instruction, or QUESTION_WITH_INPUT if the row has an input.
LAYOUT = f"{{intro}}\n\n{INSTRUCTION_KEY}\n{{question}}\n\n{RESPONSE_KEY}{{response}}\n\n{END_KEY}"
QUESTION_WITH_INPUT = f"{{instruction}}\n\n{INPUT_KEY}\n{{input}}"

# The text between the control tokens: "{intro}\n\n", "\n{question}\n\n" and "{response}\n\n".
HEAD, BODY, RESPONSE, _ = re.split("|".join(map(re.escape, CONTROL_TOKENS)), LAYOUT)


def render_prompt(instruction: str, input: str | None = None) -> str:
    """The prompt as text, up to and including the response key."""
    head, body = prompt_pieces(instruction, input)
    return head + INSTRUCTION_KEY + body + RESPONSE_KEY


def prompt_pieces(instruction: str, input: str | None) -> tuple[str, str]:
    """The text before the instruction key, and the text between it and the response key. A blank input is none."""
    if input is None or not input.strip():
        return HEAD.format(intro=INTRO), BODY.format(question=instruction)
    question = QUESTION_WITH_INPUT.format(instruction=instruction, input=input)
    return HEAD.format(intro=INTRO_WITH_INPUT), BODY.format(question=question)


def response_piece(response: str) -> str:
    """The text between the response key and the end key."""
    return RESPONSE.format(response=response)


# `chat_template` replaces the words in capitals.
_CHAT_TEMPLATE = """
{%- for message in messages -%}
{%- set content = message['content'] PLAIN -%}
{%- if message['role'] == 'user' -%}
{{ OPENING_WITH_INPUT if INPUT_MARK in content else OPENING }}{{ content + CLOSING }}
{%- elif message['role'] == 'assistant' -%}
{{ RESPONSE_KEY + content + END }}
{%- else -%}
{{ raise_exception('Dolly knows the roles user and assistant, not ' + message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ RESPONSE_KEY }}{%- endif -%}
"""


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A Jinja template for `apply_chat_template` that renders Dolly's prompt for one or more turns.

    A rendered template is tokenised at once, so the text of a control token inside a message would become that token.
    The template therefore inserts a space into it, as in "###  End".
    """
    plain = ""
    for token in tokenizer.all_special_tokens:
        spaced = re.sub(r"^(\W*)", r"\1 ", token)
        plain += f" | replace({json.dumps(token)}, {json.dumps(spaced)})"
    opening, closing = (INSTRUCTION_KEY + BODY).split("{question}")
    before_response, after_response = RESPONSE.split("{response}")
    words = {
        "PLAIN": plain,
        "OPENING_WITH_INPUT": json.dumps(HEAD.format(intro=INTRO_WITH_INPUT) + opening),
        "OPENING": json.dumps(HEAD.format(intro=INTRO) + opening),
        "INPUT_MARK": json.dumps(re.split("{instruction}|{input}", QUESTION_WITH_INPUT)[1]),
        "CLOSING": repr(closing),
        "RESPONSE_KEY": json.dumps(RESPONSE_KEY + before_response),
        "END": json.dumps(after_response + END_KEY),
    }
    template = re.sub("|".join(words), lambda match: words[match.group()], _CHAT_TEMPLATE.strip())
    return ("{{ bos_token }}" if leading_ids(tokenizer) else "") + template


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of ordinary text: a control token in it is encoded as plain characters.

    Calls the Rust tokenizer directly, because `tokenizer(texts)` spends half of its time on offsets and masks that are
    not needed here. The three settings below are safe: `tokenizer(...)` sets them again on every call.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], inputs: Sequence[str | None]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids (heads, bodies). A prompt is head + body + response key; the head ends with the instruction key."""
    key = tokenizer.convert_tokens_to_ids(INSTRUCTION_KEY)
    pieces = [prompt_pieces(*row) for row in zip(instructions, inputs, strict=True)]
    heads = list({head for head, _ in pieces})  # at most two different heads, each tokenised once
    ids = {
        head: leading_ids(tokenizer) + ids + [key]
        for head, ids in zip(heads, encode_text(tokenizer, heads), strict=True)
    }
    return [ids[head] for head, _ in pieces], encode_text(tokenizer, [body for _, body in pieces])


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that the tokenizer puts before every text: none for GPT-J, BOS for Llama."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
