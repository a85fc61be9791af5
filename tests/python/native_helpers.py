# SPDX-License-Identifier: Apache-2.0
"""Compression by the native module alone: no torch, so that the processes which tests start are quick to start."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

BF16, FP16 = 1, 2


def load():  # type: ignore[no-untyped-def]
    """The extension module, without its package."""
    package = importlib.util.find_spec("zipserv")
    assert package is not None and package.origin is not None
    spec = importlib.util.spec_from_file_location("zipserv._zipserv", Path(package.origin).with_name("_zipserv.abi3.so"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


z = load()


def weights(m: int, k: int, seed: int = 0) -> np.ndarray:
    """Gaussian weights as the bits of BF16."""
    values = np.random.default_rng(seed).standard_normal((m, k), dtype=np.float32) * 0.02
    return np.ascontiguousarray((values.view(np.uint32) >> 16).astype(np.uint16))


def compress(w: np.ndarray, dtype: int = BF16) -> np.ndarray:
    handle, size = z.plan(w.ctypes.data, dtype, *w.shape, w.shape)
    try:
        blob = np.empty(size, np.uint8)
        z.encode(handle, blob.ctypes.data, size)
    finally:
        z.free_plan(handle)
    return blob


def decompress(blob: np.ndarray) -> np.ndarray:
    info = z.info(blob.ctypes.data, blob.nbytes)
    out = np.empty((info["m"], info["k"]), np.uint16)
    z.decode_rows(blob.ctypes.data, blob.nbytes, 0, info["m"], out.ctypes.data, out.nbytes, info["k"])
    return out
