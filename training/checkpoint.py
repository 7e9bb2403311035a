"""The finished model: gathered, saved with all that stock transformers needs, described, and published."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import GenerationConfig, PreTrainedTokenizerBase, Trainer

from training.consts import DEMO, END_KEY, SAMPLE_INSTRUCTIONS
from training.data import Ledger
from training.options import TrainingOptions

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
LEDGER_FILE = "ledger.json"
RECORDED_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers")

# What Dolly generated with, and the most useful defaults for whoever loads the folder.
MAX_NEW_TOKENS = 256
SAMPLING = {"do_sample": True, "top_p": 0.92, "top_k": 0}

LICENCES = {
    "EleutherAI/gpt-j-6B": "apache-2.0",
    "EleutherAI/gpt-j-6b": "apache-2.0",
    "tatsu-lab/alpaca": "cc-by-nc-4.0",
    "databricks/databricks-dolly-15k": "cc-by-sa-3.0",
    DEMO: "apache-2.0",
}


def write_run_record(folder: Path, record: dict[str, Any]) -> None:
    """Replaces the record in one rename, so that a reader never sees half of one."""
    partial = folder / f"{RUN_FILE}.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, folder / RUN_FILE)


def start_record(options: TrainingOptions, world_size: int, precision: str) -> dict[str, Any]:
    """What is known of a run before its first step. `status` turns from "running" to "finished" at the end."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "status": "running",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": asdict(options),
        "world_size": world_size,
        "precision": precision,
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def save_model(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path, max_shard_size: str
) -> None:
    """Gathers the weights from all ranks and writes them with tokenizer and generation config. All ranks call it."""
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    model.config.use_cache = True
    model.generation_config = generation_config(tokenizer)
    model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # safetensors' writer lets nobody else read them
        shutil.copymode(folder / "config.json", file)


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Stops at the end key or EOS and pads with EOS, in whatever program loads the folder."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(END_KEY), tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
        **SAMPLING,
    )


def write_model_card(folder: Path, record: dict[str, Any], ledger: Ledger) -> None:
    """README.md of the model folder: base, data, licences, options, losses, ledger."""
    options = record["options"]
    base, dataset = options["input_model"], options["training_dataset"]
    base_licence = LICENCES.get(base, "unknown")
    data_licence = LICENCES.get(dataset, "unknown")
    data = ModelCardData(
        language="en",
        license=data_licence if data_licence == base_licence else "other",
        base_model=base if "/" in base and not Path(base).exists() else None,
        datasets=[dataset] if "/" in dataset and not Path(dataset).exists() else None,
        library_name="transformers",
        pipeline_tag="text-generation",
    )
    losses = record["held_out_loss"]
    limit = (
        "Whoever uses it is bound by both. Alpaca's forbids commercial use: this model is for research."
        if "-nc-" in data_licence
        else "Whoever uses it is bound by both."
    )
    changed = "\n".join(f"| `{key}` | `{value}` |" for key, value in options.items())
    content = f"""---
{data.to_yaml()}
---
# {folder.name}

`{base}` (licence: {base_licence}) fine-tuned to follow instructions on `{dataset}` (licence: {data_licence}),
with the recipe of Databricks' first Dolly. {limit}

Held-out loss, nats a response token: {losses["before"]:.4f} before training, **{losses["after"]:.4f}** after
{record["steps"]:,} steps on {record["world_size"]} devices in {record["precision"]}.

```python
from transformers import pipeline

ask = pipeline("text-generation", model="PATH/TO/THIS/FOLDER")
print(ask([{{"role": "user", "content": {json.dumps(SAMPLE_INSTRUCTIONS[0])}}}])[0]["generated_text"][-1]["content"])
```

It answers one instruction at a time, stops at `{END_KEY}`, and like its base it invents facts.

## Data

```
{ledger}
```

## Options

| option | value |
|---|---|
{changed}
"""
    ModelCard(content).save(folder / "README.md")


def publish(folder: Path, target: Path) -> None:
    """Copies the finished model, not its checkpoints, to `target`, one file after the other."""
    target.mkdir(parents=True, exist_ok=True)
    for source in sorted(folder.iterdir()):
        if source.is_file() and source.name != RUN_FILE:
            shutil.copyfile(source, target / source.name)
    # The record last: a folder without it was not copied to the end.
    shutil.copyfile(folder / RUN_FILE, target / RUN_FILE)
    logger.info("published to %s", target)
