# SPDX-License-Identifier: Apache-2.0
"""What a model needs on each GPU before and after compression, what KV cache that leaves room for, and what speed to expect.

Everything is arithmetic on a configuration; no weight is loaded but for a sample, and no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import architecture, capacity, compression, models, speed

__all__ = ["make"]

GIB = 1 << 30

#: Memory that vLLM's run of the largest batch, its CUDA graphs and its communication take: an assumption, they are known only then.
RESERVE = 2 * GIB

#: vLLM's own default of --gpu-memory-utilization.
UTILIZATION = 0.92

CURVE = tuple(2**i for i in range(9))  # 1 .. 256


def make(
    model: str | Path,
    *,
    gpu_memory: int,
    tp: int = 1,
    batch: int = 1,
    length: int = 4096,
    utilization: float = UTILIZATION,
    reserve: int = RESERVE,
    kv_bytes: int = 2,
    bits: float | None = None,
    machine: speed.Machine | None = None,
    table: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The plan, as values that JSON can hold; sizes are bytes of one rank.

    Args:
        model: a folder, a config.json, a name of :data:`models.KNOWN`, or a hub name that is in the local cache.
        gpu_memory: bytes of each GPU.
        tp: tensor-parallel ranks.
        batch, length: sequences decoded together, and tokens of each, prompt and answer.
        utilization: share of the memory that vLLM may use.
        reserve: bytes kept for activations, CUDA graphs and communication.
        kv_bytes: of one element of the KV cache: 2 (BF16) or 1 (FP8).
        bits: stored bits of a compressed weight; None: read, measured or assumed, whatever there is.
        machine: bandwidth and matmul rate for the roofline; None: of the table's machine, else none.
        table: a bench.json of `zipserv bench`.

    Returns:
        ``model``, ``compression``, ``matrices``, ``capacity``, ``speed`` (``roofline``, ``curve``, ``measured`` or None), ``notes``.

    Raises:
        ValueError: no such model, one of an unknown kind, or numbers that make no sense.
    """
    for what, value in (("batch", batch), ("length", length), ("gpu_memory", gpu_memory), ("tp", tp)):
        if not isinstance(value, int):
            raise TypeError(f"{what} is a whole number, not {value!r:.80}")
        if value < 1:
            raise ValueError(f"{what} is at least 1, not {value}")
    if not 0 < utilization <= 1 or reserve < 0:
        raise ValueError(f"utilization is a share, above 0 and at most 1, and reserve bytes, not {utilization} and {reserve}")
    if kv_bytes not in (1, 2):
        raise ValueError(f"an element of the KV cache has 2 bytes (BF16) or 1 (FP8), not {kv_bytes}")
    source = models.find(str(model))
    layout = architecture.layout(source.config, tp)
    stored = compression.bits(source.folder, bits)
    room = capacity.capacity(
        layout, stored, gpu_memory=gpu_memory, utilization=utilization, reserve=reserve, kv_bytes=kv_bytes, batch=batch, length=length
    )
    bench = speed.Table(table) if table is not None else None
    machine = machine or (bench.machine if bench else None)
    curve = speed.curve(layout, stored, CURVE, length=length, kv_bytes=kv_bytes, machine=machine)
    notes = list(layout.notes)
    if bench and machine and machine is not bench.machine:
        notes.append(f"the table was measured on {bench.machine.name}, the roofline is that of {machine.name}")
    if layout.longest and length > layout.longest:
        notes.append(f"the configuration allows {layout.longest} tokens, {length} were asked for")
    return {
        "model": {"name": source.name, "type": layout.model_type, "parameters": layout.parameters, "tp": tp, "batch": batch, "length": length},
        "compression": asdict(stored),
        "matrices": [asdict(group) for group in capacity.groups(layout, stored)],
        "vectors_bytes": 2 * layout.vectors,
        "capacity": room.as_dict(),
        "speed": {
            "roofline": asdict(speed.roofline(layout, stored, batch=batch, length=length, kv_bytes=kv_bytes, machine=machine)),
            "curve": {"batch": list(CURVE), "roofline": curve},
            "measured": asdict(speed.measured(layout, bench, batch=batch)) if bench else None,
            "measured_curve": _measured_curve(layout, bench) if bench else None,
        },
        "notes": notes,
    }


def _measured_curve(layout: architecture.Layout, bench: speed.Table) -> dict[str, list[float]]:
    """Where the table covers nine tenths of the weights or more; less is not a curve of this model."""
    found = [(b, speed.measured(layout, bench, batch=b)) for b in CURVE]
    kept = [(b, m.speedup) for b, m in found if m.speedup is not None and m.covered >= 0.9]
    return {"batch": [float(b) for b, _ in kept], "speedup": [s for _, s in kept]}
