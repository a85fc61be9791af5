# SPDX-License-Identifier: Apache-2.0
"""Compression on the device writes the same bytes as the CPU codec."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import KINDS, SHAPES, same_bits, trained

import zipserv


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_same_bytes_as_the_codec(kind: str, shape: tuple[int, int]) -> None:
    w = KINDS[kind](*shape)
    here, there = zipserv.compress(w), zipserv.compress(w.cuda())
    assert there.device.type == "cuda"
    assert torch.equal(there.blob.cpu(), here.blob)


@pytest.mark.parametrize("shape", [(7,), (4096,), (3, 5, 64), (8, 100, 33)])
def test_other_dimensions(shape: tuple[int, ...]) -> None:
    w = (torch.randn(shape) * 0.02).bfloat16()
    there = zipserv.compress(w.cuda())
    assert torch.equal(there.blob.cpu(), zipserv.compress(w).blob)
    assert there.decompress().shape == shape


def test_a_transposed_and_a_sliced_weight() -> None:
    w = trained(640, 512).cuda()
    for view in (w.T, w[:, 3:300], w[5:]):
        z = zipserv.compress(view)
        assert same_bits(z.decompress(), view)


def test_round_trip_of_a_large_matrix() -> None:
    w = trained(8192, 8192).cuda()
    z = zipserv.compress(w)
    assert same_bits(z.decompress(), w)
    z.cpu().verify()
