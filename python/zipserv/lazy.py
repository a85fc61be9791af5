# SPDX-License-Identifier: Apache-2.0
"""``LazyWeight``: a compressed weight in the shape of a tensor, for code that looks at ``layer.weight``.

Shape, dtype and device cost nothing; ``F.linear`` runs on the compressed bytes; any other operation decompresses the
weight first, for itself alone. It can't be changed in place: the change would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from .errors import Error
from .format import DTYPE_CODES
from .rows import linear_rows
from .tensor import linear_blob

_READ_ONLY = "a compressed weight can't be changed in place: decompress it, and compress the result"

_WRITES = (torch.Tensor.__setitem__, torch.Tensor.data.__set__)  # type: ignore[attr-defined]


class LazyWeight(torch.Tensor):
    """A read-only view of a compressed weight that decompresses when its values are asked for.

    Args:
        blob: the compressed bytes; checked by whoever holds them.
        shape: shape of the weight.
        matrix: ``(m, k)``, the matrix as which it is stored.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        row0: of a weight that is a run of the matrix's rows (two dimensions), the first of them, a multiple of 64.
    """

    _blob: torch.Tensor
    _matrix: tuple[int, int]
    _row0: int | None

    @staticmethod
    def __new__(
        cls, blob: torch.Tensor, shape: tuple[int, ...], matrix: tuple[int, int], dtype: torch.dtype, row0: int | None = None
    ) -> LazyWeight:
        self: LazyWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=blob.device, requires_grad=False
        )
        self._blob, self._matrix, self._row0 = blob, matrix, row0
        return self

    def decompress(self) -> torch.Tensor:
        """The weight itself, a tensor of its own."""
        m, k = self._matrix
        if self._row0 is not None:
            rows: torch.Tensor = torch.ops.zipserv.decompress_rows(
                self._blob, m, k, DTYPE_CODES[self.dtype], self._row0, self._row0 + self.shape[0]
            )
            return rows
        flat: torch.Tensor = torch.ops.zipserv.decompress(self._blob, m, k, DTYPE_CODES[self.dtype])
        return flat.view(self.shape)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, cls) and not isinstance(x, cls) and weight.dim() == 2 and x.dtype == weight.dtype:
                m, k = weight._matrix
                if weight._row0 is not None:
                    row0 = weight._row0
                    return linear_rows(x, weight._blob, m, k, weight.dtype, row0, row0 + weight.shape[0], bias)
                return linear_blob(x, weight._blob, m, k, weight.dtype, bias)
        if func in _WRITES and isinstance(args[0], cls):
            raise Error(_READ_ONLY)  # it would write into a view of a copy
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return args[0]
        for index, argument in enumerate(func._schema.arguments):
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            if argument.is_write and isinstance(given, cls):
                raise Error(_READ_ONLY)
        plain = tree_map(lambda value: value.decompress() if isinstance(value, cls) else value, (args, kwargs))
        return func(*plain[0], **plain[1])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


def _linear_arguments(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return input, weight, bias
