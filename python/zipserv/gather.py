# SPDX-License-Identifier: Apache-2.0
"""The op ``zipserv::embedding``: rows of a compressed matrix by index, of which only the rows asked for are decoded.

On the CPU the native decoder does it row by row. On a GPU few rows are a series of PyTorch gathers over the blob of
docs/format.md (no kernel of its own, no synchronisation, no allocation that depends on data): a lookup touches one row
in 64 of each tile, so its cost is launches. For many rows (a long prompt) the table is decompressed piece by piece, and each
piece is indexed.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from . import _zipserv
from .format import DTYPES, HEADER_BYTES, TILE

#: Most weights that the GPU path works on at a time: bounds its index tensors to some 100 MB.
CHUNK_WEIGHTS = 1 << 21

#: From this many rows on, and if the table is not far larger, it is decompressed piece by piece; weights of a piece.
MANY_ROWS, ROWS_OF_TABLE, PIECE_WEIGHTS = 512, 256, 1 << 26

#: Bytes of a tile without its escapes, by dtype code (docs/format.md, section 5).
FIXED_BYTES = {1: 5632, 2: 7168}

_LIB: Any = torch.library.Library("zipserv", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIB.define(
    "embedding(Tensor ids, Tensor blob, int m, int k, int dtype_code, int max_escapes) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def max_escapes(blob: torch.Tensor, m: int, k: int) -> int:
    """The longest escape list of any tile, in entries; 0 for a raw blob. Reads the tile headers once."""
    if _is_raw(blob, m, k):
        return 0
    tiles = -(-m // TILE) * -(-k // TILE)
    heads = blob[HEADER_BYTES : HEADER_BYTES + 8 * tiles].view(tiles, 8)
    return int((heads[:, 4].int() + heads[:, 5].int() * 256).max())


def _is_raw(blob: torch.Tensor, m: int, k: int) -> bool:
    return blob.numel() == HEADER_BYTES + 2 * m * k


def _raw_rows(ids: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return F.embedding(ids, blob[HEADER_BYTES:].view(dtype).view(m, k))


def _embedding_cpu(
    ids: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, max_escapes: int
) -> torch.Tensor:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < m:
        raise IndexError(f"an index is not within 0 .. {m - 1}")
    dtype = DTYPES[dtype_code]
    if _is_raw(blob, m, k):
        return _raw_rows(ids, blob, m, k, dtype)
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


def _embedding_gather(
    ids: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, max_escapes: int
) -> torch.Tensor:
    """The same by gathers alone, on any device."""
    dtype = DTYPES[dtype_code]
    if blob.storage_offset() % 2:
        blob = blob.clone()
    if _is_raw(blob, m, k):
        return _raw_rows(ids, blob, m, k, dtype)
    flat = ids.reshape(-1)
    out = torch.empty((flat.numel(), k), dtype=dtype, device=blob.device)
    step = max(1, CHUNK_WEIGHTS // max(k, max_escapes * -(-k // TILE)))
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].long()
        out[start : start + step] = _rows(part, blob, m, k, dtype_code, max_escapes)
    return out.view(*ids.shape, k)


def _embedding_cuda(
    ids: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, max_escapes: int
) -> torch.Tensor:
    many = ids.numel() >= MANY_ROWS and ids.numel() * ROWS_OF_TABLE >= m
    if many and DTYPES[dtype_code] == torch.bfloat16 and not _is_raw(blob, m, k):
        return _embedding_pieces(ids, blob, m, k, dtype_code)
    return _embedding_gather(ids, blob, m, k, dtype_code, max_escapes)


def _embedding_pieces(ids: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int) -> torch.Tensor:
    """The same from a table that exists decompressed piece by piece."""
    flat = ids.reshape(-1).long()
    torch._assert_async(((flat >= 0) & (flat < m)).all(), f"an index is not within 0 .. {m - 1}")
    out = torch.empty((flat.numel(), k), dtype=DTYPES[dtype_code], device=blob.device)
    step = max(TILE, PIECE_WEIGHTS // k // TILE * TILE)
    for row0 in range(0, m, step):
        piece = torch.ops.zipserv.decompress_rows(blob, m, k, dtype_code, row0, min(row0 + step, m))
        index = flat - row0
        found = F.embedding(index.clamp(0, piece.shape[0] - 1), piece)
        out = torch.where(((index >= 0) & (index < piece.shape[0]))[:, None], found, out)
    return out.view(*ids.shape, k)


def _rows(ids: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, max_escapes: int) -> torch.Tensor:
    """Rows ``ids (R,)`` of a tiled blob: docs/format.md, sections 4 to 6, one line each."""
    device, fixed_bytes = blob.device, FIXED_BYTES[dtype_code]
    wide = -(-k // TILE)
    tiles = -(-m // TILE) * wide
    fixed0 = HEADER_BYTES + -(-8 * tiles // 128) * 128
    escape0 = fixed0 + tiles * fixed_bytes
    half = blob.view(torch.int16)

    tile = (ids // TILE)[:, None] * wide + torch.arange(wide, device=device)  # (R, wide)
    row = (ids % TILE)[:, None, None]
    col = torch.arange(TILE, device=device)
    warp, eighth = row // 16, row % 16 // 8
    lane = col // 8 % 4 * 8 + row % 8
    weight = (2 * eighth + col // 32) * 8 + col % 8
    pair, upper = weight // 2, weight % 2
    base = (fixed0 + tile * fixed_bytes)[:, :, None]

    # Sign and mantissa: the pairs 8..15 share words with 0..7, byte-swapped.
    word = pair % 8
    packed = _take(half, base + warp * 1024 + word // 4 * 512 + lane * 16 + word % 4 * 4, upper)
    swapped = pair >= 8
    mantissa = torch.where(swapped, packed >> 8, packed) & 0x7F
    sign = torch.where(swapped, packed >> 7, packed >> 15) & 1

    def plane_bits(offset: int) -> torch.Tensor:
        bits = torch.zeros_like(packed)
        for plane in range(3):
            words = _take(half, base + offset + warp * 384 + plane * 128 + lane * 4, upper)
            bits |= (words >> (pair + plane) % 16 & 1) << plane
        return bits

    heads = half[HEADER_BYTES // 2 : HEADER_BYTES // 2 + 4 * tiles].view(tiles, 4)[tile].int() & 0xFFFF
    offset = (heads[..., 0].long() + (heads[..., 1].long() << 16)) * 16 + escape0
    count, window, dense = heads[..., 2], heads[..., 3] & 0xFF, heads[..., 3] >> 8 & 1
    exponent = window[..., None] + plane_bits(4096)
    escaped = _escapes(blob, half, offset, count, window, row, max_escapes)
    exponent = torch.where(escaped >= 0, escaped, exponent)
    listed = _take_bytes(blob, offset[..., None] + row * TILE + col)
    exponent = torch.where(dense[..., None] > 0, listed, exponent)

    if dtype_code == 1:
        value = sign << 15 | exponent << 7 | mantissa
    else:
        value = sign << 15 | exponent << 10 | mantissa << 3 | plane_bits(5632)
    value = torch.where(value >= 1 << 15, value - (1 << 16), value).to(torch.int16)
    return value.view(ids.numel(), wide * TILE)[:, :k].contiguous().view(DTYPES[dtype_code])


def _escapes(
    blob: torch.Tensor,
    half: torch.Tensor,
    offset: torch.Tensor,
    count: torch.Tensor,
    window: torch.Tensor,
    row: torch.Tensor,
    max_escapes: int,
) -> torch.Tensor:
    """The exponents of each tile's escapes in this row, ``(R, wide, 64)``; -1 where there is none."""
    found = torch.full((*count.shape, TILE + 1), -1, dtype=torch.int32, device=blob.device)
    if max_escapes:
        entry = torch.arange(max_escapes, device=blob.device)
        codes = _take(half, offset[..., None] + 2 * entry, 0)
        position, symbol = codes & 0xFFF, codes >> 12
        literal = _take_bytes(blob, offset[..., None] + 2 * count[..., None] + entry)
        exponent = window[..., None] + torch.where(symbol < 12, -1 - symbol, symbol - 4)
        exponent = torch.where(symbol == 15, literal, exponent)
        mine = (entry < count[..., None]) & (position // TILE == row)
        # Entries of other rows, and what lies behind the list, go to a column that is dropped.
        column = torch.where(mine, position % TILE, TILE).long()
        found.scatter_(-1, column, torch.where(mine, exponent, -1))
    return found[..., :TILE]


def _take(half: torch.Tensor, byte: torch.Tensor, upper: torch.Tensor | int) -> torch.Tensor:
    """The 16 bits at an even byte address (``upper``: at the two bytes after), as int32 0 .. 65535."""
    index = (byte // 2 + upper).clamp_(max=half.numel() - 1)
    return half[index].int() & 0xFFFF


def _take_bytes(blob: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return blob[index.clamp(max=blob.numel() - 1)].int()


def _embedding_fake(
    ids: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, max_escapes: int
) -> torch.Tensor:
    return blob.new_empty((*ids.shape, k), dtype=DTYPES[dtype_code])


def _no_gradient(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
    return (None,) * 6


_LIB.impl("embedding", _embedding_cpu, "CPU")
_LIB.impl("embedding", _embedding_cuda, "CUDA")
torch.library.register_fake("zipserv::embedding", _embedding_fake, lib=_LIB)
torch.library.register_autograd("zipserv::embedding", _no_gradient, lib=_LIB)
