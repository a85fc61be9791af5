# SPDX-License-Identifier: Apache-2.0
"""The op ``zipserv::embedding``: rows of a compressed matrix by their numbers, of which only the rows asked for are decoded.

On the CPU the native decoder does it row by row; on a GPU it is one kernel (``kernels/gather.cu``). The matrix gets no gradient.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from . import _zipserv
from .format import DTYPES, HEADER_BYTES
from .ops import cuda_module

_LIB: Any = torch.library.Library("zipserv", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIB.define("embedding(Tensor ids, Tensor blob, int m, int k, int dtype_code) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _embedding_cpu(ids: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int) -> torch.Tensor:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < m:
        raise IndexError(f"an index is not within 0 .. {m - 1}")
    dtype = DTYPES[dtype_code]
    if blob.numel() == HEADER_BYTES + 2 * m * k:  # raw
        return F.embedding(ids, blob[HEADER_BYTES:].view(dtype).view(m, k))
    wanted, inverse = torch.unique(ids, return_inverse=True)
    rows = torch.empty((wanted.numel(), k), dtype=dtype)
    pointer, nbytes, out = blob.data_ptr(), blob.numel(), rows.data_ptr()
    start = 0
    # Neighbours are decoded in one call.
    for _, run in groupby(enumerate(wanted.tolist()), lambda item: item[1] - item[0]):
        indices = [index for _, index in run]
        first, count = indices[0], len(indices)
        _zipserv.decode_rows(pointer, nbytes, first, first + count, out + 2 * k * start, 2 * k * count, k)
        start += count
    return F.embedding(inverse, rows)


def _embedding_cuda(ids: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int) -> torch.Tensor:
    rows: torch.Tensor = cuda_module().embedding(ids, blob, m, k, dtype_code)
    return rows


def _embedding_fake(ids: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int) -> torch.Tensor:
    return blob.new_empty((*ids.shape, k), dtype=DTYPES[dtype_code])


def _no_gradient(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
    return (None,) * 5


_LIB.impl("embedding", _embedding_cpu, "CPU")
_LIB.impl("embedding", _embedding_cuda, "CUDA")
torch.library.register_fake("zipserv::embedding", _embedding_fake, lib=_LIB)
torch.library.register_autograd("zipserv::embedding", _no_gradient, lib=_LIB)
embedding = torch.ops.zipserv.embedding
