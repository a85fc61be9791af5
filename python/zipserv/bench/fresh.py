# SPDX-License-Identifier: Apache-2.0
"""Run as a program in a process of its own by ``firstcall``: times what a program waits for at its first use of zipserv on a GPU.

    python fresh.py DEVICE M K      prints JSON; all times in seconds
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    del sys.path[0]  # this file's folder, whose modules are the package's
    device, m, k = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    import torch

    x = torch.ones(1, k, dtype=torch.bfloat16, device=device)  # makes the context
    _ = x @ torch.ones(k, 64, dtype=torch.bfloat16, device=device)  # loads cuBLAS, which a program has used before its first linear layer
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, k, generator=generator).to(torch.bfloat16)
    torch.cuda.synchronize()

    start = time.perf_counter()
    import zipserv

    imported = time.perf_counter() - start
    compressed = zipserv.compress(weight)  # on the CPU
    expected = torch.nn.functional.linear(x, weight.to(device))
    torch.cuda.synchronize()

    start = time.perf_counter()
    z = compressed.to(device)
    y = zipserv.linear(x, z)
    torch.cuda.synchronize()
    first = time.perf_counter() - start

    from zipserv import cuda

    files = cuda.describe()["cache"]["files"]
    start = time.perf_counter()
    zipserv.linear(x, z)
    torch.cuda.synchronize()
    second = time.perf_counter() - start
    start = time.perf_counter()
    cuda.warm(z.blob, m, k)
    everything = time.perf_counter() - start
    error = float((y - expected).float().square().mean().sqrt() / expected.float().square().mean().sqrt())
    json.dump(
        {
            "import_seconds": imported,
            "first_call_seconds": first,
            "second_call_seconds": second,
            "warm_seconds": everything,
            "kernels": files,
            "kernels_after_warm": cuda.describe()["cache"]["files"],
            "rms_error": error,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
