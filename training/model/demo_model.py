"""The embedded model: a small random-start GPT-J and its tokenizer, made in process, no network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from transformers import __version__ as transformers_version

from training.consts import DEMO
from training.data.demo_rows import DEMO_SEED, Row, demo_rows
from training.data.prompt import INPUT_KEY, INTRO, INTRO_WITH_INPUT
from training.errors import ModelError, first_line

VOCAB_SIZE = 1024  # nearly every word of the rows becomes one token

# The smallest GPT-J found that learns the rows in minutes on two cores. As in GPT-J, only a part of each head
# turns with the position.
SHAPE = {"n_positions": 512, "n_embd": 128, "n_layer": 3, "n_head": 4, "rotary_dim": 16}


def save_demo_model(folder: str | Path) -> None:
    """Write a random-start GPT-J and its tokenizer into `folder`, as `from_pretrained` reads them.

    The same bytes at every call. The tokenizer knows no control tokens: like GPT-J's own, it gets them
    at fine-tuning.
    """
    # here, as the rows alone should cost no import of torch
    import torch
    from transformers import GPT2TokenizerFast, GPTJConfig, GPTJForCausalLM

    tokenizer = GPT2TokenizerFast(*_train_bpe(demo_rows()), model_max_length=SHAPE["n_positions"])
    config = GPTJConfig(
        **SHAPE,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.09,  # about 1/sqrt(n_embd); GPT-J's 0.02 suits its width of 4096
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DEMO_SEED)
        model = GPTJForCausalLM(config)
    # save_pretrained writes nothing on another rank than 0, and on another node there is none.
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_bpe(rows: list[Row]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a byte-level BPE learnt on the rows as the prompt shows them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # the stretches between control tokens, which cut the text before BPE sees it
    text = []
    for row in rows:
        text += [INTRO_WITH_INPUT if row["input"] else INTRO, "\n\n", f"\n{row['instruction']}\n\n"]
        text += [f"{INPUT_KEY}\n{row['input']}\n\n"] if row["input"] else []
        text += [f"{row['output']}\n\n"]
    tokenizer.train_from_iterator(text, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def model_folder(name: str) -> str:
    """`name` as `from_pretrained` takes it: the embedded model is written into a folder at its first use."""
    if name != DEMO:
        return name
    from training.data import demo_rows, prompt

    sources = b"".join(
        Path(str(file)).read_bytes() for file in (__file__, demo_rows.__file__, prompt.__file__)
    )
    key = hashlib.sha256(sources + transformers_version.encode()).hexdigest()[:16]
    target = Path(HF_HOME) / "dolly" / f"demo-{key}"
    if not target.is_dir():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
        except OSError as error:
            raise _no_cache(error) from error
        try:
            save_demo_model(partial)
        except (OSError, SafetensorError) as error:  # the second is its own for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise _no_cache(error) from error
        try:
            os.replace(partial, target)
        except OSError:  # another process was first
            shutil.rmtree(partial)
    return str(target)


def _no_cache(error: Exception) -> ModelError:
    return ModelError(
        f"the embedded model cannot be written into {HF_HOME} ({first_line(error)}). Make room there, or type "
        "export HF_HOME=/a/folder/of/yours"
    )
