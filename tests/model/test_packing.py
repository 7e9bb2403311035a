"""An architecture is packed only if it keeps documents apart, and every process gets the same result."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask

from tests.conftest import jsonl, rows_of
from tests.data.test_collator import packed, padded
from tests.model.test_attention import two_spans
from tests.run.zero3_packing import KINDS, answers
from tests.starts import FLOAT32, run, torchrun
from training.consts import DEMO, IGNORE_INDEX
from training.model.packing import Packing, compare_packed_with_alone, packing_of
from training.model.tokenizer import load_tokenizer
from training.model.twin import HEADS, POSITIONS, VOCABULARY, WINDOW, shrunken_config, shrunken_twin
from training.options.trainer_options import TrainingOptions
from training.plan.model_shape import BUILT_IN
from training.run import prepare
from training.storage.record import read_run_record

PACKS = {"obstacle": None, "response_loss": True}
PACKS_WITH_ITS_OWN_LOSS = {"obstacle": None, "response_loss": False}
CROSSES = r"its attention crosses documents: the logits of document \d in a packed row differ from its logits alone by .*"
FAILS = "its code fails on a packed row .*"


def packing(kind: str, **changes: object) -> Packing:
    return packing_of(AutoConfig.for_model(kind, **changes))


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2", "gptj", "phi", "gemma"]
)
def test_an_architecture_that_keeps_documents_apart_is_packed_with_the_chunked_loss(kind: str) -> None:
    assert packing(kind) == Packing(**PACKS)


@pytest.mark.parametrize(("kind", "changes"), [("gemma2", {}), ("granite", {"logits_scaling": 8.0})])
def test_an_architecture_that_caps_or_scales_its_logits_is_packed_with_its_own_loss(
    kind: str, changes: dict
) -> None:
    assert packing(kind, **changes) == Packing(**PACKS_WITH_ITS_OWN_LOSS)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("opt", CROSSES),
        ("bloom", CROSSES),
        ("falcon", CROSSES),
        ("gpt_oss", CROSSES),
        ("gpt_neo", FAILS),
        ("mpt", FAILS),
    ],
)
def test_an_architecture_that_mixes_documents_or_fails_on_long_rows_is_refused(
    kind: str, reason: str
) -> None:
    assert re.fullmatch(reason, str(packing(kind).obstacle))


def test_the_built_in_models_of_the_plan_can_be_packed_with_the_chunked_loss() -> None:
    assert {shape.kind for shape in BUILT_IN.values()} == {"gptj", "gpt_neox"}, "both are tested above"
    assert {(shape.obstacle, shape.response_loss) for shape in BUILT_IN.values()} == {(None, True)}


# --- the small copy -----------------------------------------------------------------------------------


def test_the_small_copy_keeps_kinds_of_layers_head_size_scaling_and_a_short_window() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    kinds = ["full_attention"] * 5 + ["sliding_attention"] * 31
    config = Qwen3Config(
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, hidden_size=2560,
        sliding_window=4096, use_sliding_window=True, layer_types=kinds, rope_parameters=rope,
        max_position_embeddings=131072, pad_token_id=151643,
    )  # fmt: skip
    small = shrunken_config(config, HEADS)
    assert small.layer_types == ["full_attention"] * 5 + ["sliding_attention"], (
        "up to the first of the last kind"
    )
    assert (small.num_hidden_layers, small.sliding_window) == (6, WINDOW)
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (HEADS, 1, 128)
    assert (small.hidden_size, small.vocab_size, small.max_position_embeddings) == (
        256,
        VOCABULARY,
        POSITIONS,
    )
    assert small.rope_parameters == config.rope_parameters
    assert small.pad_token_id < VOCABULARY
    assert config.num_hidden_layers == 36, "the original is not changed"


def test_the_small_copy_of_a_gpt2_and_a_granite_keeps_their_scaling() -> None:
    gpt2 = shrunken_config(
        GPT2Config(n_positions=1024, n_inner=3072, scale_attn_by_inverse_layer_idx=True), HEADS
    )
    assert (gpt2.n_positions, gpt2.n_inner, gpt2.n_embd) == (POSITIONS, 128, 128)
    assert gpt2.scale_attn_by_inverse_layer_idx
    granite = shrunken_config(GraniteConfig(attention_multiplier=0.0078, residual_multiplier=0.22), HEADS)
    assert (granite.attention_multiplier, granite.residual_multiplier) == (0.0078, 0.22)


def test_a_recurrent_model_and_one_with_a_list_of_layer_numbers_get_a_small_copy_too() -> None:
    mamba = shrunken_config(AutoConfig.for_model("mamba", hidden_size=4096), HEADS)
    assert (mamba.hidden_size, mamba.intermediate_size, mamba.num_hidden_layers) == (128, 128, 4)
    llama4 = shrunken_config(AutoConfig.for_model("llama4_text"), HEADS)
    assert llama4.moe_layers == [0, 1, 2, 3], "numbers of layers are not kinds of layers"
    assert (llama4.num_hidden_layers, llama4.attention_chunk_size) == (4, WINDOW)
    assert set(llama4.layer_types) == {"chunked_attention", "full_attention"}
    bamba = AutoConfig.for_model("bamba", attn_layer_indices=[0, 1, 2, 3, 9], num_hidden_layers=12)
    assert shrunken_config(bamba, HEADS).num_hidden_layers == 5, "its first recurrent layer is the fifth"


def test_the_small_copy_keeps_sizes_of_single_layers_shared_keys_and_inner_heads() -> None:
    gemma = shrunken_config(AutoConfig.for_model("gemma4_text"), HEADS)
    assert (gemma.num_hidden_layers, gemma.layer_types.count("full_attention")) == (6, 1)
    assert (gemma.per_layer_config[4].head_dim, gemma.per_layer_config[5].head_dim) == (256, 512)
    shared = shrunken_config(AutoConfig.for_model("gemma3n_text"), HEADS)
    assert (shared.num_hidden_layers, shared.num_kv_shared_layers) == (15, 7)
    whisper = AutoConfig.for_model(
        "whisper", d_model=1280, encoder_attention_heads=20, decoder_attention_heads=20
    )
    assert shrunken_config(whisper, HEADS).decoder_attention_heads == HEADS
    dbrx = AutoConfig.for_model("dbrx", n_heads=48, d_model=6144, attn_config={"kv_n_heads": 8})
    assert shrunken_config(dbrx, HEADS).attn_config.kv_n_heads == 1
    composite = AutoConfig.for_model("qwen3_5")
    assert not shrunken_config(composite, HEADS).text_config.use_cache


def test_a_copy_that_would_stay_large_or_has_no_finite_logits_is_refused_in_words() -> None:
    large = AutoConfig.for_model("llama", num_attention_heads=2, hidden_size=2**16)  # head size 32,768
    assert "it would have" in str(packing_of(large).obstacle)
    broken = LlamaConfig(hidden_size=64, num_attention_heads=4, rms_norm_eps=float("nan"))
    assert packing_of(broken).obstacle == "its logits are not finite, even with small random weights"


def test_the_same_config_gives_the_same_small_copy_and_leaves_the_random_state_unchanged() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (shrunken_twin(MistralConfig()).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- planted contamination ----------------------------------------------------------------------------


def attention_that_leaks(past: int):
    """torch's attention, but a token also attends to every token at least `past` positions before it, in any document."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        positions = torch.arange(query.shape[2])
        allowed = positions[:, None] - positions >= past
        if attention_mask is not None:
            allowed = allowed | attention_mask
        key, value = (
            heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1) for heads in (key, value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)
        return attended.transpose(1, 2), None

    return attend


@pytest.mark.parametrize("past", [1, 40], ids=["everywhere", "only from tokens that are far away"])
def test_a_planted_attention_to_other_documents_is_refused(past: int) -> None:
    AttentionInterface.register("leaky", attention_that_leaks(past))
    AttentionMaskInterface.register(
        "leaky", lambda *args, **kw: sdpa_mask(*args, **{**kw, "allow_is_causal_skip": False})
    )
    try:
        model = shrunken_twin(LlamaConfig())
        assert compare_packed_with_alone(model) == Packing(**PACKS)
        model = shrunken_twin(LlamaConfig())
        model.config._attn_implementation = "leaky"
        assert re.fullmatch(CROSSES, str(compare_packed_with_alone(model).obstacle))
    finally:
        del AttentionInterface._global_mapping["leaky"], ALL_MASK_ATTENTION_FUNCTIONS._global_mapping["leaky"]


def test_a_model_whose_own_loss_shifts_the_labels_again_is_refused() -> None:
    def shifts_again(logits, labels, vocab_size, shift_labels=None, **kwargs):
        return F.cross_entropy(logits[0], shift_labels[0].roll(1))

    model = shrunken_twin(LlamaConfig())
    model.loss_function = shifts_again
    assert re.fullmatch(
        "its loss of a packed row is .*, but its logits give .*",
        str(compare_packed_with_alone(model).obstacle),
    )


def test_a_forward_without_shift_labels_gets_the_chunked_loss_if_its_head_is_a_plain_linear() -> None:
    class Older(LlamaForCausalLM):
        def forward(self, input_ids=None, position_ids=None, attention_mask=None, labels=None):
            return super().forward(input_ids, position_ids=position_ids, use_cache=False)

    class Head(torch.nn.Linear):
        pass

    model = shrunken_twin(LlamaConfig())
    model.__class__ = Older
    assert compare_packed_with_alone(model) == Packing(**PACKS)
    model = shrunken_twin(LlamaConfig())
    model.__class__, model.lm_head.__class__ = Older, Head
    assert "its forward does not take a packed batch" in str(compare_packed_with_alone(model).obstacle)


def test_one_rank_with_an_obstacle_pads_the_rows_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "gather", lambda mine: [mine, Packing("older libraries"), Packing(None)])
    options, tokenizer = TrainingOptions(local_output_dir="x", input_model=DEMO), load_tokenizer(DEMO)
    agreed = prepare.agreed_packing(options, tokenizer)
    assert (agreed.obstacle, agreed.response_loss) == ("older libraries", False)
    monkeypatch.setattr(prepare, "gather", lambda mine: [mine, mine])
    assert prepare.agreed_packing(options, tokenizer) == Packing(**PACKS, whole_blocks=True)


# --- the same result everywhere -----------------------------------------------------------------------


@pytest.mark.slow
def test_the_results_are_the_same_in_three_processes_and_two_precisions_also_under_zero3(
    tmp_path: Path,
) -> None:
    result = run(torchrun(2, "tests.run.zero3_packing"), tmp_path, timeout=500)
    assert result.returncode == 0, result.stdout[-6000:]
    here = answers()
    assert len(here) == 2 * len(KINDS)
    assert [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)] == [here, here]


@pytest.mark.slow
def test_the_first_layers_of_a_trained_llama_are_packed_on_two_ranks(
    trained_llama: Path, tmp_path: Path
) -> None:
    rows, base, output = tmp_path / "rows.jsonl", tmp_path / "base", tmp_path / "out"
    jsonl(rows, rows_of(6))
    shutil.copytree(trained_llama, base, ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaForCausalLM.from_pretrained(trained_llama, num_hidden_layers=2).save_pretrained(base)
    options = ["--input-model", base, "--training-dataset", rows, "--local-output-dir", output]
    options += ["--test-size", 2, "--max-steps", 1, "--per-device-train-batch-size", 1, "--eval-steps", 100]
    result = run(torchrun(2), "--deepspeed", FLOAT32, "--force", *options)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "are padded" not in result.stdout
    assert read_run_record(output)["decided"]["batching"] == "packed"


# --- models as deep as real ones, with activations as large --------------------------------------------

DEPTHS = {
    "llama": 32, "mistral": 32, "qwen2": 28, "qwen3": 36, "gpt_neox": 36, "gpt2": 24, "gptj": 28, "phi": 32, "gemma": 28,
}  # fmt: skip
OUTLIER = 400.0


def deep_model(kind: str) -> PreTrainedModel:
    """A narrow model of real depth, whose residual stream has one channel in the hundreds, as trained models have."""
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": DEPTHS[kind],
        "vocab_size": 211,
    }
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False}
    special = {
        "gptj": {"rotary_dim": 8}, "mistral": {"sliding_window": 32, "num_key_value_heads": 2},
        "gemma": {"head_dim": 16, "num_key_value_heads": 1}, "llama": {"num_key_value_heads": 2},
        "qwen2": {"num_key_value_heads": 2}, "qwen3": {"num_key_value_heads": 2},
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **sizes, **tokens, **special.get(kind, {}), use_cache=False)
    for name in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if hasattr(config, "intermediate_size"):
        config.intermediate_size = 128
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.mul_(20)
        embedding[:, 5] = OUTLIER / (
            8 if kind == "gemma" else 1
        )  # Gemma multiplies it by the root of the width
    return model.train()


def rows(lengths: list[int], vocabulary: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(0, vocabulary, (length,), generator=generator).tolist(),
            "response_spans": two_spans(length, generator),
        }
        for length in lengths
    ]


def gradient(model: PreTrainedModel) -> torch.Tensor:
    vector = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    model.zero_grad()
    return vector


def padded_gradient(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Gradient of the padded batch's response loss, computed in float64 from the model's logits.

    transformers' own loss is float32, which is not precise enough: for a trained model its gradient is wrong by 1e-4.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    chosen = labels != IGNORE_INDEX
    F.cross_entropy(logits[chosen].double(), labels[chosen]).backward()
    return gradient(model)


def relative_difference(model: PreTrainedModel, documents: list[dict]) -> float:
    """Relative difference between the packed gradient, with what the architecture supports, and the padded one."""
    expected = padded_gradient(model, padded(documents))
    packing_of(model.config).prepare(model)
    model(**packed(documents)).loss.backward()
    return ((gradient(model) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", DEPTHS)
def test_packed_gradients_equal_padded_ones_at_real_depth_with_outlier_activations(kind: str) -> None:
    model, documents = deep_model(kind), rows([37, 120, 2, 64, 90, 11], 211)
    with torch.no_grad():
        states = model(torch.tensor([documents[0]["input_ids"]]), output_hidden_states=True).hidden_states
    assert max(state.abs().max() for state in states) > 0.9 * OUTLIER
    assert relative_difference(model, documents) < 1e-5


@pytest.mark.slow
def test_a_trained_llama_of_30_layers_is_packed_with_the_gradients_of_padded_rows(
    trained_llama: Path,
) -> None:
    model = LlamaForCausalLM.from_pretrained(trained_llama).train()
    model.config.use_cache = False
    assert packing_of(model.config) == Packing(**PACKS)
    assert relative_difference(model, rows([37, 120, 8, 64, 2, 90], 40_000)) < 1e-5


def test_a_model_with_the_chunked_loss_generates_as_before_and_is_saved_as_transformers_own(
    tmp_path: Path,
) -> None:
    model = deep_model("llama").eval()
    prompt = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "max_new_tokens": 8,
        "do_sample": False,
        "use_cache": True,
    }
    expected = model.generate(**prompt)
    Packing(**PACKS).prepare(model)
    assert torch.equal(model.generate(**prompt), expected)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is LlamaForCausalLM
    assert all(
        torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in model.state_dict().items()
    )
