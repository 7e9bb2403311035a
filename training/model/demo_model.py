"""The demo model: a small, randomly initialised GPT-J and its tokenizer, created locally without a network."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from transformers import __version__ as transformers_version

from training.consts import DEMO, ROOT
from training.data.demo_rows import DEMO_SEED, Row, demo_rows, turns
from training.data.prompt import prompt_pieces, response_piece
from training.errors import ModelError, first_line
from training.files import expanded, fingerprint, path_problem, write_folder

# The model's files depend on these sources: an edit creates a new model.
SOURCES = [Path(__file__), *(ROOT / "training" / "data" / name for name in ("demo_rows.py", "prompt.py"))]

VOCAB_SIZE = 1024  # enough to make nearly every word of the rows one token

# The smallest GPT-J found that learns the rows in minutes on two cores. As in GPT-J, rotary embeddings cover only a
# part of each head.
SHAPE = {"n_positions": 512, "n_embd": 128, "n_layer": 3, "n_head": 4, "rotary_dim": 16}


def save_demo_model(folder: str | Path) -> None:
    """Writes a randomly initialised GPT-J and its tokenizer to `folder`, in the format of `from_pretrained`.

    Every call writes the same bytes. Like GPT-J's own, the tokenizer has no control tokens; fine-tuning adds them.
    """
    # Imported here because the plan needs only SHAPE, and not torch.
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
    # save_pretrained writes only on rank 0, but other nodes need the model on their own disk.
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_bpe(rows: list[Row]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Trains a byte-level BPE on the rows in the prompt layout. Returns (vocabulary, merges)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # BPE sees only the text between control tokens. Split it by paragraph, each with its blank line.
    pieces = [
        (*prompt_pieces(instruction, input), response_piece(output))
        for row in rows
        for instruction, input, output in turns(row)
    ]
    tokenizer.train_from_iterator((re.split(r"(?<=\n\n)", text) for text in chain(*pieces)), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def model_folder(name: str) -> str:
    """The name of a model on the Hub, or the path of a folder; for "demo" that of the demo model, created on first use.

    Raises ModelError if there is no such folder, or if the demo model cannot be created.
    """
    if name != DEMO:
        if problem := path_problem(name, "model"):
            raise ModelError(f"{name}: {problem}")
        return expanded(name)
    target = Path(HF_HOME) / "dolly" / f"demo-{fingerprint(*SOURCES, transformers_version)}"
    if not _is_model(target):
        try:
            with write_folder(target, is_complete=_is_model) as folder:
                save_demo_model(folder)
        except (OSError, SafetensorError) as error:  # safetensors raises its own error on a full disk
            raise ModelError(
                f"the demo model cannot be written into {HF_HOME} ({first_line(error)}). "
                "Make room there, or type export HF_HOME=/a/folder/of/yours"
            ) from error
    return str(target)
