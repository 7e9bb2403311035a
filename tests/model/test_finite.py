"""NaN and infinite weights are found in every kind of tensor, at memory speed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training.model.verify import largest_magnitudes, not_finite
from training.run.step_guard import describe_bad_base

NAN, INF = float("nan"), float("inf")
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_bad_number_is_found_at_every_place_of_a_tensor(dtype: torch.dtype) -> None:
    for count in (1, 7, 32, 1001):  # below, at and beyond the width of a vector register
        for place in {0, count // 2, count - 1}:
            for bad in (NAN, -NAN, INF, -INF):
                tensor = torch.randn(count).to(dtype)
                tensor[place] = bad
                assert repr(largest_magnitudes([tensor])) == repr([abs(bad)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_beside_infinite_numbers_is_found_and_the_largest_finite_numbers_pass(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for numbers in ([INF, NAN, 1], [NAN, -INF, INF], [1, INF, NAN]):
        assert math.isnan(largest_magnitudes([torch.tensor(numbers, dtype=dtype)])[0])
    assert largest_magnitudes([torch.tensor([1, -largest, largest], dtype=dtype)]) == [largest]


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_tensors_are_read(dtype: torch.dtype) -> None:
    sound, bad = (torch.tensor([1, last, -416.0]).to(dtype) for last in (0.5, NAN))
    assert [math.isnan(value) for value in largest_magnitudes([sound, bad])] == [False, True]


def test_tensors_of_any_shape_and_kind_are_read_in_order() -> None:
    strided = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "scalar": (torch.tensor(-3.0), 3),
        "a bad scalar": (torch.tensor(-INF), INF),
        "empty": (torch.empty(0, 4), 0),
        "transposed": (strided.t(), 11),
        "a column": (strided[:, 1], 9),
        "expanded": (torch.tensor([2.0]).expand(5), 2),
        "integers": (torch.tensor([2**62]), 0),
        "bools": (torch.tensor([True]), 0),
        "four bits": (torch.tensor([0x7F], dtype=torch.uint8).view(torch.float4_e2m1fn_x2), 0),
        "complex": (torch.tensor([complex(0, INF)]), INF),
        "a parameter": (torch.nn.Parameter(torch.tensor([5.0])), 5),
    }
    assert largest_magnitudes(tensor for tensor, _ in tensors.values()) == [
        expected for _, expected in tensors.values()
    ]
    assert largest_magnitudes([]) == []


def test_a_buffer_may_be_infinite_but_not_nan_and_a_weight_neither() -> None:
    model = torch.nn.Module()
    model.register_buffer("limit", torch.tensor([-INF]))
    tensors = {
        "a.limit": model.limit,
        "b.limit": torch.tensor(NAN),
        "w": torch.tensor([INF]),
        "x": torch.ones(3),
    }
    assert not_finite(tensors, model) == ["b.limit", "w"]


class Recorder(TorchDispatchMode):
    """Records the sizes of new tensors, views left out, and the operations for which a host waits for a GPU."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.sizes: list[int] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if any(
            word in str(func) for word in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select")
        ):
            self.waits.append(str(func))
        results = result if isinstance(result, list | tuple) else [result]
        tensors = [value for value in results if isinstance(value, torch.Tensor)]
        self.sizes += [t.numel() for t in tensors if t.untyped_storage().data_ptr() not in self.storages]
        return result


def test_weights_are_read_once_without_a_copy_and_without_a_wait_for_each_tensor() -> None:
    weights = [torch.ones(100, 100, dtype=dtype) for dtype in FLOATS]
    with Recorder(*weights) as recorder:
        largest_magnitudes(weights)
    assert max(recorder.sizes) == len(weights), "one number of each"
    assert recorder.waits == []


def test_the_padding_of_a_zero3_shard_is_not_a_weight() -> None:
    def message(*shards: torch.Tensor) -> str:
        weights = {f"w{n}": torch.nn.Parameter(torch.empty(0)) for n in range(len(shards))}
        for rank, (weight, shard) in enumerate(zip(weights.values(), shards, strict=True), start=2):
            # 5 numbers on 4 ranks: rank 2 holds the last one, rank 3 none.
            for name, value in (("ds_tensor", shard), ("ds_numel", 5), ("ds_zero_partition_rank", rank)):
                setattr(weight, name, value)
        return describe_bad_base(
            SimpleNamespace(named_parameters=weights.items, name_or_path="base"), fp16=False
        )

    assert "Its weights are finite" in message(torch.tensor([1, NAN]), torch.tensor([NAN, NAN]))
    assert "numbers in w0. Download" in message(torch.tensor([NAN, 1]), torch.tensor([NAN, NAN]))
