"""Text to token ids: the same ids in training, in `generate`, in the chat template and in stock transformers.

A prompt is tokenised in pieces, and the control tokens are inserted between them by id. A user's "### End" therefore
stays ordinary text, and the start of the response is known without a search. Stock transformers tokenises the whole
prompt at once: added tokens split it, and each part is tokenised for itself. The pieces are such parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from training.data.prompt import INSTRUCTION_KEY, prompt_pieces

# Copies of backends, made by `_text_backend`; None if a tokenizer needs none.
_COPIES: WeakKeyDictionary[PreTrainedTokenizerBase, Tokenizer | None] = WeakKeyDictionary()


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of text that follows a control token. A control token in the text is encoded as plain characters."""
    return _encode(_text_backend(tokenizer), texts)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], inputs: Sequence[str | None]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids (heads, bodies). A prompt is head + body + response key; the head ends with the instruction key."""
    key = tokenizer.convert_tokens_to_ids(INSTRUCTION_KEY)
    pieces = [prompt_pieces(*row) for row in zip(instructions, inputs, strict=True)]
    heads = list({head for head, _ in pieces})  # at most two different heads, each tokenised once
    before, _ = surrounding_ids(tokenizer)
    # A head begins the text, so a tokenizer may encode it otherwise than `encode_text` does.
    encoded = _encode(tokenizer.backend_tokenizer, heads)
    ids = {head: [*before, *ids, key] for head, ids in zip(heads, encoded, strict=True)}
    return [ids[head] for head, _ in pieces], encode_text(tokenizer, [body for _, body in pieces])


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

    Two kinds need a copy. SentencePiece tokenizers ("Metaspace") may mark the first word of a text as if a space came
    before it. A model may also have the text of a special token, such as "</s>", among its ordinary pieces.
    """
    if tokenizer not in _COPIES:
        backend = tokenizer.backend_tokenizer
        special = guarded_tokens(tokenizer)
        reached = [
            token
            for token, ids in zip(special, _encode(backend, special), strict=True)
            if backend.token_to_id(token) in ids
        ]
        pre_tokenizer = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else None
        first = any(part.get("prepend_scheme") == "first" for part in _parts(pre_tokenizer))
        _COPIES[tokenizer] = _copy(backend, reached) if reached or first else None
    return _COPIES[tokenizer] or tokenizer.backend_tokenizer


def _copy(backend: Tokenizer, hidden: list[str]) -> Tokenizer:
    """A copy that encodes a text as if it followed another, and that cannot encode any text as a `hidden` token."""
    state = json.loads(backend.to_str())
    for part in _parts(state["pre_tokenizer"]):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in hidden]
    state["post_processor"] = None  # may name a hidden token
    model = state["model"]
    names = {token: f"{uuid4()}{token}" for token in hidden}  # no text has this name
    if isinstance(model["vocab"], list):  # Unigram: [piece, score] in the order of ids
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): id for piece, id in model["vocab"].items()}
    if model.get("merges"):
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [(a, b) for a, b in pairs if names.keys().isdisjoint((a, b, a + b[prefix:]))]
    return Tokenizer.from_str(json.dumps(state))


def _parts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer in `tokenizer.json`."""
    if pre_tokenizer is None:
        return []
    return [part for step in pre_tokenizer.get("pretokenizers", []) for part in _parts(step)] or [
        pre_tokenizer
    ]
