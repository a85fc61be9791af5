# SPDX-License-Identifier: Apache-2.0
"""How a product with a compressed weight is computed on the CPU.

There are two ways. *Fused*: each tile of the weight is decoded into registers and multiplied at once (BF16; sums in FP32, one rounding). A token's
result has the same bits whatever other tokens there are and for any number of threads. *Exact*: the weight is decompressed panel by panel for
``torch.nn.functional.linear``, and the result has its bits. Fused is faster for few tokens, exact for many.
"""

from __future__ import annotations

import os

import torch

from . import _zipserv
from .format import HEADER_BYTES

__all__ = ["cpu_linear", "set_cpu_linear"]

_MODES = ("auto", "exact", "fused")
_VARIABLE = "ZIPSERV_CPU_LINEAR"
_BF16 = 1
_bf16 = torch.bfloat16
_linear = _zipserv.linear
_threads = torch.get_num_threads
_grad_enabled = torch.is_grad_enabled
_mode_count = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack

#: Up to so many tokens "auto" is fused on this processor; 0 where that is never faster.
FEW_TOKENS: int = _zipserv.linear_few()


def _checked(mode: str) -> str:
    if mode not in _MODES:
        raise ValueError(f"{mode!r} is no way to multiply on a CPU; 'auto', 'exact' and 'fused' are")
    return mode


def _from_environment() -> str:
    value = os.environ.get(_VARIABLE) or "auto"
    try:
        return _checked(value)
    except ValueError as error:
        raise ValueError(f"environment variable {_VARIABLE}: {error}") from None


_mode = _from_environment()


def set_cpu_linear(mode: str) -> None:
    """Chooses how ``zipserv.linear`` and the layers multiply on the CPU, for the whole process.

    Args:
        mode: ``"auto"`` (the default): fused for few tokens of BF16 (up to 32 with AVX512-BF16, 16 with AVX-512,
            8 with AVX2; portable code: none), exact for more and for FP16. ``"exact"``: the bits of
            ``F.linear`` with the uncompressed weight for any number of tokens. ``"fused"``: for any number of tokens of BF16, so that a token's bits
            never depend on what else is in the batch; slower than exact for many.

    The environment variable ``ZIPSERV_CPU_LINEAR`` says it at the start.

    Raises:
        ValueError: another mode.
    """
    global _mode
    _mode = _checked(mode)


def cpu_linear() -> str:
    """The mode that :func:`set_cpu_linear` has chosen."""
    return _mode


def fused(tokens: int, dtype_code: int, raw: bool) -> bool:
    """Whether ``tokens`` tokens are multiplied without decompressing the weight; ``raw``: there is nothing to decompress."""
    if dtype_code != _BF16 or _mode == "exact":
        return False
    return _mode == "fused" or (tokens <= FEW_TOKENS and not raw)


def multiply(x: torch.Tensor, blob: torch.Tensor, m: int, k: int, row0: int, row1: int, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """``y = x @ W[row0:row1].T + bias``, fused, on as many threads as torch uses. ``row0`` is a multiple of 64.

    Args:
        x: BF16, ``(tokens, k)``, any strides.
        bias: BF16, ``(row1 - row0,)``, or None.
        y: BF16, ``(tokens, row1 - row0)``, contiguous.
    """
    tokens = x.shape[0]
    if x.stride(1) != 1 or (tokens > 1 and x.stride(0) < k):
        x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    _linear(
        blob.data_ptr(), blob.numel(), m, k, row0, row1, x.data_ptr(), x.stride(0), tokens, 0 if bias is None else bias.data_ptr(),
        y.data_ptr(), row1 - row0, _threads(),
    )  # fmt: skip


def eager_linear(x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype_code: int, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The fused product past torch's dispatcher, which costs more than a small product itself.

    None where something needs the dispatcher (a gradient, a transform, a mode, a tensor subclass), where the product is not fused, and for whatever
    the op itself has to refuse in words. Not to be called while torch.compile traces.
    """
    if (
        x.dtype is not _bf16
        or dtype_code != _BF16
        or (x.__class__ is not torch.Tensor and x.__class__ is not torch.nn.Parameter)
        or (_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or _mode_count()
        or _transform() is not None
    ):
        return None
    shape, size, count = x.shape, blob.numel(), x.numel()
    if not shape or shape[-1] != k or not count or blob.dtype is not torch.uint8 or size < HEADER_BYTES or not blob.is_contiguous():
        return None
    if bias is not None and (bias.dtype is not _bf16 or bias.shape != (m,) or not bias.is_cpu):
        return None
    if not fused(count // k, dtype_code, size == HEADER_BYTES + 2 * m * k):
        return None
    y = x.new_empty((*shape[:-1], m))
    multiply(x if len(shape) == 2 else x.reshape(-1, k), blob, m, k, 0, m, bias, y)
    return y
