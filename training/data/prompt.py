"""The prompt: its words and layout, rendered as text and as a chat template.

This file is the only place to edit the prompt. The wording is Stanford Alpaca's, byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

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

# What shows that a question has an input, in rows and in the messages of a chat.
INPUT_MARK = re.split("{instruction}|{input}", QUESTION_WITH_INPUT)[1]
GAP = "\n\n"  # between a system message and the question
TEXT_PARTS = ("text", "input_text", "output_text")  # types of OpenAI's parts of a content that are text


def render_prompt(instruction: str, input: str | None = None) -> str:
    """The prompt as text, up to and including the response key."""
    head, body = prompt_pieces(instruction, input)
    return head + INSTRUCTION_KEY + body + RESPONSE_KEY


def question(instruction: str, input: str | None) -> str:
    """The text after the instruction key: the instruction and the input. A blank input is none."""
    if input is None or not input.strip():
        return instruction
    return QUESTION_WITH_INPUT.format(instruction=instruction, input=input)


def prompt_pieces(instruction: str, input: str | None) -> tuple[str, str]:
    """The text before the instruction key, and the text between it and the response key."""
    asked = question(instruction, input)
    return HEAD.format(intro=INTRO_WITH_INPUT if INPUT_MARK in asked else INTRO), BODY.format(question=asked)


def response_piece(response: str) -> str:
    """The text between the response key and the end key."""
    return RESPONSE.format(response=response)


# `chat_template` replaces the words in capitals.
_CHAT_TEMPLATE = """
{%- set chat = namespace(system='', text='') -%}
{{ START }}
{%- for message in messages -%}
{%- set chat.text = '' -%}
{%- if message['content'] is string -%}
{%- set chat.text = message['content'] -%}
{%- elif message['content'] is defined and message['content'] is not none
    and message['content'] is iterable and message['content'] is not mapping -%}
{%- for part in message['content'] -%}
{%- if part is string -%}
{%- set chat.text = chat.text + part -%}
{%- elif part is mapping and part['text'] is string and part['type'] in TEXT_PARTS -%}
{%- set chat.text = chat.text + part['text'] -%}
{%- else -%}
{{ raise_exception('Dolly reads text only. Send each part of a message as {"type": "text", "text": "..."}') }}
{%- endif -%}
{%- endfor -%}
{%- else -%}
{{ raise_exception('Dolly needs the content of each message as a string or as a list of text parts') }}
{%- endif -%}
{%- if message['role'] in ['system', 'developer'] -%}
{%- if chat.text | trim -%}{%- set chat.system = chat.system + chat.text + GAP -%}{%- endif -%}
{%- elif message['role'] == 'user' -%}
{%- set chat.text = chat.system + chat.text -%}
{%- set chat.system = '' -%}
{{ OPENING_WITH_INPUT if INPUT_MARK in chat.text else OPENING }}
{%- set chat.text = BEFORE_QUESTION + chat.text + AFTER_QUESTION -%}
PLAIN{{ chat.text }}
{%- elif message['role'] == 'assistant' -%}
{%- set chat.text = BEFORE_RESPONSE + chat.text + AFTER_RESPONSE -%}
{{ RESPONSE_KEY }}PLAIN{{ chat.text + END_KEY }}
{%- else -%}
{{ raise_exception('Dolly knows the roles system, user and assistant, not ' ~ message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if chat.system -%}
{{ raise_exception('Dolly puts a system message before an instruction: send a user message after it') }}
{%- endif -%}
{%- if add_generation_prompt -%}{{ RESPONSE_KEY }}{%- endif -%}
"""
_PLAIN = """{%- for token, spaced in SPECIAL_TOKENS -%}
{%- set chat.text = chat.text | replace(token, spaced) -%}
{%- endfor -%}"""


def chat_template(start: str, special_tokens: Iterable[str]) -> str:
    """A Jinja template for `apply_chat_template` that renders Dolly's prompt for one or more turns.

    `start` comes before the first turn, for example the text of the BOS token. A system message is put before the next
    instruction, followed by a blank line. Content may be a string or OpenAI's list of parts, which are joined.

    A rendered template is tokenised at once, so the text of a special token inside a message would become that token.
    The template therefore inserts a space into it, as in "###  End".
    """
    before_question, after_question = BODY.split("{question}")
    before_response, after_response = RESPONSE.split("{response}")
    words = {
        "START": start,
        "TEXT_PARTS": TEXT_PARTS,
        "GAP": GAP,
        "OPENING_WITH_INPUT": HEAD.format(intro=INTRO_WITH_INPUT) + INSTRUCTION_KEY,
        "OPENING": HEAD.format(intro=INTRO) + INSTRUCTION_KEY,
        "INPUT_MARK": INPUT_MARK,
        "BEFORE_QUESTION": before_question,
        "AFTER_QUESTION": after_question,
        "BEFORE_RESPONSE": before_response,
        "AFTER_RESPONSE": after_response,
        "RESPONSE_KEY": RESPONSE_KEY,
        "END_KEY": END_KEY,
        "SPECIAL_TOKENS": [[token, spaced(token)] for token in special_tokens],
    }
    template = _CHAT_TEMPLATE.strip().replace("PLAIN", _PLAIN)
    return re.sub(
        "|".join(words), lambda match: json.dumps(words[match.group()], ensure_ascii=False), template
    )


def response_template(eos: str) -> dict[str, Any]:
    """What transformers needs to find the answer in a generated text, up to the end key or EOS."""
    end = "|".join(map(re.escape, (END_KEY, eos)))
    return {
        "defaults": {"role": "assistant", "content": ""},
        "start_anchor": RESPONSE_KEY,
        "fields": {"content": {"close_pattern": rf"\s*(?:{end})"}},
    }


def spaced(token: str) -> str:
    """The token with a space inside, before its first letter if that breaks it."""
    broken = re.sub(r"^(\W*)", r"\1 ", token)
    return broken if token not in broken else f"{token[:1]} {token[1:]}" if len(token) > 1 else " "
