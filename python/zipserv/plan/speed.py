# SPDX-License-Identifier: Apache-2.0
"""How much faster a decode step may get: by the roofline, and by a table that `zipserv bench` measured. The two are never mixed up.

The roofline counts bytes and operations: weights that are read, the KV cache, and products at the matmul rate. It is what no
kernel can beat, not what today's reach. The measured figures are those of the linear layers alone, where the table has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .architecture import Layout, Matrix
from .capacity import stored
from .compression import Bits

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Machine:
    """``bandwidth`` in bytes a second, ``flops`` in BF16 operations a second; ``source`` says whose figures they are."""

    name: str
    bandwidth: float
    flops: float
    source: str
    memory: int = 0


def _sheet(name: str, gib: int, terabytes: float, teraflops: float) -> Machine:
    return Machine(name, terabytes * 1e12, teraflops * 1e12, "data sheet", gib << 30)


#: Bandwidth and dense BF16 rate by the makers' data sheets; the memory is what the driver reports, about.
GPUS: dict[str, Machine] = {
    "h200": _sheet("H200", 140, 4.8, 989),
    "h100": _sheet("H100 SXM", 79, 3.35, 989),
    "a100": _sheet("A100 SXM 80 GB", 79, 2.039, 312),
    "l40s": _sheet("L40S", 44, 0.864, 362),
    "l4": _sheet("L4", 22, 0.3, 121),
    "rtx4090": _sheet("GeForce RTX 4090", 23, 1.008, 165),
}


@dataclass(frozen=True)
class Estimate:
    """A decode step before and after. Seconds where the machine is known, else None; ``speedup`` in either case."""

    kind: str
    detail: str
    speedup: float
    before_seconds: float | None
    after_seconds: float | None


def experts_hit(matrix: Matrix, batch: int, top_k: int) -> float:
    """How many of ``matrix.experts`` a batch reads, were the router's choices independent and even; 1 without experts."""
    if matrix.experts == 1:
        return 1.0
    return matrix.experts * (1 - (1 - top_k / matrix.experts) ** batch)


def roofline(layout: Layout, bits: Bits, *, batch: int, length: int, kv_bytes: int, machine: Machine | None) -> Estimate:
    """One decode step of ``batch`` sequences with ``length`` tokens of context each, on one rank.

    Without a machine bandwidth alone counts, and cancels out.
    """
    cache = batch * length * layout.kv_per_token * kv_bytes
    totals = []
    for after in (False, True):
        total = (cache + 2 * layout.vectors) / (machine.bandwidth if machine else 1.0)
        for matrix in layout.matrices:
            if not matrix.read:
                continue
            size = stored(matrix, bits)[0] if after else 2 * matrix.elements
            read = experts_hit(matrix, batch, layout.top_k)
            per_expert = batch * layout.top_k / read if matrix.experts > 1 else batch
            calls = read * matrix.count / matrix.experts
            if machine is None:
                total += calls * size
            else:
                traffic = size + 2 * per_expert * (matrix.m + matrix.k)
                total += calls * max(traffic / machine.bandwidth, 2.0 * matrix.elements * per_expert / machine.flops)
        totals.append(total)
    before, after_ = totals
    if machine is None:
        return Estimate("roofline", "bytes of weights and KV cache alone: memory is the limit on any GPU at such a batch, or this is too high",
                        before / after_, None, None)  # fmt: skip
    detail = f"{machine.name}: {machine.bandwidth / 1e12:.2f} TB/s, {machine.flops / 1e12:.0f} Tera-operations/s ({machine.source})"
    return Estimate("roofline", detail, before / after_, before, after_)


def _positive(row: Row, key: str) -> float:
    value = float(row[key])
    if not 0 < value < math.inf:
        raise ValueError(f"{key} is {row[key]!r:.40}, which no measurement gives")
    return value


class Table:
    """A bench.json of `zipserv bench`. Raises ValueError where the document is something else."""

    def __init__(self, document: Row) -> None:
        try:
            self.about, limits = document["about"], document["limits"]
            name = str(self.about.get("gpu") or self.about["cpu"])
            self.machine = Machine(name, _positive(limits, "copy_bandwidth"), _positive(limits, "flops"), "measured")
            points = list(document["points"])
            kinds = {str(p["weights"]) for p in points}
            self.weights = "trained" if "trained" in kinds else min(kinds)
            self._seconds: dict[tuple[int, int], dict[int, tuple[float, float]]] = {}
            for p in points:
                if p["weights"] == self.weights:
                    at = self._seconds.setdefault((int(p["m"]), int(p["k"])), {})
                    at[int(_positive(p, "tokens"))] = (_positive(p, "blas_seconds"), _positive(p, "zip_seconds"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a bench.json of `zipserv bench --out`: {error!r}") from error

    @property
    def caption(self) -> str:
        return f"{self.machine.name}, {self.about.get('date', 'no date')}, {self.weights} weights"

    def seconds(self, m: int, k: int, tokens: int) -> tuple[float, float] | None:
        """Time of `F.linear` and of the compressed product; between two measured numbers of tokens on a line in logarithms.

        None where the shape, or a number of tokens on either side, was not measured.
        """
        at = self._seconds.get((m, k), {})
        if tokens in at:
            return at[tokens]
        below, above = max((t for t in at if t < tokens), default=None), min((t for t in at if t > tokens), default=None)
        if below is None or above is None:
            return None
        share = math.log(tokens / below) / math.log(above / below)
        first, second = (a ** (1 - share) * b**share for a, b in zip(at[below], at[above], strict=True))
        return first, second


@dataclass(frozen=True)
class Measured:
    """The linear layers of one decode step by a measured table. ``covered``: share of the weights' bytes, of those that a step reads,
    that the table has figures for; nothing is said of the rest. ``missing``: those shapes."""

    kind: str
    detail: str
    covered: float
    speedup: float | None
    before_seconds: float
    after_seconds: float
    missing: tuple[str, ...]


def measured(layout: Layout, table: Table, *, batch: int) -> Measured:
    """What the table says of this rank's linear layers at ``batch`` tokens a step."""
    before = after = 0.0
    known = total = 0
    missing: dict[str, None] = {}
    for matrix in layout.matrices:
        if not matrix.read:
            continue
        size = 2 * matrix.elements * matrix.count
        total += size
        found = table.seconds(matrix.m, matrix.k, batch) if matrix.experts == 1 else None
        if found is None:
            missing[f"{matrix.layer} {matrix.m}x{matrix.k}"] = None
            continue
        known += size
        before += matrix.count * found[0]
        after += matrix.count * (found[0] if matrix.plain else found[1])
    speedup = before / after if after else None
    return Measured("measured", table.caption, known / total, speedup, before, after, tuple(missing))


def curve(layout: Layout, bits: Bits, batches: Sequence[int], *, length: int, kv_bytes: int, machine: Machine | None) -> list[float]:
    """The roofline's speed-up for each batch size."""
    return [roofline(layout, bits, batch=b, length=length, kv_bytes=kv_bytes, machine=machine).speedup for b in batches]
