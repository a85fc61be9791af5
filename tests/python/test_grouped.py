# SPDX-License-Identifier: Apache-2.0
"""The ops of a mixture-of-experts layer against one product an expert."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zipserv
from zipserv import grouped

EXPERTS, M, K = 5, 190, 120  # 130 x 72 would be stored raw: the tiles' padding costs more than compression saves


def packed(weights: torch.Tensor) -> torch.Tensor:
    return grouped.stack([zipserv.compress(w).blob for w in weights], *weights.shape[1:])


@pytest.fixture(scope="module")
def experts() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    weights = (torch.randn(EXPERTS, M, K) * 0.02).bfloat16()
    return weights, packed(weights)


CHOICES = {
    "several": torch.tensor([[0, 3], [3, 1], [4, 3], [1, 0]]),
    "one": torch.tensor([[2], [2], [2]]),
    "elsewhere": torch.tensor([[-1, 4], [5, -1], [0, 1]]),
    "nobody": torch.tensor([[-1, 7]]),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("by_pair", [False, True])
def test_layer(experts, choice: str, dtype: torch.dtype, by_pair: bool) -> None:
    weights, blobs = experts
    ids = CHOICES[choice].to(dtype)
    tokens, top = ids.shape
    routing = grouped.moe_route(ids, EXPERTS, 8)
    x = torch.randn(tokens * top if by_pair else tokens, K).bfloat16()
    y = grouped.moe_linear(x, blobs, EXPERTS, routing, 8, M, K, 1)
    factors = torch.rand(tokens, top)
    total = torch.zeros(tokens, M)
    for pair in sorted(range(tokens * top), key=lambda pair: ids.flatten()[pair].item()):
        expert = int(ids.flatten()[pair])
        if 0 <= expert < EXPERTS:
            want = F.linear(x[pair if by_pair else pair // top, None], weights[expert])[0]
            torch.testing.assert_close(y[pair], want, rtol=1e-2, atol=1e-3)
            total[pair // top] += y[pair].float() * factors.flatten()[pair]
    assert torch.equal(grouped.moe_combine(y, ids, factors, EXPERTS), total.bfloat16())


@pytest.mark.parametrize("noise", ["small", "random bits"])
def test_raw_blobs_are_refused(noise: str) -> None:
    """The kernel would take their weights for tiles, and read escapes anywhere."""
    m, k = (130, 72) if noise == "small" else (192, 128)
    weights = (torch.randn(EXPERTS, m, k) * 0.02).bfloat16()
    if noise == "random bits":  # one of several
        weights[2] = torch.randint(-32768, 32767, (m, k), dtype=torch.int16).view(torch.bfloat16)
    made = [zipserv.compress(w) for w in weights]
    assert any(z.is_raw for z in made) and not grouped.fits(grouped.distance([z.blob for z in made]), m, k)
    with pytest.raises(ValueError, match="raw"):
        grouped.stack([z.blob for z in made], m, k)
    step = grouped.distance([z.blob for z in made])
    together = torch.cat([F.pad(z.blob, (0, step - z.nbytes)) for z in made])
    with pytest.raises(ValueError, match="one by one"):
        grouped.moe_linear(torch.randn(4, k).bfloat16(), together, EXPERTS, grouped.moe_route(CHOICES["several"], EXPERTS, 8), 8, m, k, 1)


def test_gates() -> None:
    weights = (torch.randn(EXPERTS, 256, K) * 0.1).bfloat16()
    blobs, ids, x = packed(weights), CHOICES["several"], torch.randn(4, K).bfloat16()
    routing = grouped.moe_route(ids, EXPERTS, 8)
    gates, up = grouped.moe_linear(x, blobs, EXPERTS, routing, 8, 256, K, 1).chunk(2, dim=1)
    assert torch.equal(grouped.moe_linear(x, blobs, EXPERTS, routing, 8, 256, K, 1, True), F.silu(gates) * up)
    torch.library.opcheck(torch.ops.zipserv.moe_linear.default, (x, blobs, EXPERTS, routing, 8, 256, K, 1, True))
    with pytest.raises(ValueError, match="multiple of 128"):
        grouped.moe_linear(x, blobs, EXPERTS, routing, 64, 256, K, 1, True)


def test_routing_is_of_tiles() -> None:
    ids = torch.tensor([[1]] * 19 + [[0]])
    words = grouped.moe_route(ids, EXPERTS, 8).tolist()
    assert words[0] == 4
    assert words[4:20] == [0, 0, 1, 0, 1, 1, 8, 0, 1, 9, 8, 0, 1, 17, 3, 0]
    assert words[4 + 80 : 4 + 100] == [19, *range(19)]


def test_combine_passes_over_what_is_not_there() -> None:
    y = torch.full((2, M), float("nan")).bfloat16()
    y[1] = 2
    out = grouped.moe_combine(y, torch.tensor([[-1, 1]]), torch.tensor([[0.5, 0.25]]), EXPERTS)
    assert torch.equal(out, torch.full((1, M), 0.5).bfloat16())


@pytest.mark.parametrize(("tokens", "top", "count", "tile"), [(1, 2, 8, 8), (32, 2, 8, 16), (128, 2, 8, 64), (128, 8, 128, 16), (4096, 1, 1, 64)])
def test_tile(tokens: int, top: int, count: int, tile: int) -> None:
    assert grouped.tile_for(tokens, top, count) == tile


def layer(x: torch.Tensor, ids: torch.Tensor, factors: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The definition, one pair at a time."""
    total = torch.zeros(x.shape[0], down.shape[1])
    for token in range(ids.shape[0]):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            if 0 <= expert < up.shape[0]:
                gate, value = F.linear(x[token, None], up[expert]).chunk(2, dim=-1)
                total[token] += F.linear(F.silu(gate) * value, down[expert])[0].float() * factors[token, slot].float()
    return total.bfloat16()


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_a_layer(tokens: int, factors: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    up, down = (torch.randn(EXPERTS, 256, 192) * 0.1).bfloat16(), (torch.randn(EXPERTS, 192, 128) * 0.1).bfloat16()
    weights = grouped.Weight(packed(up), EXPERTS, 256, 192), grouped.Weight(packed(down), EXPERTS, 192, 128)
    x, ids = torch.randn(tokens, 192).bfloat16(), torch.randint(-1, EXPERTS + 1, (tokens, 2))
    share = torch.rand(tokens, 2).to(factors)
    want = layer(x, ids, share, up, down)
    activated = []

    def activate(both: torch.Tensor) -> torch.Tensor:
        activated.append(both.shape)
        gate, value = both.chunk(2, dim=-1)
        return F.silu(gate) * value

    all_at_once = grouped.MAX_PAIRS
    for most, silu, invariant in ((all_at_once, True, False), (all_at_once, True, True), (all_at_once, False, False), (6, True, False)):
        monkeypatch.setattr(grouped, "MAX_PAIRS", most)
        activated.clear()
        got = grouped.multiply(x, ids, share, *weights, activate, silu_and_mul=silu, invariant=invariant)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-3)
        assert bool(activated) == (invariant or not silu)


def test_what_is_multiplied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grouped.serves(torch.bfloat16, 128, 8) and not grouped.serves(torch.float16, 128, 8)
    assert not grouped.serves(torch.bfloat16, 2000, 8) and not grouped.serves(torch.bfloat16, 128, 33)
    assert [grouped.few(pairs, 8) for pairs in (0, 512, 513)] == [True, True, False]
    assert [grouped.few(pairs, 128) for pairs in (4096, 4097)] == [True, False]
    monkeypatch.setattr(grouped, "ENABLED", False)
    assert not grouped.serves(torch.bfloat16, 128, 8)


def test_opcheck(experts) -> None:
    _, blobs = experts
    ids = CHOICES["several"]
    routing = grouped.moe_route(ids, EXPERTS, 8)
    x = torch.randn(4, K).bfloat16()
    y = grouped.moe_linear(x, blobs, EXPERTS, routing, 8, M, K, 1)
    torch.library.opcheck(torch.ops.zipserv.moe_route.default, (ids, EXPERTS, 8))
    torch.library.opcheck(torch.ops.zipserv.moe_linear.default, (x, blobs, EXPERTS, routing, 8, M, K, 1))
    torch.library.opcheck(torch.ops.zipserv.moe_combine.default, (y, ids, torch.rand(4, 2), EXPERTS))


def test_refusals(experts) -> None:
    _, blobs = experts
    ids = CHOICES["several"]
    routing = grouped.moe_route(ids, EXPERTS, 8)
    x = torch.randn(4, K).bfloat16()
    for wrong, match in (
        (lambda: grouped.moe_route(ids.float(), EXPERTS, 8), "int32 or int64"),
        (lambda: grouped.moe_route(ids, 2000, 8), "at most 1024 experts"),
        (lambda: grouped.moe_route(torch.zeros(5000, 1, dtype=torch.int64), 4, 8), "4096 in all"),
        (lambda: grouped.moe_linear(x.half(), blobs, EXPERTS, routing, 8, M, K, 1), "bfloat16 only"),
        (lambda: grouped.moe_linear(x[:3], blobs, EXPERTS, routing, 8, M, K, 1), "should be"),
        (lambda: grouped.moe_linear(x, blobs[1:], EXPERTS, routing, 8, M, K, 1), "equal distances"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            wrong()
