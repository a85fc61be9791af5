# SPDX-License-Identifier: Apache-2.0
"""A decode step without waste around its products, for compressed and uncompressed models alike.

transformers in eager mode runs some forty small kernels a layer beside the products, and copies keys and values for each
query head. Whoever serves models has neither. Here norms, rotary embeddings and activations of a decode step are compiled
(``torch.compile``), and attention to one token reads the cache once, by plain matrix products.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["fused"]

_NAME = "zipserv_bench"
#: What torch.compiler.config.dynamic_sources (a list of regular expressions) has for compressed weights.
DYNAMIC = r".*_zipserv"


def decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention of one token: query heads that share a key head are rows of one product.

    Args:
        query: ``(batch, heads, 1, size)``.
        key, value: ``(batch, key heads, length, size)``.
        mask: ``(batch or 1, 1, 1, length)``: True, or what is added to the scores; None for all.
        scaling: factor of the scores.

    Returns:
        ``(batch, 1, heads, size)``.
    """
    batch, heads, _, size = query.shape
    packed = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    weights = _weights(packed @ key.transpose(-1, -2), mask, scaling)
    return (weights @ value).reshape(batch, 1, heads, size)


def _weights(scores: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
    exact = scores.float() * scaling
    if mask is not None:
        exact = exact.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else exact + mask
    return exact.softmax(-1).to(scores.dtype)


def _attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    per_head = attention_mask is not None and attention_mask.shape[1] != 1
    if query.shape[2] != 1 or per_head or kwargs.get("softcap") is not None or kwargs.get("scaling") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return decode_attention(query, key, value, attention_mask, kwargs["scaling"]), None


def _for_one_token(call: Callable[..., Any], dim: int) -> Callable[..., Any]:
    """Compiled where the first argument holds one token a sequence; prefill stays as it is."""
    compiled = torch.compile(call)

    def either(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return compiled(x, *args, **kwargs) if x.shape[dim] == 1 else call(x, *args, **kwargs)

    return either


@contextlib.contextmanager
def fused(model: Any) -> Iterator[None]:
    """While open, ``model`` (of transformers) decodes as described above; afterwards it is as it was."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    global _weights
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before, weights = model.config._attn_implementation, _weights
    # A compressed weight's size differs from layer to layer: without the second setting each layer would be compiled for itself.
    limit, sources = torch._dynamo.config.recompile_limit, getattr(torch.compiler.config, "dynamic_sources", None)
    torch._dynamo.config.recompile_limit = 64
    if sources is not None:
        torch.compiler.config.dynamic_sources = ",".join(filter(None, [sources, DYNAMIC]))
    patched: list[tuple[Any, str, Any]] = []

    def patch(holder: Any, name: str, new: Any) -> None:
        patched.append((holder, name, getattr(holder, name)))
        setattr(holder, name, new)

    try:
        model.set_attn_implementation(_NAME)
        _weights = torch.compile(_weights)
        classes = {type(module) for module in model.modules()}
        for kind in classes:
            if kind.__name__.endswith("RMSNorm"):
                patch(kind, "forward", _method(kind.forward, 1))
            elif kind.__name__.endswith("MLP"):
                patch(kind, "forward", _method(kind.forward, 1))
            elif hasattr(sys.modules[kind.__module__], "apply_rotary_pos_emb") and kind.__name__.endswith("Attention"):
                home = sys.modules[kind.__module__]
                if not any(holder is home for holder, _, _ in patched):
                    patch(home, "apply_rotary_pos_emb", _for_one_token(home.apply_rotary_pos_emb, 2))
        yield
    finally:
        for holder, name, old in reversed(patched):
            setattr(holder, name, old)
        _weights = weights
        torch._dynamo.config.recompile_limit = limit
        if sources is not None:
            torch.compiler.config.dynamic_sources = sources
        model.set_attn_implementation(before)


def _method(forward: Callable[..., Any], dim: int) -> Callable[..., Any]:
    compiled = torch.compile(forward)

    def either(self: nn.Module, x: torch.Tensor) -> Any:
        return compiled(self, x) if x.dim() > dim and x.shape[dim] == 1 else forward(self, x)

    return either
