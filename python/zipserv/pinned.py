# SPDX-License-Identifier: Apache-2.0
"""Pinned host memory of exactly the size that is asked for. torch's own rounds up to a power of two, up to twice the weights of a model."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import Any

import torch

from .errors import Error

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


def pinned_empty(nbytes: int, device: torch.device) -> torch.Tensor:
    """A ``(nbytes,)`` uint8 tensor, page-aligned, in host memory from which a CUDA device copies at its full speed.

    The memory is unpinned and given back when the last tensor on it goes.

    Raises:
        Error: the system does not pin that much.
    """
    memory = mmap.mmap(-1, max(nbytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to pin
        except OSError:
            pass  # a kernel without huge pages
    keeper = (ctypes.c_uint8 * len(memory)).from_buffer(memory)
    address = ctypes.addressof(keeper)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        code = runtime.cudaHostRegister(address, len(memory), _PORTABLE)
    if int(code):
        raise Error(f"{nbytes} bytes of host memory could not be pinned: {runtime.cudaGetErrorString(code)}")
    # The tensor holds `keeper`, and what runs at the end of `keeper` holds the memory: unpinned first, unmapped then.
    weakref.finalize(keeper, _unpin, runtime, address, memory, device).atexit = False
    return torch.frombuffer(keeper, dtype=torch.uint8)[:nbytes]


def _unpin(runtime: Any, address: int, memory: mmap.mmap, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may still be under way
    runtime.cudaHostUnregister(address)
    del memory
