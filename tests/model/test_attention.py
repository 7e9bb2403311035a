"""Packed rows give the gradients of padded rows, and documents do not affect each other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.gptj import modeling_gptj as gptj

from tests.data.test_collator import PAD, THREE_ROWS, packed, padded
from tests.starts import run, torchrun
from training.data.batching import document_lengths
from training.data.collator import split_packed_batch
from training.model import loss as response_loss
from training.model.attention import rotary_sin_cos, rotate, use_packed_attention
from training.model.loss import use_response_loss

VOCABULARY = 211


def two_spans(length: int, generator: torch.Generator) -> list[list[int]]:
    """Two random answers in a row of `length` tokens; one may be empty."""
    return torch.randint(0, length + 1, (4,), generator=generator).sort()[0].view(-1, 2).tolist()


def random_rows(seed: int = 0, count: int = 5) -> list[dict]:
    """Rows of 2 to 59 tokens with two answers each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 60, (count,), generator=generator).tolist()
    return [
        {
            "input_ids": torch.randint(0, VOCABULARY, (n,), generator=generator).tolist(),
            "response_spans": two_spans(n, generator),
        }
        for n in lengths
    ]


def count_targets(rows: list[dict]) -> int:
    """Labels of rows: tokens of the answers, without a row's first token."""
    return sum(end - max(start, 1) for row in rows for start, end in row["response_spans"])


def tied_llama() -> LlamaForCausalLM:
    """A Llama whose head is its embedding, so that the chunked loss and the embedding give one gradient."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, use_cache=False, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def eager_gptj(dtype: torch.dtype = torch.float32) -> GPTJForCausalLM:
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=3, n_head=4, rotary_dim=8, use_cache=False,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=PAD, eos_token_id=PAD, initializer_range=0.1,
    )  # fmt: skip
    return GPTJForCausalLM(config).to(dtype).train()


def packing_gptj(original: GPTJForCausalLM) -> GPTJForCausalLM:
    model = copy.deepcopy(original)
    use_packed_attention(model)
    use_response_loss(model)
    return model


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor], **more: int) -> float:
    """Runs forward and backward, and returns the loss."""
    loss = model(**batch, **more).loss
    loss.backward()
    return loss.item()


def relative_gradient_difference(model: torch.nn.Module, reference: torch.nn.Module) -> float:
    """The largest ||g - g'|| / ||g|| of any parameter."""
    return max(
        ((p.grad.float() - q.grad.float()).norm() / q.grad.float().norm()).item()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    )


def test_document_lengths_are_read_from_restarting_positions() -> None:
    assert document_lengths(torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])) == [5, 3, 4]
    assert document_lengths(torch.tensor([[0, 0, 0, 1]])) == [1, 1, 2]


def test_rotary_embedding_equals_transformers() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [4, 3, 2, 1, 0]])
    heads = torch.randn(2, 5, 4, 16)
    table = gptj.create_sinusoidal_positions(64, 8)
    sin, cos = table[positions].chunk(2, dim=-1)
    rotated = torch.cat([gptj.apply_rotary_pos_emb(heads[..., :8], sin, cos), heads[..., 8:]], dim=-1)
    assert torch.equal(rotate(heads, *rotary_sin_cos(table, positions, torch.float32)), rotated)


@pytest.mark.parametrize(
    "chunk", [response_loss.LOSS_CHUNK_BYTES, 4 * VOCABULARY * 7], ids=["whole", "in chunks"]
)
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("rows", [THREE_ROWS, random_rows()], ids=["literal", "random"])
def test_packed_loss_and_gradients_equal_padded_eager_with_whole_and_chunked_logits(
    rows: list[dict], checkpointing: dict | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(response_loss, "LOSS_CHUNK_BYTES", chunk)
    reference = eager_gptj()
    model = packing_gptj(reference)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    assert step(model, packed(rows)) == pytest.approx(step(reference, padded(rows)), rel=1e-6)
    assert relative_gradient_difference(model, reference) < 1e-5


def test_two_forwards_before_their_backwards_keep_their_own_layouts() -> None:
    reference = eager_gptj()
    model = packing_gptj(reference)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    batches = [random_rows(seed=1), random_rows(seed=2)]
    sum(reference(**padded(rows)).loss for rows in batches).backward()
    sum(model(**packed(rows)).loss for rows in batches).backward()
    assert relative_gradient_difference(model, reference) < 1e-5


@pytest.mark.parametrize("micro_steps", [1, 2, 5, 7])
def test_micro_steps_sum_to_the_gradient_of_the_whole_share(micro_steps: int) -> None:
    reference = packing_gptj(eager_gptj())
    model = copy.deepcopy(reference)
    whole = packed(random_rows(seed=3, count=5))
    step(reference, whole)
    parts = split_packed_batch(whole, micro_steps)
    assert len(parts) == micro_steps
    for part in parts:
        step(model, part, num_items_in_batch=whole["shift_labels"].numel())
    assert relative_gradient_difference(model, reference) < 1e-5


def test_an_empty_share_has_zero_loss_and_zero_gradients() -> None:
    model = packing_gptj(eager_gptj())
    assert step(model, packed([]), num_items_in_batch=100) == 0.0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_evaluation_has_the_training_loss_and_no_gradient() -> None:
    model = packing_gptj(eager_gptj())
    batch = packed(random_rows(seed=8))
    with torch.inference_mode():
        actual = model(**batch).loss
    assert not actual.requires_grad
    assert actual.item() == step(model, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_packed_is_as_close_to_float32_as_padded_eager(dtype: torch.dtype) -> None:
    rows = random_rows(seed=5)
    exact = eager_gptj()
    step(exact, padded(rows))
    reference = eager_gptj(dtype)
    model = packing_gptj(reference)
    scale = 1024.0 if dtype == torch.float16 else 1.0  # fp16 is trained under a loss scale
    (reference(**padded(rows)).loss * scale).backward()
    (model(**packed(rows)).loss * scale).backward()
    for parameter in exact.parameters():
        parameter.grad *= scale
    ours, theirs = relative_gradient_difference(model, exact), relative_gradient_difference(reference, exact)
    assert ours < 1.5 * theirs


def test_neither_a_dense_mask_nor_logits_of_the_whole_row_are_allocated() -> None:
    model = packing_gptj(eager_gptj())
    rows = random_rows(seed=6, count=20)
    batch = packed(rows)
    tokens = batch["input_ids"].shape[1]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.numel() >= tokens * tokens:
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        output = model(**batch)
        output.loss.backward()
    assert output.logits is None
    assert tokens > 512  # so that a (tokens, tokens) mask would be larger than anything below
    assert largest == 0


def test_a_packed_row_gives_the_logits_of_its_separate_documents() -> None:
    model = packing_gptj(eager_gptj()).eval()
    batch = packed(THREE_ROWS)
    together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
    alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits[0] for row in THREE_ROWS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_left_and_right_padded_batches_give_the_logits_of_eager() -> None:
    reference = eager_gptj().eval()
    model = packing_gptj(reference)
    batch = padded(THREE_ROWS)
    for side in (lambda tensor: tensor, lambda tensor: tensor.flip(1)):
        ids, mask = side(batch["input_ids"]), side(batch["attention_mask"])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = reference(ids, attention_mask=mask, position_ids=positions).logits
        actual = model(ids, attention_mask=mask, position_ids=positions).logits
        assert not actual.isnan().any()
        torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_generation_equals_eager_with_left_padding_and_cache(cache: str | None) -> None:
    reference = eager_gptj().eval()
    model = packing_gptj(reference)
    prompts = torch.tensor([[PAD, PAD, PAD, 11, 12], [21, 22, 23, 24, 25], [PAD, 31, 32, 33, 34]])
    mask = (prompts != PAD).long()
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    settings |= {"attention_mask": mask, "use_cache": True, "disable_compile": True}
    expected = reference.generate(prompts, **settings)
    actual = model.generate(prompts, cache_implementation=cache, **settings)
    assert actual.tolist() == expected.tolist()
    assert actual.shape == (3, 25)


def test_the_saved_model_is_a_stock_gptj(tmp_path: Path) -> None:
    reference = eager_gptj()
    model = packing_gptj(reference)
    model.save_pretrained(tmp_path)
    reference.save_pretrained(tmp_path / "reference")
    assert (tmp_path / "config.json").read_text() == (tmp_path / "reference" / "config.json").read_text()
    reloaded = GPTJForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is GPTJForCausalLM
    assert type(reloaded.transformer.h[0].attn) is gptj.GPTJAttention
    for name, tensor in reference.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor)


@pytest.mark.slow
def test_two_zero3_ranks_give_the_gradients_of_one_eager_process(tmp_path: Path) -> None:
    result = run(torchrun(2, "tests.run.zero3_gradients"), tmp_path, timeout=500)
    assert result.returncode == 0, result.stdout[-6000:]
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text() == "passed"
