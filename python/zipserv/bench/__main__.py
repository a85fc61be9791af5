# SPDX-License-Identifier: Apache-2.0
"""``python -m zipserv.bench``: the scoreboard with nothing but torch installed, as on a bare GPU machine.

Writes bench.json; ``zipserv bench --read bench.json --out FOLDER`` makes tables and plots of it anywhere.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from . import gpu, machine, report, shapes, weights


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _weight(r: dict[str, Any]) -> str:
    return (
        f"{r['model']} {r['layer']} {r['m']}x{r['k']} {r['weights']}: {r['bits_per_weight']:.3f} bits, "
        f"decompress {r['decompress_seconds'] * 1e6:.1f} us, {r['decompress_of_copy']:.0%} of the copy bandwidth, "
        f"compress {r['compress_bytes_per_second'] / 1e9:.1f} GB/s"
    )


def _point(r: dict[str, Any]) -> str:
    invariant = f", batch-invariant {r['invariant_cost']:+.1%}" if "invariant_cost" in r else ""
    return (
        f"{r['model']} {r['layer']} {r['m']}x{r['k']} {r['weights']} N={r['tokens']}: F.linear {r['blas_seconds'] * 1e6:.1f} us, "
        f"zipserv {r['zip_seconds'] * 1e6:.1f} us, speed-up {r['speedup']:.3f}, of the roofline {r['of_bound']:.0%}{invariant}"
    )


def _summary(r: dict[str, Any]) -> str:
    invariant = f", batch-invariant {r['invariant_speedup']:.3f}" if "invariant_speedup" in r else ""
    return (
        f"N={r['tokens']}, {r['points']} points: geometric mean {r['mean']:.3f}, least {r['least']:.3f} at {r['least_at']}, "
        f"greatest {r['greatest']:.3f}, worst errors against F.linear's: "
        f"RMS {r['worst_error_to_blas']:.2f} x, max {r['worst_max_error_to_blas']:.2f} x{invariant}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m zipserv.bench", description="The scoreboard, written to a JSON file.")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--models", type=_listed, default=[])
    parser.add_argument("--layers", type=_listed, default=[])
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in _listed(text)], default=list(shapes.TOKENS))
    parser.add_argument("--weights", type=_listed, default=list(weights.KINDS))
    parser.add_argument("--time-budget", type=float)
    parser.add_argument("--point-budget", type=float, default=0.3)
    parser.add_argument("--no-batch-invariant", action="store_true")
    parser.add_argument("--no-first-call", action="store_true")
    options = parser.parse_args()
    settings = gpu.Settings(
        device=options.device,
        kinds=options.weights,
        tokens=options.tokens,
        budget=options.point_budget,
        total=options.time_budget,
        invariant=not options.no_batch_invariant,
        first_call=not options.no_first_call,
    )
    failed: list[str] = []
    shown, weighed, described = 0, 0, False
    last: gpu.Board | None = None
    for board in gpu.scoreboard(shapes.select(options.models, options.layers), settings):
        options.out.write_text(json.dumps(board.as_dict(), indent=1) + "\n", encoding="utf-8")
        if not described:
            described = True
            print("\n".join(report.machine_lines(board.about, machine.limits_dict(board.limits))), flush=True)
        for weight in board.weights[weighed:]:
            print(_weight(weight), flush=True)
        for point in board.points[shown:]:
            print(_point(point), flush=True)
        weighed, shown, failed = len(board.weights), len(board.points), board.failed
        last = board
    if last is not None:
        for row in report.summary(last.points):
            print(_summary(row))
        for text in last.skipped:
            print("not measured:", text)
    for text in failed:
        print("wrong result:", text)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
