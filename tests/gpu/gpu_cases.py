# SPDX-License-Identifier: Apache-2.0
"""Weights that reach every branch of the format, and the comparisons that the tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch

import zipserv


def gaussian(m: int, k: int) -> torch.Tensor:
    return (torch.randn(m, k) * 0.02).bfloat16()


def trained(m: int, k: int) -> torch.Tensor:
    """Rows of different scale with heavy tails, as trained layers have them."""
    scale = torch.exp(torch.randn(m, 1) * 0.5) * 0.02
    tails = torch.distributions.StudentT(4.0).sample((m, k))
    return (tails * scale).bfloat16()


def random_bits(m: int, k: int) -> torch.Tensor:
    """Every exponent, infinities and NaNs with every payload among them; does not shrink, so the blob is raw."""
    return torch.randint(-(2**15), 2**15, (m, k), dtype=torch.int16).view(torch.bfloat16)


def islands(m: int, k: int) -> torch.Tensor:
    """Gaussian with blocks of random bits: dense tiles between ordinary ones."""
    w = gaussian(m, k)
    w[: max(m // 8, 1), : max(k // 8, 1)] = random_bits(max(m // 8, 1), max(k // 8, 1))
    return w


def escapes(m: int, k: int) -> torch.Tensor:
    """Escapes of all kinds in every position: near the window, far above, far below (literals), zeros, infinities, NaN."""
    w = gaussian(m, k)
    flat = w.view(-1)
    every = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e4, -1e30, 1e-30, float("inf"), -float("inf"), float("nan"), 1e-40, 3e-6]).bfloat16()
    where = torch.randperm(flat.numel())[: max(flat.numel() // 12, 1)]
    flat[where] = every[torch.randint(len(every), where.shape)]
    return w


def constant(m: int, k: int) -> torch.Tensor:
    return torch.full((m, k), 0.3125).bfloat16()


def zeros(m: int, k: int) -> torch.Tensor:
    return torch.zeros(m, k).bfloat16()


def sampled_tiles(m: int, k: int) -> torch.Tensor:
    """Which tiles zs_compress_sample looks at (kernels/compress.cu)."""
    tiles = -(-m // 64) * -(-k // 64)
    samples = min(tiles, 1024)
    s = torch.arange(samples)
    return s * tiles // samples + ((s * 0x9E3779B1 & 0xFFFFFFFF) >> 8) % (tiles // samples)


def by_tile(which: torch.Tensor, here: torch.Tensor, elsewhere: torch.Tensor) -> torch.Tensor:
    """``here`` in the tiles of the given numbers, ``elsewhere`` in the others."""
    m, k = here.shape
    tiles = torch.zeros(-(-m // 64) * -(-k // 64), dtype=torch.bool)
    tiles[which] = True
    mask = tiles.view(-1, -(-k // 64)).repeat_interleave(64, 0).repeat_interleave(64, 1)
    return torch.where(mask[:m, :k], here, elsewhere)


def unseen(m: int, k: int) -> torch.Tensor:
    """No escape in the tiles that are sampled, some in all others: the guess of the blob's size is too small."""
    return by_tile(sampled_tiles(m, k), constant(m, k), gaussian(m, k))


def seen(m: int, k: int) -> torch.Tensor:
    """The other way round: the guess is far too large."""
    return by_tile(sampled_tiles(m, k), escapes(m, k), constant(m, k))


def torn(m: int, k: int) -> torch.Tensor:
    """Tiles of few and of many escapes: no guess is certain."""
    return by_tile(torch.arange(0, -(-m // 64) * -(-k // 64), 2), gaussian(m, k), escapes(m, k))


KINDS: dict[str, Callable[[int, int], torch.Tensor]] = {
    f.__name__: f for f in (gaussian, trained, random_bits, islands, escapes, constant, zeros)
}

#: Whole tiles, ragged edges in both directions, single rows and columns, more tiles than blocks.
SHAPES = [(1, 1), (1, 4096), (4096, 1), (64, 64), (65, 63), (63, 65), (128, 192), (100, 1000), (257, 129), (1000, 777), (2048, 2048), (4096, 1536)]


def on_gpu(w: torch.Tensor) -> zipserv.ZipTensor:
    return zipserv.compress(w).cuda()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int16).cpu(), b.contiguous().view(torch.int16).cpu())


def errors(y: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """RMS and largest error."""
    d = y.double() - exact
    return d.pow(2).mean().sqrt().item(), d.abs().max().item()


def assert_like_cublas(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Against float64, no worse than F.linear in BF16: the error of both is the rounding of the result."""
    exact = x.double() @ w.double().T
    if bias is not None:
        exact = exact + bias.double()
    reference = torch.nn.functional.linear(x, w, bias)
    rms, worst = errors(y, exact)
    rms0, worst0 = errors(reference, exact)
    # A half unit in the last place of the largest result is what rounding alone may cost.
    floor = exact.abs().max().item() * 2**-9
    assert rms <= 1.03 * rms0 + 1e-3 * floor, f"RMS error {rms:.3g}, cuBLAS {rms0:.3g}"
    assert worst <= max(1.1 * worst0, floor), f"largest error {worst:.3g}, cuBLAS {worst0:.3g}"
