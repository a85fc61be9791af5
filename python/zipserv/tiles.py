# SPDX-License-Identifier: Apache-2.0
"""Cutting and merging compressed matrices on tile borders (docs/format.md).

A block tile of 64 x 64 weights decodes from its own bytes alone. So a shard of a matrix, or several matrices put together
into one, is a copy of tiles with the escape offsets rebased: nothing is decoded to build it and nothing is encoded again.
A cut may end only where a tile ends or where the matrix ends.

    shard = tiles.cut(blob, rows=(0, 2048))          # rows of a column-parallel weight
    shard = tiles.cut(blob, cols=(2048, 4096))       # columns of a row-parallel weight
    qkv = tiles.stack([q, k, v])                     # one weight, one kernel launch
    whole = tiles.join([left, right])                # the inverse of a cut of columns

All functions take and give blobs: contiguous one-dimensional uint8 tensors on the CPU. A source may be a view of a mapped
file: only the tile headers and the tiles that are asked for are read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from . import _zipserv
from .errors import Error
from .format import DTYPES, HEADER_BYTES, MAX_DIMS, TILE, Header, parse_header, raw_nbytes
from .tilecode import FIXED_BYTES, decode_tiles

__all__ = ["Block", "assemble", "cut", "decode", "join", "on_borders", "read_header", "stack"]

_TILE_HEADER = np.dtype([("offset", "<u4"), ("count", "<u2"), ("base", "u1"), ("flags", "u1")])
_MAGIC = b"ZIPSERV\0"
_HEADER = struct.Struct("<8sI4BQQ8QQI16x")  # all but the CRC

Bytes = npt.NDArray[np.uint8]
Range = tuple[int, int]


def read_header(blob: torch.Tensor) -> Header:
    """The checked header of a blob on the CPU.

    Raises:
        ValueError: this is no contiguous uint8 vector on the CPU.
        Error: its bytes are not a blob, or its length is not what its header says.
    """
    if blob.dtype != torch.uint8 or blob.dim() != 1 or not blob.is_contiguous() or not blob.is_cpu:
        raise ValueError(f"a blob is a contiguous uint8 vector, here on the CPU, not {blob.dtype} {tuple(blob.shape)} on {blob.device}")
    header = parse_header(blob[:HEADER_BYTES])
    if header.nbytes != blob.numel():
        raise Error(f"damaged zipserv blob: its header speaks of {header.nbytes} bytes, it has {blob.numel()}")
    return header


def _crc32c(data: bytes) -> int:
    """CRC-32C, bit by bit: a header has 124 bytes under it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _pack(header: Header) -> Bytes:
    """The 128 bytes of a header (docs/format.md section 2)."""
    shape = header.shape + (0,) * (MAX_DIMS - len(header.shape))
    escape_bytes = 0 if header.raw else header.nbytes - _sections(header)[1]
    sizes = (header.m, header.k, *shape, escape_bytes, header.checksum)
    body = _HEADER.pack(_MAGIC, 1, header.dtype_code, int(not header.raw), len(header.shape), 0, *sizes)
    return np.frombuffer(body + struct.pack("<I", _crc32c(body)), np.uint8)


def _tile_grid(header: Header) -> tuple[int, int]:
    return -(-header.m // TILE), -(-header.k // TILE)


def _sections(header: Header) -> tuple[int, int]:
    """Where the fixed parts and the escapes of a tiled blob begin."""
    rows, cols = _tile_grid(header)
    fixed = HEADER_BYTES + -(-8 * rows * cols // 128) * 128
    return fixed, fixed + rows * cols * FIXED_BYTES[header.dtype_code]


def _bounds(what: str, span: Range | None, end: int) -> Range:
    lo, hi = (0, end) if span is None else span
    if not 0 <= lo < hi <= end:
        raise ValueError(f"{what} {lo}..{hi} are not within 0..{end}")
    return lo, hi


def on_borders(header: Header, rows: Range | None = None, cols: Range | None = None) -> bool:
    """True if this part of the matrix can be cut out of the blob without decoding it."""
    (r0, r1), (c0, c1) = _bounds("rows", rows, header.m), _bounds("columns", cols, header.k)
    if header.raw:
        return False
    aligned = r0 % TILE == 0 and c0 % TILE == 0
    return aligned and (r1 % TILE == 0 or r1 == header.m) and (c1 % TILE == 0 or c1 == header.k)


@dataclass(frozen=True)
class Block:
    """A rectangle of tiles, still lying in the blob it was taken from (or owned, after `own`)."""

    dtype_code: int
    m: int
    k: int
    heads: npt.NDArray[np.void]  # [tile rows, tile columns] of tile headers; their offsets are the source's
    sizes: npt.NDArray[np.int64]  # [tile rows, tile columns]: bytes of each tile's escape list
    fixed: Bytes  # [tile rows, tile columns, fixed bytes]
    escapes: tuple[Bytes, ...]  # one run for each row of tiles

    @staticmethod
    def of(blob: torch.Tensor, rows: Range | None = None, cols: Range | None = None) -> Block:
        """The tiles of rows `rows` and columns `cols`. Nothing is copied but the tile headers.

        Raises ValueError if the range does not lie on tile borders, the blob is raw, or its tile headers lie.
        """
        header = read_header(blob)
        (r0, r1), (c0, c1) = _bounds("rows", rows, header.m), _bounds("columns", cols, header.k)
        if header.raw:
            raise ValueError("the blob holds a raw matrix: it has no tiles")
        if not on_borders(header, (r0, r1), (c0, c1)):
            raise ValueError(f"rows {r0}..{r1}, columns {c0}..{c1} of {header.m} x {header.k} do not lie on borders of 64 x 64 tiles")
        data = blob.numpy()
        (tm, tk), (fixed_at, escapes_at) = _tile_grid(header), _sections(header)
        heads = np.frombuffer(data[HEADER_BYTES : HEADER_BYTES + 8 * tm * tk].tobytes(), _TILE_HEADER).reshape(tm, tk)
        starts = np.append(heads["offset"].astype(np.int64).reshape(-1) * 16, header.nbytes - escapes_at)
        sizes = np.diff(starts)
        if starts[0] != 0 or (sizes < 0).any():
            raise Error("damaged zipserv blob: the tiles' escape offsets do not rise")
        begin, end = starts[:-1].reshape(tm, tk), starts[1:].reshape(tm, tk)
        a, b, c, d = r0 // TILE, -(-r1 // TILE), c0 // TILE, -(-c1 // TILE)
        fixed_bytes = FIXED_BYTES[header.dtype_code]
        fixed = data[fixed_at:escapes_at].reshape(tm, tk, fixed_bytes)[a:b, c:d]
        escapes = data[escapes_at:]
        return Block(
            header.dtype_code,
            r1 - r0,
            c1 - c0,
            heads[a:b, c:d],
            sizes.reshape(tm, tk)[a:b, c:d],
            fixed,
            tuple(escapes[begin[row, c] : end[row, d - 1]] for row in range(a, b)),
        )

    def own(self) -> Block:
        """The same tiles in memory of their own, so that the source can go."""
        return replace(self, fixed=self.fixed.copy(), escapes=tuple(run.copy() for run in self.escapes))

    def decode(self) -> torch.Tensor:
        """The weights [m, k]. For small or incompressible blocks: it works in NumPy, one row of tiles at a time."""
        out = np.empty((self.m, self.k), np.uint16)
        for i, run in enumerate(self.escapes):
            ends = np.cumsum(self.sizes[i])
            lists = [run[end - size : end] for size, end in zip(self.sizes[i], ends, strict=True)]
            tiles = decode_tiles(self.dtype_code, self.heads[i], self.fixed[i], lists)
            rows = tiles.transpose(1, 0, 2).reshape(TILE, -1)
            out[i * TILE : (i + 1) * TILE] = rows[: self.m - i * TILE, : self.k]
        return torch.from_numpy(out.view(np.int16)).view(DTYPES[self.dtype_code])


def _check_grid(grid: Sequence[Sequence[Block]]) -> tuple[int, int]:
    if not grid or not grid[0] or any(len(row) != len(grid[0]) for row in grid):
        raise ValueError("blocks must form a full grid: at least one, and the same number in each row")
    heights, widths = [row[0].m for row in grid], [block.k for block in grid[0]]
    for i, row in enumerate(grid):
        for j, block in enumerate(row):
            if block.dtype_code != grid[0][0].dtype_code:
                raise ValueError("blocks of BF16 and FP16 weights can't be put together")
            if (block.m, block.k) != (heights[i], widths[j]):
                raise ValueError(f"block ({i}, {j}) is {block.m} x {block.k}, its place in the grid {heights[i]} x {widths[j]}")
    for what, spans in (("rows", heights), ("columns", widths)):
        if any(span % TILE for span in spans[:-1]):
            raise ValueError(f"only the last block may have a number of {what} that is no multiple of {TILE}, these have {spans}")
    return sum(heights), sum(widths)


def assemble(grid: Sequence[Sequence[Block]], shape: Sequence[int] | None = None) -> torch.Tensor:
    """One blob of a grid of blocks, row by row. `shape` is the shape of the tensor (default: the matrix's).

    The header's checksum is that of the new matrix, so a full check of the result proves what a check of any blob does.
    Kept raw when the tiles together would not be smaller than the weights, as every writer of the format does.
    """
    m, k = _check_grid(grid)
    code = grid[0][0].dtype_code
    heads = np.concatenate([np.concatenate([b.heads for b in row], 1) for row in grid], 0)
    sizes = np.concatenate([np.concatenate([b.sizes for b in row], 1) for row in grid], 0)
    flat = sizes.reshape(-1)
    offsets = (np.cumsum(flat) - flat).reshape(sizes.shape)
    if int(flat.sum()) >= 16 << 32:
        raise ValueError("the escape lists together are over 64 GiB: cut the matrix")
    heads["offset"] = offsets // 16
    header = Header(DTYPES[code], False, tuple(shape or (m, k)), m, k, 0, 0)
    fixed_at, escapes_at = _sections(header)
    header = replace(header, nbytes=escapes_at + int(flat.sum()))
    if math.prod(header.shape) != m * k:
        raise ValueError(f"shape {header.shape} does not hold the {m} x {k} weights")

    if header.nbytes >= raw_nbytes(m, k):
        return _raw(torch.cat([torch.cat([block.decode() for block in row], 1) for row in grid]), header.shape)

    blob = torch.empty(header.nbytes, dtype=torch.uint8)
    data = blob.numpy()
    heads_end = HEADER_BYTES + heads.nbytes
    data[HEADER_BYTES:heads_end] = np.frombuffer(heads.tobytes(), np.uint8)
    data[heads_end:fixed_at] = 0
    fixed = data[fixed_at:escapes_at].reshape(*sizes.shape, FIXED_BYTES[code])
    escapes = data[escapes_at:]
    top = 0
    for row in grid:
        left = 0
        for block in row:
            height, width = block.sizes.shape
            fixed[top : top + height, left : left + width] = block.fixed
            for i, run in enumerate(block.escapes):
                start = int(offsets[top + i, left])
                escapes[start : start + run.size] = run
            left += width
        top += height

    data[:HEADER_BYTES] = _pack(header)
    _zipserv.check(blob.data_ptr(), blob.numel(), False)  # sound lists, too, before anything decodes them
    weights = _decode(blob, header)
    data[:HEADER_BYTES] = _pack(replace(header, checksum=_zipserv.checksum(weights.data_ptr(), m, k)))
    return blob


def _decode(blob: torch.Tensor, header: Header) -> torch.Tensor:
    weights = torch.empty(header.m, header.k, dtype=header.dtype)
    _zipserv.decode_rows(blob.data_ptr(), blob.numel(), 0, header.m, weights.data_ptr(), 2 * weights.numel(), header.k)
    return weights


def decode(blob: torch.Tensor, rows: Range | None = None, cols: Range | None = None) -> torch.Tensor:
    """Any part of a matrix, decoded: [rows, columns] in the weights' dtype. Reads no more tiles than the part touches."""
    header = read_header(blob)
    (r0, r1), (c0, c1) = _bounds("rows", rows, header.m), _bounds("columns", cols, header.k)
    if header.raw:
        body = blob[HEADER_BYTES:]
        matrix = (body if body.data_ptr() % 2 == 0 else body.clone()).view(header.dtype)
        return matrix.view(header.m, header.k)[r0:r1, c0:c1].clone()
    up, down = r0 // TILE * TILE, min(-(-r1 // TILE) * TILE, header.m)
    left, right = c0 // TILE * TILE, min(-(-c1 // TILE) * TILE, header.k)
    if (left, right) == (0, header.k):
        out = torch.empty(r1 - r0, header.k, dtype=header.dtype)
        _zipserv.decode_rows(blob.data_ptr(), blob.numel(), r0, r1, out.data_ptr(), 2 * out.numel(), header.k)
        return out[:, c0:c1].contiguous()
    around = assemble([[Block.of(blob, (up, down), (left, right))]])
    return decode(around, (r0 - up, r1 - up))[:, c0 - left : c1 - left].contiguous()


def cut(blob: torch.Tensor, rows: Range | None = None, cols: Range | None = None) -> torch.Tensor:
    """The blob of a part of a matrix: rows `rows[0]..rows[1]-1` and columns `cols[0]..cols[1]-1` (default: all).

    Raises ValueError if the part does not begin and end on tile borders (or at the matrix's end). A raw blob gives a raw one.
    """
    header = read_header(blob)
    if not header.raw:
        return assemble([[Block.of(blob, rows, cols)]])
    return _raw(decode(blob, rows, cols))


def stack(blobs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matrices of the same width, one below the other, as one blob. All but the last need a multiple of 64 rows."""
    if blobs and all(read_header(blob).raw for blob in blobs):
        return _raw(torch.cat([decode(blob) for blob in blobs]))
    return assemble([[Block.of(blob)] for blob in blobs])


def join(blobs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matrices of the same height, side by side, as one blob. All but the last need a multiple of 64 columns."""
    if blobs and all(read_header(blob).raw for blob in blobs):
        return _raw(torch.cat([decode(blob) for blob in blobs], 1))
    return assemble([[Block.of(blob) for blob in blobs]])


def _raw(weights: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    weights = weights.contiguous()
    m, k = weights.shape
    header = Header(weights.dtype, True, shape or (m, k), m, k, raw_nbytes(m, k), _zipserv.checksum(weights.data_ptr(), m, k))
    blob = torch.empty(header.nbytes, dtype=torch.uint8)
    blob.numpy()[:HEADER_BYTES] = _pack(header)
    blob[HEADER_BYTES:] = weights.view(torch.uint8).view(-1)
    return blob
