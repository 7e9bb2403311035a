"""Small tokenizers of every kind, as base models have them. Each function writes one to a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from training.data.demo_rows import demo_rows

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def texts() -> list[str]:
    return [text for row in demo_rows()[:1500] for text in row.values()]


@cache
def sentencepiece_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of a BPE as Llama's, with bytes as the last resort."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *BYTES]
    bpe.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


@cache
def byte_level_bpe() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    return bpe.to_str()


@cache
def unigram_pieces() -> list[tuple[str, float]]:
    """Pieces of a Unigram model. As in converted SentencePiece models, "</s>" is an ordinary piece with score 0."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    unigram.train_from_iterator([*texts(), *"<>/#:[]_|"], trainer)
    return [tuple(piece) for piece in json.loads(unigram.to_str())["model"]["vocab"]]


def llama(folder: Path, bos: bool = True, **config: Any) -> None:
    """Llama-2's and Mistral's class. transformers reads its `legacy` from the file, but does not write it."""
    vocabulary, merges = sentencepiece_bpe()
    LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=bos).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def general(folder: Path, backend: Tokenizer, before: str = "", after: str = "", **settings: Any) -> None:
    """A tokenizer.json with special tokens `before` and `after` every text."""
    added = [*before.split(), *after.split()]
    backend.add_special_tokens(added)
    ids = [(token, backend.token_to_id(token)) for token in sorted(set(added))]
    single = f"{before} $A {after}".strip()
    backend.post_processor = TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=ids)
    settings = {"eos_token": "</s>", "unk_token": "<unk>"} | settings
    PreTrainedTokenizerFast(tokenizer_object=backend, **settings).save_pretrained(folder)


def byte_level(folder: Path, before: str = "", after: str = "", **settings: Any) -> None:
    backend = Tokenizer.from_str(byte_level_bpe())
    general(folder, backend, before, after, eos_token="<|endoftext|>", unk_token=None, **settings)


def metaspace(
    folder: Path, scheme: str, before: str = "<s>", sequence: bool = False, **settings: Any
) -> None:
    vocabulary, merges = sentencepiece_bpe()
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    step = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence([step, pre_tokenizers.Digits(individual_digits=True)]) if sequence else step
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    general(folder, backend, before, **settings)


def prepend(folder: Path) -> None:
    """Llama-2's tokenizer.json of transformers 4: a normalizer puts a "▁" before every text, and before "<s>" as well."""
    vocabulary, merges = sentencepiece_bpe()
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    general(folder, backend, "<s>")
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"normalized": false', '"normalized": true'))


def unigram(folder: Path, scheme: str, before: str = "", after: str = "", nfkc: bool = False) -> None:
    backend = Tokenizer(models.Unigram(unigram_pieces(), unk_id=0))
    if nfkc:
        backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    general(folder, backend, before, after)


def t5(folder: Path) -> None:
    """A class that puts EOS after every text, also when it is loaded again."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    T5Tokenizer(vocab=[*special, *unigram_pieces()[3:]], extra_ids=5).save_pretrained(folder)


def words_only(folder: Path) -> None:
    words = ["<unk>", "</s>", *sorted({word for text in texts() for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    general(folder, backend)


NAMES = " ".join(f"<name_{n}>" for n in range(1000))  # as many as Mistral's tekken has
KINDS: dict[str, Callable[[Path], None]] = {
    "byte-level": byte_level,
    "byte-level with BOS": lambda folder: byte_level(folder, "<|endoftext|>"),
    "byte-level with [gMASK]<sop>": lambda folder: byte_level(folder, "[gMASK] <sop>"),
    "byte-level with EOS at the end": lambda folder: byte_level(folder, "<bos>", "<|endoftext|>"),
    "byte-level with special tokens that are no words": lambda folder: byte_level(
        folder, extra_special_tokens=["***", "\N{PILE OF POO}", "⇒", '"q', "[\n"]
    ),
    "byte-level that splits special tokens": lambda folder: byte_level(folder, split_special_tokens=True),
    "llama": llama,
    "llama without BOS": lambda folder: llama(folder, bos=False),
    "llama, legacy": lambda folder: llama(folder, legacy=True),
    "llama without a space": lambda folder: llama(folder, add_prefix_space=False),
    "llama with token types": lambda folder: llama(
        folder, model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    ),
    "metaspace first in a sequence": lambda folder: metaspace(folder, "first", sequence=True),
    "metaspace always": lambda folder: metaspace(folder, "always"),
    "metaspace never": lambda folder: metaspace(folder, "never"),
    "metaspace first with [gMASK]<sop>": lambda folder: metaspace(folder, "first", "[gMASK] <sop>"),
    "metaspace first with 1000 special tokens": lambda folder: metaspace(
        folder, "first", extra_special_tokens=NAMES.split()
    ),
    "prepend": prepend,
    "unigram first": lambda folder: unigram(folder, "first", "<s>"),
    "unigram first with NFKC": lambda folder: unigram(folder, "first", "<s>", nfkc=True),
    "unigram always with EOS at the end": lambda folder: unigram(folder, "always", after="</s>"),
    "T5's class": t5,
    "words only": words_only,
}
