# SPDX-License-Identifier: Apache-2.0
"""Loads one rank's shard of a blob whose other pages may not be read: a single access to them ends the process."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from unittest import mock

import numpy as np
import support
import torch
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear

import zipserv
from zipserv.integrations.vllm.blobview import BlobView
from zipserv.integrations.vllm.config import ZipServConfig

RANK, SIZE, M, K = 2, 4, 2048, 2048
PAGE = mmap.PAGESIZE


def own_bytes(blob: np.ndarray, kind: str) -> np.ndarray:
    """For each byte of the blob: does it belong to the header, the tile headers or a tile of this rank? (docs/format.md sections 1, 4)"""
    tm, tk = M // 64, K // 64
    own = np.zeros(blob.size, bool)
    fixed_at = 128 + -(-8 * tm * tk // 128) * 128
    escapes_at = fixed_at + tm * tk * 5632
    own[:fixed_at] = True
    starts = blob[128 : 128 + 8 * tm * tk].view("<u4")[::2].astype(int) * 16 + escapes_at
    ends = np.append(starts[1:], blob.size)
    tiles = np.zeros((tm, tk), bool)
    if kind == "column":
        tiles[tm * RANK // SIZE : tm * (RANK + 1) // SIZE] = True
    else:
        tiles[:, tk * RANK // SIZE : tk * (RANK + 1) // SIZE] = True
    for tile in np.flatnonzero(tiles):
        own[fixed_at + tile * 5632 : fixed_at + (tile + 1) * 5632] = True
        own[starts[tile] : ends[tile]] = True
    return own


def main(kind: str, out: Path) -> None:
    support.join_group(0, 1, support.free_port())
    weight = (torch.randn(M, K) * 0.02).bfloat16()
    part = weight[M * RANK // SIZE : M * (RANK + 1) // SIZE] if kind == "column" else weight[:, K * RANK // SIZE : K * (RANK + 1) // SIZE]
    blob = zipserv.compress(weight).blob
    expected = zipserv.compress(part.contiguous()).blob

    memory = mmap.mmap(-1, -(-blob.numel() // PAGE) * PAGE)
    guarded = torch.frombuffer(memory, dtype=torch.uint8)[: blob.numel()]
    guarded.copy_(blob)
    pages = np.add.reduceat(own_bytes(blob.numpy(), kind), np.arange(0, blob.numel(), PAGE)) > 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for page in np.flatnonzero(~pages):
        assert libc.mprotect(guarded.data_ptr() + int(page) * PAGE, PAGE, 0) == 0, os.strerror(ctypes.get_errno())

    torch.set_default_dtype(torch.bfloat16)
    names = ("get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size")
    with support.current_config(), mock.patch.multiple(linear, **dict(zip(names, (lambda: RANK, lambda: SIZE), strict=True))):
        with mock.patch.multiple(parameter, **dict(zip(names, (lambda: RANK, lambda: SIZE), strict=True))):
            make = linear.ColumnParallelLinear if kind == "column" else linear.RowParallelLinear
            layer = make(K, M, bias=False, quant_config=ZipServConfig(), prefix="x")
            layer.weight.weight_loader(layer.weight, BlobView.of(guarded))
    assert torch.equal(layer.weight.data, expected)
    out.write_text(f"{int(pages.sum())} {pages.size}")
    os._exit(0)  # the guarded memory is not for the interpreter's clean-up
