# SPDX-License-Identifier: Apache-2.0
"""vLLM's mixture-of-experts layers over compressed experts.

Each expert's two matrices are blobs of their own, and the experts that tokens were routed to run one after the other on their
compressed bytes. Finding out on the host which ones were hit needs a synchronisation, which a CUDA graph forbids: during capture
every expert runs on all tokens instead, and the router's choice is a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.utils import set_weight_attrs

from zipserv import cuda
from zipserv.tensor import linear_blob

from .collect import Collector
from .weight import attach, finish, follow_batch_invariance, loaded_parameter

#: Blobs of one layer lie in one tensor, each at a multiple of this: what the kernels' wide copies want.
ALIGN = 256

_GATES: dict[MoEActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}


class Experts:
    """One of the two weights of a layer: a matrix [rows, cols] for each expert."""

    def __init__(self, layer: Any, name: str, prefix: str, shape: tuple[int, int, int], dtype: torch.dtype, attrs: dict[str, Any]) -> None:
        follow_batch_invariance()
        count, self.m, self.k = shape
        self.layer, self.name, self.dtype = layer, name, dtype
        self.device = torch.get_default_device()
        param = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        layer.register_parameter(name, param)
        set_weight_attrs(param, attrs)
        self.collectors = [Collector(f"{prefix}.{name}[{i}]", self.m, self.k, dtype, self.device) for i in range(count)]
        self.spans: list[tuple[int, int]] = []
        self.loader = attach(param, self.collectors, self.settle)

    def settle(self) -> None:
        if self.spans:
            return
        made = [finish(collector) for collector in self.collectors]
        self.collectors, end = [], 0
        for blob in made:
            self.spans.append((end, end + blob.numel()))
            end += -(-blob.numel() // ALIGN) * ALIGN
        together = torch.zeros(end, dtype=torch.uint8, device=self.device)
        for (start, stop), blob in zip(self.spans, made, strict=True):
            together[start:stop] = blob
            if together.is_cuda:
                cuda.changed(together[start:stop])  # the memory may have held another blob
        setattr(self.layer, self.name, loaded_parameter(together, self.loader))

    def linear(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        start, stop = self.spans[expert]
        blob = getattr(self.layer, self.name)[start:stop]
        return linear_blob(x, blob, self.m, self.k, self.dtype, None)


class ZipServMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Experts by ZipGEMM. A token's result depends on its own experts only, added in the order of their numbers: batch-invariant."""

    def __init__(self, moe: FusedMoEConfig, prefix: str) -> None:
        super().__init__(moe)
        self.prefix = prefix

    @staticmethod
    def why_not(moe: FusedMoEConfig) -> str | None:
        """Why these experts can't be served compressed, or None."""
        if moe.activation not in _GATES:
            return f"experts with the activation {moe.activation.value} are not supported"
        if any(value is not None for value in (moe.swiglu_limit, moe.swiglu_alpha, moe.swiglu_beta)):
            return "experts with a clamped or scaled activation are not supported"
        if moe.has_bias:
            return "experts with a bias are not supported"
        if moe.is_lora_enabled:
            return "LoRA on experts is not supported"
        if moe.moe_parallel_config.use_all2all_kernels:
            return "experts behind all-to-all kernels are not supported"
        return None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        inner = intermediate_size_per_partition
        up = (num_experts, self.moe.w13_num_shards * inner, hidden_size)
        self.w13 = Experts(layer, "w13_weight", self.prefix, up, params_dtype, extra_weight_attrs)
        self.w2 = Experts(layer, "w2_weight", self.prefix, (num_experts, hidden_size, inner), params_dtype, extra_weight_attrs)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.w13.settle()
        self.w2.settle()

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig | None:
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        if layer.expert_map is not None:  # expert parallel: -1 for the experts of other ranks
            topk_ids = layer.expert_map[topk_ids.long()]
        if layer.apply_router_weight_on_input:
            if topk_ids.shape[1] != 1:
                raise ValueError("router weights can be applied to the input only where each token has one expert")
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        run = _masked if x.is_cuda and torch.cuda.is_current_stream_capturing() else _routed
        return run(self._expert, len(self.w13.spans), x, topk_weights, topk_ids)

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return self.w2.linear(expert, _activate(self.moe.activation, self.w13.linear(expert, x)))


def _activate(activation: MoEActivation, x: torch.Tensor) -> torch.Tensor:
    if x.is_cuda:
        out: torch.Tensor = apply_moe_activation(activation, x.new_empty(x.shape[0], x.shape[1] // 2), x)
        return out
    gate, up = x.chunk(2, dim=-1)
    return _GATES[activation](gate) * up


def _routed(
    expert: Callable[[int, torch.Tensor], torch.Tensor], count: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Each expert that was hit, on its tokens alone."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for number in torch.unique(ids).tolist():
        if number < 0:
            continue
        token, slot = (ids == number).nonzero(as_tuple=True)
        y.index_add_(0, token, expert(number, x[token]).float() * weights[token, slot, None].float())
    return y.to(x.dtype)


def _masked(
    expert: Callable[[int, torch.Tensor], torch.Tensor], count: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """The same sums without asking the host: every expert on all tokens, and only what was routed there is added."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for number in range(count):
        chosen = ids == number
        weight = (weights.float() * chosen).sum(1, keepdim=True)
        y = torch.where(chosen.any(1, keepdim=True), y + expert(number, x).float() * weight, y)
    return y.to(x.dtype)
