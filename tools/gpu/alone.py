# SPDX-License-Identifier: Apache-2.0
"""Times products that stand alone between other kernels, as in a model, beside cuBLAS: for finding what a product's start costs, not for claims.

    python tools/gpu/alone.py --shapes 4096x4096,28672x4096 --tokens 256,512
    python tools/gpu/alone.py --shapes 4096x4096 --tokens 512 --ways    # all layouts for many tokens that can be chosen

In the benchmark's loops a product begins while the one before it ends. Here 128 MB are written in front of each, or read (--read), as most is in a
decode step, and then the activations are written, in a CUDA graph. The profiler tells how long the product's kernels take by themselves: medians in
microseconds, from the first one's begin to the last one's end. * marks the layout that is chosen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))

import zipserv  # noqa: E402
from zipserv import choices, tune  # noqa: E402
from zipserv.bench import weights  # noqa: E402
from zipserv.choices import Problem  # noqa: E402

REPEATS = 20
MANY = ("pair", "solo", "relay")


def kernels(work: Callable[[], object]) -> list[Any]:
    """The kernels that ``work`` launches, ``REPEATS`` times in a CUDA graph, in their order."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            work()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    found = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(found, key=lambda event: event.time_range.start)


def microseconds(product: Callable[[], object], before: Callable[[], object]) -> float:
    """Median time of the kernels that ``product`` launches behind ``before``."""

    def both() -> None:
        before()
        product()

    skipped, all_of_them = len(kernels(before)) // REPEATS, kernels(both)
    each = len(all_of_them) // REPEATS
    return statistics.median(
        all_of_them[(i + 1) * each - 1].time_range.end - all_of_them[i * each + skipped].time_range.start for i in range(REPEATS)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,6144x4096,4096x14336,28672x4096", metavar="MxK,..")
    parser.add_argument("--tokens", default="512", metavar="N,..")
    parser.add_argument("--weights", default="gaussian", choices=["gaussian", "trained"])
    parser.add_argument("--read", action="store_true", help="read the 128 MB that come before, do not write them")
    parser.add_argument("--ways", action="store_true", help="each layout for many tokens, too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("alone.py needs a GPU", file=sys.stderr)
        return 2
    other = torch.empty(1 << 25, device="cuda")
    for shape in args.shapes.split(","):
        m, k = map(int, shape.split("x"))
        w = weights.make(args.weights, m, k, device="cuda")
        z = zipserv.compress(w)
        for n in map(int, args.tokens.split(",")):
            x = weights.activations(n, k, device="cuda")

            def compressed(x: torch.Tensor = x, z: zipserv.ZipTensor = z) -> object:
                return zipserv.linear(x, z)

            def before(x: torch.Tensor = x) -> None:
                _ = other.sum() if args.read else other.fill_(1.0)
                x.add_(0.0)

            plain = microseconds(lambda x=x, w=w: F.linear(x, w), before)
            usual = microseconds(compressed, before)
            line = f"{shape} {args.weights} N={n}: F.linear {plain:.1f} us, zipserv {usual:.1f} us ({plain / usual:.3f} x)"
            problem = Problem(m, k, tune.bucket(n))
            now = choices.current(0, problem)
            for way in choices.candidates(0, problem) if args.ways else ():
                if way.kernel in MANY:
                    with choices.chosen(0, problem, way):
                        line += f"; {way.kernel} {64 * way.kw}/{way.blocks}{'*' if way == now else ''} {microseconds(compressed, before):.1f}"
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
