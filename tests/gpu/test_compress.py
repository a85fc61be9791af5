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


def test_every_way_to_choose_a_window() -> None:
    """Tiles whose best window starts at exponent 0, ends at 255, lies far below the largest weight, or ties with its neighbour."""
    w = trained(640, 640)
    bits, position = w.view(torch.int16), torch.arange(4096).view(64, 64)
    tiles = {
        (0, 0): lambda e: torch.where(torch.rand(64, 64) < 0.3, e, 0),  # zeros fill the window, all else is an escape
        (1, 1): lambda e: torch.randint(0, 9, (64, 64)),
        (2, 2): lambda e: torch.randint(247, 256, (64, 64)),
        (3, 3): lambda e: torch.where(position % 60 == 0, torch.randint(112, 123, (64, 64)), torch.randint(105, 113, (64, 64))),
        (4, 4): lambda e: torch.tensor([120, 128, 122, 123, 124, 125, 126, 127])[position % 8],
        (5, 5): lambda e: torch.where(torch.rand(64, 64) < 0.01, torch.randint(0, 256, (64, 64)), e),
        (6, 6): lambda e: torch.randint(60, 100, (64, 64)),
        (7, 7): lambda e: torch.zeros(64, 64, dtype=torch.int64),
    }
    for (r, c), change in tiles.items():
        part = bits[64 * r : 64 * r + 64, 64 * c : 64 * c + 64]
        e = change((part.long() >> 7) & 255)
        part.copy_(((part.long() & 0x807F) | e << 7).to(torch.int16))
    here, there = zipserv.compress(w), zipserv.compress(w.cuda())
    assert not here.is_raw
    assert torch.equal(there.blob.cpu(), here.blob)
    assert same_bits(there.decompress().cpu(), w)


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
