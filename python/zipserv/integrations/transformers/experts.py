# SPDX-License-Identifier: Apache-2.0
"""transformers' layers of stacked experts, as one of its "experts implementations": ``set_experts_implementation("zipserv")``.

On a GPU, with few tokens, the experts that were chosen are multiplied together (:mod:`zipserv.grouped`): nothing asks the host which they are, so
that such a layer has no break in a compiled graph and can be captured in a CUDA graph. Otherwise, and where a gradient is recorded, the model's
own loop takes one expert after the other ("eager").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from zipserv import cuda, grouped
from zipserv.experts import ZipExperts

__all__ = ["NAME", "implementation", "register"]

NAME = "zipserv"

#: Where experts are multiplied together; elsewhere the loop decodes those that were chosen.
_TOGETHER_ON = frozenset({"cuda"})
_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def register() -> None:
    """Make the implementation known to transformers."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)


def implementation(module: nn.Module) -> str:
    """The name of the implementation for a module of experts."""
    return NAME if hasattr(type(module).forward, "__wrapped__") else "eager"


def forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    up, down = _weights(self, hidden_states, top_k_index, top_k_weights)
    if up is None or down is None or kwargs:
        one_by_one: Callable[..., torch.Tensor] = type(self).forward.__wrapped__
        return one_by_one(self, hidden_states, top_k_index, top_k_weights, **kwargs)
    activate, silu_and_mul = _activation(self)
    return grouped.multiply(
        hidden_states, top_k_index, top_k_weights, up, down, activate, silu_and_mul=silu_and_mul, invariant=cuda.batch_invariant()
    )


def _weights(
    module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[grouped.Weight, grouped.Weight] | tuple[None, None]:
    """The weights of experts that are multiplied together; none where they are to be multiplied one by one."""
    first, second = (getattr(module, name, None) for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"))
    if not (isinstance(first, ZipExperts) and isinstance(second, ZipExperts)) or x.device.type not in _TOGETHER_ON:
        return None, None
    if module.is_transposed or getattr(module, "has_bias", False) or getattr(module, "has_post_expert_norm", False):
        return None, None
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        return None, None
    pairs, experts = ids.numel(), len(first)
    if x.dim() != 2 or not pairs or x.dtype != first.dtype or not grouped.serves(x.dtype, experts, ids.shape[1]):
        return None, None
    if not (_must(x) or cuda.batch_invariant() or grouped.few(pairs, experts)):
        return None, None
    up, down = first.together(), second.together()
    if up is None or down is None or not up.blobs.device == down.blobs.device == x.device:
        return None, None
    return up, down


def _must(x: torch.Tensor) -> bool:
    """While a CUDA graph is captured the loop, which asks the host, can't run at all."""
    return x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def _activation(module: Any) -> tuple[Callable[[torch.Tensor], torch.Tensor], bool]:
    """What lies between the two products, and whether it is what the kernel has at its end."""
    if not module.has_gate:
        return module.act_fn, False
    own = getattr(type(module), "_apply_gate", None)
    default = own is None or own.__name__ == "_default_apply_gate"
    if default:
        return lambda both: _gate(module.act_fn, both), type(module.act_fn) in _SILU
    return module._apply_gate, False


def _gate(act: Callable[[torch.Tensor], torch.Tensor], both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return act(gate) * up
