# SPDX-License-Identifier: Apache-2.0
"""Compression needs its input, its output and at most 64 MiB beside; decompression into a given tensor at most 64 MiB."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import resource, torch, zipserv

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

block = (torch.randn(512, 4096) * 0.02).bfloat16()
zipserv.compress(block).decompress()  # everything is loaded and every thread has started
weight = torch.empty(24576, 4096, dtype=torch.bfloat16)
for i in range(0, 24576, 512):
    weight[i : i + 512] = block
out = torch.zeros_like(weight)
before = peak()
packed = zipserv.compress(weight)
compressed = peak()
packed.decompress(out=out)
print(before, compressed, peak(), packed.nbytes)
assert torch.equal(out.view(torch.int16), weight.view(torch.int16))
"""


def test_peak_memory_is_input_output_and_a_little() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    before, compressed, decompressed, nbytes = map(int, run.stdout.split())
    assert nbytes > 100 << 20
    assert compressed - before <= nbytes + (64 << 20)
    assert decompressed - compressed <= 64 << 20
