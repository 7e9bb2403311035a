"""The prompt: its words, its layout as text, as a chat template and as token ids.

The wording is Stanford Alpaca's, byte for byte: a model trained on other words would be another model.

A prompt is tokenised in pieces. The control tokens are put between the pieces by id and never looked for in text, so a
user's "### End" stays ordinary text, and where the response starts is known, not searched. The pieces give the same
ids as tokenising the whole prompt at once, because added tokens split the text before the byte-pair merges run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

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
RESPONSE_KEY = "### Response:\n"  # the newline belongs to the token
END_KEY = "### End"

# Added to the tokenizer in this order, so that GPT-J gives them the ids 50400, 50401 and 50402.
CONTROL_TOKENS = (END_KEY, INSTRUCTION_KEY, RESPONSE_KEY)


def render_prompt(instruction: str, input: str | None = None) -> str:
    """The prompt as text, up to and including the response key."""
    intro, body = prompt_pieces(instruction, input)
    return intro + INSTRUCTION_KEY + body + RESPONSE_KEY


def prompt_pieces(instruction: str, input: str | None) -> tuple[str, str]:
    """The text before the instruction key, and the text between it and the response key."""
    if input:
        return f"{INTRO_WITH_INPUT}\n\n", f"\n{instruction}\n\n{INPUT_KEY}\n{input}\n\n"
    return f"{INTRO}\n\n", f"\n{instruction}\n\n"


# The words in capitals are filled in by `chat_template`, so that each prompt word has one home.
_CHAT_TEMPLATE = """
{%- for message in messages -%}
{%- set content = message['content'] PLAIN -%}
{%- if message['role'] == 'user' -%}
{{ INTRO_WITH_INPUT if INPUT_KEY in content else INTRO }}{{ content + '\\n\\n' }}
{%- elif message['role'] == 'assistant' -%}
{{ RESPONSE_KEY + content + END_KEY }}
{%- else -%}
{{ raise_exception('Dolly knows the roles user and assistant, not ' + message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ RESPONSE_KEY }}{%- endif -%}
"""


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A Jinja template for `apply_chat_template` that renders Dolly's prompt, for one turn or more.

    What a template renders is tokenised at once, so a control token inside a message would become one:
    there, and only there, it gets a space more, as in "###  End".
    """
    plain = ""
    for token in tokenizer.all_special_tokens:
        spaced = re.sub(r"^(\W*)", r"\1 ", token)
        plain += f" | replace({json.dumps(token)}, {json.dumps(spaced)})"
    words = {
        "PLAIN": plain,
        "INTRO_WITH_INPUT": json.dumps(f"{INTRO_WITH_INPUT}\n\n{INSTRUCTION_KEY}\n"),
        "INTRO": json.dumps(f"{INTRO}\n\n{INSTRUCTION_KEY}\n"),
        "INPUT_KEY": json.dumps(f"\n\n{INPUT_KEY}\n"),
        "RESPONSE_KEY": json.dumps(RESPONSE_KEY),
        "END_KEY": json.dumps(f"\n\n{END_KEY}"),
    }
    template = re.sub("|".join(words), lambda match: words[match.group()], _CHAT_TEMPLATE.strip())
    return ("{{ bos_token }}" if leading_ids(tokenizer) else "") + template


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts in which nothing is a control token, whatever it looks like.

    Straight to the Rust tokenizer: half of the time of `tokenizer(texts)` goes into offsets and masks that
    nobody reads here. `tokenizer(...)` sets these three again for itself at its next call.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], inputs: Sequence[str | None]
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of (heads, bodies): a prompt is its head, its body, and the response key.

    The head is one of two fixed texts, so it is tokenised twice, not once a row.
    """
    key = tokenizer.convert_tokens_to_ids(INSTRUCTION_KEY)
    bos = leading_ids(tokenizer)
    plain, with_input = (
        bos + ids + [key] for ids in encode_text(tokenizer, [f"{INTRO}\n\n", f"{INTRO_WITH_INPUT}\n\n"])
    )
    bodies = encode_text(
        tokenizer, [prompt_pieces(a, b)[1] for a, b in zip(instructions, inputs, strict=True)]
    )
    return [with_input if given else plain for given in inputs], bodies


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: nothing for GPT-J, a BOS for Llama."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
