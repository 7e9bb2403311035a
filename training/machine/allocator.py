"""Lets torch's CUDA allocator use expandable segments, on GPUs that have them."""

from __future__ import annotations

import ctypes
import os

# torch reads the CUDA name first, then HIP's on AMD, then the general one.
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

_VIRTUAL_MEMORY = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED of cuda.h


def use_expandable_segments() -> None:
    """Sets PYTORCH_ALLOC_CONF, unless the user has set the allocator under any of its names.

    Packed rows have another length in each step. Memory freed in pieces of one length cannot always hold tensors of the
    next one; an expandable segment joins the pieces. Call this before torch is imported.
    """
    if not any(name in os.environ for name in VARIABLES) and _gpus_map_memory():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _gpus_map_memory() -> bool:
    """Whether all GPUs have CUDA's virtual memory management. Virtual GPUs do not, and torch would fail there.

    On WSL they say so, but the call fails (pytorch issue 192330).
    """
    if "microsoft" in os.uname().release.lower():
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no CUDA
        return False
    count, device, supported = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return False
    return count.value > 0 and all(
        driver.cuDeviceGet(ctypes.byref(device), ordinal) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(supported), _VIRTUAL_MEMORY, device) == 0
        and supported.value
        for ordinal in range(count.value)
    )
