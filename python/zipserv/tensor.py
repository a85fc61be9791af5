# SPDX-License-Identifier: Apache-2.0
"""Compressed tensors: ``compress``, ``decompress``, ``linear`` and the ``ZipTensor`` they work on."""

from __future__ import annotations

import math
from typing import Any

import torch

from . import _zipserv, cpu, ops  # registers torch.ops.zipserv.* too
from .errors import Error
from .format import DTYPE_CODES, HEADER_BYTES, MAX_DIMS, Header, parse_header, storage_shape
from .stacked import mark_written

_DEVICES = ("cpu", "cuda")
_tracing_state: Any = torch._C._get_tracing_state


class ZipTensor:
    """A losslessly compressed BF16 or FP16 tensor: one blob of docs/format.md in a uint8 tensor, on the CPU or a GPU.

    Made by :func:`zipserv.compress`. ``ZipTensor(blob)`` takes an existing blob without a copy and checks its
    structure. Pickles, deep-copies and moves between devices as the compressed bytes.

    Args:
        blob: contiguous ``torch.uint8`` tensor of one dimension, all of one blob and nothing else.

    Raises:
        TypeError: the blob is not a contiguous uint8 vector.
        Error: its bytes are not a valid blob.
    """

    __slots__ = ("__weakref__", "_blob", "_header")
    _blob: torch.Tensor
    _header: Header

    def __init__(self, blob: torch.Tensor) -> None:
        self._blob = blob
        self._header = check_blob(blob)

    @classmethod
    def from_blob(cls, blob: torch.Tensor, *, verify: str = "structure") -> ZipTensor:
        """A ZipTensor over existing bytes, without a copy.

        Args:
            blob: contiguous uint8 vector.
            verify: ``"structure"`` checks every list and offset, ``"full"`` also decodes and compares the checksum of
                the original weights, ``"none"`` reads the header only: for bytes this process has checked before.

        Raises:
            TypeError, ValueError, Error: as for the constructor; ``verify`` is none of the three.
        """
        if verify not in ("none", "structure", "full"):
            raise ValueError(f"verify is 'none', 'structure' or 'full', not {verify!r}")
        self = cls.__new__(cls)
        self._blob = blob
        self._header = check_blob(blob, full=verify == "full") if verify != "none" else read_header(blob)
        return self

    @property
    def blob(self) -> torch.Tensor:
        """The compressed bytes, ``(nbytes,)`` uint8. Not to be changed in place."""
        return self._blob

    @property
    def header(self) -> Header:
        """The blob's header, kept on the host."""
        return self._header

    @property
    def shape(self) -> torch.Size:
        """Shape of the original tensor."""
        return torch.Size(self._header.shape)

    @property
    def dtype(self) -> torch.dtype:
        """``torch.bfloat16`` or ``torch.float16``: the dtype of the original tensor."""
        return self._header.dtype

    @property
    def device(self) -> torch.device:
        """Where the compressed bytes are."""
        return self._blob.device

    @property
    def m(self) -> int:
        """Rows of the matrix as which the tensor is stored."""
        return self._header.m

    @property
    def k(self) -> int:
        """Columns of the matrix as which the tensor is stored."""
        return self._header.k

    @property
    def ndim(self) -> int:
        return len(self._header.shape)

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        """Number of weights."""
        return self._header.m * self._header.k

    @property
    def nbytes(self) -> int:
        """Compressed size, all included."""
        return self._blob.numel()

    @property
    def original_nbytes(self) -> int:
        """Size of the original tensor."""
        return 2 * self.numel()

    @property
    def bits_per_weight(self) -> float:
        """Compressed bits for each weight, all included; 16 before."""
        return 8 * self.nbytes / self.numel()

    @property
    def ratio(self) -> float:
        """Original size / compressed size: larger is better."""
        return self.original_nbytes / self.nbytes

    @property
    def is_raw(self) -> bool:
        """True where the weights did not shrink and are kept as they were."""
        return self._header.raw

    @property
    def checksum(self) -> int:
        """Checksum of the original weights (docs/format.md, section 7)."""
        return self._header.checksum

    def stats(self) -> dict[str, Any]:
        """What the native library knows of the blob: mode, tiles, dense_tiles, escapes, literals and more."""
        blob = self._blob.cpu()
        return _zipserv.info(blob.data_ptr(), blob.numel())

    def verify(self) -> None:
        """Decode everything and compare with the checksum of the original weights.

        Raises:
            Error: the bytes have changed since they were written.
        """
        check_blob(self._blob, full=True)

    def decompress(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The original tensor, bit for bit.

        Args:
            out: written to and returned when given: the same shape, dtype and device, contiguous (a matrix may have
                rows that lie apart).

        Raises:
            TypeError: ``out`` is no tensor or has another dtype.
            ValueError: ``out`` has another shape, device or an unfit layout.
        """
        h = self._header
        if out is None:
            _require_device(self.device)
            flat: torch.Tensor = torch.ops.zipserv.decompress(self._blob, h.m, h.k, h.dtype_code)
            return flat.view(h.shape)
        _require_out(out, self.shape, self)
        matrix = out.detach().view(h.m, h.k) if out.is_contiguous() else out.detach()
        torch.ops.zipserv.decompress_out(self._blob, h.m, h.k, h.dtype_code, 0, matrix)
        return out

    def decompress_rows(self, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows ``start .. stop - 1`` of the ``(m, k)`` matrix as which the tensor is stored, ``(stop - start, k)``.

        For a matrix these are its own rows. Only the tiles that hold them are decoded.

        Raises:
            TypeError, ValueError: as for :meth:`decompress`; the range is not within the matrix.
        """
        h = self._header
        if not 0 <= start <= stop <= h.m:
            raise ValueError(f"rows {start} .. {stop} of a matrix of {h.m} rows")
        _require_device(self.device)
        if out is None:
            rows: torch.Tensor = torch.ops.zipserv.decompress_rows(self._blob, h.m, h.k, h.dtype_code, start, stop)
            return rows
        _require_out(out, (stop - start, h.k), self)
        torch.ops.zipserv.decompress_out(self._blob, h.m, h.k, h.dtype_code, start, out.detach())
        return out

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> ZipTensor:
        """This tensor on another device, or itself where it is there already. The dtype can't be changed.

        Raises:
            TypeError: a dtype was given: decompress first.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(f"a compressed tensor keeps its dtype ({self.dtype}): use decompress().to({device})")
        blob = self._blob.to(device, non_blocking=non_blocking)
        return self if blob is self._blob else ZipTensor._trusted(mark_written(blob), self._header)

    def cpu(self) -> ZipTensor:
        """This tensor in host memory."""
        return self.to("cpu")

    def cuda(self, device: torch.device | str | int = "cuda") -> ZipTensor:
        """This tensor on a GPU."""
        return self.to(device)

    @classmethod
    def _trusted(cls, blob: torch.Tensor, header: Header) -> ZipTensor:
        """Over a blob whose header was read and checked before."""
        self = cls.__new__(cls)
        self._blob, self._header = blob, header
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ZipTensor, (self._blob,)

    def __deepcopy__(self, memo: dict[int, Any]) -> ZipTensor:
        # Through the tensor's own deepcopy, so that blobs shared by two layers stay shared.
        copied: torch.Tensor = self._blob.__deepcopy__(memo)  # type: ignore[no-untyped-call]
        return ZipTensor._trusted(mark_written(copied), self._header)

    def __len__(self) -> int:
        return self._header.shape[0]

    def __repr__(self) -> str:
        return (
            f"ZipTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r}, "
            f"nbytes={self.nbytes}, bits_per_weight={self.bits_per_weight:.2f}, ratio={self.ratio:.3f}"
            f"{', raw' if self.is_raw else ''})"
        )


# A checked constructor is all that torch.load(weights_only=True) has to run.
torch.serialization.add_safe_globals([ZipTensor])


def compress(tensor: torch.Tensor) -> ZipTensor:
    """Compress a tensor without losing a bit.

    Args:
        tensor: ``torch.bfloat16`` or ``torch.float16``, strided, 1 to 8 dimensions, at least one element, on the CPU or
            a CUDA device. It is read only; a tensor that is not contiguous is copied once.

    Returns:
        The compressed tensor, on the same device. Weights that would not shrink are kept raw: never more than 128
        bytes above the original size.

    Raises:
        TypeError: not a tensor; another dtype, a sparse or quantized tensor.
        ValueError: no dimension or too many, no element, another device.
    """
    require_compressible(tensor)
    if tensor.is_cuda and not torch.compiler.is_compiling():
        made = ops.cuda_module().eager_compress(tensor, *storage_shape(tensor.shape))
        if made is not None:
            return ZipTensor._trusted(*made)
    blob: torch.Tensor = torch.ops.zipserv.compress(tensor.detach())
    return ZipTensor._trusted(blob, read_header(blob))


def decompress(tensor: ZipTensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The original tensor, bit for bit: :meth:`ZipTensor.decompress`."""
    _require_ziptensor(tensor)
    return tensor.decompress(out)


def linear(x: torch.Tensor, weight: ZipTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear`` with a compressed weight: ``x @ weight.T + bias``.

    The weight never exists decompressed as a whole. Differentiable in ``x`` and ``bias``. Under autocast, ``x`` and
    ``bias`` are cast to the weight's dtype.

    Args:
        x: ``(..., k)``, the weight's dtype and device, any strides; leading dimensions may be 0.
        weight: ``(m, k)``.
        bias: ``(m,)`` or None, the weight's dtype and device.

    Returns:
        ``(..., m)``, contiguous.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: shapes or devices do not fit.
    """
    _require_ziptensor(weight)
    if weight.ndim != 2:
        raise ValueError(f"linear needs a weight of two dimensions, this one has the shape {tuple(weight.shape)}")
    h = weight.header
    return linear_blob(x, weight.blob, h.m, h.k, h.dtype, bias)


def linear_blob(x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor:
    """:func:`linear` on a blob whose sizes the caller knows; what ``ZipLinear.forward`` runs."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, not {type(x).__name__}")
    if bias is not None and not isinstance(bias, torch.Tensor):
        raise TypeError(f"bias must be a torch.Tensor or None, not {type(bias).__name__}")
    if x.dtype != dtype or (bias is not None and bias.dtype != dtype):
        x, bias = ops.under_autocast(x, bias, dtype)
    if x.device == blob.device and x.device.type in _DEVICES and not torch.compiler.is_compiling() and _tracing_state() is None:
        # The call itself where nothing needs torch's dispatcher, which costs more than the call does.
        eager = ops.cuda_module() if x.is_cuda else cpu
        y: torch.Tensor | None = eager.eager_linear(x, blob, m, k, DTYPE_CODES[dtype], bias)
        if y is not None:
            return y
    if x.dtype != dtype:
        raise TypeError(f"x is {x.dtype}, the compressed weight is {dtype}: convert x with x.to({dtype}), or use autocast")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has the shape {tuple(x.shape)}, its last dimension should be {k} (weight: {m} x {k})")
    if x.device != blob.device:
        raise ValueError(f"x is on {x.device}, the compressed weight on {blob.device}: move one with .to(device)")
    if bias is not None:
        if bias.dtype != dtype:
            raise TypeError(f"bias is {bias.dtype}, the compressed weight is {dtype}: convert it with bias.to({dtype})")
        if bias.shape != (m,):
            raise ValueError(f"bias has the shape {tuple(bias.shape)}, it should be ({m},)")
        if bias.device != blob.device:
            raise ValueError(f"bias is on {bias.device}, the compressed weight on {blob.device}")
    result: torch.Tensor = torch.ops.zipserv.linear(x, blob, m, k, DTYPE_CODES[dtype], bias)
    return result


def read_header(blob: torch.Tensor) -> Header:
    """Header of a blob on any device; 128 bytes are read from it. Its length must be the blob's."""
    if not isinstance(blob, torch.Tensor):
        raise TypeError(f"a blob is a torch.uint8 tensor, not {type(blob).__name__}")
    if blob.dtype != torch.uint8 or blob.dim() != 1 or not blob.is_contiguous():
        raise TypeError(f"a blob is a contiguous torch.uint8 vector, not {blob.dtype} of shape {tuple(blob.shape)}")
    header = parse_header(blob[:HEADER_BYTES].cpu())
    if header.nbytes != blob.numel():
        raise Error(f"damaged zipserv blob: {blob.numel()} bytes, its header says {header.nbytes}")
    return header


def check_blob(blob: torch.Tensor, *, full: bool = False) -> Header:
    """Check all that a decoder relies on; with ``full`` also the checksum of the original weights.

    A blob on a GPU is copied to the host for this.
    """
    header = read_header(blob)
    host = blob.cpu()
    _zipserv.check(host.data_ptr(), host.numel(), full)
    return header


def require_compressible(tensor: torch.Tensor) -> None:
    """Raise what :func:`compress` documents, with the cure in the message."""
    if isinstance(tensor, ZipTensor):
        raise TypeError("this tensor is compressed already")
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"expected a torch.Tensor, not {type(tensor).__name__}")
    if tensor.is_quantized:
        raise TypeError(f"quantized tensors ({tensor.dtype}) can't be compressed: tensor.dequantize().to(torch.bfloat16) first")
    if tensor.is_nested:
        raise TypeError("nested tensors can't be compressed: compress each tensor of tensor.unbind()")
    if tensor.layout != torch.strided:
        raise TypeError(f"sparse tensors ({tensor.layout}) can't be compressed: tensor.to_dense() first")
    if type(tensor).__name__ == "DTensor":
        raise TypeError("a DTensor can't be compressed: compress each rank's part, tensor.to_local()")
    if tensor.dtype not in DTYPE_CODES:
        if tensor.is_floating_point() and tensor.dtype.itemsize > 2:
            cure = "tensor.to(torch.bfloat16) first (that step rounds; compression itself loses nothing)"
        elif tensor.is_complex():
            cure = "torch.view_as_real(tensor).to(torch.bfloat16) first (that step rounds)"
        else:
            cure = "only 16-bit floats have an exponent to compress"
        raise TypeError(f"{tensor.dtype} can't be compressed, torch.bfloat16 and torch.float16 can: {cure}")
    if tensor.device.type == "meta":
        raise ValueError("a tensor on the meta device has no values to compress: load or initialise it first")
    _require_device(tensor.device)
    if tensor.dim() == 0:
        raise ValueError("a tensor of no dimension can't be compressed: tensor.reshape(1) first")
    if tensor.dim() > MAX_DIMS:
        raise ValueError(f"{tensor.dim()} dimensions, at most {MAX_DIMS} can be stored: tensor.flatten() first")
    if math.prod(tensor.shape) == 0:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has no element to compress: keep it as it is")


def _require_ziptensor(tensor: object) -> None:
    if not isinstance(tensor, ZipTensor):
        cure = ": zipserv.compress(tensor) makes one" if isinstance(tensor, torch.Tensor) else ""
        raise TypeError(f"expected a zipserv.ZipTensor, not {type(tensor).__name__}{cure}")


def _require_device(device: torch.device) -> None:
    if device.type not in _DEVICES:
        raise ValueError(f"device {str(device)!r} is not supported, 'cpu' and 'cuda' are: move it with .cpu() first")


def _require_out(out: torch.Tensor, shape: tuple[int, ...], source: ZipTensor) -> None:
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out must be a torch.Tensor, not {type(out).__name__}")
    if out.dtype != source.dtype:
        raise TypeError(f"out is {out.dtype}, the compressed tensor is {source.dtype}")
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"out has the shape {tuple(out.shape)}, it should be {tuple(shape)}")
    if out.device != source.device:
        raise ValueError(f"out is on {out.device}, the compressed tensor on {source.device}")
    if out.is_contiguous():
        return
    if len(shape) != 2 or (shape[1] > 1 and out.stride(1) != 1) or (shape[0] > 1 and out.stride(0) < shape[1]):
        raise ValueError("out must be contiguous, or a matrix whose rows are contiguous and do not overlap")
