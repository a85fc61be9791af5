# SPDX-License-Identifier: Apache-2.0
"""Block tiles decoded in NumPy, straight after docs/format.md sections 3 to 6.

The native library decodes whole blobs, and fast. This reads tiles that stand in no blob: parts of a matrix that would not be
smaller than their weights and therefore can only be stored raw. It is also an independent reading of the format for tests.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .format import TILE

Bits = npt.NDArray[np.uint16]

WEIGHTS = TILE * TILE
FIXED_BYTES = {1: 5632, 2: 7168}  # of a tile, by dtype code
DENSE = 1


def _places() -> npt.NDArray[np.intp]:
    """[4 warp tiles, 32 lanes, 32 weights] -> position 64 row + column in the block tile (section 5)."""
    warp, lane, weight = np.meshgrid(np.arange(4), np.arange(32), np.arange(32), indexing="ij")
    frag = 4 * (weight // 8) + lane // 8
    row = 16 * warp + 8 * (frag // 8) + lane % 8
    return (TILE * row + 8 * (frag % 8) + weight % 8).astype(np.intp)


_PLACES = _places()


def _planes(words: npt.NDArray[np.uint32]) -> Bits:
    """Three bitmaps [tiles, 4, 3, 32] -> three-bit numbers [tiles, 4, 32 lanes, 32 weights]."""
    pair, half, plane = np.arange(32) // 2, np.arange(32) % 2, np.arange(3)
    shift = (16 * half + (pair + plane[:, None]) % 16).astype(np.uint32)  # [plane, weight]
    bits = (words[..., None] >> shift[None, None, :, None, :]) & 1
    return (bits[:, :, 0] | bits[:, :, 1] << 1 | bits[:, :, 2] << 2).astype(np.uint16)


def _signs_mantissas(fixed: npt.NDArray[np.uint8]) -> Bits:
    """Bytes 0..4095 of the fixed parts -> [tiles, 4, 32 lanes, 32 weights]: the sign in bit 15, seven mantissa bits below."""
    words = fixed[:, :4096].copy().view("<u4").reshape(-1, 4, 2, 32, 4)  # tile, warp tile, g, lane, q mod 4
    halves = words[..., None].view("<u2").reshape(-1, 4, 2, 32, 4, 2).transpose(0, 1, 3, 2, 4, 5)
    low = halves.reshape(-1, 4, 32, 16)  # pairs 0..7, each its low and high half
    return np.asarray(np.concatenate([low, low.byteswap()], axis=-1) & 0x807F, np.uint16)


def _exponents(base: int, flags: int, count: int, run: npt.NDArray[np.uint8], exponent: Bits) -> None:
    """Put the escapes of one tile into its exponents [4096], in place (section 6)."""
    if flags & DENSE:
        exponent[:] = run[:WEIGHTS]
        return
    entries = run[: 2 * count].copy().view("<u2")
    place, symbol = entries & 0x0FFF, (entries >> 12).astype(np.int64)
    literals = int((symbol == 15).sum())
    value = np.where(symbol < 12, base - 1 - symbol, base + 8 + symbol - 12)
    value[:literals] = run[2 * count : 2 * count + literals]
    exponent[place] = value


def decode_tiles(dtype_code: int, heads: npt.NDArray[np.void], fixed: npt.NDArray[np.uint8], runs: list[npt.NDArray[np.uint8]]) -> Bits:
    """Tiles with their headers [T], fixed parts [T, bytes] and escape lists -> the bits of their weights [T, 64, 64]."""
    fixed = np.ascontiguousarray(fixed).reshape(len(runs), FIXED_BYTES[dtype_code])
    codes = _planes(fixed[:, 4096:5632].copy().view("<u4").reshape(-1, 4, 3, 32))
    out = np.empty((len(runs), WEIGHTS), np.uint16)
    exponents = np.empty_like(out)
    exponents[:, _PLACES] = codes + heads["base"].astype(np.uint16)[:, None, None, None]
    for tile, run in enumerate(runs):
        head = heads[tile]
        _exponents(int(head["base"]), int(head["flags"]), int(head["count"]), run, exponents[tile])
    out[:, _PLACES] = _signs_mantissas(fixed)
    if dtype_code == 1:
        return np.asarray(out | exponents << 7, np.uint16).reshape(-1, TILE, TILE)
    low = np.empty_like(out)
    low[:, _PLACES] = _planes(fixed[:, 5632:7168].copy().view("<u4").reshape(-1, 4, 3, 32))
    return np.asarray((out & 0x8000) | exponents << 10 | (out & 0x7F) << 3 | low, np.uint16).reshape(-1, TILE, TILE)
