# SPDX-License-Identifier: Apache-2.0
"""Products with compressed weights: as exact as cuBLAS, the same from run to run and whatever the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import assert_like_cublas, gaussian, islands, on_gpu, same_bits, trained

import zipserv
from zipserv import choices, cuda, tune
from zipserv.choices import Problem
from zipserv.rows import linear_rows

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

TOKENS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 128, 200, 512]


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize(
    "shape", [(256, 256), (512, 4096), (4096, 512), (1000, 777), (65, 63), (3072, 3072), (4608, 3584)], ids=lambda s: f"{s[0]}x{s[1]}"
)  # the last one's runs begin anywhere in k on 132 multiprocessors
def test_against_float64(shape: tuple[int, int], n: int) -> None:
    w = trained(*shape)
    x = torch.randn(n, shape[1], device="cuda").bfloat16()
    bias = torch.randn(shape[0], device="cuda").bfloat16() if n % 2 else None
    y = zipserv.linear(x, on_gpu(w), bias)
    assert y.shape == (n, shape[0])
    assert_like_cublas(y, x, w.cuda(), bias)


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (64, 1), (3, 5), (1, 5000), (5000, 1), (17, 4097)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("n", [1, 5, 64, 70])
def test_odd_shapes(shape: tuple[int, int], n: int) -> None:
    w = gaussian(*shape)
    x = torch.randn(n, shape[1], device="cuda").bfloat16()
    bias = torch.randn(shape[0], device="cuda").bfloat16()
    assert_like_cublas(zipserv.linear(x, on_gpu(w), bias), x, w.cuda(), bias)


@pytest.mark.parametrize("n", [1, 8, 40])
def test_one_hot_activations_read_the_weights_exactly(n: int) -> None:
    """x = unit vectors: the result is a column of W, bit for bit; finds every misplaced row, column, escape and padding."""
    w = islands(520, 456)
    w = torch.where(w.isfinite(), w, torch.zeros_like(w))  # infinities and NaNs times 0 would hide everything else
    z = on_gpu(w)
    for first in range(0, 456, n):
        columns = torch.arange(first, min(first + n, 456))
        x = torch.zeros(len(columns), 456)
        x[torch.arange(len(columns)), columns] = 1.0
        y = zipserv.linear(x.bfloat16().cuda(), z)
        want = w[:, columns].T.float()
        assert torch.equal(y.float().cpu(), want + 0.0)  # a sum of zeros makes -0 +0


@pytest.mark.parametrize("shape", [(512, 1024), (4096, 4096), (1000, 777)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_a_token_does_not_see_its_batch(shape: tuple[int, int]) -> None:
    """A token's result has the same bits whatever N is and wherever it stands: up to 16 tokens always, beyond in the invariant mode."""
    z = on_gpu(trained(*shape))
    x = torch.randn(64, shape[1], device="cuda").bfloat16()
    for most, invariant in ((16, False), (64, True)):
        zipserv.set_batch_invariant(invariant)
        try:
            alone = torch.cat([zipserv.linear(x[i : i + 1], z) for i in range(most)])
            for n in (2, 3, 8, 9, 16, 17, 31, 32, 33, 64):
                if n <= most:
                    assert same_bits(zipserv.linear(x[:n], z), alone[:n]), f"N = {n}"
            order = torch.randperm(most, device="cuda")
            assert same_bits(zipserv.linear(x[:most][order], z), alone[order])
        finally:
            zipserv.set_batch_invariant(False)


def test_batch_invariant_mode_holds_for_many_tokens() -> None:
    z = on_gpu(trained(1024, 1536))
    x = torch.randn(1000, 1536, device="cuda").bfloat16()
    zipserv.set_batch_invariant(True)
    try:
        alone = zipserv.linear(x[:1], z)
        for n in (64, 65, 128, 500, 1000):
            y = zipserv.linear(x[:n], z)
            assert same_bits(y[:1], alone), f"N = {n}"
        middle = zipserv.linear(x[700:701], z)
        assert same_bits(zipserv.linear(x, z)[700:701], middle)
    finally:
        zipserv.set_batch_invariant(False)


@pytest.mark.parametrize("n", [1, 16, 32, 64, 100, 128, 300])
@pytest.mark.parametrize("m, k", [(4096, 4096), (14336, 4096), (4608, 3584)])
def test_the_same_from_run_to_run(m: int, k: int, n: int) -> None:
    z = on_gpu(trained(m, k))
    x = torch.randn(n, k, device="cuda").bfloat16()
    first = zipserv.linear(x, z)
    for _ in range(20):
        assert same_bits(zipserv.linear(x, z), first)


#: Whole and partial tiles of tokens, one to eight of them.
MANY = [129, 200, 256, 257, 300, 512, 1000, 1024]
#: All smaller compressed, so that none is raw and cuBLAS's. The last three have runs that begin anywhere in k on 132 multiprocessors (turns.cuh).
RAGGED = [(4096, 4096), (1000, 776), (126, 120), (250, 184), (60, 2040), (2040, 56), (8200, 1032), (5080, 3400), (13800, 3592), (8950, 3400)]


@pytest.mark.skipif(
    not (HOPPER and torch.cuda.get_device_properties(0).multi_processor_count == 132), reason="for what was measured: an H100 SXM, or an H200"
)
@pytest.mark.parametrize("m, k", [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)])
def test_many_tokens_are_one_launch_on_hopper(m: int, k: int) -> None:
    """What an H100 measured as the fastest way (core/cuda/plan/pair_test.go)."""
    assert choices.current(0, Problem(m, k, 256)).kernel == ("solo" if m == 28672 else "pair")
    assert choices.current(0, Problem(m, k, 8192)).kernel == "relay"
    zipserv.set_batch_invariant(True)
    try:
        assert choices.current(0, Problem(m, k, None)).kernel == "wgmma"
    finally:
        zipserv.set_batch_invariant(False)


@pytest.mark.skipif(not HOPPER, reason="these kernels are for compute capability 9.0")
@pytest.mark.parametrize("n", MANY)
@pytest.mark.parametrize("shape", RAGGED, ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_kernel_for_many_tokens(shape: tuple[int, int], n: int) -> None:
    """Ragged ends in every direction, more and fewer tiles than clusters; twice the same bits."""
    m, k = shape
    w = islands(m, k) if m == 1000 else trained(m, k)
    w = torch.where(w.abs() < 1e4, w, torch.zeros_like(w))  # no infinities, and results that BF16 holds
    z, x = on_gpu(w), torch.randn(n, k, device="cuda").bfloat16()
    bias = torch.randn(m, device="cuda").bfloat16() if n % 2 else None
    problem = Problem(m, k, tune.bucket(n))
    many = [c for c in choices.candidates(0, problem) if c.kernel in ("pair", "solo", "relay")]
    assert {(c.kernel, c.mw, c.kw) for c in many} == {("pair", 2, 2), ("pair", 2, 3), ("pair", 2, 4), ("solo", 2, 3), ("solo", 2, 4), ("relay", 2, 1)}
    for choice in many:
        with choices.chosen(0, problem, choice):
            assert choices.current(0, problem) == choice
            y = zipserv.linear(x, z, bias)
            assert_like_cublas(y, x, w.cuda(), bias)
            for _ in range(5):
                assert same_bits(zipserv.linear(x, z, bias), y)


@pytest.mark.parametrize("n", [100, 300, 512, 2048, 6000])
@pytest.mark.parametrize("part", [(5000, 1024, 128, 4224), (1600, 72, 64, 1600), (1600, 4096, 1024, 1280), (2500, 1160, 0, 1900)], ids=str)
def test_some_rows_of_a_matrix(part: tuple[int, int, int, int], n: int) -> None:
    m, k, first, end = part
    w = trained(m, k)
    x = torch.randn(n, k, device="cuda").bfloat16()
    bias = torch.randn(end - first, device="cuda").bfloat16()
    y = linear_rows(x, on_gpu(w).blob, m, k, w.dtype, first, end, bias)
    assert same_bits(y, zipserv.linear(x, on_gpu(w[first:end]), bias)) or not HOPPER or n <= 128
    assert_like_cublas(y, x, w[first:end].cuda(), bias)


@pytest.mark.parametrize("n", [129, 300, 512, 700, 2100])
@pytest.mark.parametrize("m, k, parts", [(384, 520, 3), (384, 520, 2), (1280, 2048, 2), (320, 328, 5), (28672, 512, 2)])
def test_results_of_several_layers(m: int, k: int, parts: int, n: int) -> None:
    """A matrix for each of several layers' rows: the bits that a product of all rows gives."""
    w = trained(m, k)
    z, x = on_gpu(w), torch.randn(3, n, k, device="cuda").bfloat16()[1]
    bias = torch.randn(m, device="cuda").bfloat16() if n % 2 else None
    problem = Problem(m, k, tune.bucket(n))
    for choice in choices.candidates(0, problem):
        with choices.chosen(0, problem, choice):
            whole = zipserv.linear(x, z, bias)
            made = cuda.linear_parts(x, z.blob, m, k, 1, bias, parts)
            if choice.kernel not in ("pair", "solo", "relay"):
                assert made is None
                continue
            assert len(made) == parts and all(y.is_contiguous() and y.shape == (n, m // parts) for y in made)
            assert same_bits(torch.cat(made, -1), whole), choice


@pytest.mark.skipif(not HOPPER, reason="these kernels are for compute capability 9.0")
@pytest.mark.parametrize(("m", "k"), [(256, 4096), (2048, 1024), (28672, 4096), (10240, 3584), (5120, 2048)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gates(m: int, k: int, with_bias: bool) -> None:
    """As far from float64 as gates behind the product are, whatever kernel the plan takes."""
    w = trained(m, k)
    z = on_gpu(w)
    first, second = w.cuda().double().chunk(2)
    bias = torch.randn(m, device="cuda").bfloat16() if with_bias else None
    for n in (1, 8, 31, 64, 128, 129, 192, 200, 300, 384, 512, 513, 700, 1030):
        x = torch.randn(n, k, device="cuda").bfloat16()
        made = cuda.linear_gated(x, z.blob, m, k, 1, bias)
        assert made is not None and made.shape == (n, m // 2)
        gates, up = x.double() @ first.T, x.double() @ second.T
        if bias is not None:
            gates, up = gates + bias[: m // 2], up + bias[m // 2 :]
        exact = F.silu(gates) * up
        behind = F.silu(gates.bfloat16()) * up.bfloat16()  # three roundings, as in the kernel
        off = (made.double() - exact).norm() / exact.norm()
        assert off <= 1.05 * (behind.double() - exact).norm() / exact.norm(), (n, off)


@pytest.mark.skipif(not HOPPER, reason="these kernels are for compute capability 9.0")
def test_gates_of_any_size() -> None:
    """SiLU where exponentials overflow, are nothing, or are not numbers: one-hot tokens pick gates from a list, and 1 for what they are for."""
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-3, 1.0, -1.0, 8.0, -8.0, 20.0, -20.0, 80.0, -80.0, 90.0, -90.0, 1e5, -1e5, 3e38, -3e38]).bfloat16()
    count = values.numel()
    w = torch.zeros(128, 4096, dtype=torch.bfloat16)
    w[:count, 0], w[64:, 0] = values, 1.0
    w[:, 1:] = torch.randn(128, 4095).bfloat16() * 0.02  # so that it is compressed; no token asks for it
    z = on_gpu(w)
    want = F.silu(values.cuda())
    for n in (3, 200):
        x = torch.zeros(n, 4096, device="cuda", dtype=torch.bfloat16)
        x[:, 0] = 1.0
        made = cuda.linear_gated(x, z.blob, 128, 4096, 1, None)
        assert made is not None
        torch.testing.assert_close(made[:, :count], want.expand(n, -1), rtol=2**-8, atol=1e-36)


@pytest.mark.skipif(not HOPPER, reason="these kernels are for compute capability 9.0")
def test_one_hot_activations_read_the_weights_exactly_with_many_tokens() -> None:
    w = islands(520, 456)
    w = torch.where(w.isfinite(), w, torch.zeros_like(w))
    z = on_gpu(w)
    x = torch.eye(456, device="cuda").bfloat16()
    problem = Problem(520, 456, tune.bucket(456))
    for choice in (c for c in choices.candidates(0, problem) if c.kernel in ("pair", "solo", "relay")):
        with choices.chosen(0, problem, choice):
            assert torch.equal(zipserv.linear(x, z).float().cpu(), w.T.float() + 0.0)


def test_graphs_of_many_numbers_of_tokens() -> None:
    """Graphs of different numbers of tokens, replayed in turns beside eager calls: the same bits as alone, and no workspace is left in disorder."""
    w = trained(4096, 4096)
    z = on_gpu(w)
    xs = {n: torch.randn(n, 4096, device="cuda").bfloat16() for n in (1, 64, 128, 129, 256, 300, 512, 1000, 2000)}
    alone = {n: zipserv.linear(x, z) for n, x in xs.items()}
    graphs = {}
    for n, x in xs.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = zipserv.linear(x, z)
            second = zipserv.linear(x, z)  # starts before the first has ended
        graphs[n] = graph, first, second
    for turn in range(4):
        for n in sorted(xs, key=lambda n: (n * 7 + turn * 5) % 11):
            graph, first, second = graphs[n]
            first.zero_()
            graph.replay()
            assert same_bits(zipserv.linear(xs[n], z), alone[n]), f"N = {n}"
            assert same_bits(first, alone[n]) and same_bits(second, alone[n]), f"N = {n}"


def test_activations_that_lie_apart() -> None:
    w = trained(384, 320)
    z = on_gpu(w)
    wide = torch.randn(24, 1000, device="cuda").bfloat16()
    for x in (wide[:, :320], wide[:, 1:321], wide[::3, 8:328], torch.randn(320, 24, device="cuda").bfloat16().T, wide[:1, :320].expand(10, 320)):
        assert_like_cublas(zipserv.linear(x, z), x, w.cuda(), None)


def test_leading_dimensions_and_bias() -> None:
    w = trained(200, 128)
    x = torch.randn(2, 3, 5, 128, device="cuda").bfloat16()
    bias = torch.randn(400, device="cuda").bfloat16()[::2]
    y = zipserv.linear(x, on_gpu(w), bias)
    assert y.shape == (2, 3, 5, 200)
    assert_like_cublas(y.reshape(-1, 200), x.reshape(-1, 128), w.cuda(), bias)
    assert zipserv.linear(x[0:0], on_gpu(w)).shape == (0, 3, 5, 200)


def test_infinite_and_nan_activations_stay_in_their_token() -> None:
    z = on_gpu(gaussian(256, 256))
    x = torch.randn(8, 256, device="cuda").bfloat16()
    clean = zipserv.linear(x, z)
    x[3, 7] = float("inf")
    x[5, 200] = float("nan")
    y = zipserv.linear(x, z)
    keep = torch.tensor([0, 1, 2, 4, 6, 7], device="cuda")
    assert same_bits(y[keep], clean[keep])
    assert y[5].isnan().all() and not y[3].isfinite().any()


@pytest.mark.skipif(not HOPPER, reason="for compute capability 9.0")
def test_weights_that_were_handed_on_are_those_of_the_product() -> None:
    """Products with different weights one after the other, some in the memory of the one before, beside products on another stream."""
    ws = [trained(1024, 2048), gaussian(1024, 2048), trained(2048, 1024)]
    zs, other = [on_gpu(w) for w in ws], torch.cuda.Stream()
    xs = [torch.randn(1500, w.shape[1], device="cuda").bfloat16() for w in ws]
    want = []
    for w, z, x in zip(ws, zs, xs, strict=True):
        problem = Problem(*w.shape, tune.bucket(1500))
        relay = next(c for c in choices.candidates(0, problem) if c.kernel == "relay")
        choices.choose(0, problem, relay)
        want.append(zipserv.linear(x, z))
        assert_like_cublas(want[-1], x, w.cuda(), None)
    try:
        torch.cuda.synchronize()
        for _ in range(30):
            got = [zipserv.linear(x, z) for x, z in zip(xs, zs, strict=True)]
            with torch.cuda.stream(other):
                beside = [zipserv.linear(x, z) for x, z in zip(xs, zs, strict=True)]
            torch.cuda.synchronize()
            assert all(same_bits(a, b) for a, b in zip(got + beside, want + want, strict=True))
    finally:
        for w in ws:
            choices.unchoose(0, Problem(*w.shape, tune.bucket(1500)))


def test_wrong_arguments() -> None:
    z = on_gpu(gaussian(128, 64))
    x = torch.randn(2, 64, device="cuda").bfloat16()
    for wrong in (x.float(), x[:, :63], x.cpu()):
        with pytest.raises((TypeError, ValueError)):
            zipserv.linear(wrong, z)
    for wrong in (torch.zeros(127, dtype=torch.bfloat16, device="cuda"), torch.zeros(128, device="cuda"), torch.zeros(128, dtype=torch.bfloat16)):
        with pytest.raises((TypeError, ValueError)):
            zipserv.linear(x, z, wrong)
