"""One attention call a layer for all documents: where it is used, what it is called with, and that it changes nothing.

`varlen_attn` runs on CUDA only. Elsewhere its place is taken by a function with the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from tests.data.test_collator import THREE_ROWS, packed
from tests.model.test_attention import (
    eager_gptj,
    packing_gptj,
    random_rows,
    relative_gradient_difference,
    step,
)
from training.data.batching import offsets
from training.model import attention
from training.model.attention import (
    attend_document_by_document,
    attend_in_one_call,
    varlen_obstacle,
)

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "device", "dtype", "head_size", "dropout", "obstacle"),
    [
        ((8, 0), CUDA, torch.bfloat16, 256, 0.0, None),
        ((8, 6), CUDA, torch.float16, 64, 0.0, None),
        ((9, 0), CUDA, torch.bfloat16, 128, 0.0, None),
        ((12, 0), CUDA, torch.bfloat16, 256, 0.0, None),
        ((7, 0), CUDA, torch.float16, 256, 0.0, "it needs compute capability 8.0, and this GPU has 7.0"),
        ((7, 5), CUDA, torch.float16, 256, 0.0, "it needs compute capability 8.0, and this GPU has 7.5"),
        ((8, 0), CUDA, torch.float32, 256, 0.0, "it needs bfloat16 or float16, not torch.float32"),
        (
            (8, 0),
            CUDA,
            torch.bfloat16,
            320,
            0.0,
            "it needs a head size of at most 256, divisible by 8, not 320",
        ),
        (
            (8, 0),
            CUDA,
            torch.bfloat16,
            12,
            0.0,
            "it needs a head size of at most 256, divisible by 8, not 12",
        ),
        ((8, 0), CUDA, torch.bfloat16, 256, 0.1, "it has no dropout"),
        (None, torch.device("cpu"), torch.bfloat16, 256, 0.0, "it needs an NVIDIA GPU"),
        (None, torch.device("mps"), torch.float16, 256, 0.0, "it needs an NVIDIA GPU"),
    ],
)
def test_one_call_is_used_on_newer_nvidia_gpus_in_16_bits_without_dropout(
    capability: tuple[int, int] | None, device: torch.device, dtype: torch.dtype, head_size: int, dropout: float,
    obstacle: str | None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert varlen_obstacle(device, dtype, head_size, dropout) == obstacle


def test_a_torch_without_the_kernel_keeps_one_call_per_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    without = f"torch {torch.__version__} does not have it"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert varlen_obstacle(CUDA, torch.bfloat16, 256, 0.0) == without
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(attention, "_varlen_attn", lambda: None)
    assert varlen_obstacle(CUDA, torch.bfloat16, 256, 0.0) == without


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Lets the model use one call a layer on a CPU, and records its arguments and the choices of the kernel."""
    recorded: list[dict] = []

    def stand_in(*args: object, **kwargs: object) -> torch.Tensor:
        """Attention by a dense mask of the documents, from the arguments as torch's own function names them."""
        bound = signature(varlen_attn).bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        recorded.append(call)
        query, key, value = (call[name].transpose(0, 1) for name in ("query", "key", "value"))
        numbers = torch.arange(query.shape[1])
        document = torch.bucketize(numbers, call["cu_seq_q"][1:], right=True)
        left, right = call["window_size"]
        assert (left, right) == (-1, 0)
        mask = (document[:, None] == document) & (numbers[:, None] >= numbers)
        scores = (query @ key.transpose(1, 2)) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return (weights @ value).transpose(0, 1)

    def choose(*args: object) -> None:
        recorded.append({"choice": args})

    monkeypatch.setattr(attention, "_varlen_attn", lambda: stand_in)
    monkeypatch.setattr(attention, "varlen_obstacle", choose)
    return recorded


def test_the_kernel_is_chosen_once_a_forward_and_called_once_a_layer_for_all_documents(
    calls: list[dict],
) -> None:
    model = packing_gptj(eager_gptj())
    model(**packed(THREE_ROWS))
    choice, *layers = calls
    assert choice == {"choice": (torch.device("cpu"), torch.float32, 16, 0.0)}
    assert len(layers) == len(model.transformer.h) == 3
    for call in layers:
        assert {call[name].shape for name in ("query", "key", "value")} == {(12, 4, 16)}
        assert call["cu_seq_q"] is call["cu_seq_k"]
        assert (call["cu_seq_q"].tolist(), call["cu_seq_q"].dtype) == ([0, 5, 8, 12], torch.int32)
        assert call["max_q"] == call["max_k"] == 5
        assert call["scale"] is None  # 1 / sqrt(head size), as in the loop
    calls.clear()
    model.config.attn_pdrop = 0.1
    model(**packed(THREE_ROWS))
    model.eval()(**packed(THREE_ROWS))
    assert [call["choice"][3] for call in calls if "choice" in call] == [0.1, 0.0]


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("rows", [THREE_ROWS, random_rows(), []], ids=["literal", "random", "empty share"])
def test_one_call_gives_the_loss_and_gradients_of_one_call_per_document(
    rows: list[dict], checkpointing: dict | None, calls: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = eager_gptj(torch.float64)
    model, reference = packing_gptj(original), packing_gptj(original)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    loss = step(model, packed(rows), num_items_in_batch=7)
    assert len(calls) >= 4
    monkeypatch.setattr(attention, "varlen_obstacle", lambda *args: "the loop")
    assert loss == pytest.approx(step(reference, packed(rows), num_items_in_batch=7), rel=1e-6)
    if rows:
        assert relative_gradient_difference(model, reference) < 1e-6
    else:
        assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_positions_alone_give_the_same_call_as_the_boundaries_of_the_collator(calls: list[dict]) -> None:
    model, batch = packing_gptj(eager_gptj()), packed(THREE_ROWS)
    model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    _, *layers = calls
    assert [call["cu_seq_q"].tolist() for call in layers] == [[0, 5, 8, 12]] * 3
    assert [call["max_q"] for call in layers] == [5, 5, 5]


def test_under_autocast_the_kernel_gets_16_bits(calls: list[dict]) -> None:
    """Without DeepSpeed the weights are float32, and so are the rotated heads."""
    model = packing_gptj(eager_gptj())
    with torch.autocast("cpu", torch.bfloat16):
        model(**packed(THREE_ROWS)).loss.backward()
    choice, *layers = calls
    assert choice["choice"][1] == torch.bfloat16
    assert {call[name].dtype for call in layers for name in ("query", "key", "value")} == {torch.bfloat16}


def test_torchs_own_function_accepts_the_call_forward_and_backward() -> None:
    """On the meta device, where its kernels only compute shapes."""
    heads = [
        torch.empty(1, 12, 4, 256, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3)
    ]
    attended = attend_in_one_call(*heads, torch.empty(4, dtype=torch.int32, device="meta"), 5)  # type: ignore[call-arg]
    assert (attended.shape, attended.dtype) == ((1, 12, 4, 256), torch.bfloat16)
    attended.sum().backward()
    assert {(head.grad.shape, head.grad.dtype) for head in heads} == {((1, 12, 4, 256), torch.bfloat16)}


def heads_gradients(
    attend: Callable[..., torch.Tensor], dtype: torch.dtype, lengths: list[int], head_size: int
) -> list[torch.Tensor]:
    """The output of an attention on CUDA, and the gradients of query, key and value, in float32."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    shape = (1, sum(lengths), 16, head_size)
    *heads, outer = (torch.randn(shape, generator=generator, device="cuda") for _ in range(4))
    heads = [head.to(dtype).requires_grad_() for head in heads]
    attended = attend(*heads)
    attended.backward(outer.to(dtype))
    return [tensor.detach().float() for tensor in (attended, *(head.grad for head in heads))]


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_one_call_is_as_close_to_float32_as_one_call_per_document(
    dtype: torch.dtype, head_size: int
) -> None:
    if obstacle := varlen_obstacle(torch.device("cuda", 0), dtype, head_size, 0.0):
        pytest.skip(obstacle)
    lengths = [1, 37, 300, 2, 129, 64, 611]

    def loop(*heads: torch.Tensor) -> torch.Tensor:
        return attend_document_by_document(*heads, lengths)  # type: ignore[call-arg]

    def one_call(*heads: torch.Tensor) -> torch.Tensor:
        return attend_in_one_call(*heads, offsets(lengths, "cuda"), max(lengths))  # type: ignore[call-arg]

    exact = heads_gradients(loop, torch.float32, lengths, head_size)
    errors = [
        [((ours - true).norm() / true.norm()).item() for ours, true in zip(found, exact, strict=True)]
        for found in (heads_gradients(attend, dtype, lengths, head_size) for attend in (one_call, loop))
    ]
    assert all(ours < 1.5 * theirs for ours, theirs in zip(*errors, strict=True)), errors


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_a_model_has_the_gradients_of_one_call_per_document(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in packed(random_rows(count=9)).items()
    }
    exact = packing_gptj(eager_gptj()).cuda()
    step(exact, batch)
    one_call, loop = (packing_gptj(eager_gptj()).to("cuda", dtype) for _ in range(2))
    if obstacle := varlen_obstacle(one_call.device, dtype, 16, 0.0):
        pytest.skip(obstacle)
    scale = 1024.0  # fp16 is trained under a loss scale
    (one_call(**batch).loss * scale).backward()
    monkeypatch.setattr(attention, "varlen_obstacle", lambda *args: "the loop")
    (loop(**batch).loss * scale).backward()
    for parameter in exact.parameters():
        parameter.grad *= scale
    ours, theirs = (relative_gradient_difference(model, exact) for model in (one_call, loop))
    assert ours < 1.5 * theirs
