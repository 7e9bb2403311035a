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

from training.checkpoint import read_manifest
from training.consts import CONTROL_TOKENS, DEMO, END_KEY, SAMPLE_INSTRUCTIONS
from training.data import Ledger
from training.model import ModelError

LEDGER_FILE = "ledger.json"

# What Dolly generated with, and the most useful defaults for whoever loads the folder.
MAX_NEW_TOKENS = 256
SAMPLING = {"do_sample": True, "top_p": 0.92, "top_k": 0}
# The likeliest token each time: the same model always gives the same answer.
GREEDY: dict[str, Any] = {"do_sample": False, "top_p": None, "top_k": None}

LICENCES = {
    "EleutherAI/gpt-j-6B": "apache-2.0",
    "EleutherAI/gpt-j-6b": "apache-2.0",
    "tatsu-lab/alpaca": "cc-by-nc-4.0",
    "databricks/databricks-dolly-15k": "cc-by-sa-3.0",
    DEMO: "apache-2.0",
}
ENGLISH = ("tatsu-lab/alpaca", "databricks/databricks-dolly-15k", DEMO)  # data whose language is known


def save_model(
    model: PreTrainedModel,
    state_dict: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_shard_size: str,
) -> None:
    """Writes a model's weights, gathered as `state_dict`, with tokenizer and generation config."""
    training = model.config.use_cache, model.generation_config
    model.config.use_cache, model.generation_config = True, generation_config(tokenizer)
    try:
        model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
    finally:  # with a cache, transformers would let packed documents read each other from the next step on
        model.config.use_cache, model.generation_config = training
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
    """Makes a checkpoint's model that of the output folder: the weights as links, which cost no disk, where they can be made."""
    manifest = read_manifest(checkpoint)
    assert manifest is not None, f"{checkpoint} is not complete"
    for old in output.glob("*.safetensors*"):  # of an earlier end of this run, perhaps in more shards
        old.unlink()
    for name in manifest["model"]:
        (output / name).unlink(missing_ok=True)
        try:
            if not name.endswith(".safetensors"):  # what a person may edit is a file of its own
                raise OSError
            os.link(checkpoint / name, output / name)
        except OSError:
            shutil.copyfile(checkpoint / name, output / name)


def verify_model(folder: Path, trust_remote_code: bool = False) -> None:
    """Proves from the files alone that a folder holds a whole model that answers.

    Names, shapes and number of the weights are those of the config; nothing is empty, NaN or infinite; embedding,
    tokenizer and generation config agree; and a greedy answer of a few tokens comes out. Holds the model once in
    host memory, in the precision of its files. Raises ModelError with everything that is wrong.
    """
    faults: list[str] = []
    try:
        faults += _weight_faults(folder, trust_remote_code)
        faults += _answer_faults(folder, trust_remote_code)
    except Exception as error:  # whatever reads a broken file raises: tokenizers has a bare Exception
        faults += [f"{type(error).__name__}: {error}"]
    if faults:
        more = [f"and {len(faults) - 8} more"] if len(faults) > 8 else []
        raise ModelError(
            f"{folder} is not a model that can be used:\n" + "\n".join(f"  - {f}" for f in faults[:8] + more)
        )


def _weight_faults(folder: Path, trust_remote_code: bool) -> list[str]:
    """Of the tensors in the files, under whatever names: transformers renames some when it saves and loads."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = [tensor for name, tensor in model.state_dict().items() if name not in parameters]
    expected = sum(tensor.numel() for tensor in [*model.parameters(), *buffers])  # a tied weight counts once
    found, faults = 0, []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a dict)
                tensor = weights.get_tensor(name)
                found += tensor.numel()
                if tensor.numel() == 0:
                    faults.append(f"{name} is empty")
                elif not torch.isfinite(tensor).all():
                    faults.append(f"{name} holds NaN or infinite numbers")
    if found != expected:
        faults.append(f"its files hold {found:,} numbers, and the model of its config {expected:,}")
    return faults


@torch.inference_mode()
def _answer_faults(folder: Path, trust_remote_code: bool) -> list[str]:
    """Of the model as transformers loads it, which would make up at random what it does not find."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model, loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told below, with the others
    )
    model.eval()
    faults = [f"{name} is missing" for name in sorted(loaded["missing_keys"])]
    faults += [f"{name} is not of this architecture" for name in sorted(loaded["unexpected_keys"])]
    faults += [
        f"{name} has the shape {list(found)}, and {list(expected)} is that of the config"
        for name, found, expected in sorted(loaded["mismatched_keys"])
    ]
    if faults:
        return faults
    rows, stops = model.get_input_embeddings().num_embeddings, model.generation_config.eos_token_id
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
        **GREEDY,
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
        language="en" if dataset in ENGLISH else None,
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
