# SPDX-License-Identifier: Apache-2.0
"""A short run of every kernel on small shapes, for compute-sanitizer."""

from __future__ import annotations

import torch
from gpu_cases import escapes, islands, on_gpu, same_bits, trained

import zipserv
from zipserv import choices, cuda, grouped, tune
from zipserv.choices import Problem


def experts(count: int, m: int, k: int) -> None:
    """All kinds of escape lists; by token and by pair, with gates, every size of item."""
    made = [(trained, islands, escapes)[e % 3](m, k) for e in range(count)]
    weights = torch.stack([torch.where(w.isfinite(), w, torch.zeros_like(w)).clamp(-1, 1) for w in made])
    blobs = grouped.stack([zipserv.compress(w).blob for w in weights], m, k).cuda()
    weights = weights.cuda().double()
    for tokens, tile in ((1, 8), (9, 16), (40, 32), (100, 64)):
        ids, factors = torch.rand(tokens, count, device="cuda").topk(2).indices, torch.rand(tokens, 2, device="cuda")
        routing = grouped.moe_route(ids, count, tile)
        for rows in (tokens, 2 * tokens):
            x = torch.randn(rows, k, device="cuda").bfloat16()
            y = grouped.moe_linear(x, blobs, count, routing, tile, m, k, 1)
            each = x.double().repeat_interleave(2 * tokens // rows, 0)
            torch.testing.assert_close(y.double(), torch.einsum("pmk,pk->pm", weights[ids.flatten()], each), rtol=2e-2, atol=5e-2)
            grouped.moe_combine(y, ids, factors, count)
            if m % 128 == 0 and tile <= grouped.MAX_GATED_TILE:
                grouped.moe_linear(x, blobs, count, routing, tile, m, k, 1, True)


def many_tokens(z: zipserv.ZipTensor, w: torch.Tensor, n: int) -> None:
    """Every way that there is for many tokens; with results that no tensor copy can write, results of two layers, and gates, too."""
    m, k = w.shape
    x = torch.randn(n, k, device="cuda").bfloat16()
    want = x.double() @ w.cuda().double().T
    problem = Problem(m, k, tune.bucket(n))
    for choice in choices.candidates(0, problem):
        with choices.chosen(0, problem, choice):
            for _ in range(2):
                torch.testing.assert_close(zipserv.linear(x, z).double(), want, rtol=2e-2, atol=5e-2)
            parts = cuda.linear_parts(x, z.blob, m, k, 1, None, 2) if m % 128 == 0 else None
            if parts is not None:
                torch.testing.assert_close(torch.cat(parts, -1).double(), want, rtol=2e-2, atol=5e-2)
    gated = cuda.linear_gated(x, z.blob, m, k, 1, None) if m % 128 == 0 else None
    if gated is not None:
        gates, up = want.chunk(2, -1)
        torch.testing.assert_close(gated.double(), torch.nn.functional.silu(gates) * up, rtol=5e-2, atol=2e-1)


def in_step() -> None:
    """A block whose run has a whole strip between parts of others; the shapes below give no block more than a step.

    No block has more tiles than its ring: racecheck does not follow mbarriers from ordinary stores to others, and reports any ring's second round.
    """
    w = trained(320, 328)
    z, x = on_gpu(w), torch.randn(100, 328, device="cuda").bfloat16()
    with choices.chosen(0, Problem(320, 328, tune.bucket(100)), choices.Choice("wgmma", 1, 2, 3)):
        torch.testing.assert_close(zipserv.linear(x, z).double(), x.double() @ w.cuda().double().T, rtol=2e-2, atol=5e-2)


def main() -> None:
    torch.manual_seed(7)
    if torch.cuda.get_device_capability() == (9, 0):
        in_step()
    experts(5, 190, 123)
    experts(4, 256, 192)
    for make, m, k in ((trained, 128, 320), (islands, 200, 130), (escapes, 70, 513)):
        w = make(m, k)
        z = on_gpu(w)
        assert same_bits(z.decompress(), w)
        finite = torch.where(w.isfinite(), w, torch.zeros_like(w)).clamp(-1, 1)
        zf = on_gpu(finite)
        for n in (1, 9, 20, 64):
            x = torch.randn(n, k, device="cuda").bfloat16()
            bias = torch.randn(m, device="cuda").bfloat16()
            y = zipserv.linear(x, zf, bias)
            torch.testing.assert_close(y.double(), x.double() @ finite.cuda().double().T + bias.double(), rtol=2e-2, atol=5e-2)
        for n in (5, 150, 300):
            many_tokens(zf, finite, n)
        assert torch.equal(zipserv.compress(w.cuda()).blob.cpu(), zipserv.compress(w).blob)
        ids = torch.randint(m, (20,), device="cuda")
        assert same_bits(torch.ops.zipserv.embedding(ids, z.blob, m, k, 1), w[ids.cpu()])
    torch.cuda.synchronize()
    print("small shapes: right")


if __name__ == "__main__":
    main()
