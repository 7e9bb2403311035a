"""Describes a finished model: its card, and the entries of run.json about its training."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from training.consts import DEMO, METRICS_FILE, SAMPLE_INSTRUCTIONS
from training.data.ledger import Ledger
from training.data.prompt import END_KEY
from training.data.source_names import joined, sources_of
from training.errors import printable
from training.files import is_hub_name
from training.storage import checkpoint, metrics

LICENCES = {
    "EleutherAI/gpt-j-6B": "apache-2.0",
    "EleutherAI/gpt-j-6b": "apache-2.0",
    "tatsu-lab/alpaca": "cc-by-nc-4.0",
    "databricks/databricks-dolly-15k": "cc-by-sa-3.0",
    DEMO: "apache-2.0",
}
ENGLISH = ("tatsu-lab/alpaca", "databricks/databricks-dolly-15k", DEMO)  # data whose language is known


def write_model_card(folder: Path, record: dict[str, Any], ledger: Ledger, name: str | None = None) -> None:
    """README.md of the model folder: base, data, licences, options, losses, ledger."""
    options = record["options"]
    base, sources = options["input_model"], sources_of(options["training_dataset"])
    base_licence = LICENCES.get(base, "unknown")
    data_licences = {source: LICENCES.get(source, "unknown") for source in sources}
    data = ModelCardData(
        language="en" if all(source in ENGLISH for source in sources) else None,
        license=base_licence if {base_licence} == set(data_licences.values()) else "other",
        base_model=base if _is_on_hub(base) else None,
        datasets=list(filter(_is_on_hub, sources)) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
    )
    losses = record["held_out_loss"]
    after = "not measured" if losses["after"] is None else f"**{losses['after']:.4f}**"
    limit = f"{'Both' if len(sources) == 1 else 'All'} licences apply to every use of the model."
    if any("-nc-" in licence for licence in data_licences.values()):
        limit += " Alpaca's forbids commercial use: this model is for research."
    changed = "\n".join(
        f"| `{key}` | {_code(value)} |"
        for key, value in (options | {"training_dataset": joined(sources)}).items()
        if value is not None
    )
    data_words = ", ".join(f"{_code(source)} (licence: {data_licences[source]})" for source in sources)
    steps, devices = record["steps"], record["world_size"]
    content = f"""---
{data.to_yaml()}
---
# {_line(name or folder.name)}

{_code(base)} (licence: {base_licence}) fine-tuned to follow instructions on {data_words},
with the recipe of Databricks' first Dolly. {limit}

Held-out loss, nats a response token: {losses["before"]:.4f} before training, {after} after
{steps:,} step{"s" * (steps != 1)} on {devices} device{"s" * (devices != 1)} in {record["precision"]}.

{_sources_section(record)}```python
from transformers import pipeline

ask = pipeline("text-generation", model="PATH/TO/THIS/FOLDER")
print(ask([{{"role": "user", "content": {json.dumps(SAMPLE_INSTRUCTIONS[0])}}}])[0]["generated_text"][-1]["content"])
```

{_adapter_section(record)}{_ability(ledger)}, stops at `{END_KEY}`, and like its base it invents facts.

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


def _ability(ledger: Ledger) -> str:
    if ledger.turns > ledger.rows_kept:
        return "It answers a question, also one that follows earlier turns"
    return "It answers one instruction at a time"


def _sources_section(record: dict[str, Any]) -> str:
    """Rows and held-out losses of each source as a table; "" for a single source."""
    sources = record.get("sources")
    if not sources:
        return ""
    losses = record["held_out_loss"].get("by_source", {})
    lines = ["| source | rows | held out | loss before | after |", "|---|---|---|---|---|"]
    for source in sources:
        of_source = losses.get(source["label"], {})
        figures = [of_source.get(moment) for moment in ("before", "after")]
        rows = f"{source['rows']:,} | {source['held_out']:,}"
        lines.append(f"| {_code(source['source'])} | {rows} | {' | '.join(map(loss_text, figures))} |")
    return "\n".join(lines) + "\n\n"


def loss_text(loss: float | None) -> str:
    """A held-out loss of a source. A resume with --force, or with another name of a file, may have one of the two only."""
    return "not measured" if loss is None else f"{loss:.4f}"


def _adapter_section(record: dict[str, Any]) -> str:
    """What a LoRA run has trained, and how to load its adapter; "" for a run that trained all weights."""
    options, base = record["options"], record.get("base")
    if not options.get("lora") or base is None:
        return ""
    version = (
        f"revision {base['revision']}" if base["revision"] else f"weights of SHA-256 {base['sha256'][:16]}..."
    )
    in_bits = ", which was in 4 bits during training" if options.get("quantize") else ""
    return f"""It was trained by LoRA: an adapter of rank {options["lora"]} (alpha {options["lora_alpha"]:g}) on {_code(base["model"])}
({version}){in_bits}. The adapter is merged into this model. It also lies alone in `adapter/`:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER/adapter")
```

"""


def _is_on_hub(name: str) -> bool:
    """Whether it is OWNER/NAME. The Hub refuses a card that names a folder."""
    return "/" in name and is_hub_name(name) and not Path(name).exists()


def _line(text: object) -> str:
    return " ".join(printable(text).split())


def _code(text: object) -> str:
    """A Markdown code span, also in a table: the name of a file may hold anything."""
    return "`" + _line(text).replace("`", "'").replace("|", "\\|") + "`"


def outcome(record: dict[str, Any], chosen: Path, last: Path) -> dict[str, Any]:
    """The entries of run.json for a finished run, from its last and its chosen checkpoint.

    The losses by source are in the order of the record: trainer_state.json sorts its keys.
    """
    manifest = checkpoint.read_manifest(chosen)
    assert manifest is not None
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    held_out = {entry["step"]: entry for entry in history if "eval_loss" in entry}
    before, after = held_out[min(held_out)], held_out.get(checkpoint.step_of(chosen), {})
    losses: dict[str, Any] = {"before": before["eval_loss"], "after": manifest["eval_loss"]}
    starts, ends = metrics.losses_by_source(before), metrics.losses_by_source(after)
    if found := starts | ends:
        typed = [source["label"] for source in record.get("sources", ())]
        labels = [label for label in typed if label in found]
        labels += [label for label in found if label not in typed]  # of a source that was renamed since
        losses["by_source"] = {
            label: {"before": starts.get(label), "after": ends.get(label)} for label in labels
        }
    progress = json.loads((last / checkpoint.PROGRESS_FILE).read_text())
    loss_sum = progress["loss_total"] + fmean(progress["loss_sums"])
    return {
        "status": "finished",
        "steps": checkpoint.step_of(last),
        "model_of_step": checkpoint.step_of(chosen),
        "train_loss": loss_sum / checkpoint.step_of(last),
        "held_out_loss": losses,
        "seconds": {"training": progress["seconds"]},
        "batching": progress["batching"],
        "saves": metrics.saves_of(last.parent / METRICS_FILE),
    }
