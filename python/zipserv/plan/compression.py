# SPDX-License-Identifier: Apache-2.0
"""How many bits a weight takes: read from a compressed folder, measured on a sample of a plain one, else assumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..format import HEADER_BYTES, SUFFIX, TILE, parse_header, raw_nbytes
from ..tensor import compress

#: What BF16 weights of trained models take, about: all-MiniLM-L6-v2 11.28, Gaussian ones 11.21 (README).
ASSUMED_BITS = 11.3

SAMPLE = 32 << 20  # weights: about a second
_PIECES = 64
_TILE_BYTES_PER_BIT = TILE * TILE // 8


@dataclass(frozen=True)
class Bits:
    """``per_weight``: stored bits of a compressed weight. ``how``: "read", "measured", "given" or "assumed"; ``detail`` in words."""

    per_weight: float
    how: str
    detail: str

    def nbytes(self, m: int, k: int) -> int | None:
        """Bytes of a compressed matrix, padding to whole tiles included; None where it would not shrink."""
        tiles = -(-m // TILE) * -(-k // TILE)
        size = HEADER_BYTES + round(tiles * self.per_weight * _TILE_BYTES_PER_BIT)
        return size if size < raw_nbytes(m, k) else None


def bits(folder: Path | None, given: float | None = None) -> Bits:
    """What to plan with. A folder without safetensors files counts as none.

    Raises ValueError for ``given`` outside 8 .. 16, zipserv.Error for damaged files.
    """
    if given is not None:
        if not 8 < given < 16:
            raise ValueError(f"a BF16 weight takes more than 8 and less than 16 bits, not {given}")
        return Bits(given, "given", f"{given} bits a weight, as given")
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    found = _read(files) or _sample(files) if files else None
    return found or Bits(ASSUMED_BITS, "assumed", f"{ASSUMED_BITS} bits a weight: an assumption, for the weights are not here")


def _open(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(str(file), framework="pt", device="cpu")


def _read(files: list[Path]) -> Bits | None:
    """Sizes of the blobs of a compressed folder."""
    stored = weights = 0
    for file in files:
        with _open(file) as handle:
            for key in handle.keys():
                if key.endswith(SUFFIX):
                    part = handle.get_slice(key)
                    header = parse_header(part[:HEADER_BYTES].contiguous())
                    if not header.raw:
                        stored += part.get_shape()[0]
                        weights += header.m * header.k
    if not weights:
        return None
    detail = f"{8 * stored / weights:.3f} bits a weight, read from the compressed folder ({weights / 1e6:.1f} M weights)"
    return Bits(8 * stored / weights, "read", detail)


def _sample(files: list[Path]) -> Bits | None:
    """Rows of up to 64 matrices, spread over the model, compressed."""
    places = []
    for file in files:
        with _open(file) as handle:
            for key in handle.keys():
                part = handle.get_slice(key)
                shape = part.get_shape()
                if part.get_dtype() == "BF16" and key.endswith(".weight") and len(shape) == 2 and min(shape) >= TILE:
                    places.append((file, key))
    chosen = [places[i * len(places) // _PIECES] for i in range(_PIECES)] if len(places) > _PIECES else places
    stored = weights = 0
    for file, key in chosen:
        with _open(file) as handle:
            part = handle.get_slice(key)
            rows, k = part.get_shape()
            take = min(rows, max(TILE, SAMPLE // len(chosen) // k // TILE * TILE))
            first = (rows - take) // 2 // TILE * TILE
            blob = compress(part[first : first + take].contiguous())
        stored += blob.nbytes
        weights += take * k
    if not weights:
        return None
    detail = f"{8 * stored / weights:.3f} bits a weight, measured on a sample ({weights / 1e6:.1f} M weights of {len(chosen)} matrices)"
    return Bits(8 * stored / weights, "measured", detail)
