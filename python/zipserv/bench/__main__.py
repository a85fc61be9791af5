# SPDX-License-Identifier: Apache-2.0
"""``python -m zipserv.bench``: the scoreboard with nothing but torch installed, as on a bare GPU machine.

Writes bench.json; ``zipserv bench --read bench.json --out FOLDER`` makes tables and plots of it anywhere.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from . import gpu, machine, report, shapes, weights


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


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
    shown, described = 0, False
    for board in gpu.scoreboard(shapes.select(options.models, options.layers), settings):
        options.out.write_text(json.dumps(board.as_dict(), indent=1) + "\n", encoding="utf-8")
        if not described:
            described = True
            print("\n".join(report.machine_lines(board.about, machine.limits_dict(board.limits))), flush=True)
        for p in board.points[shown:]:
            print(
                f"{p['model']} {p['layer']} {p['m']}x{p['k']} {p['weights']} N={p['tokens']}: F.linear {float(str(p['blas_seconds'])) * 1e6:.1f} us, "
                f"zipserv {float(str(p['zip_seconds'])) * 1e6:.1f} us, speed-up {float(str(p['speedup'])):.3f}, "
                f"of the roofline {float(str(p['of_bound'])):.0%}",
                flush=True,
            )
        shown, failed = len(board.points), board.failed
    for text in failed:
        print("wrong result:", text)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
