# SPDX-License-Identifier: Apache-2.0
"""Stacked expert weights ``(experts, rows, columns)`` of mixture-of-experts models, each expert compressed for itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .format import SUFFIX
from .layers import BlobModule
from .lazy import LazyWeight
from .tensor import ZipTensor, compress

__all__ = ["ZipExperts"]


class ZipExperts(BlobModule):
    """Takes the place of a three-dimensional parameter: ``experts[e]`` is the weight of expert e.

    What it gives is a :class:`LazyWeight`: ``F.linear(x, experts[e])`` runs on the compressed bytes, so that of a layer
    with many experts only those that were chosen are ever decoded. Each expert is the buffer ``E_zipserv``.

    Args:
        weights: one compressed matrix for each expert, all of one shape and dtype.

    Raises:
        ValueError: none, or of different shapes or dtypes.
    """

    def __init__(self, weights: Sequence[ZipTensor]) -> None:
        super().__init__()
        if not weights or any((w.shape, w.dtype, w.ndim) != (weights[0].shape, weights[0].dtype, 2) for w in weights):
            raise ValueError("experts are at least one matrix, all of one shape and dtype")
        self.rows, self.columns = weights[0].shape
        self.dtype = weights[0].dtype
        for index, weight in enumerate(weights):
            self.register_blob(str(index), (self.rows, self.columns), self.dtype, weight.blob)

    @classmethod
    def from_tensor(cls, weight: torch.Tensor) -> ZipExperts:
        """Compress a tensor ``(experts, rows, columns)``. Raises what :func:`zipserv.compress` raises."""
        if weight.dim() != 3:
            raise ValueError(f"stacked experts have three dimensions, this tensor has the shape {tuple(weight.shape)}")
        return cls([compress(expert) for expert in weight])

    def decompress(self) -> torch.Tensor:
        """All experts, ``(experts, rows, columns)``, bit for bit."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for index, weight in enumerate(self.ziptensors()):
            weight.decompress(out[index])
        return out

    def ziptensors(self) -> Iterator[ZipTensor]:
        """The compressed experts, over this module's own bytes."""
        return (self.get_ziptensor(str(index)) for index in range(len(self)))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self.rows, self.columns))

    @property
    def device(self) -> torch.device:
        return self.get_buffer("0" + SUFFIX).device

    @property
    def nbytes(self) -> int:
        """Compressed size of all experts."""
        return sum(self.get_buffer(str(index) + SUFFIX).numel() for index in range(len(self)))

    @property
    def is_raw(self) -> bool:
        """True where compression would not make the experts smaller."""
        return self.nbytes >= 2 * len(self) * self.rows * self.columns

    def __len__(self) -> int:
        return len(self._blob_specs)

    def __getitem__(self, index: int | torch.Tensor) -> LazyWeight:
        number = int(index)
        if not 0 <= number < len(self):
            raise IndexError(f"expert {number} of {len(self)}")
        matrix = (self.rows, self.columns)
        return LazyWeight(self.get_buffer(str(number) + SUFFIX), matrix, matrix, self.dtype)

    def __iter__(self) -> Iterator[LazyWeight]:
        return (self[index] for index in range(len(self)))

    def extra_repr(self) -> str:
        bits = 8 * self.nbytes / (len(self) * self.rows * self.columns)
        return f"experts={len(self)}, shape=({self.rows}, {self.columns}), dtype={self.dtype}, {bits:.2f} bits/weight"
