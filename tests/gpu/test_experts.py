# SPDX-License-Identifier: Apache-2.0
"""Experts that are multiplied together, on a GPU: every pair against its expert's own product, in CUDA graphs with a changing router too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import zipserv
from zipserv import ZipExperts, grouped

BF16 = torch.bfloat16


class Layer:
    def __init__(self, experts: int, m: int, k: int, scale: float = 0.02) -> None:
        self.experts, self.m, self.k = experts, m, k
        self.weights = (torch.randn(experts, m, k, device="cuda") * scale).to(BF16)
        self.weights[:, : min(m, 64), : min(k, 64)] *= torch.randn(min(m, 64), min(k, 64), device="cuda").exp().to(BF16)  # escapes
        self.blobs = grouped.stack([zipserv.compress(w).blob for w in self.weights], m, k)

    def product(self, x: torch.Tensor, ids: torch.Tensor, tile: int | None = None) -> torch.Tensor:
        tile = tile or grouped.tile_for(*ids.shape, self.experts)
        routing = grouped.moe_route(ids, self.experts, tile)
        return grouped.moe_linear(x, self.blobs, self.experts, routing, tile, self.m, self.k, 1)

    def check(self, x: torch.Tensor, ids: torch.Tensor, y: torch.Tensor) -> None:
        flat = ids.flatten()
        here = (flat >= 0) & (flat < self.experts)
        rows = x if x.shape[0] == flat.numel() else x.repeat_interleave(ids.shape[1], 0)
        for expert in flat[here].unique().tolist():
            mine = flat == expert
            want = F.linear(rows[mine].double(), self.weights[expert].double())
            bound = F.linear(rows[mine].double().abs(), self.weights[expert].double().abs()) * 1e-5 + want.abs() / 250
            wrong = ((y[mine].double() - want).abs() > bound).sum().item()
            assert wrong == 0, f"expert {expert}: {wrong} of {want.numel()} values are off"


def choose(tokens: int, top: int, experts: int) -> torch.Tensor:
    return torch.rand(tokens, experts, device="cuda").topk(top).indices


SHAPES = [(8, 2, 1024, 512), (128, 8, 1536, 2048), (16, 4, 190, 120), (16, 4, 190, 123), (5, 1, 64, 1000), (64, 6, 2816, 2048)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 32, 100])
def test_products(shape: tuple[int, int, int, int], tokens: int) -> None:
    experts, top, m, k = shape
    layer = Layer(experts, m, k)
    ids = choose(tokens, top, experts)
    for x in (torch.randn(tokens, k, device="cuda").to(BF16), torch.randn(tokens * top, k, device="cuda").to(BF16)):
        for tile in (None, 8, 64):
            layer.check(x, ids, layer.product(x, ids, tile))


def test_raw_blobs_are_refused() -> None:
    """Small odd shapes do not shrink; the kernel would take their weights for tiles, and read anywhere."""
    weights = torch.randn(16, 130, 72, device="cuda").to(BF16)
    made = [zipserv.compress(w) for w in weights]
    ids, x = choose(1, 4, 16), torch.randn(1, 72, device="cuda").to(BF16)
    assert all(z.is_raw for z in made)
    with pytest.raises(ValueError, match="raw"):
        grouped.moe_linear(x, torch.cat([F.pad(z.blob, (0, 96)) for z in made]), 16, grouped.moe_route(ids, 16, 8), 8, 130, 72, 1)


@pytest.mark.parametrize("shape", [(8, 2, 1024, 512), (128, 8, 1536, 2048), (5, 1, 384, 1000)])
def test_gates(shape: tuple[int, int, int, int]) -> None:
    experts, top, m, k = shape
    layer = Layer(experts, m, k)
    for tokens in (1, 8, 50):
        ids, x = choose(tokens, top, experts), torch.randn(tokens, k, device="cuda").to(BF16)
        for tile in (8, 32):
            gates, up = layer.product(x, ids, tile).chunk(2, 1)
            routing = grouped.moe_route(ids, experts, tile)
            got = grouped.moe_linear(x, layer.blobs, experts, routing, tile, m, k, 1, True)
            torch.testing.assert_close(got, F.silu(gates) * up, rtol=2e-2, atol=2e-3)


def test_routing_is_the_cpu_s() -> None:
    for tokens, top, experts, tile in ((1, 1, 1, 8), (5, 2, 8, 8), (128, 8, 128, 16), (512, 8, 1000, 8), (300, 3, 7, 64)):
        ids = torch.randint(-1, experts + 1, (tokens, top), device="cuda")
        here, want = grouped.moe_route(ids, experts, tile).cpu(), grouped.moe_route(ids.cpu(), experts, tile)
        items, pairs = int(want[0]), int(((ids >= 0) & (ids < experts)).sum())
        first = 4 + 4 * ids.numel()
        assert here[0] == items
        for start, length in ((4, 4 * items), (first, pairs), (first + ids.numel(), pairs)):
            assert torch.equal(here[start : start + length], want[start : start + length])


def test_combine_is_the_cpu_s() -> None:
    for tokens, top, m in ((1, 2, 4096), (33, 8, 2048), (7, 3, 130)):
        ids = choose(tokens, top, 16) - 2
        y = torch.randn(tokens * top, m, device="cuda").to(BF16)
        y[ids.flatten() < 0] = float("nan")
        weights = torch.rand(tokens, top, device="cuda")
        got = grouped.moe_combine(y, ids, weights, 14)
        torch.testing.assert_close(got.cpu(), grouped.moe_combine(y.cpu(), ids.cpu(), weights.cpu(), 14), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("invariant", [False, True])
def test_every_run_gives_the_same_bits(invariant: bool) -> None:
    layer, top = Layer(32, 1536, 2048), 4
    zipserv.set_batch_invariant(invariant)
    try:
        for tokens in (1, 5, 40):
            ids, x = choose(tokens, top, 32), torch.randn(tokens, 2048, device="cuda").to(BF16)
            y = layer.product(x, ids)
            for _ in range(20):
                assert torch.equal(y, layer.product(x, ids))
            if invariant:
                for token in range(min(tokens, 8)):
                    alone = layer.product(x[token : token + 1], ids[token : token + 1])
                    assert torch.equal(alone, y[token * top : (token + 1) * top])
    finally:
        zipserv.set_batch_invariant(False)


def test_a_graph_follows_the_router() -> None:
    layer, tokens, top = Layer(16, 512, 768), 6, 4
    x, ids = torch.randn(tokens, 768, device="cuda").to(BF16), choose(tokens, top, 16)
    weights = torch.rand(tokens, top, device="cuda")

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        y = layer.product(x, ids)
        return y, grouped.moe_combine(y, ids, weights, 16)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, out = run()
    for kind in ("any", "one", "any", "nobody", "any"):
        x.normal_()
        ids.copy_({"any": choose(tokens, top, 16), "one": torch.full_like(ids, 7), "nobody": torch.full_like(ids, -1)}[kind])
        for _ in range(3):
            graph.replay()
        layer.check(x, ids, y)
        if kind == "nobody":
            assert not out.any()
        else:
            torch.testing.assert_close(out.float(), (y.view(tokens, top, -1).float() * weights[..., None]).sum(1), rtol=2e-2, atol=2e-2)


def test_one_launch_each_and_no_wait() -> None:
    layer = Layer(8, 512, 256)
    x, ids = torch.randn(4, 256, device="cuda").to(BF16), choose(4, 2, 8)
    layer.product(x, ids)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = layer.product(x, ids)
            grouped.moe_combine(y, ids, torch.ones(4, 2, device="cuda"), 8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    names = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA and event.name.startswith("zs_")]
    assert names == ["zs_moe_route", "zs_zipgemm_grouped", "zs_moe_combine"]


def swiglu(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def one_by_one(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: ZipExperts, down: ZipExperts) -> torch.Tensor:
    y = torch.zeros(x.shape, device="cuda")
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        y.index_add_(0, token, F.linear(swiglu(F.linear(x[token], up[expert])), down[expert]).float() * weights[token, slot, None])
    return y


@pytest.mark.parametrize("shape", [(8, 2, 512, 768), (64, 6, 256, 704)])
@pytest.mark.parametrize("made_on", ["cpu", "cuda"])
@torch.no_grad()
def test_stacked_experts_of_a_model(shape: tuple[int, int, int, int], made_on: str) -> None:
    """ZipExperts: moved, each expert by itself, all together, captured, and loaded again beneath the graph."""
    count, top, hidden, inner = shape
    weights = [(torch.randn(count, *size) * 0.05).to(BF16) for size in ((2 * inner, hidden), (hidden, inner))]
    up, down = (ZipExperts.from_tensor(w.to(made_on)).cuda() for w in weights)
    assert all(torch.equal(e.decompress().cpu(), w) for e, w in zip((up, down), weights, strict=True))
    first, second = up.together(), down.together()
    assert first is not None and second is not None
    grouped.warm(first, second, True)
    for tokens in (1, 7, 40, 300):
        x, ids = torch.randn(tokens, hidden, device="cuda").to(BF16), choose(tokens, top, count)
        share = torch.rand(tokens, top, device="cuda")
        run = lambda: grouped.multiply(x, ids, share, first, second, swiglu, silu_and_mul=True, invariant=False)  # noqa: B023, E731
        torch.testing.assert_close(run().float(), one_by_one(x, ids, share, up, down), rtol=3e-2, atol=3e-2)
    x, ids, share = torch.randn(5, hidden, device="cuda").to(BF16), choose(5, top, count), torch.rand(5, top, device="cuda")
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for sign in (1, -1, 1):  # other weights of the same length
        up.load_state_dict(ZipExperts.from_tensor(sign * weights[0].cuda()).state_dict())
        graph.replay()
        torch.testing.assert_close(y.float(), one_by_one(x, ids, share, up, down), rtol=3e-2, atol=3e-2)
    assert up.together().blobs is first.blobs
    up.load_state_dict(ZipExperts.from_tensor((torch.randn(count, 2 * inner, hidden) * 0.02).to(BF16)).state_dict())  # of other lengths
    first = up.together()
    torch.testing.assert_close(run().float(), one_by_one(x, ids, share, up, down), rtol=3e-2, atol=3e-2)
