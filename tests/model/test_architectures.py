"""Every architecture of transformers' list of causal language models trains, or is refused in one sentence.

A tiny random model of each is trained for two steps, packed or padded, and saved, verified and reloaded. The long test
sweeps over all of them and writes docs/architectures.md; the quick ones try one of each verdict.

python -m tests.model.test_architectures FOLDER KIND...    prints the verdict of each as a line of JSON
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import select
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GPT2TokenizerFast,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.conftest import jsonl, say_rows
from training.data.collator import DataCollatorForCompletionOnlyLM
from training.data.held_out import split_held_out
from training.errors import ModelError, OptionsError
from training.model.demo_model import model_folder
from training.options.trainer_options import TrainingOptions
from training.run.prepare import tokenised_rows
from training.trainer import train

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architectures.md"
KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
FLOOR = 172  # architectures that train, as the sweep of docs/architectures.md found
SECONDS = 120  # for one architecture on a busy machine
HELD_OUT = 8

# Sizes of a tiny model, for each key that a config has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "v_head_dim", "qk_nope_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "audio_vocab_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "linear_num_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "index_n_heads", "n_mamba_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "hidden_dropout"), 0.0),
    **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout_prob"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob", "summary_last_dropout"), 0.0),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "num_kv_shared_layers"), 0),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "n_groups"), 1),
    **dict.fromkeys(("mamba_n_groups",), 1),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "mamba_num_heads", "hidden_size_per_layer_input"), 8),
    "mamba_n_heads": 4,
    "is_decoder": True,
    "use_mamba_kernels": False,
}  # fmt: skip
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 28, "patch_size": 14}  # fmt: skip
ALL_KEY_HEADS = {"num_key_value_heads": 4}  # each head has keys of its own
TWO_KINDS = {"layer_types": ["linear_attention", "full_attention"] * 2}
CONV = {"layer_types": ["conv", "full_attention"] * 2}
DECODER = {"encoder_layers": 2, "decoder_layers": 2}
# What the sizes above do not fit, by model type.
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), ALL_KEY_HEADS),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3"), ALL_KEY_HEADS),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), ALL_KEY_HEADS | TWO_KINDS),
    **dict.fromkeys(("lfm2", "lfm2_moe"), CONV),
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2,
                            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4}
                                                for kind in ("sliding_attention", "full_attention")}},
    "cpmant": {"dim_head": 16, "dim_ff": 96, "prompt_types": 2, "segment_types": 2, "prompt_length": 4},
    "ctrl": {"dff": 96},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 5e5},
             "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 16, "hc_mult": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": ALL_KEY_HEADS | {"head_dim": 24, "per_layer_config": {}},
    "fuyu": {"text_config": {"model_type": "persimmon"}, "image_size": 28, "patch_size": 14},
    "gemma3": {"vision_config": VISION | {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 8,
                     "activation_sparsity_pattern": [0.0] * 4},
    "got_ocr2": {"text_config": {"model_type": "qwen2"}, "vision_config": VISION | {"output_channels": 32}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_d_head": 32, "shared_intermediate_size": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 8},
    "longcat_flash": ALL_KEY_HEADS | {"head_dim": 8, "num_layers": 2, "ffn_hidden_size": 96, "moe_topk": 2,
                                      "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minimax_m3_vl_text": {"dense_intermediate_size": 96, "shared_intermediate_size": 32, "index_block_size": 16},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"}},
    "mpt": {"attn_config": {}},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 32, "layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
                       "indexer_compress_ratio": 4, "ngram_vocab_size_base": 100, "split_ngram_parts": 2,
                       "ple_embed_dim": 16, "hc_count": 2, "hc_lowrank": 8},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_shape": (16, 16), "axial_pos_embds_dim": (32, 32),
                 "feed_forward_size": 96, "attention_head_size": 16, "local_attn_chunk_length": 16,
                 "lsh_attn_chunk_length": 16, "local_attention_probs_dropout_prob": 0.0},
    "roc_bert": {"pronunciation_embed_dim": 16, "pronunciation_vocab_size": 20, "shape_embed_dim": 16, "shape_vocab_size": 20},
    "seed_oss": {"residual_dropout": 0.0},
    "youtu": ALL_KEY_HEADS | {"pad_token_id": None},  # transformers sets this token's embedding to zero at each load
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "xlm": {"n_layers": 2, "n_heads": 4, "emb_dim": 64, "causal": True},
    "xlnet": {"d_inner": 96, "attn_type": "uni", "mem_len": None},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "head_dim": 32},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2, "head_dim": 32, "adapter_rank": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}  # fmt: skip


def tiny_config(kind: type[PreTrainedConfig] | str, vocabulary: int) -> PreTrainedConfig:
    """A config of the model type, or of the class of an inner config, with SIZES for each key that it has."""
    config_class = CONFIG_MAPPING[kind] if isinstance(kind, str) else kind
    other_names = config_class.attribute_map
    keys = {
        *config_class.__dataclass_fields__,
        *inspect.signature(config_class.__init__).parameters,
        *other_names,
    }
    sizes = SIZES | {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
    values = {key: size for key, size in sizes.items() if key in keys and other_names.get(key) not in keys}
    own = dict(OVERRIDES.get(config_class.model_type, {}))
    for name, inner in config_class.sub_configs.items():
        if "model_type" in own.get(name, {}):
            own[name] = tiny_config(own[name]["model_type"], vocabulary).to_dict() | own[name]
        elif inner is not AutoConfig:
            with suppress(Exception):  # otherwise it is the outer config's default
                values[name] = tiny_config(inner, vocabulary).to_dict()
    return config_class(**values | own)


# --- one architecture ---------------------------------------------------------------------------------


def verdict(kind: str, folder: Path) -> dict[str, Any]:
    """{"kind", "verdict", "reason", "seconds"} of an architecture. The verdict is packed, padded, refused or failed."""
    begin, shown = time.monotonic(), []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    logging.getLogger("training").addHandler(handler)
    logging.getLogger("training").setLevel(logging.INFO)
    try:
        name, reason = _trained(kind, folder, shown)
    except (ModelError, OptionsError) as error:
        name, reason = "refused", str(error).strip().removeprefix("- ").replace(str(folder / "base"), "")
    except Exception as error:
        name, reason = "failed", f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("training").removeHandler(handler)
    return {"kind": kind, "verdict": name, "reason": reason, "seconds": round(time.monotonic() - begin, 1)}


def _trained(kind: str, folder: Path, shown: list[str]) -> tuple[str, str]:
    """(verdict, reason). Raises the errors of the trainer, or AssertionError if the losses differ."""
    tokenizer = GPT2TokenizerFast.from_pretrained(model_folder("demo"))
    base, rows = folder / "base", jsonl(folder / "rows.jsonl", say_rows(40))
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(kind, len(tokenizer)))
        model.save_pretrained(base)
    except Exception as error:
        return (
            "refused",
            f"not tried: transformers could not build a tiny one ({type(error).__name__}: {error})",
        )
    tokenizer.save_pretrained(base)
    options = {
        "input_model": str(base), "training_dataset": rows, "test_size": HELD_OUT, "max_steps": 2, "lr": 1e-3,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1,
        "logging_steps": 1, "eval_steps": 1, "bf16": False,
    }  # fmt: skip
    chosen = TrainingOptions(**options, local_output_dir=str(folder / "out"))
    record = train(chosen)
    [warning] = [line for line in shown if "are padded, not packed" in line] or [""]
    _check_with_stock_transformers(chosen, record["held_out_loss"]["after"])
    if warning:
        return "padded", warning.split(" packed: ", 1)[1].rsplit(". The devices compute", 1)[0]
    train(TrainingOptions(**options, local_output_dir=str(folder / "padded"), batching="padded"))
    packed, padded = _losses(folder / "out"), _losses(folder / "padded")
    assert packed == pytest.approx(padded, rel=1e-4), "packed and padded rows have other losses"
    return "packed", ""


def _losses(output: Path) -> list[float]:
    """The losses of the steps and of the held-out rows."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]


@torch.no_grad()
def _check_with_stock_transformers(options: TrainingOptions, held_out_loss: float) -> None:
    """The saved model, loaded by stock transformers, must have the run's loss on the padded held-out rows."""
    tokenizer, rows, _ = tokenised_rows(options)
    held_out = split_held_out(rows, HELD_OUT, options.seed)[1]
    batch = DataCollatorForCompletionOnlyLM(tokenizer.pad_token_id)(list(held_out))
    model = AutoModelForCausalLM.from_pretrained(options.local_output_dir).eval()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten()).item()
    assert held_out_loss == pytest.approx(loss, rel=1e-4), "stock transformers computes another loss"


@pytest.mark.parametrize(
    ("kind", "expected", "reason"),
    [
        ("gemma4_text", "packed", ""),
        ("mamba", "padded", "its attention crosses documents"),
        ("bart", "padded", "its code fails on a packed row"),
        ("marian", "refused", "stock transformers loads another model than was saved"),
    ],
)
def test_a_model_trains_with_the_losses_of_padded_rows_or_is_refused_before_rows_are_read(
    tmp_path: Path, kind: str, expected: str, reason: str
) -> None:
    found = verdict(kind, tmp_path)
    assert found["verdict"] == expected, found
    assert reason in found["reason"]


# --- all of them --------------------------------------------------------------------------------------


def main(folder: Path, kinds: list[str]) -> None:
    """Prints the verdict of each architecture as a line of JSON."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for kind in kinds:
        (folder / kind).mkdir()
        print(json.dumps(verdict(kind, folder / kind)), flush=True)
        shutil.rmtree(folder / kind)


def sweep(folder: Path) -> Iterator[dict[str, Any]]:
    """The verdict of every architecture. One that crashes or hangs its process is failed, and the next goes on."""
    left = list(KINDS)
    while left:
        with (folder / "errors").open("w") as errors:
            command = [sys.executable, "-m", "tests.model.test_architectures", folder, *left]
            worker = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
            )
        deadline = time.monotonic() + SECONDS
        assert worker.stdout is not None
        while left and select.select([worker.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            line = worker.stdout.readline()
            if not line:
                break
            if line.startswith('{"kind"'):
                found = json.loads(line)
                assert found["kind"] == left.pop(0)
                deadline = time.monotonic() + SECONDS
                yield found
        worker.kill()
        worker.wait()
        if left:
            shutil.rmtree(folder / left[0], ignore_errors=True)
            yield {
                "kind": left.pop(0),
                "verdict": "failed",
                "reason": "its process crashed or hung",
                "seconds": SECONDS,
            }


def _short(reason: str) -> str:
    """The reason without numbers and details, so that architectures with the same one stand together."""
    reason = " ".join(reason.removeprefix(": ").split())
    reason = re.sub(r"^a \S+ model cannot be trained here: ", "", reason)
    reason = re.sub(r"^a \S+ model is not", "it is not", reason)
    reason = re.split(r": the logits of document|\. Name another| \(\w+(?:Error|Exception)\b", reason)[0]
    return re.sub(r"\d[\d,]*(\.\d+)?(e-?\d+)?", "N", reason)


def page(results: list[dict[str, Any]]) -> str:
    """docs/architectures.md."""
    groups: dict[str, dict[str, list[str]]] = {"packed": {}, "padded": {}, "refused": {}}
    for found in results:
        groups[found["verdict"]].setdefault(_short(found["reason"]), []).append(found["kind"])

    def names(kinds: list[str]) -> str:
        return ", ".join(f"`{kind}`" for kind in sorted(kinds))

    def section(title: str, group: dict[str, list[str]]) -> str:
        count = sum(map(len, group.values()))
        lines = [f"## {title}: {count}", ""]
        if group.keys() == {""}:
            return "\n".join([*lines, textwrap.fill(names(group[""]), 120), ""])
        lines += ["| why | model types |", "|---|---|"]
        for reason, kinds in sorted(group.items(), key=lambda item: (-len(item[1]), item[0])):
            lines.append(f"| {reason} | {names(kinds)} |")
        return "\n".join([*lines, ""])

    return "\n".join(
        [
            "# Architectures",
            "",
            "This page is for you if you choose a base model. It names every model type in transformers' list of causal language",
            f"models, {len(results)} in version {transformers.__version__}, and says how it trains. The model type is in `config.json`.",
            "",
            f"`tests/model/test_architectures.py` wrote this page on {date.today():%d %B %Y}. It trains a tiny random model of each type",
            "for two steps on a CPU, saves, verifies and reloads it. Packed rows must have the losses of padded rows, and stock",
            "transformers must compute the run's held-out loss from the saved folder.",
            "",
            "A run asks the same of a small copy of your model before rows are read ([own-data.md](own-data.md)). Another config of",
            "the same type may therefore get another verdict. Encoders such as BERT were tried with `is_decoder` set. Without it",
            "they are refused, because their tokens see later ones.",
            "",
            section("Trained on packed rows", groups["packed"]),
            section("Trained on padded rows", groups["padded"]),
            section("Refused before rows are read, or not tried", groups["refused"]),
        ]
    )


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_causal_language_model_of_transformers_trains_or_is_refused_in_a_sentence(
    tmp_path: Path,
) -> None:
    results = list(sweep(tmp_path))
    failed = [found for found in results if found["verdict"] == "failed"]
    assert not failed, failed
    PAGE.write_text(page(results))
    assert sum(found["verdict"] != "refused" for found in results) >= FLOOR


def test_the_page_names_every_architecture_and_counts_them() -> None:
    text = PAGE.read_text()
    sections = re.split(r"^## .*: (\d+)\n", text, flags=re.MULTILINE)[1:]
    counts, lists = (
        [int(number) for number in sections[::2]],
        [re.findall(r"`([\w.-]+)`", part) for part in sections[1::2]],
    )
    assert [len(kinds) for kinds in lists] == counts
    assert sorted(kind for kinds in lists for kind in kinds) == sorted(KINDS)
    assert counts[0] + counts[1] >= FLOOR


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
