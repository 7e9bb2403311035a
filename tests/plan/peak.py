"""Peak memory of tensors on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def peak_bytes(function: Callable[[], Any]) -> int:
    """Peak bytes of tensors allocated while `function` runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    allocations: list[tuple[int, int]] = []

    def collect(nodes: Any) -> None:
        for node in nodes:
            if node.tag.name == "Allocation":  # frees are allocations of negative size
                allocations.append((node.start_time_ns, node.extra_fields.alloc_size))
            collect(node.children)

    collect(profiler.profiler.kineto_results.experimental_event_tree())
    alive = np.cumsum([size for _, size in sorted(allocations, key=lambda event: event[0])])
    return int(alive.max())
