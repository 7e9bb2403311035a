"""Loads the base model's tokenizer and adds Dolly's control tokens."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, GPT2TokenizerFast, PreTrainedTokenizerBase

from training.consts import MAX_NEW_TOKENS, SAMPLING
from training.data.prompt import CONTROL_TOKENS, END_KEY, chat_template, encode_text
from training.errors import ModelError, first_line
from training.model.demo_model import model_folder


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, adds control tokens and chat template, and sets EOS as the pad token. Raises ModelError."""
    name = model_folder(name)
    try:
        if _is_bare_bpe(name):
            tokenizer = GPT2TokenizerFast.from_pretrained(name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # missing folder, no network, broken JSON: a dozen unrelated types
        raise ModelError(
            f"{name}: no tokenizer could be loaded ({first_line(error)}). "
            "Expected a folder with tokenizer.json, or a model's name on the Hub"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise ModelError(
            f"{name}: its tokenizer has no fast (Rust) form. Save one as tokenizer.json in the folder"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name}: its tokenizer has no EOS token. Set eos_token in tokenizer_config.json")
    try:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.add_special_tokens(
            {"extra_special_tokens": list(CONTROL_TOKENS)}, replace_extra_special_tokens=False
        )
        tokenizer.chat_template = chat_template(tokenizer)
        _check_control_tokens(tokenizer, name)
    except ModelError:
        raise
    except Exception as error:  # the files load, but cannot be used
        raise ModelError(
            f"{name}: its tokenizer is broken ({first_line(error)}). Use the tokenizer files of the base model"
        ) from error
    return tokenizer


def _is_bare_bpe(name: str) -> bool:
    """Whether the folder has only vocab.json and merges.txt, from which AutoTokenizer cannot infer the class."""
    folder = Path(name)
    return (folder / "vocab.json").is_file() and not any(
        (folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "config.json")
    )


def _check_control_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises ModelError unless each control token has one id of its own and stays text in `encode_text`."""
    vocabulary = tokenizer.get_vocab()
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ModelError(
            f"{name}: its tokenizer gives two tokens the same id. Use the tokenizer of the base model"
        )
    for key in CONTROL_TOKENS:
        ids = tokenizer(f"a{key}b", add_special_tokens=False)["input_ids"]
        if ids.count(tokenizer.convert_tokens_to_ids(key)) != 1:
            raise ModelError(
                f"{name}: its tokenizer does not keep {key!r} as one token (got ids {ids}). "
                "Use a model with another tokenizer"
            )
    for key in (*CONTROL_TOKENS, tokenizer.eos_token):
        if tokenizer.convert_tokens_to_ids(key) in encode_text(tokenizer, [key])[0]:
            raise ModelError(
                f"{name}: its tokenizer reads {key!r} inside a text as a control token, which would end a row early. "
                "Use a model with another tokenizer"
            )


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Generation settings saved with the model: sample like Dolly, stop at the end key or EOS, pad with EOS."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(END_KEY), tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
        **SAMPLING,
    )
