"""The finished model: everything that stock transformers needs in one folder, described, and verified from its files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from training.checkpoint import read_manifest
from training.consts import CONTROL_TOKENS, DEMO, END_KEY, SAMPLE_INSTRUCTIONS
from training.data import Ledger
from training.model import ModelError

LEDGER_FILE = "ledger.json"

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


def save_model(
    model: PreTrainedModel,
    state_dict: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_shard_size: str,
) -> None:
    """Writes a model's weights, gathered as `state_dict`, with tokenizer and generation config."""
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


def not_finite(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinite numbers."""
    return [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]


def place_model(checkpoint: Path, output: Path) -> None:
    """Makes a checkpoint's model that of the output folder: as links, which cost no disk, where links can be made."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None, f"{checkpoint} is not complete"
    for old in output.glob("*.safetensors*"):  # of an earlier end of this run, perhaps in more shards
        old.unlink()
    for name in manifest["model"]:
        (output / name).unlink(missing_ok=True)
        try:
            os.link(checkpoint / name, output / name)
        except OSError:
            shutil.copyfile(checkpoint / name, output / name)


def verify_model(folder: Path, trust_remote_code: bool = False) -> None:
    """Proves from the files alone that a folder holds a whole model that answers.

    Names, shapes and number of the weights are those of the config; nothing is empty, NaN or infinite; embedding,
    tokenizer and generation config agree; and a greedy answer of a few tokens comes out. Holds the model once in
    host memory, in the precision of its files. Raises ModelError with everything that is wrong.
    """
    try:
        faults = _weight_faults(folder, trust_remote_code)
        faults = faults or _answer_faults(folder, trust_remote_code)
    except Exception as error:  # whatever reads a broken file raises: tokenizers has a bare Exception
        faults = [f"{type(error).__name__}: {error}"]
    if faults:
        more = [f"and {len(faults) - 8} more"] if len(faults) > 8 else []
        raise ModelError(
            f"{folder} is not a model that can be used:\n" + "\n".join(f"  - {f}" for f in faults[:8] + more)
        )


def _weight_faults(folder: Path, trust_remote_code: bool) -> list[str]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    # Saving writes some architectures under their original names: GPT-NeoX's head is embed_out in its files.
    named = revert_weight_conversion(model, model.state_dict())
    expected = {name: list(tensor.shape) for name, tensor in named.items()}
    found: dict[str, list[int]] = {}
    faults = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a dict)
                tensor = weights.get_tensor(name)
                found[name] = list(tensor.shape)
                if tensor.numel() == 0:
                    faults.append(f"{name} is empty")
                elif not torch.isfinite(tensor).all():
                    faults.append(f"{name} holds NaN or infinite numbers")
    # Tied weights are saved once, under one of their names.
    tied = set(model._tied_weights_keys or ()) if config.get_text_config().tie_word_embeddings else set()
    faults += [f"{name} is missing" for name in expected if name not in found and name not in tied]
    faults += [f"{name} is not of this architecture" for name in found if name not in expected]
    faults += [
        f"{name} has the shape {found[name]}, and {expected[name]} is that of the config"
        for name in found
        if name in expected and found[name] != expected[name]
    ]
    return faults


@torch.inference_mode()
def _answer_faults(folder: Path, trust_remote_code: bool) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model, loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
    )
    model.eval()
    rows, stops = model.get_input_embeddings().num_embeddings, model.generation_config.eos_token_id
    # An index of shards that names too few of them: what is missing would be made up at random.
    faults = [f"{name} is not found when the model is loaded" for name in sorted(loaded["missing_keys"])]
    if len(tokenizer) > rows:
        faults.append(f"the tokenizer has {len(tokenizer):,} entries, and the embedding {rows:,} rows")
    lost = [key for key in CONTROL_TOKENS if len(tokenizer(key, add_special_tokens=False)["input_ids"]) != 1]
    faults += [f"the tokenizer does not keep {key!r} as one token" for key in lost]
    if tokenizer.convert_tokens_to_ids(END_KEY) not in (stops if isinstance(stops, list) else [stops]):
        faults.append(f"generation_config.json does not stop at {END_KEY!r}")
    if faults:
        return faults
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": SAMPLE_INSTRUCTIONS[0]}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        do_sample=False,
        top_p=None,
        top_k=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    if not all(torch.isfinite(logits).all() for logits in answer.logits):
        faults.append("its answer has NaN or infinite logits")
    return faults


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
