"""A LoRA run from its options to its model: it learns to stop, and its base is in the run's precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPTJForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import jsonl
from training.consts import GREEDY
from training.data.conversations import Prompt
from training.data.prompt import END_KEY
from training.model.generation import answer_ids, load_model_tokenizer_for_generate, prompt_ids
from training.model.loading import load_model
from training.options.trainer_options import TrainingOptions
from training.run import steps
from training.trainer import train

ANSWERS = {"Name a colour.": "red", "Name a river.": "Rhine", "Name a number.": "seven", "Say yes.": "yes"}
ROWS = [{"instruction": question, "input": "", "output": answer} for question, answer in ANSWERS.items()] * 12


@pytest.fixture(scope="module")
def trained_base(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-J trained on the answers as plain text. It has never seen a control token: its vocabulary has none."""
    folder = tmp_path_factory.mktemp("trained-base")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = GPTJForCausalLM.from_pretrained(base_folder).train()
    texts = [f"{question}\n{answer}\n" for question, answer in ANSWERS.items()]
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = sum(model(input_ids=row, labels=row).loss for row in rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 4 * 0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of the greedy answers end with the end key by themselves."""
    prompts = prompt_ids(tokenizer, list(map(Prompt, ANSWERS)), 200)
    ids = answer_ids(prompts, model.eval(), tokenizer, torch.device("cpu"), max_new_tokens=20, **GREEDY)
    return int((ids == tokenizer.convert_tokens_to_ids(END_KEY)).any(dim=1).sum())


@pytest.mark.slow
def test_a_base_whose_embedding_grows_learns_to_stop_with_its_new_rows(
    trained_base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    before = load_model(str(trained_base), tokenizer, torch.float32, seed=42)
    rows = GPTJForCausalLM.from_pretrained(trained_base).config.vocab_size
    assert before.config.vocab_size == rows + 3
    assert stops(before, tokenizer) == 0
    record = train(
        TrainingOptions(
            input_model=str(trained_base), training_dataset=jsonl(tmp_path / "rows.jsonl", ROWS), lora=8, lr=1e-2,
            max_steps=150, test_size=8, per_device_train_batch_size=8, bf16=False, save_steps=150, eval_steps=150,
            local_output_dir=str(tmp_path / "out"),
        )
    )  # fmt: skip
    assert record["status"] == "finished"
    assert (record["options"]["lr"], record["options"]["lora_alpha"]) == (1e-2, 16)
    model, again = load_model_tokenizer_for_generate(str(tmp_path / "out"))
    assert stops(model, again) == len(ANSWERS)
    prompts = prompt_ids(again, list(map(Prompt, ANSWERS)), 200)
    answers = answer_ids(prompts, model, again, torch.device("cpu"), max_new_tokens=20, **GREEDY)
    texts = [text.strip() for text in again.batch_decode(answers, skip_special_tokens=True)]
    assert texts == list(ANSWERS.values())
    # The end key is the last token of a row, so its vector is never an input that matters.
    for module, first in (("transformer.wte", rows + 1), ("lm_head", rows)):
        old, new = (m.get_submodule(module).weight for m in (before, model))
        assert torch.equal(old[:rows], new[:rows]), "no other row is trained"
        assert all((new[first:] - old[first:]).abs().amax(dim=1) > 0.01)
    assert model.lm_head.bias[-3:].abs().min() > 0


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"lora": 4, "bf16": True}, torch.bfloat16),
        ({"lora": 4, "bf16": False}, torch.float32),
        ({"bf16": True}, torch.float32),
    ],
    ids=["bf16 adapters", "float32 adapters", "bf16 full"],
)
def test_a_frozen_base_is_loaded_in_the_precision_of_the_run_and_trained_weights_in_float32_and_counted(
    base_folder: Path,
    tmp_path: Path,
    options: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "training")
    seen = []
    real = steps.build_trainer

    def build(*args: Any) -> Any:
        trainer = real(*args)
        weight = trainer.model.transformer.h[0].ln_1.weight
        trained = {tensor.dtype for tensor in trainer.model.parameters() if tensor.requires_grad}
        seen.append((weight.dtype, trained, trainer.accelerator.native_amp))
        count = sum(tensor.numel() for tensor in trainer.model.parameters() if tensor.requires_grad)
        assert (f"{count:,} parameters are trained" in caplog.text) == ("lora" in options)
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "build_trainer", build)
    with pytest.raises(KeyboardInterrupt):
        train(
            TrainingOptions(
                input_model=str(base_folder),
                training_dataset=jsonl(tmp_path / "rows.jsonl", ROWS),
                local_output_dir=str(tmp_path / "out"),
                **options,
            )
        )
    assert seen == [(dtype, {torch.float32}, bool(options["bf16"]))]
