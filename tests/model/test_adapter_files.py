"""An adapter in peft's format is merged as peft computes it; one that does not fit, or is broken, is refused in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from training.errors import ModelError
from training.model.adapter_files import ADAPTER_WEIGHTS, find_adapter, merge_into

peft = pytest.importorskip("peft")

ROWS = 50  # of each base's embedding
IDS = torch.randint(0, ROWS, (2, 7), generator=torch.Generator().manual_seed(1))


def gptj() -> PreTrainedModel:
    """With its own head, which has a bias."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    model = GPTJForCausalLM(
        GPTJConfig(vocab_size=ROWS, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=32, **tokens)
    )
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def gpt2() -> PreTrainedModel:
    """With transposed weights (Conv1D) and a tied head."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=ROWS, n_embd=16, n_layer=2, n_head=2, n_positions=32, **tokens)
    )


def llama(tied: bool = True) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=ROWS, num_hidden_layers=2, tie_word_embeddings=tied, **sizes)
    )


def save(make: Callable[[], PreTrainedModel], folder: Path, rows: int = ROWS, **config: Any) -> Path:
    """Saves a base, and an adapter on it whose every number is random. Returns the adapter's folder."""
    torch.manual_seed(0)
    base = make().eval()
    base.save_pretrained(folder / "base")
    if rows > ROWS:
        base.resize_token_embeddings(rows, mean_resizing=False)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "adapter"


def fresh(folder: Path) -> PreTrainedModel:
    kind = {"gptj": GPTJForCausalLM, "gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}
    config = json.loads((folder / "base" / "config.json").read_text())
    return kind[config["model_type"]].from_pretrained(folder / "base").eval()


ALL = "all-linear"
CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "head with a bias": (
        gptj,
        {"target_modules": ALL, "trainable_token_indices": {"wte": [48, 49]}, "modules_to_save": ["lm_head"]},
    ),
    "tied, rows": (llama, {"target_modules": ALL, "trainable_token_indices": {"embed_tokens": [3, 49]}}),
    "own head, rows": (
        lambda: llama(tied=False),
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [3]}},
    ),
    "rows of a list": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [4, 7]}),
    "transposed": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "other ranks and scales": (
        llama,
        {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    ),
    "embedding": (lambda: llama(tied=False), {"target_modules": ["embed_tokens", "v_proj", "lm_head"]}),
    "biases": (gptj, {"target_modules": ["fc_in", "fc_out"], "bias": "lora_only"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_has_the_logits_of_peft(case: str, tmp_path: Path) -> None:
    make, config = CASES[case]
    folder = save(make, tmp_path, r=4, lora_alpha=6, **config)
    with torch.no_grad():
        plain = fresh(tmp_path)(IDS).logits
        expected = peft.PeftModel.from_pretrained(fresh(tmp_path), folder)(IDS).logits
        model = fresh(tmp_path)
        merge_into(model, find_adapter(str(folder)))
        merged = model(IDS).logits
    assert (plain - expected).abs().max() > 0.01, "the adapter changes the model"
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_a_sum_is_rounded_once_to_the_precision_of_the_base(tmp_path: Path) -> None:
    folder = save(llama, tmp_path, r=4, target_modules=["q_proj"])
    exact, rounded = fresh(tmp_path).to(torch.bfloat16).float(), fresh(tmp_path).to(torch.bfloat16)
    for model in (exact, rounded):
        merge_into(model, find_adapter(str(folder)))
    for name, tensor in rounded.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact.state_dict()[name].to(torch.bfloat16)), name


def test_the_embedding_grows_by_the_rows_of_the_adapter(tmp_path: Path) -> None:
    folder = save(
        llama, tmp_path, ROWS + 3, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [51, 52]}
    )  # fmt: skip
    model = fresh(tmp_path)
    merge_into(model, find_adapter(str(folder)))
    rows = load_file(folder / ADAPTER_WEIGHTS)[
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    assert model.get_input_embeddings().weight.shape[0] == ROWS + 3
    assert torch.equal(model.get_output_embeddings().weight[51:], rows)


def edit(folder: Path, **entries: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "prompt tuning": (lambda f: edit(f, peft_type="PROMPT_TUNING"), "of the kind PROMPT_TUNING; plain LoRA was expected"),
    "DoRA": (lambda f: edit(f, use_dora=True), "of the kind LORA with DoRA; plain LoRA"),
    "PiSSA": (lambda f: edit(f, init_lora_weights="pissa"), r"a start from changed base weights \(pissa\)"),
    "no base": (lambda f: edit(f, base_model_name_or_path=None), "without the name of its base model. Set base_model"),
    "lost base": (lambda f: edit(f, base_model_name_or_path="/no/such/model"), "on /no/such/model, and there is no such folder"),
    "itself": (lambda f: edit(f, base_model_name_or_path=str(f)), "it is a LoRA adapter on itself"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "its adapter_config.json is broken"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[1]"), "its adapter_config.json is broken"),
    "no weights": (lambda f: (f / ADAPTER_WEIGHTS).unlink(), "it has no adapter_model.safetensors"),
    "cut weights": (lambda f: (f / ADAPTER_WEIGHTS).write_bytes(b"12345678"), "cannot be read"),
    "empty": (lambda f: edit_weights(f, dict.clear), "is empty"),
    "another base": (lambda f: edit_weights(f, lambda t: t.update({f"{Q}B.weight": torch.zeros(8, 4)})), "its change"),
    "one factor": (lambda f: edit_weights(f, lambda t: t.pop(f"{Q}A.weight")), "has no other factor"),
    "ranks": (lambda f: edit_weights(f, lambda t: t.update({f"{Q}A.weight": torch.zeros(3, 16)})), "do not fit each other"),
    "NaN": (lambda f: edit_weights(f, lambda t: t[f"{Q}A.weight"].fill_(float("nan"))), "holds NaN"),
    "other layers": (
        lambda f: edit_weights(f, lambda t: t.update({"base_model.model.h.0.attn.lora_A.weight": torch.zeros(4, 16)})),
        "it changes h.0.attn.weight, which this model does not have",
    ),
    "no rows": (lambda f: edit(f, trainable_token_indices=None), "does not name the rows of model.embed_tokens"),
    "rows": (lambda f: edit(f, trainable_token_indices={"embed_tokens": [1, 2]}), r"expected \[2, 16\]"),
    "tied head": (
        lambda f: edit_weights(f, lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(ROWS, 16)})),
        "lm_head, which this model shares with its embedding",
    ),
    "alpha": (lambda f: edit(f, lora_alpha="much"), "lora_alpha in its adapter_config.json is 'much'"),
    "alpha NaN": (lambda f: edit(f, lora_alpha=float("nan")), "lora_alpha in its adapter_config.json is nan"),
    "alphas": (lambda f: edit(f, alpha_pattern={"(": 3}), "alpha_pattern in its adapter_config.json is"),
    "integers": (
        lambda f: edit_weights(f, lambda t: t.update({f"{Q}A.weight": t[f"{Q}A.weight"].int()})),
        "lora_A.weight holds int32, expected float16, bfloat16 or float32",
    ),
    "float8": (
        lambda f: edit_weights(f, lambda t: t.update({f"{Q}B.weight": t[f"{Q}B.weight"].to(torch.float8_e4m3fn)})),
        "lora_B.weight holds float8_e4m3fn, expected",
    ),
    "scalar": (
        lambda f: edit_weights(f, lambda t: t.update({"base_model.model.model.norm.weight": torch.tensor(1.0)})),
        "model.norm.weight has the shape \\[16\\], but its change \\[\\]",
    ),
    "rows far away": (
        lambda f: edit(f, trainable_token_indices={"embed_tokens": [10**9]}),
        "it trains row 1,000,000,000 of the embedding, and its base has 50 rows. Copy the adapter again with its tokenizer",
    ),
    "rank 0": (
        lambda f: edit_weights(f, lambda t: t.update({f"{Q}A.weight": torch.zeros(0, 16), f"{Q}B.weight": torch.zeros(16, 0)})),
        "have rank 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_cannot_be_merged_is_refused_and_the_base_unchanged(
    case: str, tmp_path: Path
) -> None:
    folder = save(
        llama, tmp_path, r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]}
    )
    change, words = REFUSED[case]
    change(folder)
    model = fresh(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=words):
        merge_into(model, find_adapter(str(folder)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("alpha", [1e300, 4.0])
def test_an_adapter_whose_sums_overflow_is_refused(alpha: float, tmp_path: Path) -> None:
    folder = save(llama, tmp_path, r=4, target_modules=["q_proj"])
    edit(folder, lora_alpha=alpha)
    if alpha < 1e300:
        edit_weights(folder, lambda tensors: [tensor.fill_(3e38) for tensor in tensors.values()])
    with pytest.raises(ModelError, match=r"q_proj\.weight would hold numbers beyond those of float32"):
        merge_into(fresh(tmp_path), find_adapter(str(folder)))


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    save(llama, tmp_path, target_modules=["q_proj"])
    assert find_adapter(str(tmp_path / "base")) is None
    assert find_adapter("demo") is None
    assert find_adapter("EleutherAI/gpt-j-6B") is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs the peak of memory from /proc")
def test_merging_takes_the_memory_of_one_layer_and_no_second_model(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }

    def wide() -> PreTrainedModel:
        return LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, num_hidden_layers=8, **sizes))

    folder = save(wide, tmp_path, r=4, target_modules=ALL)

    def memory(kind: str) -> int:
        [line] = (
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)
        )
        return 1024 * int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    model = fresh(tmp_path)  # mapped from its file until it is changed
    merge_into(model, find_adapter(str(folder)))
    size, grown = 4 * model.num_parameters(), memory("VmHWM") - before
    print(
        f"model {size / 2**20:.0f} MiB, its largest layer 4 MiB; loaded and merged: {grown / 2**20:.0f} MiB"
    )
    assert grown < 1.3 * size
