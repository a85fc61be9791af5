# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch in the place of what vLLM's wheel lacks on a CPU: its attention, and two of its MoE kernels.

The kernels stand in for the *uncompressed* experts, which are what the compressed ones are compared with. Attention stands in for
both sides alike, so that whole models run from token ids to logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

_LIB = torch.library.Library("_C", "FRAGMENT")
_LIB.define("prepack_moe_weight(Tensor weight, Tensor(a!) out, str isa) -> ()")
_LIB.define(
    "cpu_fused_moe(Tensor(a!) out, Tensor x, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, "
    "Tensor weights, Tensor ids, bool skip_weighted, str act, str isa) -> ()"
)


def _prepack(weight: torch.Tensor, out: torch.Tensor, isa: str) -> None:
    out.copy_(weight)


def _fused_moe(out, x, w13, w2, w13_bias, w2_bias, weights, ids, skip_weighted, act, isa) -> None:
    """By the definition, token by token, in FP32 from the weights as they are."""
    assert act == "silu" and w13_bias is None and w2_bias is None and not skip_weighted
    for token in range(x.shape[0]):
        total = torch.zeros(x.shape[1])
        for weight, expert in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            gate, up = (w13[expert].float() @ x[token].float()).chunk(2)
            total += weight * (w2[expert].float() @ (F.silu(gate) * up))
        out[token] = total.to(out.dtype)


_LIB.impl("prepack_moe_weight", _prepack, "CPU")
_LIB.impl("cpu_fused_moe", _fused_moe, "CPU")


def _attend(self: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Causal attention of one sequence without a cache."""
    heads = ((query, self.num_heads), (key, self.num_kv_heads), (value, self.num_kv_heads))
    q, k, v = (states.view(-1, count, self.head_size).transpose(0, 1) for states, count in heads)
    y = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True, scale=self.impl.scale)
    return y[0].transpose(0, 1).reshape(query.shape)


@contextmanager
def running(config) -> Iterator[None]:
    """Inside it a model's forward runs on the CPU."""
    before, Attention.forward = Attention.forward, _attend
    try:
        with torch.no_grad(), set_forward_context(None, config):
            yield
    finally:
        Attention.forward = before


def hidden(model: torch.nn.Module, config, tokens: torch.Tensor, **kwargs) -> torch.Tensor:
    """The model's output for one sequence: hidden states, or what goes to the next pipeline stage."""
    with running(config):
        return model(tokens, torch.arange(tokens.shape[0]), **kwargs)


def logits(model: torch.nn.Module, config, tokens: torch.Tensor) -> torch.Tensor:
    states = hidden(model, config, tokens)
    with torch.no_grad():
        return model.compute_logits(states)
