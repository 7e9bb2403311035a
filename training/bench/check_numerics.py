"""Lines of the GPU check that compare numbers: attention, packing and the loss against float32."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend

from training.bench.lines import Finding, NotApplicableError, Setup, serve
from training.bench.random_model import gptj_config, random_gptj, random_rows, row_lengths
from training.consts import DEFAULT_SEED, GIB
from training.data.collator import DataCollatorForPackedRows, offsets
from training.machine.flops import wait_for
from training.machine.kernels import best_precision, kernel_problems
from training.machine.local import free_host_gib
from training.model import packing
from training.model.attention import attend_document_by_document, attend_in_one_call, varlen_obstacle
from training.model.loading import DTYPES
from training.model.loss import ResponseLossHead
from training.model.twin import POSITIONS, VOCABULARY, shrunken_twin

Tensors = list[torch.Tensor]

# A kernel in 16 bit differs from float32 by its rounding. Correct kernels stay below this share of the norm, wrong ones
# (a token too many, a factor) are far above it.
ROUNDING = {"bf16": 2e-2, "fp16": 4e-3}
TIMES_PLAIN = 2.0  # our function may be this much less exact than the plain one in the same precision
LOSS_SCALE = 2.0**16  # the first scale of fp16 training
DOCUMENTS = 8  # in a row of the attention's lines: a GPU's rows of one step on 8 GPUs


def machine(setup: Setup) -> Finding:
    """Whether this torch has kernels for the GPU. Its figures are the head of the table."""
    if setup.device == "cpu":
        figures = {"device": "CPU", "free_gib": free_host_gib(), "precision": "bf16"}
        return Finding(True, f"no GPU: tiny sizes on {torch.get_num_threads()} threads of the CPU", figures)
    if problems := kernel_problems():
        return Finding(False, "; ".join(problems))
    gpu = torch.cuda.get_device_properties(0)
    free, total = (size / GIB for size in torch.cuda.mem_get_info(0))
    figures = {
        "device": gpu.name,
        "memory_gib": total,
        "free_gib": free,
        "capability": f"{gpu.major}.{gpu.minor}",
        "precision": best_precision(),
    }
    text = (
        f"{free:.1f} of {total:.1f} GiB free, compute capability {gpu.major}.{gpu.minor}, {best_precision()}"
    )
    return Finding(True, text, figures)


# --- attention ----------------------------------------------------------------------------------------


def attention_loop(setup: Setup) -> Finding:
    """The kernel call per document against plain softmax attention in float32."""
    lengths = row_lengths(DOCUMENTS)
    inputs = _attention_inputs(setup, lengths)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend_document_by_document(query, key, value, lengths)

    difference = _difference(_with_gradients(attend, inputs), _reference(inputs, lengths))
    milliseconds = 1000 * _time(lambda: _with_gradients(attend, inputs), setup)
    good = difference <= ROUNDING[setup.precision]
    text = (
        f"{_backend(inputs, lengths)}: {milliseconds:.2f} ms forward and backward of {DOCUMENTS} documents, "
        f"{sum(lengths)} tokens; results and gradients differ from float32 by {difference:.1e}"
    )
    return Finding(good, text, {"milliseconds": milliseconds, "difference": difference})


def attention_in_one_call(setup: Setup) -> Finding:
    """The one kernel call for all documents against the loop, and against float32."""
    dtype, size = DTYPES[setup.precision], setup.width // setup.heads
    if obstacle := varlen_obstacle(torch.device(setup.device), dtype, size, 0.0):
        raise NotApplicableError(f"attention in one call is not used here: {obstacle}")
    lengths = row_lengths(DOCUMENTS)
    inputs = _attention_inputs(setup, lengths)
    bounds = offsets(lengths, setup.device)

    def one_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend_in_one_call(query, key, value, bounds, max(lengths))

    def loop(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend_document_by_document(query, key, value, lengths)

    result, expected = _with_gradients(one_call, inputs), _with_gradients(loop, inputs)
    reference = _reference(inputs, lengths)
    from_loop = _difference(result, expected)
    from_float32 = _difference(result, reference), _difference(expected, reference)
    times = [1000 * _time(partial(_with_gradients, f, inputs), setup) for f in (one_call, loop)]
    good = from_float32[0] <= min(ROUNDING[setup.precision], TIMES_PLAIN * from_float32[1])
    text = (
        f"{times[0]:.2f} ms against {times[1]:.2f} of the loop; results and gradients differ from the loop by "
        f"{from_loop:.1e}, from float32 by {from_float32[0]:.1e} (the loop: {from_float32[1]:.1e})"
    )
    figures = {"milliseconds": times[0], "loop_milliseconds": times[1], "difference": from_float32[0]}
    return Finding(good, text, figures)


def _attention_inputs(setup: Setup, lengths: list[int]) -> Tensors:
    """Random query, key, value and the gradient of the result, each `(1, tokens, heads, head size)`."""
    shape = (1, sum(lengths), setup.heads, setup.width // setup.heads)
    generator = torch.Generator().manual_seed(DEFAULT_SEED)
    return [
        torch.randn(shape, generator=generator).to(setup.device, DTYPES[setup.precision]) for _ in range(4)
    ]


def _with_gradients(attend: Callable[..., torch.Tensor], inputs: Tensors) -> Tensors:
    """The result, and the gradients of query, key and value."""
    *heads, gradient = (tensor.detach() for tensor in inputs)
    heads = [tensor.requires_grad_() for tensor in heads]
    result = attend(*heads)
    return [result.detach(), *torch.autograd.grad(result, heads, gradient)]


def _reference(inputs: Tensors, lengths: list[int]) -> Tensors:
    """The same by plain softmax attention in float32, one document after another."""

    def attend(*heads: torch.Tensor) -> torch.Tensor:
        parts = []
        for query, key, value in zip(*(tensor[0].split(lengths) for tensor in heads), strict=True):
            scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
            parts.append(
                torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), value)
            )
        return torch.cat(parts)[None]

    return _with_gradients(attend, [tensor.float() for tensor in inputs])


def _difference(found: Tensors, expected: Tensors) -> float:
    """The largest relative difference of a tensor, by norm. NaN counts as infinite."""
    shares = [
        ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)).item()
        for a, b in zip(found, expected, strict=True)
    ]
    return max(share if share == share else float("inf") for share in shares)


def _backend(inputs: Tensors, lengths: list[int]) -> str:
    """The kernel that torch chooses for the first document."""
    query, key, value = (tensor[:, : lengths[0]].transpose(1, 2) for tensor in inputs[:3])
    choice = torch._fused_sdp_choice(query, key, value, is_causal=True)
    return SDPBackend(choice).name.lower().replace("_", " ")


def _time(function: Callable[[], Any], setup: Setup) -> float:
    """Mean seconds of a call, repeated for `setup.seconds`."""
    device = torch.device(setup.device)
    function()
    wait_for(device)
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < setup.seconds:
        function()
        wait_for(device)
        calls += 1
    return (time.perf_counter() - begin) / max(calls, 1)


# --- packing ------------------------------------------------------------------------------------------


def packing_proof(setup: Setup) -> Finding:
    """The proof of model/packing.py, with its margin: a row whose documents are one must fail it by far."""
    config = gptj_config(setup)
    obstacle = packing.packing_of(config).obstacle
    model = shrunken_twin(config)
    packing.use_packed_attention(model)
    lengths = packing.DOCUMENT_LENGTHS
    ids = torch.randint(1, VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=part).logits for part in ids.split(lengths, dim=1)], dim=1)
        packed = model(input_ids=ids, position_ids=positions).logits
        # One document of the same tokens and positions: 1 instead of 0 where a document begins.
        mixed = model(input_ids=ids, position_ids=_as_one_document(positions)).logits
    honest, contaminated = (((row - alone).abs().max() / alone.abs().max()).item() for row in (packed, mixed))
    good = obstacle is None and honest <= packing.TOLERANCE and contaminated > 100 * packing.TOLERANCE
    text = (
        f"packed and alone differ by {honest:.0e} of the largest logit, a contaminated row by {contaminated:.0e}; "
        f"the limit is {packing.TOLERANCE:.0e}"
    )
    if obstacle:
        text = f"{obstacle}; {text}"
    return Finding(good, text, {"difference": honest, "contaminated": contaminated})


def _as_one_document(positions: torch.Tensor) -> torch.Tensor:
    """Positions `(1, tokens)` at which only the first document begins; longer rows start again at 1."""
    return torch.where(
        torch.arange(positions.shape[1], device=positions.device) == 0, 0, positions % (POSITIONS - 1) + 1
    )


def packing_leak(setup: Setup) -> Finding:
    """On the device, in its precision: one document must not feel another, forward or backward."""
    model = random_gptj(gptj_config(setup, layers=2), DTYPES[setup.precision], setup.device)
    packing.Packing(response_loss=True).prepare(model)
    rows = random_rows(DOCUMENTS, setup.vocabulary)
    start = rows[0]["length"]
    packed = _logits(model, rows)
    changed = [
        rows[0] | {"input_ids": [(token + 1) % setup.vocabulary for token in rows[0]["input_ids"]]},
        *rows[1:],
    ]
    leak = _share(_logits(model, changed)[start:], packed[start:])
    contaminated = _share(_logits(model, changed, True)[start:], _logits(model, rows, True)[start:])
    backward = [_gradient_of_first(model, rows, as_one) for as_one in (False, True)]
    good = leak <= 0.01 * contaminated and contaminated > 0 and backward[0] == 0 < backward[1]
    text = (
        f"another first document changes the others by {leak:.1e} (contaminated: {contaminated:.1e}); the others' loss "
        f"has a gradient of {backward[0]:.1e} at it (contaminated: {backward[1]:.1e})"
    )
    figures = {"leak": leak, "contaminated": contaminated, "gradient": backward[0]}
    return Finding(good, text, figures)


def _batch(rows: list[dict[str, Any]], device: Any, as_one: bool) -> dict[str, Any]:
    if as_one:  # the contaminated row
        ids = [token for row in rows for token in row["input_ids"]]
        rows = [{"input_ids": ids, "response_spans": [[rows[0]["length"], len(ids)]]}]
    batch = DataCollatorForPackedRows(pad_token_id=0)(rows)
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def _logits(model: Any, rows: list[dict[str, Any]], as_one: bool = False) -> torch.Tensor:
    """Logits `(tokens, vocabulary)` of the packed rows, or of one document of all their tokens."""
    batch = _batch(rows, model.device, as_one)
    names = ("input_ids", "position_ids", "cu_seq_lens_q", "documents")
    with torch.no_grad():
        hidden = model.base_model(**{name: batch[name] for name in names}).last_hidden_state
        return F.linear(hidden[0], model.lm_head.weight, model.lm_head.bias).float()


def _gradient_of_first(model: Any, rows: list[dict[str, Any]], as_one: bool) -> float:
    """The largest gradient at the first document's embeddings of the loss of the others."""
    start, embedded = rows[0]["length"], []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    hook = model.get_input_embeddings().register_forward_hook(keep)
    silent = [rows[0] | {"response_spans": []}, *rows[1:]]
    try:
        model(**_batch(silent, model.device, as_one)).loss.backward()
    finally:
        hook.remove()
    model.zero_grad()
    gradient = embedded[0].grad
    assert gradient is not None
    return gradient[0, :start].abs().max().item()


def _share(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


# --- the loss -----------------------------------------------------------------------------------------


def loss_in(precision: str) -> Callable[[Setup], Finding]:
    """The check of the chunked loss in a precision. In fp16 with the loss scale of training."""

    def check(setup: Setup) -> Finding:
        if precision == "bf16" and setup.device == "cuda" and best_precision() != "bf16":
            raise NotApplicableError("this GPU cannot compute in bf16")
        scale = LOSS_SCALE if precision == "fp16" else 1.0
        inputs = _loss_inputs(setup, DTYPES[precision])
        reference = _loss(_plain_loss, [tensor.float() for tensor in inputs[:3]], inputs[3], 1.0)
        plain = _difference(_loss(_plain_loss, inputs[:3], inputs[3], scale), reference)
        found = _loss(_chunked_loss, inputs[:3], inputs[3], scale)
        difference = _difference(found, reference)
        value = abs(found[0] / reference[0] - 1).item()
        good = difference <= min(ROUNDING[precision], TIMES_PLAIN * plain) and value <= 1e-3
        text = (
            f"loss {found[0].item():.4f}, in float32 {reference[0].item():.4f}; gradients differ from float32 by "
            f"{difference:.1e} (the plain loss: {plain:.1e})" + (f", scale {scale:.0f}" if scale > 1 else "")
        )
        return Finding(good, text, {"difference": difference, "plain": plain, "value": value})

    return check


def _loss_inputs(setup: Setup, dtype: torch.dtype) -> Tensors:
    """Hidden states, weight and bias of the head, and the labels of a step's rows."""
    generator = torch.Generator().manual_seed(DEFAULT_SEED)
    spans = [span for row in random_rows(setup.rows, setup.vocabulary) for span in row["response_spans"]]
    labels = sum(end - start for start, end in spans)
    weight = 0.02 * torch.randn(setup.vocabulary, setup.width, generator=generator)
    hidden, bias = (
        torch.randn(*shape, generator=generator) for shape in ((labels, setup.width), (len(weight),))
    )
    targets = torch.randint(setup.vocabulary, (labels,), generator=generator)
    return [*(tensor.to(setup.device, dtype) for tensor in (hidden, weight, bias)), targets.to(setup.device)]


def _loss(
    compute: Callable[..., torch.Tensor], inputs: Tensors, targets: torch.Tensor, scale: float
) -> Tensors:
    """The loss and its gradients in float32, computed with a loss scale and divided by it."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    loss = compute(*inputs, targets)
    gradients = torch.autograd.grad(loss.float() * scale, inputs)
    return [loss.detach().float(), *(gradient.float() / scale for gradient in gradients)]


def _plain_loss(hidden: Any, weight: Any, bias: Any, targets: Any) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets)


def _chunked_loss(hidden: Any, weight: Any, bias: Any, targets: Any) -> torch.Tensor:
    head = ResponseLossHead(weight.shape[1], weight.shape[0], device="meta")
    return torch.func.functional_call(head, {"weight": weight, "bias": bias}, (hidden, targets, len(targets)))


CHECKS = {
    "machine": machine,
    "loop": attention_loop,
    "varlen": attention_in_one_call,
    "proof": packing_proof,
    "leak": packing_leak,
    "loss-fp16": loss_in("fp16"),
    "loss-bf16": loss_in("bf16"),
}

if __name__ == "__main__":
    serve(CHECKS)
