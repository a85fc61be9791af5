# SPDX-License-Identifier: Apache-2.0
"""Tables, JSON and plots of what the benchmarks measured."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table  # here, so that the rest works on a bare machine

    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.1f} us"
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def machine_lines(about: Row, limits: Row | None = None) -> list[str]:
    """Date, machine, versions; and the limits that were measured."""
    name = about.get("gpu") or about["cpu"]
    detail = f"{about['sms']} SMs, CUDA {about['cuda']}" if "gpu" in about else f"{about['cpu_threads']} threads"
    lines = [f"{about['date']}: {name} ({detail}), zipserv {about['zipserv']}, torch {about['torch']}"]
    if "first_call" in about:
        first = about["first_call"]
        kernels, everything = first["first_call_kernels"], first["first_call_kernels"] + first["warm_kernels"]
        lines.append(
            f"first product of a fresh process: {seconds(first['first_call_seconds'])} with an empty kernel cache ({kernels} compiled), "
            f"{seconds(first['cached_first_call_seconds'])} with a full one; all {everything} kernels of a weight: "
            f"{seconds(first['warm_seconds'])} more, cached {seconds(first['cached_warm_seconds'])}; "
            f"import zipserv {seconds(first['import_seconds'])}"
        )
    if "host_seconds_per_call" in about:
        lines.append(
            f"host time of an eager call: {seconds(about['host_seconds_per_call'])}, F.linear {seconds(about['host_seconds_per_blas_call'])}"
        )
    if limits is not None:
        lines.append(
            f"limits measured in this run: copy {limits['copy_bandwidth'] / 1e9:.1f} GB/s (read + written), "
            f"BF16 matmul {limits['flops'] / 1e12:.2f} Tera-operations/s, last-level cache {limits['cache_bytes'] / 2**20:.0f} MiB"
        )
    return lines


def codec_table(rows: Sequence[Row]) -> Table:
    table = _table("CPU codec: GB/s of BF16 weights; % of a memcpy of the same weights in the same run", (
        "weights", "matrix", "bits", "ratio", "memcpy", "compress", "of memcpy", "decompress", "of memcpy",
    ))  # fmt: skip
    for r in rows:
        table.add_row(
            r["weights"], f"{r['m']}x{r['k']}", f"{r['bits_per_weight']:.3f}", f"{r['ratio']:.3f}",
            f"{r['memcpy_bytes_per_second'] / 1e9:.2f}",
            f"{r['compress_bytes_per_second'] / 1e9:.2f}", f"{r['compress_of_memcpy']:.0%}",
            f"{r['decompress_bytes_per_second'] / 1e9:.2f}", f"{r['decompress_of_memcpy']:.0%}",
        )  # fmt: skip
    return table


def weight_table(rows: Sequence[Row]) -> Table:
    table = _table("weights: bit-exact round trip; decompression against the copy bandwidth (bytes read + written)", (
        "shape", "M x K", "weights", "bits", "copies", "decompress", "GB/s", "of copy", "spread", "compress GB/s",
    ))  # fmt: skip
    for r in rows:
        table.add_row(
            f"{r['model']} {r['layer']}", f"{r['m']}x{r['k']}", r["weights"], f"{r['bits_per_weight']:.3f}",
            str(r["copies"]), seconds(r["decompress_seconds"]), f"{r['decompress_bytes_per_second'] / 1e9:.1f}",
            f"{r['decompress_of_copy']:.0%}", f"{r['decompress_spread']:.0%}",
            f"{r['compress_bytes_per_second'] / 1e9:.1f}",
        )  # fmt: skip
    return table


def point_table(rows: Sequence[Row]) -> Table:
    table = _table("linear: speed-up over F.linear in BF16 (median, 10th..90th percentile); share of the roofline; batch-invariant mode's time", (
        "shape", "M x K", "weights", "N", "F.linear", "zipserv", "speed-up", "p10..p90", "GB/s", "of bound",
        "RMS error", "F.linear's", "batch-invariant",
    ))  # fmt: skip
    for r in rows:
        table.add_row(
            f"{r['model']} {r['layer']}", f"{r['m']}x{r['k']}", r["weights"], str(r["tokens"]),
            seconds(r["blas_seconds"]), seconds(r["zip_seconds"]), f"{r['speedup']:.3f}",
            f"{r['speedup_low']:.2f}..{r['speedup_high']:.2f}", f"{r['compressed_bytes_per_second'] / 1e9:.1f}",
            f"{r['of_bound']:.0%}", f"{r['rms_error']:.2e}", f"{r['blas_rms_error']:.2e}",
            f"{r['invariant_cost']:+.1%}" if "invariant_cost" in r else "",
        )  # fmt: skip
    return table


def summary(points: Sequence[Row]) -> list[dict[str, object]]:
    """For each number of tokens: geometric mean, least and greatest speed-up over all shapes and kinds of weights."""
    rows: list[dict[str, object]] = []
    for tokens in sorted({int(p["tokens"]) for p in points}):
        mine = [p for p in points if p["tokens"] == tokens]
        worst = min(mine, key=lambda p: float(p["speedup"]))
        rows.append(
            {
                "tokens": tokens,
                "points": len(mine),
                "mean": geometric_mean([float(p["speedup"]) for p in mine]),
                "least": float(worst["speedup"]),
                "least_at": f"{worst['model']} {worst['layer']} ({worst['weights']})",
                "greatest": max(float(p["speedup"]) for p in mine),
                "worst_error_to_blas": max(float(p["rms_error"]) / max(float(p["blas_rms_error"]), 1e-300) for p in mine),
                "worst_max_error_to_blas": max(float(p["max_error"]) / max(float(p["blas_max_error"]), 1e-300) for p in mine),
                **_invariant(mine),
            }
        )
    return rows


def _invariant(points: Sequence[Row]) -> dict[str, object]:
    """What the batch-invariant mode takes beside the default mode and F.linear; nothing where it was not measured."""
    mine = [p for p in points if "invariant_seconds" in p]
    if not mine:
        return {}
    return {
        "invariant_cost": geometric_mean([float(p["invariant_cost"]) + 1 for p in mine]) - 1,
        "invariant_speedup": geometric_mean([float(p["blas_seconds"]) / float(p["invariant_seconds"]) for p in mine]),
    }


def summary_table(points: Sequence[Row]) -> Table:
    table = _table("speed-up over F.linear, all shapes; errors against float64 beside F.linear's, worst; batch-invariant mode, geometric means", (
        "tokens", "points", "geometric mean", "least", "at", "greatest", "RMS error", "max error", "batch-invariant: time", "speed-up",
    ))  # fmt: skip
    for r in summary(points):
        table.add_row(
            str(r["tokens"]), str(r["points"]), f"{r['mean']:.3f}", f"{r['least']:.3f}", str(r["least_at"]),
            f"{r['greatest']:.3f}", f"{r['worst_error_to_blas']:.2f} x", f"{r['worst_max_error_to_blas']:.2f} x",
            f"{r['invariant_cost']:+.1%}" if "invariant_cost" in r else "",
            f"{r['invariant_speedup']:.3f}" if "invariant_speedup" in r else "",
        )  # fmt: skip
    return table


def write_json(document: Row, path: Path) -> Path:
    """Writes in one step, so that a run that is stopped leaves the last complete result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def write_plots(board: Row, folder: Path) -> list[Path]:
    """The speed-up curves, the roofline and, where it was measured, the batch-invariant mode; ImportError without matplotlib."""
    from .. import plots

    written = [plots.speedup(board, folder / "speedup.png"), plots.roofline(board, folder / "roofline.png")]
    if any("invariant_seconds" in p for p in board["points"]):
        written.append(plots.invariant(board, folder / "batch_invariant.png"))
    return written
