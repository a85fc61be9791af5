# SPDX-License-Identifier: Apache-2.0
"""A short run of every kernel on small shapes, for compute-sanitizer."""

from __future__ import annotations

import torch
from gpu_cases import escapes, islands, on_gpu, same_bits, trained

import zipserv


def main() -> None:
    torch.manual_seed(7)
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
        assert torch.equal(zipserv.compress(w.cuda()).blob.cpu(), zipserv.compress(w).blob)
        ids = torch.randint(m, (20,), device="cuda")
        assert same_bits(torch.ops.zipserv.embedding(ids, z.blob, m, k, 1), w[ids.cpu()])
    torch.cuda.synchronize()
    print("small shapes: right")


if __name__ == "__main__":
    main()
