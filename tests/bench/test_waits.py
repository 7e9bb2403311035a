"""Waits of the host for the device are seen on a CPU, by the calls that cause them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from training.bench.waits import by_owner, watch_waits

CPU = torch.device("cpu")

# Each takes a tensor of the device.
WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "a condition": lambda x: 1 if x.sum() > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "where of one argument": lambda x: torch.where(x > 0),
    "a mask as index": lambda x: x[x > 1],
    "assignment by a mask": lambda x: x.__setitem__(x > 1, 0.0),
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "a number made on the device": lambda x: torch.tensor(3, device=x.device),
    "new_tensor": lambda x: x.new_tensor(3),
    "as_tensor of a number": lambda x: torch.as_tensor(3, device=x.device),
    "a copy to the device": lambda x: torch.tensor([1, 2]).to(x.device),
    "copy_ from the host": lambda x: x.copy_(torch.tensor([1.0, 2.0, 3.0])),
}
NONE: dict[str, Callable[[torch.Tensor], object]] = {
    "arithmetic": lambda x: (x * 2 + 1).sum(),
    "where of three arguments": lambda x: torch.where(x > 1, x, 0.0),
    "a filled tensor": lambda x: torch.full((), 3, device=x.device),
    "new_full": lambda x: x.new_full((), 3),
    "an index": lambda x: x[torch.arange(2, device=x.device)],
    "masked_fill": lambda x: x.masked_fill(x > 1, 0.0),
    "another dtype": lambda x: x.to(torch.float64),
    "a copy that is not waited for": lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True),
    "reading the host's own": lambda x: (torch.tensor([1, 2]) + 1).tolist(),
    "a mask of the host's own": lambda x: torch.arange(3)[torch.arange(3) > 1].nonzero(),
}


@pytest.mark.parametrize(("calls", "expected"), [(WAITS, 1), (NONE, 0)], ids=["waits", "no waits"])
def test_a_read_of_the_device_is_one_wait_and_its_arithmetic_is_none(calls, expected):
    x = torch.tensor([1.0, 2.0, 3.0])
    counted = {}
    for name, call in calls.items():
        with watch_waits(CPU) as waits:
            call(x)
        counted[name] = len(waits)
    assert counted == dict.fromkeys(calls, expected)


def test_a_wait_in_a_backward_pass_is_seen():
    class Reader(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * gradient.sum().item()

    x = torch.ones(3, requires_grad=True)
    with watch_waits(CPU) as waits:
        Reader.apply(x).sum().backward()
    assert [wait.operation for wait in waits] == ["_local_scalar_dense"]
    assert "backward" in waits[0].place


def test_a_wait_is_put_down_to_the_package_whose_code_waits():
    from accelerate.utils import send_to_device

    from training.data.batching import document_lengths

    positions = torch.tensor([[0, 1, 0]])
    with watch_waits(CPU) as waits:
        document_lengths(positions)
        send_to_device({"input_ids": torch.tensor([[1, 2]])}, CPU)
    assert by_owner(waits) == {"training": 2, "accelerate": 1}
    assert waits[0].place.startswith("training.data.batching:")
    assert waits[0].place.endswith(" document_lengths")
