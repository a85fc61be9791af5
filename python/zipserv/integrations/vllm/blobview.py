# SPDX-License-Identifier: Apache-2.0
"""A compressed checkpoint tensor that vLLM's weight loaders can slice like any other.

vLLM's loaders know how each layer is sharded: they `narrow`, `chunk` and `transpose` what the checkpoint holds and `copy_` the
result into a parameter. `BlobView` lets them do so with a blob: slicing moves an index and reads nothing, and a copy into an
ordinary parameter decodes just the part that was cut out. So a layer that this package leaves alone (an embedding without a
quantization config, an ignored layer) still loads from a compressed checkpoint, and a compressed layer learns which tiles of
the blob are its own (`collect.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.models.utils import WeightsMapper

from zipserv import _zipserv, tiles
from zipserv.format import SUFFIX, Header

aten = torch.ops.aten

_VIEWS = {
    aten.alias.default,
    aten.as_strided.default,
    aten.detach.default,
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.view.default,
}


class BlobView(torch.Tensor):
    """A view of a compressed matrix: shape, strides and offset of `places` (a meta tensor) over the weights of `blob`."""

    blob: torch.Tensor
    header: Header
    places: torch.Tensor

    @staticmethod
    def __new__(cls, blob: torch.Tensor, header: Header, index: torch.Tensor) -> BlobView:
        made: BlobView = torch.Tensor._make_wrapper_subclass(
            cls, index.shape, index.stride(), index.storage_offset(), dtype=header.dtype, device=torch.device("cpu")
        )
        made.blob, made.header, made.places = blob, header, index
        return made

    @classmethod
    def of(cls, blob: torch.Tensor) -> BlobView:
        """The whole tensor that the blob holds."""
        header = tiles.read_header(blob)
        return cls(blob, header, torch.empty(header.shape, dtype=header.dtype, device="meta"))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _VIEWS and isinstance(args[0], BlobView):
            source = args[0]
            made = func(source.places, *args[1:], **kwargs)
            if isinstance(made, torch.Tensor):
                return BlobView(source.blob, source.header, made)
            return type(made)(BlobView(source.blob, source.header, view) for view in made)
        if func is aten.copy_.default and args[0].is_meta:
            return args[0]
        args = torch.utils._pytree.tree_map_only(BlobView, BlobView.decode, args)
        kwargs = torch.utils._pytree.tree_map_only(BlobView, BlobView.decode, kwargs)
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"BlobView({tuple(self.shape)}, {self.dtype}, of {self.header.m} x {self.header.k})"

    def part(self) -> tuple[tiles.Range, tiles.Range]:
        """The smallest rows and columns of the stored matrix that hold all of this view."""
        k = self.header.k
        row, col = divmod(int(self.places.storage_offset()), k)
        down = right = 0
        for size, stride in zip(self.places.shape, self.places.stride(), strict=True):
            if stride % k == 0 and k > 1 or size == 1:
                down += (size - 1) * (stride // k)
            else:
                right += (size - 1) * stride
        if col + right >= k:  # a view that crosses rows: take them whole
            down, col, right = down + (col + right) // k, 0, k - 1
        return (row, row + down + 1), (col, col + right + 1)

    def is_rectangle(self) -> bool:
        """True if the view is that part itself, in its own order: rows by columns (dimensions of size one aside)."""
        (r0, r1), (c0, c1) = self.part()
        strides = [(n, s) for n, s in zip(self.places.shape, self.places.stride(), strict=True) if n > 1]
        wanted = [(n, s) for n, s in ((r1 - r0, self.header.k), (c1 - c0, 1)) if n > 1]
        return self.places.dim() >= 2 and strides == wanted and self.numel() == (r1 - r0) * (c1 - c0)

    def is_whole(self) -> bool:
        """True if the view is the whole stored matrix."""
        return self.is_rectangle() and self.numel() == self.header.m * self.header.k

    def decode(self) -> torch.Tensor:
        """The weights of the view. Only the tiles that it touches are read; if that is all of them, the checksum is checked, too."""
        if self.is_whole():
            _zipserv.check(self.blob.data_ptr(), self.blob.numel(), True)
        (r0, r1), (c0, c1) = self.part()
        weights = tiles.decode(self.blob, (r0, r1), (c0, c1)).view(-1)
        k, width = self.header.k, c1 - c0
        strides = [s // k * width + s % k for s in self.places.stride()]
        offset = self.places.storage_offset() - r0 * k - c0
        return weights.as_strided(self.places.shape, strides, weights.storage_offset() + offset // k * width + offset % k)


class BlobMapper(WeightsMapper):  # type: ignore[misc]
    """The step between checkpoint and loaders: `NAME_zipserv` with a blob becomes `NAME` with a `BlobView`.

    vLLM merges it into each model's own mapper (`mapper | this`), so it must stay what it is when merged.
    """

    def __or__(self, other: WeightsMapper) -> BlobMapper:
        return BlobMapper(**vars(WeightsMapper.__or__(self, other)))

    def __ror__(self, other: WeightsMapper) -> BlobMapper:
        return BlobMapper(**vars(WeightsMapper.__or__(other, self)))

    def apply(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        mapped: Iterable[tuple[str, torch.Tensor]] = super().apply(map(_open, weights))
        return mapped


#: Stacked experts of transformers, compressed one by one, get the names that vLLM knows for single experts.
_STACKED = re.compile(r"\.experts\.(gate_up_proj|down_proj)\.(\d+)$")


def _open(item: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    name, tensor = item
    if not name.endswith(SUFFIX):
        return name, tensor
    name = _STACKED.sub(r".experts.\2.\1.weight", name.removesuffix(SUFFIX))
    return name, BlobView.of(tensor.cpu())
