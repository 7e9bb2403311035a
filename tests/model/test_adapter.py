"""Adapters on a frozen base: their gradients are those of the merged model, and frozen weights cost nothing backward."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.data.test_collator import packed, padded
from tests.model.test_attention import VOCABULARY, count_targets, eager_gptj, random_rows
from training.errors import ModelError, OptionsError
from training.machine.flops import adapter_parameters, layer_tokens, model_parameters, training_flops
from training.model import loss as response_loss
from training.model.adapter import (
    Lora,
    add_adapter,
    check_adapter,
    lora_of,
    merge,
    row_ids,
    target_layers,
)
from training.model.new_rows import trainable_state
from training.model.packing import Packing, packing_of
from training.model.trial import try_model

LORA = Lora(rank=4, alpha=6.0)
ROWS = [3, 7, VOCABULARY - 2, VOCABULARY - 1]  # two rows that the base has, and two by which it grew
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama, untied": {"model_type": "llama", "tie_word_embeddings": False},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "phi, with a biased head": {"model_type": "phi", "tie_word_embeddings": False},
    "gpt2, with Conv1D": {"model_type": "gpt2", "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gemma2, with a scaled embedding and its own loss": {
        "model_type": "gemma2",
        "head_dim": 8,
        "attn_implementation": "eager",
    },
}


def base_of(kind: str) -> PreTrainedModel:
    """A small float64 model with random weights, the same at each call."""
    torch.manual_seed(0)
    if kind == "gptj":
        return eager_gptj(torch.float64)
    values = dict(SMALL | KINDS[kind])
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def with_adapter(kind: str, lora: Lora = LORA) -> PreTrainedModel:
    """A model as a run trains it on packed rows, with a random adapter instead of one that is zero."""
    model = base_of(kind)
    packing = packing_of(model.config)
    assert packing.obstacle is None
    packing.prepare(model)
    add_adapter(model, lora, ROWS, seed=1)
    set_random(model)
    return model


def set_random(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def merged_stock_model(kind: str, model: PreTrainedModel) -> PreTrainedModel:
    """A stock model, all of whose weights are trained, that computes what `model` computes."""
    merged, trained = base_of(kind), trainable_state(model)
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    names = {id(module): name for name, module in merged.named_modules()}
    with torch.no_grad():
        for name in target_layers(merged):
            layer = merged.get_submodule(name)
            a, b = (trained[f"{name}.lora_{part}.default.weight"] for part in "AB")
            change = LORA.alpha / LORA.rank * b @ a
            layer.weight += change.T if isinstance(layer, Conv1D) else change
        for module in (embedding, head):
            for tensor, rows in (("weight", "new_rows"), ("bias", "new_bias")):
                if (new := trained.get(f"{names[id(module)]}.{rows}")) is not None:
                    getattr(module, tensor)[ROWS] = new
    return merged


def expected_gradients(merged: PreTrainedModel, model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The gradients of adapter and new rows, by the chain rule from those of the merged weights."""
    trained = trainable_state(model)
    for name in trained:
        layer, _, part = name.partition(".lora_")
        if part:
            weight = merged.get_submodule(layer)
            gradient = weight.weight.grad.T if isinstance(weight, Conv1D) else weight.weight.grad
            a, b = (trained[f"{layer}.lora_{factor}.default.weight"] for factor in "AB")
            scale = LORA.alpha / LORA.rank
            yield name, scale * (b.T @ gradient if part.startswith("A") else gradient @ a.T)
        else:
            module, _, rows = name.rpartition(".")
            tensor = getattr(merged.get_submodule(module), "weight" if rows == "new_rows" else "bias")
            yield name, tensor.grad[ROWS]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("kind", ["gptj", *KINDS])
def test_gradients_of_packed_rows_are_those_of_padded_rows_of_the_merged_stock_model(
    kind: str, checkpointing: bool
) -> None:
    model = with_adapter(kind)
    merged = merged_stock_model(kind, model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = random_rows(seed=3, count=4)
    rows[0]["input_ids"][-3:] = ROWS[:3]
    rows[1]["input_ids"][0] = ROWS[3]
    expected_loss = merged(**padded(rows)).loss
    expected_loss.backward()
    loss = model(**packed(rows), num_items_in_batch=count_targets(rows)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    trained = trainable_state(model)
    compared = dict(expected_gradients(merged, model))
    assert compared.keys() == trained.keys()
    for name, gradient in compared.items():
        difference = ((trained[name].grad - gradient).norm() / gradient.norm()).item()
        assert difference < 1e-5, f"{name}: {difference}"
    assert all(tensor.grad is None for tensor in model.parameters() if not tensor.requires_grad)


def test_the_names_of_what_is_trained_are_those_of_checkpoints() -> None:
    trained = trainable_state(with_adapter("gptj")).keys()
    assert {"transformer.wte.new_rows", "lm_head.new_rows", "lm_head.new_bias"} <= trained
    assert "transformer.h.0.attn.q_proj.lora_A.default.weight" in trained
    assert len(trained) == 3 + 3 * 6 * 2
    tied = trainable_state(with_adapter("llama, tied")).keys()
    assert [name for name in tied if "new" in name] == ["model.embed_tokens.new_rows"]


@pytest.mark.parametrize("kind", ["gptj", "llama, tied", "gpt2, with Conv1D"])
def test_a_new_adapter_changes_nothing_and_is_drawn_from_the_seed_alone(kind: str) -> None:
    row = torch.tensor([[5, 3, 9, VOCABULARY - 1, 4]])
    base, model = base_of(kind).eval(), base_of(kind).eval()
    add_adapter(model, LORA, ROWS, seed=7)
    with torch.no_grad():
        ours, theirs = model(input_ids=row).logits, base(input_ids=row).logits
    # Logits of the new rows come from a product of their own, which some CPUs round otherwise.
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    old = [id for id in range(VOCABULARY) if id not in ROWS]
    assert torch.equal(ours[..., old], theirs[..., old])
    torch.manual_seed(123)
    again, other = base_of(kind), base_of(kind)
    add_adapter(again, LORA, ROWS, seed=7)
    add_adapter(other, LORA, ROWS, seed=8)
    first, second, third = (trainable_state(m) for m in (model, again, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


@pytest.mark.parametrize("kind", ["gptj", "llama, tied", "gemma2, with a scaled embedding and its own loss"])
def test_merged_weights_give_the_same_logits(kind: str) -> None:
    model = with_adapter(kind).eval()
    row = torch.tensor([[5, 3, 9, VOCABULARY - 1, 4]])
    with torch.no_grad():
        logits = model(input_ids=row).logits
        merge(model)
        assert torch.allclose(model(input_ids=row).logits, logits, rtol=1e-9, atol=1e-9)


def test_dropout_of_adapters_acts_in_training_only() -> None:
    model = with_adapter("llama, tied", Lora(4, 6.0, dropout=0.5))
    row = {"input_ids": torch.arange(9)[None]}
    with torch.no_grad():
        assert not torch.equal(model(**row).logits, model(**row).logits)
        model.eval()
        assert torch.equal(model(**row).logits, model(**row).logits)


# --- frozen weights cost nothing backward -------------------------------------------------------------


class ProductShapes(TorchDispatchMode):
    """Records the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")):
            self.shapes.append(tuple(result.shape))
        return result


def products_of_weights(model: PreTrainedModel, batch: dict[str, Any]) -> list[tuple[int, ...]]:
    """The matrix products of a step whose result has the shape of a frozen weight: gradients of weights."""
    frozen = {tuple(p.shape) for p in model.parameters() if not p.requires_grad and p.ndim == 2}
    frozen |= {shape[::-1] for shape in frozen}
    with ProductShapes() as products:
        model(**batch).loss.backward()
    return [shape for shape in products.shapes if shape in frozen]


@pytest.mark.parametrize("chunk", [None, 4 * VOCABULARY * 7], ids=["whole", "in chunks"])
@pytest.mark.parametrize("kind", ["gptj", "llama, untied", "llama, tied"])
def test_no_product_is_computed_for_the_gradient_of_a_frozen_weight(
    kind: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk:
        monkeypatch.setattr(response_loss, "LOSS_CHUNK_BYTES", chunk)
    batch = packed(random_rows(seed=4, count=3))
    tokens, labels = batch["input_ids"].shape[1], batch["shift_labels"].shape[1]
    model = with_adapter(kind)
    sizes = {size for p in model.parameters() for size in p.shape}
    assert not {tokens, labels, 7, labels % 7} & sizes, "a product over tokens could look like a weight's"
    assert products_of_weights(model, batch) == []
    for tensor in model.parameters():  # the same count finds them where weights are trained
        tensor.requires_grad_(not tensor.requires_grad)
    model.zero_grad()
    with ProductShapes() as products:
        model(**batch).loss.backward()
    head = tuple(model.get_output_embeddings().weight.shape)
    assert head in products.shapes or head[::-1] in products.shapes
    assert len(products.shapes) > 20


def test_a_frozen_head_without_new_rows_gets_no_gradient_either() -> None:
    model = base_of("gptj")
    Packing(response_loss=True).prepare(model)
    model.lm_head.requires_grad_(False)
    batch = packed(random_rows(seed=4, count=3))
    with ProductShapes() as products:
        model(**batch).loss.backward()
    assert tuple(model.lm_head.weight.shape) not in products.shapes
    gradient = model.transformer.h[0].attn.q_proj.weight.grad.clone()
    whole = base_of("gptj")
    Packing(response_loss=True).prepare(whole)
    whole(**batch).loss.backward()
    assert torch.allclose(gradient, whole.transformer.h[0].attn.q_proj.weight.grad, rtol=1e-9)


def test_the_flops_of_a_lora_step_are_those_that_torch_counts() -> None:
    model = with_adapter("gptj", Lora(2, 4.0))
    batch = packed(random_rows(seed=5, count=6))
    labels = batch["shift_labels"].shape[1]
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    layers, head = model_parameters(model)
    stock = base_of("gptj")
    assert (layers, head) == model_parameters(stock), "the base is counted without its adapter"
    tokens = layer_tokens(batch["input_ids"].shape[1], labels, 3)
    shape = (layers, head, 64, 3, tokens, labels, 0)  # torch counts no attention on a CPU
    counted = counter.get_total_flops()
    assert counted == pytest.approx(training_flops(*shape, adapters=adapter_parameters(model)), rel=0.02)
    assert counted < 0.75 * training_flops(*shape), "4N instead of 6N for frozen weights"
    assert adapter_parameters(stock) is None


@contextmanager
def saved_tensors() -> Iterator[list[torch.Tensor]]:
    """Collects the tensors that are stored for the backward pass."""
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def test_a_base_in_16_bits_stores_no_activation_in_float32_although_adapters_are_float32() -> None:
    model = eager_gptj(torch.bfloat16)
    Packing(response_loss=True).prepare(model)
    add_adapter(model, LORA, ROWS, seed=1)
    assert {tensor.dtype for tensor in trainable_state(model).values()} == {torch.float32}
    batch = packed(random_rows(seed=4, count=2))
    tokens = batch["input_ids"].shape[1]
    with saved_tensors() as saved:
        loss = model(**batch).loss
    large = {tensor.dtype for tensor in saved if tensor.ndim == 3 and tensor.shape[1:] == (tokens, 64)}
    assert large == {torch.bfloat16}
    loss.backward()
    gradients = [tensor.grad for tensor in trainable_state(model).values()]
    assert all(gradient.dtype == torch.float32 and torch.isfinite(gradient).all() for gradient in gradients)


# --- rows, targets and refusals -----------------------------------------------------------------------


def test_the_trained_rows_are_the_control_tokens_and_those_by_which_the_embedding_grew(
    tokenizer: Any,
) -> None:
    control = tokenizer.convert_tokens_to_ids(["### End", "### Instruction:", "### Response:\n"])
    rows = max(tokenizer.get_vocab().values()) + 1
    assert row_ids(tokenizer, rows + 9) == sorted(control), "a model with spare rows"
    assert row_ids(tokenizer, min(control)) == list(range(min(control), rows))
    assert row_ids(tokenizer, min(control) - 2) == list(range(min(control) - 2, rows))


def test_all_linear_layers_of_the_blocks_are_the_default_and_names_choose_some() -> None:
    model = base_of("gptj")
    names = {name.rsplit(".", 1)[1] for name in target_layers(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"}
    assert len(target_layers(model)) == 3 * 6
    assert target_layers(model, "attn.q_proj, fc_out") == [
        f"transformer.h.{n}.{name}" for n in range(3) for name in ("attn.q_proj", "mlp.fc_out")
    ]
    gpt2 = base_of("gpt2, with Conv1D")
    assert {name.rsplit(".", 1)[1] for name in target_layers(gpt2)} == {"c_attn", "c_proj", "c_fc"}


def test_targets_that_do_not_exist_and_a_rank_above_the_width_are_refused_together() -> None:
    config = base_of("gptj").config
    with pytest.raises(OptionsError) as caught:
        check_adapter(config, Lora(65, 1.0, targets="q_prj,lm_head,zzz"))
    width, near, head, none = caught.value.problems
    assert width.startswith("--lora 65: the model's width is 64")
    assert "--lora-targets q_prj: a gptj model has no linear layer of that name. Type q_proj" in near
    assert "--lora-targets lm_head" in head
    assert "It has fc_in, fc_out, k_proj, out_proj, q_proj, v_proj. Type one of them" in none
    check_adapter(config, Lora(64, 1.0, targets="q_proj"))


def test_the_adapter_of_a_run_comes_from_its_options() -> None:
    options = SimpleNamespace(lora=8, lora_alpha=None, lora_dropout=0.1, lora_targets="q_proj")
    assert lora_of(options) == Lora(8, 16.0, 0.1, "q_proj")


def test_code_that_goes_past_an_adapter_is_refused_before_weights_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = AutoConfig.for_model(**SMALL | KINDS["llama, untied"])
    packing = packing_of(config)
    assert try_model("my-model", config, packing, grows=True, lora=LORA).obstacle is None

    from transformers.models.llama import modeling_llama

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.linear(x, self.up_proj.weight)  # as fused kernels do
        return self.down_proj(self.act_fn(self.gate_proj(x)) * hidden)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    with pytest.raises(ModelError, match="its code goes past adapters: merged into the weights they change"):
        try_model("my-model", config, packing, grows=True, lora=LORA)
    only = Lora(4, 6.0, targets="q_proj,v_proj")
    assert try_model("my-model", config, packing, grows=True, lora=only).obstacle is None


def test_a_copy_of_a_model_with_an_adapter_is_independent() -> None:
    model = with_adapter("gptj")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.wte.new_rows.zero_()
    assert model.transformer.wte.new_rows.abs().sum() > 0
