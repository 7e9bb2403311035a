"""Models of the page: one that ends its answer, and one that goes on until the limit or a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerBase

from tests.conftest import follow_chain, jsonl, say_rows
from training.data.conversations import Prompt
from training.data.prompt import END_KEY, RESPONSE_KEY
from training.page.models import PageModel
from training.page.state import Page
from training.page.votes import HELD_OUT, Question, Votes

LONG = 2**15  # positions, so that a model can be stopped
SCRIPT = "<script>window.attacked = true</script><img src=x onerror='window.attacked = true'> **bold**"
RIVER = f"Name a river. {SCRIPT}"


def chain_model(tokenizer: PreTrainedTokenizerBase, *chain: str) -> GPTJForCausalLM:
    """A GPT-J that follows the chain of tokens, with positions for a long answer."""
    eos = tokenizer.eos_token_id
    config = GPTJConfig(vocab_size=len(tokenizer), n_positions=LONG, n_embd=32, n_layer=2, n_head=2, rotary_dim=8,
                        bos_token_id=eos, eos_token_id=eos)  # fmt: skip
    return follow_chain(GPTJForCausalLM(config), tokenizer, *chain)


@pytest.fixture(scope="session")
def endless_model(tokenizer: PreTrainedTokenizerBase) -> GPTJForCausalLM:
    """Answers "A A A ..." for ever."""
    return chain_model(tokenizer, RESPONSE_KEY, "A", "Ġ", "A")


@pytest.fixture(scope="session")
def brief_model(tokenizer: PreTrainedTokenizerBase) -> GPTJForCausalLM:
    """Answers "AB" and the end key."""
    return chain_model(tokenizer, RESPONSE_KEY, "A", "B", END_KEY)


@pytest.fixture
def page(
    endless_model: GPTJForCausalLM,
    brief_model: GPTJForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> Page:
    """Models "base", which never ends, and "tuned", which answers "AB"; three rows."""
    models = [
        PageModel("base", "hub/base", "hub/base", endless_model, tokenizer),
        PageModel("tuned", "hub/tuned", "run-1", brief_model, tokenizer),
    ]
    rows = [Question(Prompt(f"Say {n}."), HELD_OUT) for n in range(3)]
    return Page(models, Votes.open(tmp_path / "votes" / "votes.jsonl"), rows)


def save_run(
    folder: Path, model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerBase, base: Path | str, rows: Path
) -> None:
    """Saves `model` as the finished run of training on `rows`, a new file, from `base`, with saved answers."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    jsonl(rows, [row | {"instruction": f"{row['instruction']} {SCRIPT}"} for row in say_rows(40)])
    options = {
        "input_model": str(base),
        "training_dataset": str(rows),
        "max_length": None,
        "test_size": 6,
        "seed": 42,
    }
    options |= {"keep_truncated": False, "max_dropped_fraction": 0.1}
    (folder / "run.json").write_text(json.dumps({"status": "finished", "id": "run-1", "options": options}))
    texts = {"instruction": RIVER, "input": ""}
    jsonl(
        folder / "samples.jsonl",
        [{"step": 0, **texts, "response": "A A A"}, {"step": 60, **texts, "response": "The Rhine"}],
    )
