# SPDX-License-Identifier: Apache-2.0
"""Checking blobs on the GPU that holds them, at the speed of its memory.

A blob is decoded, the weights are compressed again, and all bytes are compared with the blob's. What the compressor writes is valid, checksum
included, so a blob that is equal to it is valid too. One that is not may still be (another program may choose other windows), so the
CPU has the last word on it.
"""

from __future__ import annotations

import torch

from . import ops
from .errors import Error
from .format import Header

#: Blobs below this are checked by the CPU sooner than kernels are launched; above, decoded weights would take too much of the GPU.
LEAST_BYTES = 4 << 20
MOST_WEIGHT_BYTES = 3 << 29


class Proofs:
    """Blobs of one device that are being checked."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._differs: list[torch.Tensor] = []
        self._weights: torch.Tensor | None = None
        self._again: torch.Tensor | None = None
        self._others: list[str] = []
        self._able = True

    def takes(self, blob: torch.Tensor, header: Header) -> bool:
        """Whether the check of a blob is one for the GPU."""
        large = blob.numel() >= LEAST_BYTES and 2 * header.m * header.k <= MOST_WEIGHT_BYTES
        return self._able and large and blob.is_cuda and not header.raw and header.dtype is torch.bfloat16

    def begin(self, name: str, blob: torch.Tensor, header: Header) -> bool:
        """Queue the check of a blob of whose lists :func:`zipserv._zipserv.check_lists` has found nothing wrong. False: it is the CPU's."""
        if not self.takes(blob, header):
            return False
        try:
            same = self._compare(blob, header)
        except torch.OutOfMemoryError:
            return False
        except Error:  # no compiler for the kernels, say; a device that is lost tells of it again
            self._able = False
            return False
        if same is None:
            self._others.append(name)
        else:
            self._names.append(name)
            self._differs.append(same)
        return True

    def _compare(self, blob: torch.Tensor, header: Header) -> torch.Tensor | None:
        count, nbytes = header.m * header.k, blob.numel()
        self._weights = weights = _at_least(self._weights, count, torch.bfloat16, blob.device)
        self._again = again = _at_least(self._again, nbytes, torch.uint8, blob.device)
        weights, again = weights[:count].view(header.m, header.k), again[:nbytes]
        ops.cuda_module().decompress(blob, header.m, header.k, header.dtype_code, 0, weights)
        if ops.cuda_module().compress_into(weights, header.m, header.k, header.shape, again) != nbytes:
            return None
        kind = torch.int64 if nbytes % 8 == 0 and blob.data_ptr() % 8 == 0 else torch.uint8
        return torch.ne(again.view(kind), blob.view(kind)).any()

    def open_questions(self) -> list[str]:
        """Wait, and name the blobs that are not as the compressor would have written them."""
        found = torch.stack(self._differs).tolist() if self._differs else []
        return [*self._others, *(name for name, differs in zip(self._names, found, strict=True) if differs)]


def _at_least(memory: torch.Tensor | None, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory of at least so many elements: the same again, or new where that is too small."""
    return memory if memory is not None and memory.numel() >= count else torch.empty(count, dtype=dtype, device=device)
