# SPDX-License-Identifier: Apache-2.0
"""CPU codec speed against memcpy in the same run."""

from __future__ import annotations

from functools import partial

import torch

import zipserv

from . import weights
from .timing import Loop, measure


def run(*, mib: int = 256, kinds: tuple[str, ...] = weights.KINDS, budget: float = 2.0) -> list[dict[str, object]]:
    """Compresses and decompresses ``mib`` MiB of BF16 weights; speeds are bytes of BF16 weights per second.

    The roofline of both is the copy: compression has to read 16 bits and write about 11, a copy reads and writes 16.
    ``of_memcpy`` is the speed against a copy of the same weights in the same run.
    """
    k = 4096
    m = max(64, (mib << 20) // (2 * k))
    results: list[dict[str, object]] = []
    for kind in kinds:
        weight = weights.make(kind, m, k)
        target = torch.empty_like(weight)
        target.copy_(weight)  # pages exist from here on
        compressed = zipserv.compress(weight)
        raw = weight.numel() * weight.element_size()
        device = weight.device
        copy = measure(Loop([partial(target.copy_, weight)], device), min_rounds=5, budget=budget / 4)
        pack = measure(Loop([partial(zipserv.compress, weight)], device), min_rounds=3, budget=budget)
        unpack = measure(Loop([partial(compressed.decompress, out=target)], device), min_rounds=3, budget=budget)
        if not torch.equal(target.view(torch.int16), weight.view(torch.int16)):
            raise zipserv.Error(f"{kind} weights: the decompressed weight differs from the original")
        results.append(
            {
                "weights": kind,
                "m": m,
                "k": k,
                "bits_per_weight": compressed.bits_per_weight,
                "ratio": compressed.ratio,
                "memcpy_bytes_per_second": raw / copy.median,
                "compress_bytes_per_second": raw / pack.median,
                "compress_spread": pack.spread,
                "compress_of_memcpy": copy.median / pack.median,
                "decompress_bytes_per_second": raw / unpack.median,
                "decompress_spread": unpack.spread,
                "decompress_of_memcpy": copy.median / unpack.median,
            }
        )
    return results
