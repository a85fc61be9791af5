# SPDX-License-Identifier: Apache-2.0
"""Products for several layers in one blob; the op ``zipserv::linear_rows``, with a run of rows of the matrix, and ``zipserv::linear_gated``.

    linear_rows(x (..., k), blob, m, k, dtype_code, row0, row1, bias (row1 - row0,) or None) -> (..., row1 - row0)
    linear_rows_grad_x(grad (..., row1 - row0), blob, m, k, dtype_code, row0, row1) -> (..., k)
    linear_gated(x (..., k), blob, m, k, dtype_code, bias (m,) or None) -> (..., m / 2): SiLU of the first half times the second; no gradient

``row0`` is a multiple of 64. On the CPU the result has the bits of a blob that holds these rows alone. On a GPU few
tokens are multiplied by the whole matrix, of which the rows are taken: the sums are those of the whole matrix. Some hundred and
more are multiplied by these rows alone, compressed or decompressed, whichever should be faster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import ops
from .format import DTYPE_CODES

#: Up to this many tokens a GPU multiplies by all rows.
FEW_TOKENS = 64

_tracing_state: Any = torch._C._get_tracing_state
_library: Any = torch.library.Library  # untyped in torch
_LIB = _library("zipserv", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIB.define("linear_rows(Tensor x, Tensor blob, int m, int k, int dtype_code, int row0, int row1, Tensor? bias) -> Tensor", tags=_TAGS)
_LIB.define("linear_gated(Tensor x, Tensor blob, int m, int k, int dtype_code, Tensor? bias) -> Tensor", tags=_TAGS)
_LIB.define("linear_rows_grad_x(Tensor grad, Tensor blob, int m, int k, int dtype_code, int row0, int row1) -> Tensor", tags=_TAGS)


def linear_rows(
    x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype: torch.dtype, row0: int, row1: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """The op, with its arguments checked; ``x`` and ``bias`` are cast under autocast. Errors as for :func:`zipserv.linear`."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, not {type(x).__name__}")
    x, bias = ops.under_autocast(x, bias, dtype)
    if x.dtype != dtype:
        raise TypeError(f"x is {x.dtype}, the compressed weight is {dtype}: convert x with x.to({dtype}), or use autocast")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x has the shape {tuple(x.shape)}, its last dimension should be {k} (weight: {row1 - row0} x {k})")
    if x.device != blob.device:
        raise ValueError(f"x is on {x.device}, the compressed weight on {blob.device}: move one with .to(device)")
    y: torch.Tensor = torch.ops.zipserv.linear_rows(x, blob, m, k, DTYPE_CODES[dtype], row0, row1, bias)
    return y


def _is_for_the_engine(x: torch.Tensor, blob: torch.Tensor, dtype: torch.dtype) -> bool:
    """On a GPU, of the weight's dtype, and no tracer follows: those take ops."""
    return x.is_cuda and x.dtype == dtype and x.device == blob.device and not torch.compiler.is_compiling() and _tracing_state() is None


def linear_parts(
    x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype: torch.dtype, bias: torch.Tensor | None, parts: int
) -> tuple[torch.Tensor, ...] | None:
    """The results of ``parts`` layers in one blob, of as many rows each (a multiple of 64), by one product on a GPU: each ``(..., m / parts)``.
    None where no kernel does that, as on the CPU, where arguments don't fit, and where something needs torch's dispatcher."""
    x, bias = ops.under_autocast(x, bias, dtype)
    if not _is_for_the_engine(x, blob, dtype):
        return None
    y: tuple[torch.Tensor, ...] | None = ops.cuda_module().eager_parts(x, blob, m, k, DTYPE_CODES[dtype], bias, parts)
    return y


def linear_gated(
    x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype: torch.dtype, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """``silu(x @ Wg.T + bg) * (x @ Wu.T + bu)``, ``(..., m / 2)``, for a gate and another layer in one blob, of as many rows each (a multiple of 64),
    by one product on a GPU; rounded where separate kernels would round. None as of :func:`linear_parts`: tracers take the op."""
    x, bias = ops.under_autocast(x, bias, dtype)
    if not _is_for_the_engine(x, blob, dtype):
        return None
    y: torch.Tensor | None = ops.cuda_module().eager_gated(x, blob, m, k, DTYPE_CODES[dtype], bias)
    return y


def _linear_gated(x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None) -> torch.Tensor:
    if x.is_cuda and x.numel() and dtype_code == DTYPE_CODES[torch.bfloat16]:
        y: torch.Tensor | None = ops.cuda_module().linear_gated(x, blob, m, k, dtype_code, bias)
        if y is not None:
            return y
    both: torch.Tensor = torch.ops.zipserv.linear(x, blob, m, k, dtype_code, bias)
    gates, up = both.chunk(2, -1)
    return F.silu(gates) * up


def _linear_rows_cuda(
    x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int, row1: int, bias: torch.Tensor | None
) -> torch.Tensor:
    ops._require_rows(m, row0, row1)
    if x.numel() == 0 or row0 == row1:
        return x.new_empty((*x.shape[:-1], row1 - row0))
    cuda = ops.cuda_module()
    if x.numel() <= FEW_TOKENS * k or cuda.batch_invariant():
        whole = None if bias is None else F.pad(bias, (row0, m - row1))
        y: torch.Tensor = cuda.linear(x, blob, m, k, dtype_code, whole)
        return y.narrow(-1, row0, row1 - row0).contiguous()
    some: torch.Tensor = cuda.linear(x, blob, m, k, dtype_code, bias, (row0, row1))
    return some


def _linear_rows_fake(
    x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int, row1: int, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], row1 - row0))


def _linear_gated_fake(x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], m // 2))


def _grad_x_fake(grad: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, row0: int, row1: int) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, blob, *ctx.sizes, _ = inputs
    ctx.save_for_backward(blob)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (blob,) = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.zipserv.linear_rows_grad_x(grad, blob, *ctx.sizes)
    if ctx.needs_input_grad[7]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, None, None, None, grad_bias


def _grad_x_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, blob, *ctx.sizes = inputs
    ctx.save_for_backward(blob)


def _grad_x_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (blob,) = ctx.saved_tensors
    return torch.ops.zipserv.linear_rows(grad, blob, *ctx.sizes, None), None, None, None, None, None, None


_LIB.impl("linear_rows", ops._linear_rows_cpu, "CPU")
_LIB.impl("linear_rows", _linear_rows_cuda, "CUDA")
_LIB.impl("linear_rows_grad_x", ops._linear_grad_x_cpu, "CPU")
_LIB.impl("linear_rows_grad_x", ops._linear_grad_x_cuda, "CUDA")
_LIB.impl("linear_gated", _linear_gated, "CPU")
_LIB.impl("linear_gated", _linear_gated, "CUDA")
torch.library.register_fake("zipserv::linear_gated", _linear_gated_fake, lib=_LIB)
torch.library.register_fake("zipserv::linear_rows", _linear_rows_fake, lib=_LIB)
torch.library.register_fake("zipserv::linear_rows_grad_x", _grad_x_fake, lib=_LIB)
torch.library.register_autograd("zipserv::linear_rows", _backward, setup_context=_setup, lib=_LIB)
torch.library.register_autograd("zipserv::linear_rows_grad_x", _grad_x_backward, setup_context=_grad_x_setup, lib=_LIB)
