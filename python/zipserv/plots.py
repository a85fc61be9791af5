# SPDX-License-Identifier: Apache-2.0
"""Pictures: exponents and sizes of a model, and the benchmark's curves. Needs matplotlib (``pip install zipserv[plots]``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .survey import WINDOW, LayerSurvey, total

_BLUE, _GREY, _ORANGE, _GREEN = "#1f6feb", "#8b949e", "#d9730d", "#1a7f37"


def require() -> None:
    """Raises ImportError, with the cure, where matplotlib is missing: before long work, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib: pip install 'zipserv[plots]'")


def _pyplot() -> Any:
    require()
    import matplotlib

    matplotlib.use("Agg")  # a file is written; no screen is needed
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    _pyplot().close(figure)
    return path


def model(layers: Sequence[LayerSurvey], path: Path, title: str) -> Path:
    """Histogram of exponents with the window of eight, and each layer's bits per weight against the bound.

    Raises ValueError without layers, ImportError without matplotlib.
    """
    everything = total(layers)
    if everything is None:
        raise ValueError("nothing to plot: no BF16 or FP16 tensors")
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, max(4.2, min(12.0, 1.5 + 0.16 * len(layers)))), width_ratios=(1, 1.6))
    figure.suptitle(title)

    used = [e for e, n in enumerate(everything.histogram) if n > 1e-5 * everything.weights]
    first, last = min(used[0], everything.window) - 1, max(used[-1], everything.window + WINDOW) + 1
    exponents = range(max(0, first), min(len(everything.histogram), last + 1))
    share = [everything.histogram[e] / everything.weights for e in exponents]
    inside = [everything.window <= e < everything.window + WINDOW for e in exponents]
    covered = sum(s for s, i in zip(share, inside, strict=True) if i)
    left.bar(list(exponents), share, color=[_BLUE if i else _GREY for i in inside])
    left.axvspan(everything.window - 0.5, everything.window + WINDOW - 0.5, color=_BLUE, alpha=0.08)
    left.set_yscale("log")
    left.set(xlabel="exponent", ylabel="share of weights", title=f"one window of {WINDOW} exponents holds {covered:.2%}")

    rows = range(len(layers))
    right.plot([x.bits for x in layers], rows, "o", ms=4, color=_BLUE, label=f"zipserv, mean {everything.bits:.2f}")
    right.plot([x.bound for x in layers], rows, "|", ms=9, color=_GREEN, label=f"entropy bound, mean {everything.bound:.2f}")
    right.plot(
        [x.paper_bits for x in layers], rows, "x", ms=4, color=_ORANGE,
        label=f"seven codes and escapes in place (paper), mean {everything.paper_bits:.2f}",
    )  # fmt: skip
    right.set(xlabel="bits per weight", title="bits per weight, layer by layer")
    if len(layers) <= 60:
        right.set_yticks(list(rows), [layer.name for layer in layers], fontsize=6)
    else:
        right.set_ylabel("layer")
    right.invert_yaxis()
    right.legend(fontsize=8)
    figure.tight_layout()
    return _save(figure, path)


Row = Mapping[str, Any]


def _curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    curves: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: int(r["tokens"])):
        curves.setdefault(f"{row['model']} {row['layer']} {row['m']}x{row['k']}", []).append(row)
    return curves


def _grid(pyplot: Any, panels: int) -> tuple[Any, list[Any]]:
    columns = min(3, panels)
    lines = -(-panels // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.2 * columns, 3.6 * lines), squeeze=False)
    flat = [axis for line in axes for axis in line]
    for axis in flat[panels:]:
        axis.remove()
    return figure, flat[:panels]


def speedup(board: Mapping[str, Any], path: Path) -> Path:
    """Speed-up over BLAS against the number of tokens: one panel a model, one curve a layer and kind of weights."""
    pyplot = _pyplot()
    points: Sequence[Row] = board["points"]
    names = list(dict.fromkeys(str(p["model"]) for p in points))
    if not names:
        raise ValueError("nothing to plot: no points were measured")
    figure, axes = _grid(pyplot, len(names))
    for axis, name in zip(axes, names, strict=True):
        named = next(p["weights"] for p in points if p["model"] == name)
        for kind, style in (("gaussian", "-"), ("trained", "--")):
            mine = [p for p in points if p["model"] == name and p["weights"] == kind]
            for color, (label, rows) in enumerate(_curves(mine).items()):
                x = [r["tokens"] for r in rows]
                axis.plot(
                    x, [r["speedup"] for r in rows], style, marker=".", color=f"C{color}",
                    label=label.removeprefix(name) if kind == named else None,
                )  # fmt: skip
                axis.fill_between(x, [r["speedup_low"] for r in rows], [r["speedup_high"] for r in rows], color=f"C{color}", alpha=0.12)
        axis.axhline(1, color=_GREY, lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set(title=name, xlabel="tokens", ylabel="time of F.linear / time of zipserv")
        axis.legend(fontsize=7)
    figure.suptitle(_caption(board, "speed-up over BF16 F.linear (solid: Gaussian weights, dashed: trained-like)"))
    figure.tight_layout()
    return _save(figure, path)


def roofline(board: Mapping[str, Any], path: Path) -> Path:
    """How fast compressed weights are read, against the measured copy bandwidth and matmul rate."""
    pyplot = _pyplot()
    points: Sequence[Row] = board["points"]
    if not points:
        raise ValueError("nothing to plot: no points were measured")
    limits = board["limits"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.6))
    for color, (label, rows) in enumerate(_curves(points).items()):
        marker = dict(color=f"C{color % 10}", marker="os^vD"[color // 10 % 5], ms=4, ls="none", label=label)
        left.plot([r["tokens"] for r in rows], [r["compressed_bytes_per_second"] / 1e9 for r in rows], **marker)
        flops = [2.0 * r["m"] * r["k"] * r["tokens"] for r in rows]
        traffic = [r["compressed_bytes_per_second"] * r["zip_seconds"] + 2 * r["tokens"] * (r["m"] + r["k"]) for r in rows]
        right.plot(
            [f / t for f, t in zip(flops, traffic, strict=True)],
            [f / r["zip_seconds"] / 1e12 for f, r in zip(flops, rows, strict=True)],
            **marker,
        )
    left.axhline(limits["copy_bandwidth"] / 1e9, color=_GREY, lw=1)
    left.set_xscale("log", base=2)
    left.set(xlabel="tokens", ylabel="compressed weights read, GB/s", title="line: copy bandwidth (read + written)")
    ridge = limits["flops"] / limits["copy_bandwidth"]
    x = [ridge / 1024, ridge, ridge * 8]
    right.plot(x, [min(v * limits["copy_bandwidth"], limits["flops"]) / 1e12 for v in x], color=_GREY, lw=1)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set(xlabel="operations per byte moved", ylabel="Tera-operations/s", title="roofline of this run")
    handles, labels = left.get_legend_handles_labels()
    figure.suptitle(_caption(board, "ZipGEMM against the machine's limits"))
    figure.tight_layout()
    figure.legend(handles, labels, fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 0))
    return _save(figure, path)


def _caption(board: Mapping[str, Any], what: str) -> str:
    about = board["about"]
    return f"{what}\n{about.get('gpu') or about['cpu']}, torch {about['torch']}, {about['date']}"
