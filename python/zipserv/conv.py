# SPDX-License-Identifier: Apache-2.0
"""Convolutions that are matrix products: patch embeddings (stride = kernel) and 1x1 kernels, with compressed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import Error
from .format import DTYPE_CODES, SUFFIX, storage_shape
from .layers import BlobModule
from .lazy import LazyWeight
from .tensor import ZipTensor, compress, linear_blob

__all__ = ["ZipConv", "ZipConv1d", "ZipConv2d", "ZipConv3d", "is_matmul"]


def is_matmul(conv: Any) -> bool:
    """True for a convolution whose windows do not overlap: no padding, no dilation, no groups, and stride = kernel or
    a kernel of one element; and whose weight is stored as the matrix that this takes."""
    if type(conv) not in _KINDS or conv.groups != 1 or any(step != 1 for step in conv.dilation):
        return False
    if conv.padding != "valid" and (isinstance(conv.padding, str) or any(conv.padding)):
        return False
    if tuple(conv.stride) != tuple(conv.kernel_size) and any(size != 1 for size in conv.kernel_size):
        return False
    return bool(storage_shape(conv.weight.shape)[0] == conv.out_channels)


class ZipConv(BlobModule):
    """A convolution without overlap as one matrix product on the compressed weight; use :meth:`from_conv`."""

    weight_zipserv: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, ...]
    weight_dtype: torch.dtype

    @staticmethod
    def from_conv(conv: Any, weight: ZipTensor | None = None) -> ZipConv:
        """The same convolution with its weight compressed; the bias is shared.

        Args:
            conv: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` for which :func:`is_matmul` is true.
            weight: its weight, if it has been compressed already.

        Raises:
            TypeError: another module, or its weight is not BF16 or FP16.
            ValueError: a convolution that is no matrix product.
        """
        kind = _KINDS.get(type(conv))
        if kind is None:
            raise TypeError(f"expected nn.Conv1d, nn.Conv2d or nn.Conv3d, not {type(conv).__name__}")
        if not is_matmul(conv):
            raise ValueError(f"{conv} is no matrix product: it needs stride = kernel size or a kernel of 1, and no padding, dilation or groups")
        weight = compress(conv.weight) if weight is None else weight
        return _over(kind, conv, tuple(weight.shape), weight.dtype, weight.blob)

    @staticmethod
    def empty_like(conv: Any, dtype: torch.dtype | None = None) -> ZipConv:
        """The same convolution without a weight yet, to load one into; ``dtype`` is the weight's (default: the old one's)."""
        dtype = dtype or (conv.weight.dtype if conv.weight.dtype in DTYPE_CODES else torch.bfloat16)
        return _over(_KINDS[type(conv)], conv, tuple(conv.weight.shape), dtype, None)

    def to_conv(self) -> nn.Module:
        """The plain convolution with the decompressed weight, equal to the original bit for bit; the bias is shared."""
        kind = next(plain for plain, zipped in _KINDS.items() if zipped is type(self))
        layer: Any = kind.__new__(kind)
        nn.Module.__init__(layer)
        skip = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_blob_specs", "weight_dtype")
        layer.__dict__.update({key: value for key, value in self.__dict__.items() if key not in skip})
        layer.weight = nn.Parameter(self.ziptensor.decompress(), requires_grad=False)
        layer.register_parameter("bias", self.bias)
        plain: nn.Module = layer
        return plain

    @property
    def ziptensor(self) -> ZipTensor:
        """The compressed weight, over this layer's own bytes."""
        return self.get_ziptensor("weight")

    @property
    def weight(self) -> torch.Tensor:  # of the convolutions below, which have a parameter here
        """The weight for code that looks at it: free for shape, dtype and device, decompressed for anything else."""
        shape, dtype = self._blob_specs["weight"]
        blob, matrix = self.get_buffer("weight" + SUFFIX), storage_shape(shape)
        if torch.compiler.is_compiling():
            flat: torch.Tensor = torch.ops.zipserv.decompress(blob, *matrix, DTYPE_CODES[dtype])
            return flat.view(shape)
        return LazyWeight(blob, shape, matrix, dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError("the weight of a compressed convolution can't be set: use ZipConv.from_conv")
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Not possible: a compressed weight is never drawn anew. Raises Error."""
        raise Error("a compressed weight can't be initialised anew: initialise the convolution, then ZipConv.from_conv")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input (batch, in_channels, *sizes)``, or without batch -> ``(batch, out_channels, *sizes after)``."""
        shape, dtype = self._blob_specs["weight"]
        kernel = shape[2:]
        x = input if input.dim() == len(shape) else input[None]
        if x.dim() != len(shape) or x.shape[1] != shape[1]:
            raise ValueError(f"input has the shape {tuple(input.shape)}, {shape[1]} channels and {len(kernel)} sizes are expected")
        if all(size == 1 for size in kernel):
            for axis, step in enumerate(self.stride):
                x = x if step == 1 else x[(slice(None),) * (axis + 2) + (slice(None, None, step),)]
            patches = x.movedim(1, -1)
        else:
            counts = [size // window for size, window in zip(x.shape[2:], kernel, strict=True)]
            for axis, (count, window) in enumerate(zip(counts, kernel, strict=True)):
                x = x.narrow(axis + 2, 0, count * window)
            split = [part for pair in zip(counts, kernel, strict=True) for part in pair]
            x = x.reshape(x.shape[0], shape[1], *split)
            axes = range(2, 2 + 2 * len(kernel), 2)
            patches = x.permute(0, *axes, 1, *(axis + 1 for axis in axes)).flatten(1 + len(kernel))
        y = linear_blob(patches, self.weight_zipserv, *storage_shape(shape), dtype, self.bias).movedim(-1, 1)
        return y if input.dim() == len(shape) else y[0]


class ZipConv1d(ZipConv, nn.Conv1d):  # type: ignore[override]
    """``nn.Conv1d`` without overlap, weight compressed."""


class ZipConv2d(ZipConv, nn.Conv2d):  # type: ignore[override]
    """``nn.Conv2d`` without overlap (a patch embedding, a 1x1 convolution), weight compressed."""


class ZipConv3d(ZipConv, nn.Conv3d):  # type: ignore[override]
    """``nn.Conv3d`` without overlap (a video patch embedding), weight compressed."""


def _over(kind: type[ZipConv], conv: Any, shape: tuple[int, ...], dtype: torch.dtype, blob: torch.Tensor | None) -> ZipConv:
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    skip = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    layer.__dict__.update({key: value for key, value in conv.__dict__.items() if key not in skip})
    layer.weight_dtype = dtype
    layer.register_blob("weight", shape, dtype, blob, conv.weight.device)
    layer.register_parameter("bias", conv.bias)
    return layer


_KINDS: dict[type[nn.Module], type[ZipConv]] = {nn.Conv1d: ZipConv1d, nn.Conv2d: ZipConv2d, nn.Conv3d: ZipConv3d}
