# SPDX-License-Identifier: Apache-2.0
"""The ``torch.library`` ops ``zipserv::*``: schemas, CPU implementations, fake kernels, gradients.

A blob (docs/format.md) travels as one uint8 tensor; sizes and dtype travel as ints, so that neither a fake kernel nor
a CUDA launch ever reads it. CUDA implementations live in ``zipserv.cuda``, which is imported at the first CUDA call.

=====================  ==========================================================================
``linear``             ``x (..., k)``, bias ``(m,)`` or None -> ``(..., m)``
``linear_grad_x``      ``grad (..., m)`` -> ``grad @ W``, ``(..., k)``
``decompress``         -> the matrix, ``(m, k)``
``decompress_rows``    -> rows ``row0 .. row1 - 1``, ``(row1 - row0, k)``
``decompress_out``     rows from ``row0`` on into ``out (rows, k)``, whose rows may lie apart
``compress``           tensor of any shape -> blob; the size is known only afterwards
=====================  ==========================================================================
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import _zipserv, cpu
from .format import DTYPE_CODES, DTYPES, HEADER_BYTES, TILE, Header, parse_header, storage_shape

#: Most bytes of a weight that the CPU path holds decompressed at a time (but at least one row of tiles).
PANEL_BYTES = 2 << 20

_TAGS = (torch.Tag.pt2_compliant_tag,)
_library: Any = torch.library.Library  # untyped in torch
_LIB = _library("zipserv", "DEF")
_LIB.define("linear(Tensor x, Tensor blob, int m, int k, int dtype_code, Tensor? bias) -> Tensor", tags=_TAGS)
_LIB.define("linear_grad_x(Tensor grad, Tensor blob, int m, int k, int dtype_code) -> Tensor", tags=_TAGS)
_LIB.define("decompress(Tensor blob, int m, int k, int dtype_code) -> Tensor", tags=_TAGS)
_LIB.define("decompress_rows(Tensor blob, int m, int k, int dtype_code, int row0, int row1) -> Tensor", tags=_TAGS)
_LIB.define("decompress_out(Tensor blob, int m, int k, int dtype_code, int row0, Tensor(a!) out) -> ()", tags=_TAGS)
_LIB.define("compress(Tensor weight) -> Tensor", tags=_TAGS)


def under_autocast(x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both in the weight's dtype where autocast is on, else as they are."""
    if x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        return x.to(dtype), None if bias is None else bias.to(dtype)
    return x, bias


# --- CPU ------------------------------------------------------------------------------------------------------------


def _decode(blob: torch.Tensor, row0: int, out: torch.Tensor) -> None:
    """Rows from ``row0`` on into ``out (rows, k)``; the native side checks the blob's structure and both ranges."""
    rows, k = out.shape
    if rows == 0:
        return
    stride = out.stride(0) if rows > 1 else k
    nbytes = 2 * ((rows - 1) * stride + k)
    _zipserv.decode_rows(blob.data_ptr(), blob.numel(), row0, row0 + rows, out.data_ptr(), nbytes, stride)


def _require_blob(blob: torch.Tensor, m: int, k: int, dtype_code: int) -> Header:
    """A CPU blob must be what the caller says it is, or rows would be written with the wrong stride."""
    if blob.dtype != torch.uint8 or not blob.is_contiguous():
        raise TypeError("a blob is a contiguous torch.uint8 tensor")
    if blob.numel() < HEADER_BYTES:
        raise ValueError("there is no compressed weight here yet: load a state dict, or compress one")
    header = parse_header(blob)
    if (header.m, header.k, header.dtype_code) != (m, k, dtype_code):
        raise ValueError(f"the blob holds {header.m} x {header.k} {header.dtype}, not {m} x {k} {DTYPES.get(dtype_code)}")
    return header


def _require_input(x: torch.Tensor, last: int, dtype_code: int) -> None:
    if x.dtype != DTYPES[dtype_code]:
        raise TypeError(f"the input is {x.dtype}, the weight is {DTYPES[dtype_code]}")
    if x.dim() == 0 or x.shape[-1] != last:
        raise ValueError(f"the input has the shape {tuple(x.shape)}, its last dimension should be {last}")


def _panel_rows(m: int, k: int) -> int:
    rows = PANEL_BYTES // (2 * k) // TILE * TILE
    return min(m, max(rows, TILE))


def _linear_cpu(x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None) -> torch.Tensor:
    return _linear_rows_cpu(x, blob, m, k, dtype_code, 0, m, bias)


def _linear_rows_cpu(
    x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int, row1: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """The product with rows ``row0 .. row1 - 1`` alone, the bits of a weight that has no others: panels are counted from ``row0``."""
    header = _require_blob(blob, m, k, dtype_code)
    _require_input(x, k, dtype_code)
    _require_rows(m, row0, row1)
    rows = row1 - row0
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias has the shape {tuple(bias.shape)}, it should be ({rows},)")
    y = x.new_empty((*x.shape[:-1], rows))
    if y.numel() == 0:
        return y
    x2, y2 = x.reshape(-1, k), y.view(-1, rows)
    if row0 % TILE == 0 and (bias is None or bias.dtype == x.dtype) and cpu.fused(x2.shape[0], dtype_code, header.raw):
        cpu.multiply(x2, blob, m, k, row0, row1, bias, y2)
        return y
    if header.raw and blob.data_ptr() % 2 == 0 and blob.storage_offset() % 2 == 0:
        matrix = blob[HEADER_BYTES:].view(x.dtype).view(m, k)  # there is nothing to decompress
        return F.linear(x2, matrix[row0:row1], bias).view(y.shape)
    step = _panel_rows(rows, k)
    work = x.new_empty((step, k))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        panel = work[: last - first]
        _decode(blob, row0 + first, panel)
        y2[:, first:last] = F.linear(x2, panel, None if bias is None else bias[first:last])
    return y


def _linear_grad_x_cpu(
    grad: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int = 0, row1: int | None = None
) -> torch.Tensor:
    _require_blob(blob, m, k, dtype_code)
    rows = (m if row1 is None else row1) - row0
    _require_rows(m, row0, row0 + rows)
    _require_input(grad, rows, dtype_code)
    g2 = grad.reshape(-1, rows)
    # The sum runs over panels: partial sums in FP32, rounded once at the end.
    total = torch.zeros((g2.shape[0], k), dtype=torch.float32)
    step = _panel_rows(rows, k)
    work = grad.new_empty((step, k))
    for first in range(0, rows, step) if g2.numel() else ():
        last = min(rows, first + step)
        panel = work[: last - first]
        _decode(blob, row0 + first, panel)
        total.addmm_(g2[:, first:last].float(), panel.float())
    return total.to(grad.dtype).view(*grad.shape[:-1], k)


def _decompress_cpu(blob: torch.Tensor, m: int, k: int, dtype_code: int) -> torch.Tensor:
    return _decompress_rows_cpu(blob, m, k, dtype_code, 0, m)


def _decompress_rows_cpu(blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int, row1: int) -> torch.Tensor:
    _require_blob(blob, m, k, dtype_code)
    _require_rows(m, row0, row1)
    out = torch.empty((row1 - row0, k), dtype=DTYPES[dtype_code])
    _decode(blob, row0, out)
    return out


def _decompress_out_cpu(blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int, out: torch.Tensor) -> None:
    _require_blob(blob, m, k, dtype_code)
    _require_out(out, m, k, dtype_code, row0)
    _decode(blob, row0, out)


def _decompress_out_versioned(keys: Any, blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int, out: torch.Tensor) -> None:
    """Tells autograd that ``out`` has changed, so that a graph that had kept its old values refuses to run."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        torch.ops.zipserv.decompress_out(blob, m, k, dtype_code, row0, out)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def _compress_cpu(weight: torch.Tensor) -> torch.Tensor:
    code = DTYPE_CODES[weight.dtype]
    weight = weight.contiguous()
    m, k = storage_shape(weight.shape)
    handle, nbytes = _zipserv.plan(weight.data_ptr(), code, m, k, tuple(weight.shape))
    try:
        blob = torch.empty(nbytes, dtype=torch.uint8)
        _zipserv.encode(handle, blob.data_ptr(), nbytes)
    finally:
        _zipserv.free_plan(handle)
    return blob


def _require_rows(m: int, row0: int, row1: int) -> None:
    if not 0 <= row0 <= row1 <= m:
        raise ValueError(f"rows {row0} .. {row1} of a matrix of {m} rows")


def _require_out(out: torch.Tensor, m: int, k: int, dtype_code: int, row0: int) -> None:
    if out.dtype != DTYPES[dtype_code]:
        raise TypeError(f"out is {out.dtype}, the weight is {DTYPES[dtype_code]}")
    if out.dim() != 2 or out.shape[1] != k:
        raise ValueError(f"out has the shape {tuple(out.shape)}, it should be (rows, {k})")
    _require_rows(m, row0, row0 + out.shape[0])
    if (k > 1 and out.stride(1) != 1) or (out.shape[0] > 1 and out.stride(0) < k):
        raise ValueError("each row of out must be contiguous and rows must not overlap")


# --- CUDA: zipserv.cuda does the work -------------------------------------------------------------------------------


@functools.cache
def cuda_module() -> Any:
    """``zipserv.cuda``, imported at the first CUDA call."""
    return importlib.import_module("zipserv.cuda")


def _linear_cuda(x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None) -> torch.Tensor:
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], m))
    y: torch.Tensor = cuda_module().linear(x, blob, m, k, dtype_code, bias)
    return y


def _linear_grad_x_cuda(
    grad: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int = 0, row1: int | None = None
) -> torch.Tensor:
    # Panels bound the workspace as on the CPU; they are larger, for a GPU needs more work at a time.
    rows = (m if row1 is None else row1) - row0
    _require_rows(m, row0, row0 + rows)
    g2 = grad.reshape(-1, rows)
    step = min(rows, max(TILE, 32 * PANEL_BYTES // (2 * k) // TILE * TILE))
    work = grad.new_empty((step, k))
    if step == rows:
        cuda_module().decompress(blob, m, k, dtype_code, row0, work)
        return (g2 @ work).view(*grad.shape[:-1], k)
    total = torch.zeros((g2.shape[0], k), dtype=torch.float32, device=grad.device)
    for first in range(0, rows, step):
        panel = work[: min(step, rows - first)]
        cuda_module().decompress(blob, m, k, dtype_code, row0 + first, panel)
        total += g2[:, first : first + panel.shape[0]] @ panel
    return total.to(grad.dtype).view(*grad.shape[:-1], k)


def _decompress_cuda(blob: torch.Tensor, m: int, k: int, dtype_code: int) -> torch.Tensor:
    return _decompress_rows_cuda(blob, m, k, dtype_code, 0, m)


def _decompress_rows_cuda(blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int, row1: int) -> torch.Tensor:
    _require_rows(m, row0, row1)
    out = torch.empty((row1 - row0, k), dtype=DTYPES[dtype_code], device=blob.device)
    if row1 > row0:
        cuda_module().decompress(blob, m, k, dtype_code, row0, out)
    return out


def _decompress_out_cuda(blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int, out: torch.Tensor) -> None:
    _require_out(out, m, k, dtype_code, row0)
    if out.shape[0]:
        cuda_module().decompress(blob, m, k, dtype_code, row0, out)


def _compress_cuda(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.contiguous()
    m, k = storage_shape(weight.shape)
    blob: torch.Tensor = cuda_module().compress(weight, m, k, tuple(weight.shape))[0]
    return blob


# --- shapes for tracing ---------------------------------------------------------------------------------------------


def _linear_fake(x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], m))


def _linear_grad_x_fake(grad: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _decompress_fake(blob: torch.Tensor, m: int, k: int, dtype_code: int) -> torch.Tensor:
    return blob.new_empty((m, k), dtype=DTYPES[dtype_code])


def _decompress_rows_fake(blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int, row1: int) -> torch.Tensor:
    return blob.new_empty((row1 - row0, k), dtype=DTYPES[dtype_code])


def _decompress_out_fake(blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int, out: torch.Tensor) -> None:
    return None


def _compress_fake(weight: torch.Tensor) -> torch.Tensor:
    size = torch.library.get_ctx().new_dynamic_size(min=HEADER_BYTES)
    return weight.new_empty((size,), dtype=torch.uint8)


# --- gradients ------------------------------------------------------------------------------------------------------


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, blob, ctx.m, ctx.k, ctx.dtype_code, _ = inputs
    ctx.save_for_backward(blob)


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (blob,) = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.zipserv.linear_grad_x(grad, blob, ctx.m, ctx.k, ctx.dtype_code)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, ctx.m).sum(0)
    return grad_x, None, None, None, None, grad_bias


def _grad_x_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, blob, ctx.m, ctx.k, ctx.dtype_code = inputs
    ctx.save_for_backward(blob)


def _grad_x_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (blob,) = ctx.saved_tensors
    return torch.ops.zipserv.linear(grad, blob, ctx.m, ctx.k, ctx.dtype_code, None), None, None, None, None


def _register() -> None:
    kernels: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
        "linear": (_linear_cpu, _linear_cuda, _linear_fake),
        "linear_grad_x": (_linear_grad_x_cpu, _linear_grad_x_cuda, _linear_grad_x_fake),
        "decompress": (_decompress_cpu, _decompress_cuda, _decompress_fake),
        "decompress_rows": (_decompress_rows_cpu, _decompress_rows_cuda, _decompress_rows_fake),
        "decompress_out": (_decompress_out_cpu, _decompress_out_cuda, _decompress_out_fake),
        "compress": (_compress_cpu, _compress_cuda, _compress_fake),
    }
    for name, (on_cpu, on_cuda, fake) in kernels.items():
        _LIB.impl(name, on_cpu, "CPU")
        _LIB.impl(name, on_cuda, "CUDA")
        torch.library.register_fake(f"zipserv::{name}", fake, lib=_LIB)
    _LIB.impl("decompress_out", _decompress_out_versioned, "ADInplaceOrView", with_keyset=True)
    torch.library.register_autograd("zipserv::linear", _linear_backward, setup_context=_linear_setup, lib=_LIB)
    torch.library.register_autograd("zipserv::linear_grad_x", _grad_x_backward, setup_context=_grad_x_setup, lib=_LIB)


_register()
