# SPDX-License-Identifier: Apache-2.0
"""One shape, looked at closely: check the result, then time BLAS, ZipGEMM and decompression side by side."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

import zipserv

from . import machine
from .gpu import Bench, Settings
from .shapes import Shape


def forced_split(device: torch.device, shape: Shape, tokens: int, shares: int | None) -> AbstractContextManager[None]:
    """Within it, products of this shape have K cut into ``shares`` equal parts, each summed up by a block of its own; None: as always.

    Raises ValueError where the split was asked for and cannot be had.
    """
    if shares is None:
        return nullcontext()
    if shares < 1:
        raise ValueError(f"--split-k must be at least 1, got {shares}")
    if device.type != "cuda":
        raise ValueError("--split-k is a property of the CUDA kernels; there is none on a CPU")
    from .. import choices, tune

    problem = choices.Problem(shape.m, shape.k, tune.bucket(tokens))
    return choices.chosen(device.index or 0, problem, choices.split(device.index or 0, problem, shares))


def solved_by(device: torch.device, shape: Shape, tokens: int) -> str | None:
    """Which kernel and layout a product has; None on a CPU."""
    if device.type != "cuda":
        return None
    from .. import choices, tune

    return str(choices.current(device.index or 0, choices.Problem(shape.m, shape.k, tune.bucket(tokens))))


def run(shape: Shape, tokens: int, kind: str, settings: Settings, split_k: int | None = None) -> dict[str, object]:
    """Measures ``Y[N, M] = X[N, K] W[M, K]^T`` for one shape.

    Returns what was measured; raises WrongResult where a result is wrong, before anything is timed, and ValueError where the split
    cannot be had.
    """
    with forced_split(settings.device, shape, tokens, split_k):
        limits = machine.measure_limits(settings.device, quick=settings.quick)
        bench = Bench(shape, kind, limits, settings)
        try:
            solved = solved_by(settings.device, shape, tokens)
            weight = bench.about_weight()
            point = bench.point(tokens, zipserv.linear)
        finally:
            bench.close()
    return {
        "split_k": split_k,
        "solved_by": solved,
        "about": machine.describe(settings.device),
        "limits": machine.limits_dict(limits),
        "weight": weight,
        "point": point,
    }
