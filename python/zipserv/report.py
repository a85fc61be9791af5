# SPDX-License-Identifier: Apache-2.0
"""What ``compress_model`` did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class LayerReport:
    """One weight of a model.

    Attributes:
        name: the layer's name in the model.
        shape, dtype: of the weight.
        before, after: bytes of the weight before and after; ``after`` is 0 for a weight that shares another's bytes.
        status: ``"compressed"``, ``"tied"`` (compressed under another name) or ``"kept"`` (left as it was).
        note: why it was kept, or what it is tied to.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    before: int
    after: int
    status: str
    note: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight; 0 for a tied one."""
        return 16 * self.after / self.before if self.before and self.dtype.itemsize == 2 else 8.0 * self.dtype.itemsize


@dataclass
class CompressionReport:
    """All weights that ``compress_model`` looked at. Its repr is a table."""

    layers: list[LayerReport] = field(default_factory=list)

    @property
    def before(self) -> int:
        """Bytes of the looked-at weights before; tied ones count once."""
        return sum(layer.before for layer in self.layers if layer.status != "tied")

    @property
    def after(self) -> int:
        """Bytes of the same weights after."""
        return sum(layer.after for layer in self.layers)

    @property
    def compressed(self) -> list[LayerReport]:
        """The layers that were compressed, tied ones included."""
        return [layer for layer in self.layers if layer.status != "kept"]

    @property
    def ratio(self) -> float:
        """Size before / size after; 1 where nothing was done."""
        return self.before / self.after if self.after else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values that JSON can hold."""
        layers = [{**asdict(layer), "dtype": str(layer.dtype), "shape": list(layer.shape)} for layer in self.layers]
        return {"before": self.before, "after": self.after, "ratio": self.ratio, "layers": layers}

    def __repr__(self) -> str:
        head = ("layer", "shape", "before", "after", "bits", "status")
        rows = [
            (
                layer.name,
                " x ".join(map(str, layer.shape)),
                _size(layer.before),
                _size(layer.after),
                f"{layer.bits_per_weight:.2f}",
                f"{layer.status}: {layer.note}" if layer.note else layer.status,
            )
            for layer in self.layers
        ]
        total = (f"{len(self.compressed)} of {len(self.layers)}", "", _size(self.before), _size(self.after), "", f"{self.ratio:.3f}x smaller")
        widths = [max(len(row[i]) for row in (head, total, *rows)) for i in range(5)]
        lines = []
        for row in (head, *rows, total):
            name, shape, *numbers = (row[i].rjust(widths[i]) if i in (2, 3, 4) else row[i].ljust(widths[i]) for i in range(5))
            lines.append("  ".join((name, shape, *numbers, row[5])).rstrip())
        return "\n".join(lines)


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{int(value)} B" if unit == "B" else f"{value:.2f} {unit}"
