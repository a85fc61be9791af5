# SPDX-License-Identifier: Apache-2.0
"""From the calls of vLLM's weight loaders to one compressed weight.

A parameter that will be compressed starts on the meta device: it has a shape and vLLM's loader, but no memory. `record` watches
what the loader would copy into it, and a `Collector` keeps the pieces. Pieces of a blob that lie on tile borders, there and
here, stay compressed; they are put together as they are. Anything else (a plain checkpoint, a shard of odd size, padding) goes
into a plain matrix that is compressed as soon as the last piece has come: then the plain matrix is freed, so that loading needs
the compressed model and the layers that are under way, never the whole model uncompressed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zipserv import _zipserv, tiles
from zipserv.format import TILE

from .blobview import BlobView

aten = torch.ops.aten

_CURE = "that can't be followed, so the layer has to be listed in modules_to_not_convert"

Rect = tuple[int, int, int, int]  # first row, end row, first column, end column


class Collector:
    """The pieces of one matrix (`rows` x `cols`) on their way into memory."""

    def __init__(self, name: str, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.rows, self.cols, self.dtype, self.device = name, rows, cols, dtype, device
        self.plain: torch.Tensor | None = None
        self.blocks: dict[Rect, tiles.Block] = {}
        self.whole: torch.Tensor | None = None  # the blob, where one alone is all of the matrix
        self.rects: set[Rect] = set()
        self.done = False

    def __repr__(self) -> str:
        return f"{self.name} [{self.rows}, {self.cols}]"

    @property
    def started(self) -> bool:
        return bool(self.rects)

    @property
    def complete(self) -> bool:
        """True once every weight has come. Pieces that overlap never count as complete: `finish` settles them at the end."""
        rects = sorted(self.rects)
        if any(_overlap(a, b) for i, a in enumerate(rects) for b in rects[i + 1 :]):
            return False
        return sum((r1 - r0) * (c1 - c0) for r0, r1, c0, c1 in rects) == self.rows * self.cols

    def put(self, rect: Rect, source: torch.Tensor) -> None:
        """Take the weights of one piece. `source` may be any tensor of that size."""
        if self.done:
            raise RuntimeError(f"{self}: the weight is compressed already; loading into a running model is not supported")
        r0, r1, c0, c1 = rect
        if self._fits(rect, source):
            assert isinstance(source, BlobView)
            if source.is_whole():  # nothing else of this blob goes elsewhere: its own checksum can be held against it
                _zipserv.check(source.blob.data_ptr(), source.blob.numel(), True)
                if rect == (0, self.rows, 0, self.cols):
                    self.whole = source.blob
            block = tiles.Block.of(source.blob, *source.part())
            self.blocks[rect] = block if self.whole is not None else block.own()
        else:
            self._make_plain()[r0:r1, c0:c1].copy_(source.reshape(r1 - r0, c1 - c0))
        self.rects.add(rect)

    def fill(self, rect: Rect, value: float) -> None:
        r0, r1, c0, c1 = rect
        self._make_plain()[r0:r1, c0:c1].fill_(value)
        self.rects.add(rect)

    def _fits(self, rect: Rect, source: torch.Tensor) -> bool:
        if self.plain is not None or not isinstance(source, BlobView) or source.dtype != self.dtype or not source.is_rectangle():
            return False
        (r0, r1, c0, c1), (rows, cols) = rect, source.part()
        aligned = all(at % TILE == 0 for at in (r0, c0)) and all(at % TILE == 0 or at == end for at, end in ((r1, self.rows), (c1, self.cols)))
        return aligned and tiles.on_borders(source.header, rows, cols) and not any(_overlap(rect, other) for other in self.rects)

    def _make_plain(self) -> torch.Tensor:
        if self.plain is None:
            self.plain = torch.zeros(self.rows, self.cols, dtype=self.dtype, device=self.device)
            for (r0, r1, c0, c1), block in self.blocks.items():
                self.plain[r0:r1, c0:c1].copy_(tiles.decode(tiles.assemble([[block]])))
            self.blocks, self.whole = {}, None
        return self.plain

    def finish(self) -> torch.Tensor:
        """The blob, on the device; whatever has not come is zero. The collector is empty afterwards."""
        grid = self._grid()
        if self.whole is not None:
            blob = self.whole.to(self.device, copy=True)
        elif grid is not None:
            blob = tiles.assemble(grid).to(self.device)
        else:
            blob = torch.ops.zipserv.compress(self._make_plain())
        self.done, self.plain, self.blocks, self.whole = True, None, {}, None
        return blob

    def _grid(self) -> list[list[tiles.Block]] | None:
        """The blocks in rows and columns, if they fill the matrix so."""
        if self.plain is not None or not self.complete:
            return None
        tops, lefts = sorted({rect[0] for rect in self.rects}), sorted({rect[2] for rect in self.rects})
        at = {(rect[0], rect[2]): block for rect, block in self.blocks.items()}
        if len(at) != len(tops) * len(lefts):
            return None
        return [[at[top, left] for left in lefts] for top in tops]


def _overlap(a: Rect, b: Rect) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands the writes into one meta parameter to its collectors, one for each of the parameter's matrices."""

    def __init__(self, param: torch.Tensor, collectors: list[Collector]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storage = param.untyped_storage()._cdata
        self.collectors = collectors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = args[0] if args else None
        if not (isinstance(target, torch.Tensor) and target.is_meta and target.untyped_storage()._cdata == self.storage):
            return func(*args, **(kwargs or {}))
        if func is aten.copy_.default:
            self._write(target, args[1])
        elif func in (aten.fill_.Scalar, aten.zero_.default):
            self._write(target, args[1] if len(args) > 1 else 0.0)
        elif func._schema.is_mutable:
            raise RuntimeError(f"{self.collectors[0]}: its loader writes with {func}; {_CURE}")
        else:
            return func(*args, **(kwargs or {}))
        return target

    def _write(self, target: torch.Tensor, source: torch.Tensor | float) -> None:
        if target.numel() == 0:
            return
        if target.dim() == 3:
            for i in range(target.shape[0]):
                self._write(target[i], source if isinstance(source, float | int) or source.dim() < 3 else source[i])
            return
        first = self.collectors[0]
        rows, cols = first.rows, first.cols
        which, at = divmod(int(target.storage_offset()), rows * cols)
        if target.dim() != 2 or target.stride(1) not in (1, cols) or (target.shape[0] > 1 and target.stride(0) != cols):
            raise RuntimeError(f"{first}: its loader writes {tuple(target.shape)} with strides {target.stride()}; {_CURE}")
        rect = (at // cols, at // cols + target.shape[0], at % cols, at % cols + target.shape[1])
        if isinstance(source, torch.Tensor):
            self.collectors[which].put(rect, source.expand(target.shape) if source.shape != target.shape else source)
        else:
            self.collectors[which].fill(rect, source)


def record(loader: Callable[..., Any], param: torch.Tensor, collectors: list[Collector], after: Callable[[], None]) -> Callable[..., Any]:
    """vLLM's `loader`, with its writes into the meta tensor `param` going to the collectors; `after` runs after each call.

    The result may be called with any parameter: it always stands for this one. So it still knows which weights belong to other
    ranks, and refuses those that come a second time, when the blob has taken the parameter's place.
    """

    @functools.wraps(loader)
    def load(*args: Any, **kwargs: Any) -> Any:
        if "param" in kwargs:
            kwargs["param"] = param
        else:
            args = (param, *args[1:])
        with _Recorder(param, collectors):
            result = loader(*args, **kwargs)
        after()
        return result

    return load
