# SPDX-License-Identifier: Apache-2.0
"""Tiled blobs one below the other as one blob, and taken apart again, on the device where they lie.

Rows of tiles are contiguous in each section of a blob (docs/format.md), so both ways are copies of four runs of bytes with
the escape offsets rebased. Nothing waits for a GPU but the reading of the headers. ``zipserv.tiles`` does more, on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .errors import Error
from .format import HEADER_BYTES, TILE, Header, parse_header
from .tilecode import FIXED_BYTES
from .tiles import _pack

__all__ = ["Part", "stack", "take"]


@dataclass(frozen=True)
class Part:
    """One of the matrices of a stacked blob.

    Attributes:
        row0: its first row, a multiple of 64.
        head: the 128 bytes of its own header; the checksum in it proves these rows.
        escape0: where its escapes begin, in bytes from the first escape of the stacked blob.
    """

    row0: int
    head: bytes
    escape0: int

    @property
    def header(self) -> Header:
        return _parsed(self.head)

    @property
    def rows(self) -> int:
        return self.header.m


def _parsed(head: bytes) -> Header:
    return parse_header(torch.frombuffer(bytearray(head), dtype=torch.uint8))


def _sections(m: int, k: int, code: int) -> tuple[int, int, int]:
    """Tiles, where their fixed parts begin, and where the escapes begin."""
    tiles = -(-m // TILE) * -(-k // TILE)
    fixed = HEADER_BYTES + -(-8 * tiles // 128) * 128
    return tiles, fixed, fixed + tiles * FIXED_BYTES[code]


def _rebased(heads: torch.Tensor, by: int) -> torch.Tensor:
    """A copy of tile headers, bytes, whose escape offsets are moved by this many bytes."""
    heads = heads.clone()
    heads.view(torch.int32).view(-1, 2)[:, 0] += by // 16
    return heads


def stack(blobs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, tuple[Part, ...]]:
    """Matrices of one width and dtype, one below the other.

    The blob's own header carries no checksum (0): each part's does, and :func:`take` gives it back.

    Args:
        blobs: two or more, tiled (not raw), on one device; all but the last of a multiple of 64 rows.

    Raises:
        ValueError: they do not fit together.
    """
    heads = [bytes(blob[:HEADER_BYTES].cpu().numpy()) for blob in blobs]
    headers = [_parsed(head) for head in heads]
    first = headers[0]
    if any(header.raw or (header.k, header.dtype) != (first.k, first.dtype) for header in headers):
        raise ValueError("only compressed matrices of the same width and dtype can be stacked")
    if any(header.m % TILE for header in headers[:-1]):
        raise ValueError(f"only the last matrix may have a number of rows that is no multiple of {TILE}")
    code, k = first.dtype_code, first.k
    parts, tile_heads, fixed, escapes = [], [], [], []
    row0 = escape0 = 0
    for blob, head, header in zip(blobs, heads, headers, strict=True):
        tiles, fixed_at, escapes_at = _sections(header.m, k, code)
        parts.append(Part(row0, head, escape0))
        tile_heads.append(_rebased(blob[HEADER_BYTES : HEADER_BYTES + 8 * tiles], escape0))
        fixed.append(blob[fixed_at:escapes_at])
        escapes.append(blob[escapes_at:])
        row0 += header.m
        escape0 += header.nbytes - escapes_at
    if escape0 >= 16 << 31:
        raise ValueError("the escape lists together are over 32 GiB")
    tiles, fixed_at, escapes_at = _sections(row0, k, code)
    whole = replace(first, shape=(row0, k), m=row0, nbytes=escapes_at + escape0, checksum=0)
    return _joined(bytes(_pack(whole)), tile_heads, fixed_at, fixed, escapes), tuple(parts)


def take(blob: torch.Tensor, part: Part) -> torch.Tensor:
    """The bytes of the blob that became this part, in memory of their own."""
    whole = parse_header(blob[:HEADER_BYTES].cpu())
    header, code = part.header, whole.dtype_code
    _, fixed0, escapes0 = _sections(whole.m, whole.k, code)
    before = part.row0 // TILE * -(-whole.k // TILE)
    tiles, fixed_at, escapes_at = _sections(header.m, header.k, code)
    begin = HEADER_BYTES + 8 * before
    heads = _rebased(blob[begin : begin + 8 * tiles], -part.escape0)
    fixed = blob[fixed0 + before * FIXED_BYTES[code] :][: tiles * FIXED_BYTES[code]]
    escapes = blob[escapes0 + part.escape0 :][: header.nbytes - escapes_at]
    return _joined(part.head, [heads], fixed_at, [fixed], [escapes])


def _joined(
    head: bytes, heads: Sequence[torch.Tensor], fixed_at: int, fixed: Sequence[torch.Tensor], escapes: Sequence[torch.Tensor]
) -> torch.Tensor:
    device = heads[0].device
    padding = fixed_at - HEADER_BYTES - sum(part.numel() for part in heads)
    start = torch.frombuffer(bytearray(head), dtype=torch.uint8).to(device)
    blob = torch.cat([start, *heads, start.new_zeros(padding), *fixed, *escapes])
    if _parsed(head).nbytes != blob.numel():
        raise Error("the parts of a stacked weight do not fit together")
    mark_written(blob)
    return blob


def mark_written(blob: torch.Tensor) -> torch.Tensor:
    """To be called on bytes that work in the stream has just written: on a GPU the next product waits for that work.

    Memory that torch's allocator hands out again may have held a blob that the engine has read before.
    """
    if blob.is_cuda and blob.__class__ is torch.Tensor:
        importlib.import_module("zipserv.cuda").changed(blob)  # not before CUDA is used
    return blob
