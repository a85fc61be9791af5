# SPDX-License-Identifier: Apache-2.0
"""Cutting and merging blobs: the result must be, byte for byte, what compressing the cut or merged matrix gives."""

from __future__ import annotations

import itertools

import pytest
import torch

import zipserv
from zipserv import tiles

GENERATOR = torch.Generator().manual_seed(7)


def gaussian(m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(m, k, generator=GENERATOR) * 0.02).to(dtype)


def odd(m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Escapes of all kinds, dense tiles, zeros, infinities, NaN payloads."""
    weights = gaussian(m, k, dtype)
    weights[: m // 5, : k // 5] *= torch.exp2(torch.randint(-30, 30, (m // 5, k // 5), generator=GENERATOR)).to(dtype)
    weights[::7, ::5] = 0
    noise = torch.randint(-(1 << 15), 1 << 15, (m // 8, k // 8), generator=GENERATOR, dtype=torch.int16)
    weights.view(torch.int16)[-noise.shape[0] :, -noise.shape[1] :] = noise
    return weights


def blob_of(weights: torch.Tensor) -> torch.Tensor:
    return zipserv.compress(weights.contiguous()).blob


def same(blob: torch.Tensor, weights: torch.Tensor) -> None:
    zipserv.ZipTensor.from_blob(blob, verify="full")
    assert torch.equal(blob, blob_of(weights))


@pytest.mark.parametrize("make", [gaussian, odd])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(256, 192), (380, 250), (64, 64), (65, 129)])
def test_cut_is_what_compressing_the_part_gives(make, dtype, shape) -> None:
    weights = make(*shape, dtype)
    blob = blob_of(weights)
    m, k = shape
    row_spans = [(0, m), (0, 64), (64 * ((m - 1) // 64), m)]
    col_spans = [(0, k), (0, 64), (64 * ((k - 1) // 64), k)]
    for rows, cols in itertools.product(row_spans, col_spans):
        part = weights[rows[0] : rows[1], cols[0] : cols[1]]
        if zipserv.ZipTensor(blob).is_raw:  # a raw matrix has no tiles: its parts are raw too
            assert torch.equal(tiles.decode(tiles.cut(blob, rows, cols)).view(torch.int16), part.view(torch.int16))
        else:
            same(tiles.cut(blob, rows, cols), part)


@pytest.mark.parametrize("make", [gaussian, odd])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stack_and_join_are_what_compressing_the_whole_gives(make, dtype) -> None:
    parts = [make(m, 250, dtype) for m in (256, 192, 320, 252)]
    same(tiles.stack([blob_of(part) for part in parts]), torch.cat(parts))
    parts = [make(252, k, dtype) for k in (256, 192, 250)]
    same(tiles.join([blob_of(part) for part in parts]), torch.cat(parts, 1))


@pytest.mark.parametrize("make", [gaussian, odd])
def test_shards_join_to_the_original(make) -> None:
    blob = blob_of(make(256, 512))
    for n in (2, 4):
        assert torch.equal(tiles.join([tiles.cut(blob, cols=(i * 512 // n, (i + 1) * 512 // n)) for i in range(n)]), blob)
        assert torch.equal(tiles.stack([tiles.cut(blob, rows=(i * 256 // n, (i + 1) * 256 // n)) for i in range(n)]), blob)


@pytest.mark.parametrize("make", [gaussian, odd])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numpy_decoder_agrees(make, dtype) -> None:
    """tilecode.py reads the format on its own: every bit must be what was compressed."""
    weights = make(380, 250, dtype)
    block = tiles.Block.of(blob_of(weights))
    assert torch.equal(block.decode().view(torch.int16), weights.view(torch.int16))
    assert torch.equal(block.own().decode().view(torch.int16), weights.view(torch.int16))


@pytest.mark.parametrize("rows,cols", [((0, 300), (0, 200)), ((10, 250), (70, 71)), ((299, 300), (0, 200)), ((64, 128), (3, 200))])
@pytest.mark.parametrize("noise", [False, True])
def test_decode_of_any_part(rows, cols, noise) -> None:
    weights = gaussian(300, 200)
    if noise:
        weights.view(torch.int16)[:] = torch.randint(-(1 << 15), 1 << 15, (300, 200), dtype=torch.int16)
    blob = blob_of(weights)
    assert (blob.numel() == 128 + 2 * 300 * 200) == noise  # noise is kept raw
    part = weights[rows[0] : rows[1], cols[0] : cols[1]]
    assert torch.equal(tiles.decode(blob, rows, cols).view(torch.int16), part.view(torch.int16))
    if noise:
        same(tiles.cut(blob, rows, cols), part)


def test_a_whole_of_tiles_that_does_not_shrink_is_kept_raw() -> None:
    weights = gaussian(192, 192)
    weights.view(torch.int16)[:64, :64] = torch.randint(-(1 << 15), 1 << 15, (64, 64), dtype=torch.int16)
    blob = blob_of(weights)
    part = tiles.cut(blob, (0, 64), (0, 64))
    assert part.numel() == 128 + 2 * 64 * 64
    same(part, weights[:64, :64])


def test_what_can_not_be_cut_or_merged_is_refused() -> None:
    blob = blob_of(gaussian(300, 200))
    for rows, cols in (((1, 64), None), ((0, 63), None), (None, (0, 100)), (None, (32, 200))):
        with pytest.raises(ValueError, match="borders"):
            tiles.cut(blob, rows, cols)
    for span in ((0, 301), (64, 64), (-64, 64), (128, 64)):
        with pytest.raises(ValueError, match="not within"):
            tiles.cut(blob, span)
    with pytest.raises(ValueError, match="multiple of 64"):
        tiles.stack([blob, blob])
    with pytest.raises(ValueError, match="its place in the grid"):
        tiles.stack([blob_of(gaussian(64, 64)), blob_of(gaussian(64, 128))])
    with pytest.raises(ValueError, match="BF16 and FP16"):
        tiles.stack([blob_of(gaussian(64, 128)), blob_of(gaussian(64, 128, torch.float16))])
    with pytest.raises(ValueError, match="at least one"):
        tiles.stack([])
    with pytest.raises(ValueError, match="uint8"):
        tiles.cut(blob.view(torch.int8))


def test_lying_blobs_are_refused() -> None:
    blob = blob_of(odd(256, 256))
    with pytest.raises(zipserv.Error, match="speaks of"):
        tiles.cut(blob[:-16].contiguous())
    wrong = blob.clone()
    wrong[16] ^= 1
    with pytest.raises(zipserv.Error, match="CRC"):
        tiles.cut(wrong)
    wrong = blob.clone()
    wrong[128 + 8 : 128 + 12] = 255  # the second tile's escape offset
    with pytest.raises(zipserv.Error, match="do not rise"):
        tiles.cut(wrong)
    wrong = blob.clone()
    wrong[128 + 4] ^= 1  # the first tile's number of escapes: found when the list is read
    with pytest.raises(zipserv.Error):
        tiles.cut(wrong)
