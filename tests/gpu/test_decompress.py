# SPDX-License-Identifier: Apache-2.0
"""Decompression on the device gives back every bit, for every shape and kind of weight."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import KINDS, SHAPES, gaussian, islands, on_gpu, same_bits, trained

import zipserv


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_bit_exact(kind: str, shape: tuple[int, int]) -> None:
    w = KINDS[kind](*shape)
    z = on_gpu(w)
    assert same_bits(z.decompress(), w)


def test_every_pattern_of_16_bits() -> None:
    """Each pattern once in an otherwise Gaussian matrix, so that it is coded, escaped or dense and never raw."""
    w = gaussian(2048, 2048)
    flat = w.view(-1)
    flat[torch.randperm(flat.numel())[: 1 << 16]] = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    z = on_gpu(w)
    assert not z.is_raw
    assert same_bits(z.decompress(), w)


@pytest.mark.parametrize("ld", [200, 201, 256, 1000])
def test_into_rows_that_lie_apart(ld: int) -> None:
    w = trained(300, 200)
    canvas = torch.full((300, ld), 7.0, dtype=torch.bfloat16, device="cuda")
    z = on_gpu(w)
    torch.ops.zipserv.decompress_out(z.blob, 300, 200, 1, 0, canvas[:, :200])
    assert same_bits(canvas[:, :200], w)
    assert (canvas[:, 200:] == 7.0).all()


def test_into_an_unaligned_address() -> None:
    w = gaussian(130, 70)
    z = on_gpu(w)
    memory = torch.zeros(130 * 70 + 1, dtype=torch.bfloat16, device="cuda")
    out = memory[1:].view(130, 70)
    torch.ops.zipserv.decompress_out(z.blob, 130, 70, 1, 0, out)
    assert same_bits(out, w) and memory[0] == 0


@pytest.mark.parametrize("rows", [(0, 64), (64, 128), (10, 300), (299, 300), (128, 300), (5, 5)])
def test_a_range_of_rows(rows: tuple[int, int]) -> None:
    w = islands(300, 200)
    z = on_gpu(w)
    assert same_bits(torch.ops.zipserv.decompress_rows(z.blob, 300, 200, 1, *rows), w[rows[0] : rows[1]])


def test_a_blob_at_an_unaligned_address() -> None:
    w = trained(256, 256)
    z = on_gpu(w)
    memory = torch.empty(z.nbytes + 3, dtype=torch.uint8, device="cuda")
    memory[3:] = z.blob
    assert same_bits(torch.ops.zipserv.decompress(memory[3:], 256, 256, 1), w)


def test_fp16_is_right_too() -> None:
    w = (torch.randn(256, 192) * 0.02).half()
    with pytest.warns(UserWarning, match="BF16 only"):
        assert same_bits(zipserv.compress(w).cuda().decompress(), w)


def test_a_large_matrix() -> None:
    w = trained(8192, 28672)
    z = on_gpu(w)
    assert same_bits(z.decompress(), w)
