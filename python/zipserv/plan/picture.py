# SPDX-License-Identifier: Apache-2.0
"""The plan as a picture: the memory of one GPU before and after, and the speed-up against the batch size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..plots import _BLUE, _GREEN, _GREY, _ORANGE, _pyplot, _save

_GIB = 1 << 30


def draw(plan: Mapping[str, Any], path: Path) -> Path:
    """Writes the picture of a document of :func:`zipserv.plan.make`; ImportError without matplotlib."""
    pyplot = _pyplot()
    model, room, speed = plan["model"], plan["capacity"], plan["speed"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), width_ratios=(1, 1.3))
    about = f"{model['name']}, {model['parameters'] / 1e9:.2f} G parameters, TP {model['tp']}"
    figure.suptitle(f"{about}, batch {model['batch']} x {model['length']} tokens")

    sides = [room["before"], room["after"]]
    parts = (
        ("uncompressed weights", _GREY, [side["uncompressed"] for side in sides]),
        ("compressed weights", _BLUE, [side["weights"] - side["uncompressed"] for side in sides]),
        ("reserve (assumed)", _ORANGE, [room["reserve"]] * 2),
        ("KV cache", _GREEN, [side["kv_bytes"] for side in sides]),
    )
    bottom = [0.0, 0.0]
    for label, color, values in parts:
        left.bar(("before", "after"), [v / _GIB for v in values], bottom=[b / _GIB for b in bottom], color=color, label=label, width=0.55)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    for x, side in enumerate(sides):
        text = f"{side['tokens']:,} tokens" if side["fits"] else "does not fit"
        left.annotate(text, (x, bottom[x] / _GIB), ha="center", va="bottom", fontsize=9)
    left.axhline(room["gpu_memory"] / _GIB, color="black", lw=1, ls=":")
    left.axhline(room["budget"] / _GIB, color="black", lw=1)
    left.set(ylabel="GiB of one GPU", title="memory (dotted: the GPU's; line: what vLLM may use)")
    left.set_ylim(0, max(*bottom, room["gpu_memory"]) / _GIB * 1.08)
    left.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.08))

    right.plot(speed["curve"]["batch"], speed["curve"]["roofline"], "--", color=_GREY, label="roofline: no kernel can be above")
    measured = speed["measured_curve"]
    if measured and measured["batch"]:
        right.plot(measured["batch"], measured["speedup"], "o-", color=_BLUE, label=f"measured, linear layers alone\n({speed['measured']['detail']})")
    right.axhline(1, color=_GREY, lw=0.8)
    right.set_xscale("log", base=2)
    right.set(xlabel="sequences decoded together", ylabel="time before / time after", title="speed-up of a decode step")
    right.legend(fontsize=8)
    figure.tight_layout()
    return _save(figure, path)
