# SPDX-License-Identifier: Apache-2.0
"""Pictures: exponents and sizes of a model, and the benchmark's curves. Needs matplotlib (``pip install zipserv[plots]``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
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
    size = (5.2 * columns, 3.6 * lines) if panels > 1 else (8.5, 4.6)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False)
    flat = [axis for line in axes for axis in line]
    for axis in flat[panels:]:
        axis.remove()
    return figure, flat[:panels]


def _token_axis(axis: Any, rows: Sequence[Row]) -> None:
    """A logarithmic axis with the numbers of tokens written out, as many as have room."""
    tokens = sorted({int(r["tokens"]) for r in rows})
    axis.set_xscale("log", base=2)
    shown = tokens if len(tokens) <= 8 else tokens[::2]
    axis.set_xticks(shown, [str(n) for n in shown])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("tokens")


_STYLES = {"gaussian": "-", "trained": "--"}


def _panels(board: Mapping[str, Any], value: Callable[[Row], tuple[float, float, float] | None], what: str, ylabel: str, path: Path) -> Path:
    """One panel a model, one curve a layer and kind of weights; ``value``: a point's value, lower and upper end."""
    pyplot = _pyplot()
    points: Sequence[Row] = board["points"]
    names = list(dict.fromkeys(str(p["model"]) for p in points))
    if not names:
        raise ValueError("nothing to plot: no points were measured")
    figure, axes = _grid(pyplot, len(names))
    for axis, name in zip(axes, names, strict=True):
        named = next(p["weights"] for p in points if p["model"] == name)
        for kind, style in _STYLES.items():
            mine = [p for p in points if p["model"] == name and p["weights"] == kind]
            for color, (label, rows) in enumerate(_curves(mine).items()):
                known = [(r["tokens"], *v) for r in rows if (v := value(r)) is not None]
                if not known:
                    continue
                x, middle, low, high = zip(*known, strict=True)
                axis.plot(x, middle, style, marker=".", color=f"C{color}", label=label.removeprefix(name) if kind == named else None)
                axis.fill_between(x, low, high, color=f"C{color}", alpha=0.12)
        axis.axhline(1, color=_GREY, lw=0.8)
        _token_axis(axis, [p for p in points if p["model"] == name])
        axis.grid(alpha=0.25)
        axis.set(title=name, ylabel=ylabel)
        axis.legend(fontsize=7)
    figure.suptitle(_caption(board, f"{what} (solid: Gaussian weights, dashed: trained-like)"))
    figure.tight_layout()
    return _save(figure, path)


def speedup(board: Mapping[str, Any], path: Path) -> Path:
    """Speed-up over BLAS against the number of tokens: one panel a model, one curve a layer and kind of weights."""

    def value(r: Row) -> tuple[float, float, float]:
        return r["speedup"], r["speedup_low"], r["speedup_high"]

    return _panels(board, value, "speed-up over BF16 F.linear", "time of F.linear / time of zipserv", path)


def invariant(board: Mapping[str, Any], path: Path) -> Path:
    """The same for the batch-invariant mode, where it was measured."""

    def value(r: Row) -> tuple[float, float, float] | None:
        if "invariant_seconds" not in r:
            return None
        ratio = r["blas_seconds"] / r["invariant_seconds"]
        return ratio, ratio, ratio

    return _panels(board, value, "batch-invariant mode: speed-up over BF16 F.linear", "time of F.linear / time of zipserv", path)


def roofline(board: Mapping[str, Any], path: Path) -> Path:
    """How fast compressed weights are read, against the measured copy bandwidth and matmul rate."""
    pyplot = _pyplot()
    points: Sequence[Row] = board["points"]
    if not points:
        raise ValueError("nothing to plot: no points were measured")
    limits = board["limits"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.6))
    furthest = 0.0
    curves = _curves(points)
    models = list(dict.fromkeys(str(p["model"]) for p in points))
    layers = list(dict.fromkeys(str(p["layer"]) for p in points))
    for i, (label, rows) in enumerate(curves.items()):
        # Few curves have a colour each; of many a layer has a colour and a model a marker.
        color, shape = (i, 0) if len(curves) <= 10 else (layers.index(rows[0]["layer"]), models.index(rows[0]["model"]))
        for kind, fill in (("gaussian", "full"), ("trained", "none")):
            mine = [r for r in rows if r["weights"] == kind]
            if not mine:
                continue
            marker = dict(color=f"C{color % 10}", marker="os^vDPX*"[shape % 8], ms=4, ls="none", fillstyle=fill)
            marker["label"] = label if kind == rows[0]["weights"] else None
            left.plot([r["tokens"] for r in mine], [r["compressed_bytes_per_second"] / 1e9 for r in mine], **marker)
            flops = [2.0 * r["m"] * r["k"] * r["tokens"] for r in mine]
            traffic = [r["compressed_bytes_per_second"] * r["zip_seconds"] + 2 * r["tokens"] * (r["m"] + r["k"]) for r in mine]
            intensity = [f / t for f, t in zip(flops, traffic, strict=True)]
            furthest = max(furthest, *intensity)
            right.plot(intensity, [f / r["zip_seconds"] / 1e12 for f, r in zip(flops, mine, strict=True)], **marker)
    left.axhline(limits["copy_bandwidth"] / 1e9, color=_GREY, lw=1)
    left.set_ylim(0, limits["copy_bandwidth"] * 1.08 / 1e9)
    _token_axis(left, points)
    left.set(ylabel="compressed weights read, GB/s", title="line: copy bandwidth (read + written)")
    ridge = limits["flops"] / limits["copy_bandwidth"]
    x = [ridge / 1024, ridge, max(ridge * 2, furthest * 1.5)]
    right.plot(x, [min(v * limits["copy_bandwidth"], limits["flops"]) / 1e12 for v in x], color=_GREY, lw=1)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set(xlabel="operations per byte moved", ylabel="Tera-operations/s", title="roofline of this run")
    handles, labels = left.get_legend_handles_labels()
    figure.suptitle(_caption(board, "ZipGEMM against the machine's limits (filled: Gaussian weights, hollow: trained-like)"))
    figure.tight_layout()
    figure.legend(handles, labels, fontsize=7, ncols=min(5, len(labels)), loc="upper center", bbox_to_anchor=(0.5, 0))
    return _save(figure, path)


def _caption(board: Mapping[str, Any], what: str) -> str:
    about = board["about"]
    return f"{what}\n{about.get('gpu') or about['cpu']}, torch {about['torch']}, {about['date']}"
