# SPDX-License-Identifier: Apache-2.0
"""Stacked expert weights ``(experts, rows, columns)`` of mixture-of-experts models, each expert compressed for itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import grouped
from .errors import Error
from .format import SUFFIX
from .layers import BlobModule
from .lazy import LazyWeight
from .stacked import mark_written
from .tensor import ZipTensor, check_blob, compress

__all__ = ["ZipExperts"]

_ALL = "experts" + SUFFIX  # the buffer


class ZipExperts(BlobModule):
    """Takes the place of a three-dimensional parameter: ``experts[e]`` is the weight of expert e.

    What it gives is a :class:`LazyWeight`: ``F.linear(x, experts[e])`` runs on the compressed bytes, so that of a layer
    with many experts only those that were chosen are ever decoded.

    The bytes of all experts are one buffer, at equal distances, which :mod:`zipserv.grouped` multiplies in one launch (:meth:`together`).
    State dicts do not show it: there expert e is ``E_zipserv``. Where one does not shrink, which that can't multiply, and after :meth:`split`,
    each expert is a buffer of that name.

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
        self._lengths: list[int] = []
        self._arriving: dict[str, torch.Tensor] = {}
        self._hold([weight.blob for weight in weights])

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

    def together(self) -> grouped.Weight | None:
        """What :func:`zipserv.grouped.multiply` takes; None where the experts can only be multiplied one by one."""
        blobs = self._buffers.get(_ALL)
        return None if blobs is None else grouped.Weight(blobs, len(self), self.rows, self.columns)

    def split(self) -> None:
        """Give each expert a buffer of its own, for those who move single buffers by the names in a state dict (accelerate's offload)."""
        if _ALL in self._buffers:
            self._hold([self._blob(name).clone() for name in self._blob_specs], apart=True)

    def parts(self, blobs: torch.Tensor) -> list[torch.Tensor]:
        """The experts' blobs within a tensor that has this module's buffer's bytes."""
        step = blobs.numel() // len(self._lengths)
        return [blobs[index * step : index * step + length] for index, length in enumerate(self._lengths)]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self.rows, self.columns))

    @property
    def device(self) -> torch.device:
        return next(self._blobs()).device

    @property
    def nbytes(self) -> int:
        """Compressed size of all experts."""
        return sum(self._lengths) or sum(blob.numel() for blob in self._blobs())

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
        return LazyWeight(self._blob(str(number)), matrix, matrix, self.dtype)

    def __iter__(self) -> Iterator[LazyWeight]:
        return (self[index] for index in range(len(self)))

    def extra_repr(self) -> str:
        bits = 8 * self.nbytes / (len(self) * self.rows * self.columns)
        return f"experts={len(self)}, shape=({self.rows}, {self.columns}), dtype={self.dtype}, {bits:.2f} bits/weight"

    # --- the bytes ------------------------------------------------------------------------------------------------

    def _hold(self, blobs: Sequence[torch.Tensor], apart: bool = False) -> None:
        """Take the experts' blobs: into one buffer if they can be multiplied so, else each as it is."""
        matrix = (self.rows, self.columns)
        self._buffers.clear()
        self._non_persistent_buffers_set.clear()
        if apart or not grouped.fits(grouped.distance(blobs), *matrix):
            self._lengths = []
            for index, blob in enumerate(blobs):
                self.register_blob(str(index), matrix, self.dtype, blob)
            return
        self._lengths = [blob.numel() for blob in blobs]
        self._blob_specs = {str(index): (matrix, self.dtype) for index in range(len(blobs))}
        self.register_buffer(_ALL, grouped.stack(blobs, *matrix), persistent=False)

    def _blob(self, name: str) -> torch.Tensor:
        blobs = self._buffers.get(_ALL)
        if blobs is None:
            return super()._blob(name)
        index = int(name)
        start = index * (blobs.numel() // len(self._lengths))
        return blobs[start : start + self._lengths[index]]

    def _blobs(self) -> Iterator[torch.Tensor]:
        return (blob for blob in self._buffers.values() if blob is not None)

    def _mark_all(self) -> None:
        """Products know a blob by its address, not by the buffer that it lies in."""
        blobs = self._buffers.get(_ALL)
        if blobs is not None and blobs.is_cuda:
            for part in self.parts(blobs):
                mark_written(part)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self._buffers.get(_ALL)
        super()._apply(fn, recurse)
        if self._buffers.get(_ALL) is not before:
            self._mark_all()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark_all()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if _ALL in self._buffers:
            for name in self._blob_specs:
                destination[prefix + name + SUFFIX] = self._blob(name)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        self._arriving = {}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        arrived, self._arriving = self._arriving, {}
        if arrived:
            self._put(arrived, assign=bool(local_metadata.get("assign_to_params_buffers", False)))

    def _load_blob(self, name: str, value: object, *, is_plain: bool, assign: bool) -> None:
        if _ALL not in self._buffers:
            super()._load_blob(name, value, is_plain=is_plain, assign=assign)
            return
        if not isinstance(value, torch.Tensor | ZipTensor):
            raise TypeError(f"expected a tensor, not {type(value).__name__}")
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                return
            value = compress(value) if is_plain else ZipTensor._trusted(value, check_blob(value))
        self._check_header(name, value.header)
        self._arriving[name] = value.blob

    def _put(self, arrived: dict[str, torch.Tensor], *, assign: bool) -> None:
        """Blobs from a state dict in the place of those that are here."""
        old = self._buffers[_ALL]
        assert old is not None
        if old.is_meta and not assign:
            warnings.warn("loading into a module on the meta device does nothing: pass assign=True", stacklevel=2)
            return
        if old.is_meta and len(arrived) < len(self):
            raise Error(f"experts on the meta device are loaded all or none, not {len(arrived)} of {len(self)}")
        if not assign and all(blob.numel() == self._lengths[int(name)] for name, blob in arrived.items()):
            with torch.no_grad():  # in place: captured CUDA graphs stay valid
                for name, blob in arrived.items():
                    mark_written(self._blob(name).copy_(blob))
            return
        device = next(iter(arrived.values())).device if assign else old.device
        self._hold([(arrived[name] if name in arrived else self._blob(name)).to(device) for name in self._blob_specs])
