"""A real model, the Llama SmolLM2-135M, learns by LoRA: its held-out loss falls, and the merged model answers and stops."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import jsonl
from training.data.demo_rows import demo_rows
from training.model.generation import generate_responses, load_model_tokenizer_for_generate
from training.options.trainer_options import TrainingOptions
from training.trainer import train

peft = pytest.importorskip("peft")


@pytest.mark.slow
def test_a_trained_llama_learns_by_lora_and_its_merged_model_answers_and_stops(
    trained_llama: Path, tmp_path: Path
) -> None:
    rows = random.Random(0).sample(demo_rows(), 200)
    output = tmp_path / "out"
    record = train(
        TrainingOptions(
            input_model=str(trained_llama), training_dataset=jsonl(tmp_path / "rows.jsonl", rows), test_size=8,
            lora=8, lr=2e-3, bf16=False, per_device_train_batch_size=8, max_steps=10, logging_steps=5, eval_steps=10,
            save_steps=10, local_output_dir=str(output),
        )
    )  # fmt: skip
    assert record["decided"]["batching"] == "packed"
    losses = record["held_out_loss"]
    print(f"held-out loss {losses['before']:.3f} -> {losses['after']:.3f}")
    assert losses["after"] < 0.5 * losses["before"]
    model, tokenizer = load_model_tokenizer_for_generate(str(output), torch.float32, "cpu")
    instructions = [row["instruction"] for row in rows[:6] if not row["input"]]
    answers = generate_responses(
        instructions, model=model, tokenizer=tokenizer, max_new_tokens=24, do_sample=False
    )
    print(*zip(instructions, answers, strict=True), sep="\n")
    assert all(answer and len(tokenizer(answer)["input_ids"]) < 20 for answer in answers), (
        "each stops at ### End"
    )
    # A tied head: the adapter's new rows are those of both.
    base = AutoModelForCausalLM.from_pretrained(trained_llama, dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = peft.PeftModel.from_pretrained(base, output / "adapter").eval()
    ids = tokenizer(f"{instructions[0]}\n\n### Response:\n{answers[0]}\n\n### End", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
