"""Loads the base model's tokenizer and adds Dolly's control tokens."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GPT2TokenizerFast,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_sentencepiece_available

from training.consts import MAX_NEW_TOKENS, MOST_TOKENS, SAMPLING
from training.data.encoding import (
    encode_text,
    encode_turns,
    guarded_tokens,
    join_turns,
    special_tokens,
    surrounding_ids,
    tokens_in_reach,
)
from training.data.prompt import (
    CONTROL_TOKENS,
    END_KEY,
    INSTRUCTION_KEY,
    chat_template,
    prompt_pieces,
    question,
    render_prompt,
    response_piece,
    response_template,
    spaced,
)
from training.errors import ModelError, first_line, own_code_problem
from training.model.adapter_files import find_adapter
from training.model.demo_model import model_folder

# Files of which a folder with a tokenizer has at least one.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "*tok*.json", "tekken.json")

# Special tokens into whose text a space is put, at most: each costs a search in every text.
MOST_BROKEN = 1000

# A vocabulary has at least its letters. Those that transformers makes have at most "▁".
MIN_WORDS = 5

# ASCII to letters that many normalizers turn back into ASCII.
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}

# Settings of a tokenizer, besides its tokens, that the saved files must hold.
KEPT = (
    "padding_side",
    "model_input_names",
    "split_special_tokens",
    "model_max_length",
    "clean_up_tokenization_spaces",
)

# (instruction, input, response): what tokenizers treat in special ways, at the ends of the pieces and within them.
SAMPLES = (
    ("Name a river.", "", "The Rhine."),
    (" Translate into German: 12,5 km\n", "the caf\u00e9,  \U0001f642", "- das Caf\u00e9,\n- 12,5 km \n"),
    ("\tdef f(x):\n\n    return x", "\n# Why?\n", "\n  It's the identity: f(x) == x\n\n"),
)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, adds control tokens and chat template, and sets EOS as the pad token. Raises ModelError.

    An adapter without a tokenizer has that of its base.
    """
    if adapter := find_adapter(name):
        name = adapter.tokenizer_name
    name = model_folder(name)
    if Path(name).is_dir() and not any(
        file.match(kind) for file in Path(name).iterdir() for kind in TOKENIZER_FILES
    ):
        raise ModelError(
            f"{name}: no tokenizer could be loaded: there are no tokenizer files in the folder (tokenizer.json and "
            "tokenizer_config.json, or tokenizer.model). Copy those of its base model into it"
        )
    try:
        if _is_bare_bpe(name):
            tokenizer = GPT2TokenizerFast.from_pretrained(name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # missing folder, no network, broken JSON: a dozen unrelated types
        if os.path.isfile(Path(name) / "tokenizer.model") and not is_sentencepiece_available():
            raise ModelError(
                f"{name}: its tokenizer.model cannot be read without the package sentencepiece. "
                "Type pip install sentencepiece protobuf"
            ) from error
        raise ModelError(
            own_code_problem(name, error)
            or f"{name}: no tokenizer could be loaded ({first_line(error)}). "
            "Expected a folder with tokenizer.json, or a model's name on the Hub"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise ModelError(
            f"{name}: its tokenizer has no fast (Rust) form. Save one as tokenizer.json in the folder"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name}: its tokenizer has no EOS token. Set eos_token in tokenizer_config.json")
    try:
        _prepare(tokenizer, name)
        _check_vocabulary(tokenizer, name)
        _check_control_tokens(tokenizer, name)
        _check_ids(tokenizer, name)
        _check_special_tokens(tokenizer, name)
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


def _prepare(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Adds what Dolly needs, and sets what stock transformers needs to generate with the saved tokenizer."""
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"  # a batch of prompts must end with their last tokens
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # a causal model takes no token_type_ids
    tokenizer.split_special_tokens = False  # a prompt has control tokens
    tokenizer.init_kwargs |= {name: getattr(tokenizer, name) for name in KEPT}  # only these are saved
    _remove_suffix(tokenizer)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": list(CONTROL_TOKENS)}, replace_extra_special_tokens=False
    )
    _break_tokens_in_texts(tokenizer, name)
    tokenizer.chat_template = chat_template(_chat_start(tokenizer), special_tokens(tokenizer))


def _break_tokens_in_texts(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Puts a space into the text of special tokens that the model has among its pieces, as SentencePiece's "</s>".

    This comes after normalisation, so "</s>" in other letters that are normalised to it is broken as well. Special
    tokens are found before, so those of a prompt stay.
    """
    tokens = tokens_in_reach(tokenizer)
    if len(tokens) > MOST_BROKEN:
        raise ModelError(
            f"{name}: {len(tokens):,} special tokens, such as {tokens[-1]!r}, are ordinary pieces of its model, so no text "
            'could have them. Set "special" to true only for control tokens in tokenizer.json'
        )
    backend = tokenizer.backend_tokenizer
    steps = [normalizers.Replace(token, spaced(token)) for token in tokens]
    if steps:
        backend.normalizer = normalizers.Sequence(
            [*([backend.normalizer] if backend.normalizer else []), *steps]
        )


def _remove_suffix(tokenizer: PreTrainedTokenizerBase) -> None:
    """Stops the tokenizer from putting an EOS after every text: a prompt would end with it."""
    before, after = surrounding_ids(tokenizer)
    if after:
        tokens = _texts(tokenizer, before)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*tokens, "$A"],
            pair=[*tokens, "$A", "$B"],
            special_tokens=list(dict(zip(tokens, before, strict=True)).items()),
        )


def _texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Added tokens as they stand in a text. `convert_ids_to_tokens` may give them a "▁"."""
    return [tokenizer.added_tokens_decoder[id].content for id in ids]


def _chat_start(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text before a chat's first turn that gives the ids which the tokenizer puts before every text."""
    before, _ = surrounding_ids(tokenizer)
    start = "".join(_texts(tokenizer, before))
    head, _ = prompt_pieces("", None)
    expected = tokenizer(head)["input_ids"]
    # SentencePiece tokenizers may encode the first word of a text as if a space came before it.
    for gap in ("", " ") if start else ():
        if tokenizer(start + gap + head, add_special_tokens=False)["input_ids"] == expected:
            return start + gap
    return start


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises ModelError for a tokenizer without words. transformers makes one if the folder has only its settings."""
    words = tokenizer.get_vocab().keys() - special_tokens(tokenizer)
    if len(words) < MIN_WORDS:
        raise ModelError(
            f"{name}: its tokenizer has no vocabulary, so text would be lost. Copy tokenizer.json (or tokenizer.model) of its "
            "base model into the folder"
        )
    token, id = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if id >= MOST_TOKENS:
        raise ModelError(
            f"{name}: its tokenizer gives {token!r} the id {id:,}, expected less than {MOST_TOKENS:,}. "
            "Use the tokenizer files of the base model"
        )


def _check_control_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises ModelError unless each control token has one id of its own."""
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


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises ModelError unless the text of each special token stays text, in rows and in chats."""
    tokens = guarded_tokens(tokenizer)
    texts = [" ".join(tokens), "".join(tokens)]
    texts += [texts[0].translate(FULL_WIDTH), texts[0].upper(), texts[0].lower()]
    turns = [{"role": "user", "content": text} for text in texts]
    chat = Counter(tokenizer.apply_chat_template(turns)["input_ids"])
    expected = Counter(surrounding_ids(tokenizer)[0])
    expected[tokenizer.convert_tokens_to_ids(INSTRUCTION_KEY)] += len(turns)
    for token, ids in zip(tokens, encode_text(tokenizer, tokens), strict=True):
        id = tokenizer.convert_tokens_to_ids(token)
        if id in ids or chat[id] != expected[id]:
            raise ModelError(
                f"{name}: its tokenizer reads {token!r} inside a text as a control token, so a user's text could "
                "end a row early. Use a model with another tokenizer"
            )


def _stock_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of SAMPLES, and of a conversation of them, in stock transformers: as whole texts, then as chats."""
    texts, chats = [], []
    for instruction, input, response in SAMPLES:
        texts.append(render_prompt(instruction, input) + response_piece(response) + END_KEY)
        chats.append(
            [
                {"role": "user", "content": question(instruction, input)},
                {"role": "assistant", "content": response},
            ]
        )
    texts.append("".join(texts))
    chats.append([message for chat in chats for message in chat])
    return [tokenizer(text)["input_ids"] for text in texts] + [
        tokenizer.apply_chat_template(chat)["input_ids"] for chat in chats
    ]


def _check_ids(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises ModelError unless rows of training, whole texts in stock transformers and chats have the same ids."""
    samples = [*([sample] for sample in SAMPLES), SAMPLES]
    rows = [join_turns(tokenizer, turns) for turns in encode_turns(tokenizer, samples)]
    for ids, other in zip(rows * 2, _stock_ids(tokenizer), strict=True):
        if ids != other:
            pairs = enumerate(zip(ids, other, strict=False))
            at = next((n for n, (a, b) in pairs if a != b), min(len(ids), len(other)))
            ours, stock = (tokenizer.convert_ids_to_tokens(part[at : at + 3]) for part in (ids, other))
            raise ModelError(
                f"{name}: its tokenizer gives other ids for a whole prompt ({stock}) than for the parts between its "
                f"control tokens ({ours}), so servers would not ask as the model was trained. "
                "Use a model with another tokenizer"
            )


def saved_form(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A tokenizer with the same ids, whose files `AutoTokenizer` loads with these ids from the model's folder.

    transformers builds some classes anew when it loads them, and forgets options of theirs that it did not save. Such a
    tokenizer is returned as the general class, which is loaded as it was. Raises ModelError if that fails too.
    """
    from transformers.cli.serving.utils import get_response_template  # imports much of transformers

    # For some architectures `transformers serve` assumes the chat format of the original, and would answer with the prompt.
    if get_response_template(tokenizer, SimpleNamespace(config=config)):
        tokenizer.response_template = response_template(tokenizer.eos_token)
    if not _change_when_loaded(tokenizer, config, trust_remote_code):
        return tokenizer
    general = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        extra_special_tokens=tokenizer.extra_special_tokens,
        chat_template=tokenizer.chat_template,
        response_template=tokenizer.response_template,
        name_or_path=tokenizer.name_or_path,
        **tokenizer.special_tokens_map,
        **{name: getattr(tokenizer, name) for name in KEPT},
    )
    change = _change_when_loaded(general, config, trust_remote_code)
    if not change:
        return general
    raise ModelError(
        f"{tokenizer.name_or_path}: {change} once its tokenizer ({type(tokenizer).__name__}) was saved and loaded again. "
        "Use a model with another tokenizer"
    )


def _change_when_loaded(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, trust_remote_code: bool
) -> str:
    """What differs once AutoTokenizer loads the saved tokenizer beside the model's config; "" if nothing does."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)  # AutoTokenizer chooses the class with it
        tokenizer.save_pretrained(folder)
        try:
            loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # as many types as in load_tokenizer
            return f"transformers raises an error ({first_line(error)})"
        if loaded.padding_side != tokenizer.padding_side:
            return f"transformers pads on the {loaded.padding_side}"
        if _stock_ids(loaded) != _stock_ids(tokenizer):
            return "transformers gives other ids"
        return "transformers reads special tokens in texts" if tokens_in_reach(loaded) else ""


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Generation settings saved with the model: sample like Dolly, stop at the end key or EOS, pad with EOS."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(END_KEY), tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
        **SAMPLING,
    )
