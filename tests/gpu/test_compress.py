# SPDX-License-Identifier: Apache-2.0
"""Compression on the device writes the same bytes as the CPU codec."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable

import pytest
import torch
from gpu_cases import KINDS, SHAPES, gaussian, islands, random_bits, same_bits, seen, torn, trained, unseen

import zipserv
from zipserv import _zipserv


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_same_bytes_as_the_codec(kind: str, shape: tuple[int, int]) -> None:
    w = KINDS[kind](*shape)
    here, there = zipserv.compress(w), zipserv.compress(w.cuda())
    assert there.device.type == "cuda"
    assert torch.equal(there.blob.cpu(), here.blob)


@pytest.mark.parametrize(
    ("make", "shape", "way"),
    [
        (gaussian, (2048, 2048), "guess write"),  # 1024 tiles: all are sampled
        (gaussian, (4096, 4096), "guess write"),
        (trained, (4100, 3000), "guess write"),
        (unseen, (4096, 4096), "guess write guess write"),
        (seen, (4096, 4096), "guess write"),
        (torn, (4096, 4096), "guess count guess write"),
        (random_bits, (4096, 1536), "guess count"),
        (random_bits, (100, 100), "guess count"),
    ],
)
def test_ways_to_the_size(make: Callable[[int, int], torch.Tensor], shape: tuple[int, int], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guess is enough, too small, too large or none; the bytes are the codec's, in memory hardly larger than they."""
    calls: list[str] = []
    plan, write = _zipserv.cuda_compress_plan, _zipserv.cuda_compress_write
    monkeypatch.setattr(_zipserv, "cuda_compress_plan", lambda *a: (calls.append("guess"), plan(*a))[1])
    monkeypatch.setattr(_zipserv, "cuda_compress_write", lambda *a: (calls.append("write" if a[8] else "count"), write(*a))[1])
    w = make(*shape)
    here, there = zipserv.compress(w), zipserv.compress(w.cuda())
    assert " ".join(calls) == way
    assert torch.equal(there.blob.cpu(), here.blob)
    assert there.header == here.header
    assert there.blob.untyped_storage().nbytes() <= 1.02 * there.nbytes
    there.verify()


@pytest.mark.parametrize("make", [gaussian, trained])
def test_blocks_of_twelve_tiles(make: Callable[[int, int], torch.Tensor]) -> None:
    """A matrix that is large enough for them on any GPU of up to 148 multiprocessors, and ragged: the bytes are the codec's."""
    w = make(7200, 16392)
    there = zipserv.compress(w.cuda())
    assert torch.equal(there.blob.cpu(), zipserv.compress(w).blob)


def test_nothing_of_others_behind_a_result() -> None:
    """The memory behind a blob holds zeros, not what was there before."""
    w = trained(4096, 4096).cuda()
    zipserv.compress(w)
    torch.full((1 << 28,), 0xA5, dtype=torch.uint8, device="cuda")
    z = zipserv.compress(w)
    storage = torch.empty(0, dtype=torch.uint8, device="cuda").set_(z.blob.untyped_storage())
    rest = storage[z.nbytes :]
    assert z.blob.data_ptr() == storage.data_ptr() and rest.numel() > 0
    assert not rest.any()


def test_a_result_in_larger_memory_is_saved_and_loaded() -> None:
    w = trained(4096, 4096).cuda()
    z = zipserv.compress(w)
    file = io.BytesIO()
    torch.save(z, file)
    assert file.tell() <= 1.02 * z.nbytes + 4096
    file.seek(0)
    assert torch.equal(torch.load(file).blob, z.blob)


def test_many_at_a_time() -> None:
    """Threads and streams compress beside each other: blocks of one wait for their own only, and no mail goes astray."""
    weights = [make(m, k) for make in (gaussian, trained, islands) for m, k in ((4096, 1536), (1000, 777), (2048, 4096))]
    want = [zipserv.compress(w).blob for w in weights]
    wrong: list[object] = []

    def work(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(first, first + 3 * len(weights)):
                j = i % len(weights)
                blob = zipserv.compress(weights[j].cuda()).blob.cpu()
                if not torch.equal(blob, want[j]):
                    wrong.append((first, j))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


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
