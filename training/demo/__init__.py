"""The embedded default: instruction rows and a small random-start GPT-J, made in process, no network."""

import json
import random
from pathlib import Path
from typing import Any

from training.consts import DEMO, INPUT_KEY, INTRO, INTRO_WITH_INPUT
from training.demo import tasks

SEED = 42
VOCAB_SIZE = 1024  # nearly every word of the rows becomes one token
# The smallest GPT-J found that learns the rows in minutes on two cores. As in GPT-J, only a part of each head
# turns with the position.
SHAPE = {"n_positions": 512, "n_embd": 128, "n_layer": 3, "n_head": 4, "rotary_dim": 16}

ROWS_A_STEP = 64
TEST_SIZE = 400
# The trainer's options that suit it: a model that starts at random needs a higher rate, and more passes, than one
# that already speaks.
RECIPE: dict[str, Any] = {
    "epochs": 6.0,
    "lr": 2.5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "test_size": TEST_SIZE,
    "per_device_eval_batch_size": 50,
    "eval_steps": 180,
    "logging_steps": 20,
    "save_steps": 100000,
}

TASKS = (
    tasks.classify,
    tasks.describe,
    tasks.opposite,
    tasks.capital,
    tasks.plural,
    tasks.past_tense,
    tasks.repeat,
    tasks.join,
    tasks.count,
    tasks.first_or_last,
    tasks.pick,
    tasks.compare,
    tasks.add,
    tasks.what_comes_next,
    tasks.read,
    tasks.rewrite,
)


def demo_options(ranks: int) -> dict[str, Any]:
    """The trainer's options for the demo on so many ranks, by the names of TrainingOptions."""
    return {
        "input_model": DEMO,
        "training_dataset": DEMO,
        "per_device_train_batch_size": max(1, ROWS_A_STEP // ranks),
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "off",
        **RECIPE,
    }


def demo_rows() -> list[tasks.Row]:
    """The rows in Alpaca's form, `{instruction, input, output}`; the same ones at every call."""
    rng = random.Random(SEED)
    rows = [row for task in TASKS for row in task(rng)]
    # two draws may give the same exercise; a repeated one could be held out and trained on
    return list({(row["instruction"], row["input"]): row for row in rows}.values())


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
        torch.manual_seed(SEED)
        model = GPTJForCausalLM(config)
    # save_pretrained writes nothing on another rank than 0, and on another node there is none.
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_bpe(rows: list[tasks.Row]) -> tuple[dict[str, int], list[tuple[str, str]]]:
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
