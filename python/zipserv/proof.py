# SPDX-License-Identifier: Apache-2.0
"""Checking blobs on the GPU that holds them, at the speed of its memory.

A blob is decoded, the weights are compressed again, and all bytes are compared with the blob's. What the compressor writes is valid, checksum
included, so a blob that is equal to it is valid too. One that is not may still be (another program may choose other windows), so the
CPU has the last word on it. An experiment, switched on by the environment variable ``ZIPSERV_GPU_CHECK=1``.
"""

from __future__ import annotations

import os

import torch

from . import ops
from .format import Header

#: Blobs below this are checked by the CPU sooner than kernels are launched; above, decoded weights would take too much of the GPU.
LEAST_BYTES = 4 << 20
MOST_WEIGHT_BYTES = 3 << 29


def wanted() -> bool:
    """Whether GPUs are to check."""
    return os.environ.get("ZIPSERV_GPU_CHECK") == "1"


class Proofs:
    """Blobs of one device that are being checked."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._differs: list[torch.Tensor] = []
        self._scratch: torch.Tensor | None = None
        self._others: list[str] = []

    def begin(self, name: str, blob: torch.Tensor, header: Header) -> bool:
        """Queue the check of a blob of whose lists :func:`zipserv._zipserv.check_lists` has found nothing wrong. False: it is the CPU's."""
        count = header.m * header.k
        small = blob.numel() < LEAST_BYTES or 2 * count > MOST_WEIGHT_BYTES
        if not blob.is_cuda or small or header.raw or header.dtype is not torch.bfloat16:
            return False
        try:
            same = self._compare(blob, header, count)
        except torch.OutOfMemoryError:
            return False
        if same is None:
            self._others.append(name)
        else:
            self._names.append(name)
            self._differs.append(same)
        return True

    def _compare(self, blob: torch.Tensor, header: Header, count: int) -> torch.Tensor | None:
        if self._scratch is None or self._scratch.numel() < count:
            self._scratch = None
            self._scratch = torch.empty(count, dtype=torch.bfloat16, device=blob.device)
        weights = self._scratch[:count].view(header.m, header.k)
        ops.cuda_module().decompress(blob, header.m, header.k, header.dtype_code, 0, weights)
        again: torch.Tensor = ops.cuda_module().compress(weights, header.m, header.k, header.shape)[0]
        if again.numel() != blob.numel():
            return None
        kind = torch.int64 if blob.numel() % 8 == 0 and blob.data_ptr() % 8 == 0 else torch.uint8
        return torch.ne(again.view(kind), blob.view(kind)).any()

    def open_questions(self) -> list[str]:
        """Wait, and name the blobs that are not as the compressor would have written them."""
        found = torch.stack(self._differs).tolist() if self._differs else []
        return [*self._others, *(name for name, differs in zip(self._names, found, strict=True) if differs)]
