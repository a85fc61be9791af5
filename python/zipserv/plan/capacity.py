# SPDX-License-Identifier: Apache-2.0
"""What fits into one GPU: weights before and after, and the KV cache that is left room for."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from .architecture import Layout, Matrix
from .compression import Bits

#: Tokens of one block of vLLM's KV cache: room comes in whole blocks.
BLOCK = 16

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """``24GiB``, ``80GB``, ``1.5 GiB`` or a number of bytes. Raises ValueError for anything else."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is no size: give 24GiB, 80GB or a number of bytes")
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


@dataclass(frozen=True)
class Group:
    """All of a rank's matrices of one kind and size. Bytes of all ``count`` together; ``after`` equals ``before`` where ``plain`` says why."""

    layer: str
    m: int
    k: int
    count: int
    before: int
    after: int
    plain: str | None


def groups(layout: Layout, bits: Bits) -> list[Group]:
    """The rank's matrices, equal ones added up, in the order of the model."""
    found: dict[tuple[str, int, int, str | None], Group] = {}
    for matrix in layout.matrices:
        size, plain = stored(matrix, bits)
        key = (matrix.layer, matrix.m, matrix.k, plain)
        old = found.get(key)
        count = matrix.count + (old.count if old else 0)
        found[key] = Group(matrix.layer, matrix.m, matrix.k, count, count * 2 * matrix.elements, count * size, plain)
    return list(found.values())


def stored(matrix: Matrix, bits: Bits) -> tuple[int, str | None]:
    """Bytes of one such matrix as it is served, and why it is plain if it is."""
    size = None if matrix.plain else bits.nbytes(matrix.m, matrix.k)
    if size is None:
        return 2 * matrix.elements, matrix.plain or "it would not shrink"
    return size, None


@dataclass(frozen=True)
class Side:
    """Bytes of one rank, before or after. ``tokens``: KV-cache tokens that fit; ``sequences``: of the length asked for."""

    weights: int
    uncompressed: int
    kv_bytes: int
    tokens: int
    sequences: int
    fits: bool


@dataclass(frozen=True)
class Capacity:
    """Of one rank; bytes. ``budget``: what vLLM may use; ``reserve``: for activations, graphs and communication."""

    gpu_memory: int
    utilization: float
    budget: int
    reserve: int
    kv_bytes_per_token: int
    tokens_wanted: int
    before: Side
    after: Side

    @property
    def tokens_gained(self) -> int:
        return self.after.tokens - self.before.tokens

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "tokens_gained": self.tokens_gained}


def capacity(
    layout: Layout, bits: Bits, *, gpu_memory: int, utilization: float, reserve: int, kv_bytes: int, batch: int, length: int
) -> Capacity:
    """What fits on each of ``layout.tp`` GPUs of ``gpu_memory`` bytes, for ``batch`` sequences of ``length`` tokens.

    ``kv_bytes``: of one element of the KV cache, 2 or 1. Raises ValueError for sizes that make no sense.
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"the share of the memory that may be used lies in 0 .. 1, not {utilization}")
    budget = int(gpu_memory * utilization)
    if reserve >= budget:
        raise ValueError(f"a reserve of {reserve} bytes leaves nothing of the {budget} that may be used")
    all_of_it = groups(layout, bits)
    vectors = 2 * layout.vectors
    per_token = layout.kv_per_token * kv_bytes

    def side(weights: int, plain: int) -> Side:
        left = budget - reserve - weights
        tokens = max(0, left) // per_token // BLOCK * BLOCK
        return Side(weights, plain, max(0, left), tokens, tokens // (-(-length // BLOCK) * BLOCK), left >= 0)

    before = sum(g.before for g in all_of_it) + vectors
    after = sum(g.after for g in all_of_it) + vectors
    plain = sum(g.after for g in all_of_it if g.plain) + vectors
    return Capacity(gpu_memory, utilization, budget, reserve, per_token, batch * length, side(before, before), side(after, plain))
