"""Text to token ids: the same ids in training, in `generate`, in the chat template and in stock transformers.

A prompt is tokenised in pieces, and the control tokens are inserted between them by id. A user's "### End" therefore
stays ordinary text, and the start of the response is known without a search. Stock transformers tokenises the whole
prompt at once: added tokens split it, and each part is tokenised for itself. The pieces are such parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from training.data.prompt import END_KEY, INSTRUCTION_KEY, RESPONSE_KEY, prompt_pieces, response_piece

# Made by `_text_backend`; None if a tokenizer needs no copy.
_COPIES: WeakKeyDictionary[PreTrainedTokenizerBase, Tokenizer | None] = WeakKeyDictionary()


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of text that follows a control token. A control token in the text is encoded as plain characters."""
    return _encode(_text_backend(tokenizer), texts)


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[tuple[str, str | None, str]]]
) -> list[list[tuple[list[int], list[int], list[int]]]]:
    """Token ids (head, body, response) of each turn of each row, given (instruction, input, output) of each turn.

    A turn is head + body + response key + response + end key, and a row is its turns one after the other.
    """
    turns = list(chain.from_iterable(rows))
    pieces = [prompt_pieces(instruction, input) for instruction, input, _ in turns]
    different = {head for head, _ in pieces}
    first = _encode_heads(tokenizer, different, first=True)
    bodies = encode_text(tokenizer, [body for _, body in pieces])
    responses = encode_text(tokenizer, [response_piece(output) for *_, output in turns])
    if len(turns) == len(rows):  # as in Alpaca, which this makes faster
        heads = [first[head] for head, _ in pieces]
        return [[turn] for turn in zip(heads, bodies, responses, strict=True)]
    later = _encode_heads(tokenizer, different, first=False)
    encoded = iter(zip(pieces, bodies, responses, strict=True))
    ids = []
    for row in rows:
        of_row: list[tuple[list[int], list[int], list[int]]] = []
        for (head, _), body, response in islice(encoded, len(row)):
            of_row.append(((later if of_row else first)[head], body, response))
        ids.append(of_row)
    return ids


def join_turns(
    tokenizer: PreTrainedTokenizerBase, turns: Iterable[tuple[list[int], list[int], list[int]]]
) -> list[int]:
    """Token ids of whole turns, given (head, body, response) of each."""
    response_key, end_key = tokenizer.convert_tokens_to_ids([RESPONSE_KEY, END_KEY])
    return [id for head, body, response in turns for id in (*head, *body, response_key, *response, end_key)]


def _encode_heads(
    tokenizer: PreTrainedTokenizerBase, heads: Iterable[str], first: bool
) -> dict[str, list[int]]:
    """Token ids of heads with the instruction key; there are two, each tokenised once.

    The `first` head begins the text: a tokenizer may put ids before it, and may encode it otherwise than text after a
    control token. A later one follows an end key.
    """
    heads = list(heads)
    before = surrounding_ids(tokenizer)[0] if first else []
    encoded = _encode(tokenizer.backend_tokenizer, heads) if first else encode_text(tokenizer, heads)
    key = tokenizer.convert_tokens_to_ids(INSTRUCTION_KEY)
    return {head: [*before, *ids, key] for head, ids in zip(heads, encoded, strict=True)}


def surrounding_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer puts (before, after) every text: none for GPT-J, ([BOS], []) for Llama."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoding["input_ids"], encoding["special_tokens_mask"]
    if 0 not in mask:
        return ids, []
    return ids[: mask.index(0)], ids[len(mask) - mask[::-1].index(0) :]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All tokens that stock transformers recognises in a text as special, in the order of their ids."""
    return [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]


def guarded_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that no text may become: all but the token for unknown characters, unless it is EOS as well."""
    unknown = None if tokenizer.unk_token == tokenizer.eos_token else tokenizer.unk_token
    return [token for token in special_tokens(tokenizer) if token != unknown]


def tokens_in_reach(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The guarded tokens that the model itself has among its pieces, so that their text becomes them."""
    tokens = guarded_tokens(tokenizer)
    ids = _encode(tokenizer.backend_tokenizer, tokens)
    return [
        token for token, own in zip(tokens, ids, strict=True) if tokenizer.convert_tokens_to_ids(token) in own
    ]


def _encode(backend: Tokenizer, texts: Iterable[str]) -> list[list[int]]:
    """Calls the Rust tokenizer directly, because `tokenizer(texts)` spends half of its time on offsets and masks.

    The three settings below are safe: `tokenizer(...)` sets them again on every call.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _text_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's backend, or a copy of it where text after a control token would get other ids than in stock use.

    SentencePiece tokenizers ("Metaspace") may mark the first word of a text as if a space came before it.
    """
    if tokenizer not in _COPIES:
        backend, copy = tokenizer.backend_tokenizer, None
        state = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else None
        if any(part.get("prepend_scheme") == "first" for part in _parts(state)):
            state = json.loads(backend.to_str())
            for part in _parts(state["pre_tokenizer"]):
                if part.get("prepend_scheme") == "first":
                    part["prepend_scheme"] = "never"
            copy = Tokenizer.from_str(json.dumps(state))
        _COPIES[tokenizer] = copy
    return _COPIES[tokenizer] or tokenizer.backend_tokenizer


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer in `tokenizer.json`."""
    if pre_tokenizer is None:
        return []
    return [part for step in pre_tokenizer.get("pretokenizers", []) for part in _parts(step)] or [
        pre_tokenizer
    ]
