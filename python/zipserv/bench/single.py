# SPDX-License-Identifier: Apache-2.0
"""One shape, looked at closely: check the result, then time BLAS, ZipGEMM and decompression side by side."""

from __future__ import annotations

import inspect

import torch

import zipserv

from . import machine
from .gpu import Bench, LinearCall, Settings
from .shapes import Shape


def linear_call(device: torch.device, split_k: int | None) -> LinearCall:
    """``zipserv.linear``, or the CUDA call with a chosen number of K splits.

    Raises ValueError where a split was asked for and cannot be chosen.
    """
    if split_k is None:
        return zipserv.linear
    if split_k < 1:
        raise ValueError(f"--split-k must be at least 1, got {split_k}")
    if device.type != "cuda":
        raise ValueError("--split-k is a property of the CUDA kernels; there is none on a CPU")
    from zipserv import cuda, format

    call = getattr(cuda, "linear", None)
    if call is None or "split_k" not in inspect.signature(call).parameters:
        raise ValueError("this build's CUDA kernels choose the split of K from the shape; run without --split-k")

    def linear(x: torch.Tensor, z: zipserv.ZipTensor) -> torch.Tensor:
        result = call(x, z.blob, z.m, z.k, format.DTYPE_CODES[z.dtype], None, split_k=split_k)
        assert isinstance(result, torch.Tensor)
        return result

    return linear


def run(shape: Shape, tokens: int, kind: str, settings: Settings, linear: LinearCall) -> dict[str, object]:
    """Measures ``Y[N, M] = X[N, K] W[M, K]^T`` for one shape.

    Returns what was measured; raises WrongResult where a result is wrong, before anything is timed.
    """
    limits = machine.measure_limits(settings.device, quick=settings.quick)
    bench = Bench(shape, kind, limits, settings)
    try:
        weight = bench.about_weight()
        point = bench.point(tokens, linear)
    finally:
        bench.close()
    return {
        "about": machine.describe(settings.device),
        "limits": machine.limits_dict(limits),
        "weight": weight,
        "point": point,
    }
