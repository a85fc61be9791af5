# SPDX-License-Identifier: Apache-2.0
"""What Python needs to know of the blob (docs/format.md): the 128-byte header and the matrix view of a tensor.

A header is read from its own 128 bytes alone, for a blob may lie on a GPU or in a file that is opened lazily.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import _zipserv
from .errors import Error

HEADER_BYTES = 128
MAX_DIMS = 8
MAX_SIDE = 2**31 - 1
TILE = 64

#: A compressed weight ``NAME`` is stored as the uint8 tensor ``NAME + SUFFIX``: in modules, state dicts and files.
SUFFIX = "_zipserv"

DTYPE_CODES: dict[torch.dtype, int] = {torch.bfloat16: 1, torch.float16: 2}
DTYPES: dict[int, torch.dtype] = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class Header:
    """A checked blob header (docs/format.md, section 2)."""

    dtype: torch.dtype
    raw: bool
    shape: tuple[int, ...]
    m: int
    k: int
    nbytes: int
    checksum: int

    @property
    def dtype_code(self) -> int:
        return DTYPE_CODES[self.dtype]


def raw_nbytes(m: int, k: int) -> int:
    """Length of a raw blob: header and matrix."""
    return HEADER_BYTES + 2 * m * k


def parse_header(head: torch.Tensor) -> Header:
    """Read and check the first 128 bytes of a blob.

    Args:
        head: contiguous uint8 vector in host memory; what follows the header is not looked at.

    Raises:
        Error: these bytes are not a header of format version 1.
    """
    if head.numel() < HEADER_BYTES:
        raise Error(f"not a zipserv blob: {head.numel()} bytes, a header alone has {HEADER_BYTES}")
    info = _zipserv.header(head.data_ptr(), head.numel())
    raw, m, k = info["mode"] == 0, info["m"], info["k"]
    header = Header(DTYPES[info["dtype"]], raw, tuple(info["shape"]), m, k, info["nbytes"], info["checksum"])
    if len(header.shape) == 2 and header.shape != (m, k):
        raise Error(f"damaged zipserv blob: a matrix of {header.shape}, stored as {m} x {k}")
    # A tiled blob is always smaller than the raw one (section 1): length alone tells the mode, which kernels rely on.
    if not raw and header.nbytes >= raw_nbytes(m, k):
        raise Error("damaged zipserv blob: the tiled form is not smaller than the raw form")
    return header


def storage_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The matrix (M, K) as which a tensor of this shape is stored: M * K is its number of elements.

    A matrix stays as it is. A vector is folded into rows of a power of two. Of more dimensions the last one becomes
    K where it fills a tile's width, else all but the first.
    """
    count = math.prod(shape)
    if len(shape) == 2:
        candidates = [(shape[0], shape[1])]
    elif len(shape) == 1:
        candidates = [(count // k, k) for k in (4096, 2048, 1024, 512, 256, 128, 64) if count % k == 0 and count >= 64 * k]
        candidates += [(count // 64, 64)] if count % 64 == 0 else [(1, count)]
    else:
        by_last = (count // shape[-1], shape[-1])
        by_first = (shape[0], count // shape[0])
        candidates = [by_last, by_first] if shape[-1] >= TILE else [by_first, by_last]
    for m, k in candidates:
        if m <= MAX_SIDE and k <= MAX_SIDE:
            return m, k
    raise ValueError(f"a tensor of shape {tuple(shape)} is too large: reshape it to a matrix with sides below 2**31")
