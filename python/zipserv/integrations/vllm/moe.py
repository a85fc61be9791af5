# SPDX-License-Identifier: Apache-2.0
"""vLLM's mixture-of-experts layers over compressed experts.

Each expert's two matrices are blobs of their own. On a GPU, with few tokens an expert, those that were hit are multiplied together, on their
compressed bytes and in one launch a product; which they are only the device knows (:mod:`zipserv.grouped`). What that does not serve (FP16,
an expert that is stored raw, many tokens, no GPU) runs one expert after the other. Finding out on the host which ones were
hit needs a synchronisation, which a CUDA graph forbids. So while one is captured the device chooses: of few tokens each has its experts' blobs
copied to a place that is known beforehand, of many every expert runs on all tokens and the router's choice is a mask. All add a token's experts
in the order of their numbers.
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

from zipserv import cuda, grouped
from zipserv.tensor import linear_blob

from .collect import Collector
from .weight import attach, finish, follow_batch_invariance, is_raw, loaded_parameter

#: A blob that is copied and then used is read twice and written once.
_COPY_COST = 3

Expert = Callable[[torch.Tensor], torch.Tensor]

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
        self.longest = 0  # bytes of the largest blob; 0 where one is raw, which none can stand in for
        self.fits = False  # that they can be multiplied together
        self.loader = attach(param, self.collectors, self.settle)

    def settle(self) -> None:
        if self.spans:
            return
        made = [finish(collector) for collector in self.collectors]
        self.collectors = []
        longest, step = max(blob.numel() for blob in made), grouped.distance(made)
        self.spans = [(i * step, i * step + blob.numel()) for i, blob in enumerate(made)]
        self.longest = 0 if any(is_raw(blob, self.m, self.k) for blob in made) else longest
        self.fits = grouped.fits(step, self.m, self.k)
        together = torch.zeros(len(made) * step, dtype=torch.uint8, device=self.device)
        for (start, stop), blob in zip(self.spans, made, strict=True):
            together[start:stop] = blob
            if together.is_cuda:
                cuda.changed(together[start:stop])  # the memory may have held another blob
        setattr(self.layer, self.name, loaded_parameter(together, self.loader))

    def weight(self) -> grouped.Weight:
        return grouped.Weight(getattr(self.layer, self.name).data, len(self.spans), self.m, self.k)

    def linear(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        start, stop = self.spans[expert]
        blob = getattr(self.layer, self.name)[start:stop]
        return linear_blob(x, blob, self.m, self.k, self.dtype, None)

    def pick(self, expert: torch.Tensor) -> Expert:
        """The expert whose number, int64 of shape (1,), only the device knows: a copy of its blob. GPU only."""
        words = getattr(self.layer, self.name).view(torch.int64).view(len(self.spans), -1)
        blob = words.index_select(0, expert)[0].view(torch.uint8)[: self.longest]
        cuda.changed(blob)  # written by the work ahead in the stream
        return lambda x: linear_blob(x, blob, self.m, self.k, self.dtype, None)


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
        up, down = self.w13.weight(), self.w2.weight()
        if up.blobs.is_cuda and self._can_group(self.w13.dtype, 1):
            # Which kernel runs depends on the number of tokens: none is to be compiled by a request, or while a graph is captured.
            grouped.warm(up, down, self.moe.activation == MoEActivation.SILU)

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
        count = len(self.w13.spans)
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if x.is_cuda and topk_ids.numel() and self._can_group(x.dtype, topk_ids.shape[1]):
            few = topk_ids.numel() <= grouped.MAX_PAIRS if capturing else grouped.few(topk_ids.numel(), count)
            if few or cuda.batch_invariant():
                return self._grouped(x, topk_weights, topk_ids)
        if not capturing:
            return _routed(self._expert, count, x, topk_weights, topk_ids)
        if self.w13.longest and self.w2.longest and _COPY_COST * topk_ids.numel() < count:
            return _picked(self._pick, x, topk_weights, topk_ids)
        return _masked(self._expert, count, x, topk_weights, topk_ids)

    def _can_group(self, dtype: torch.dtype, top: int) -> bool:
        return self.w13.fits and self.w2.fits and grouped.serves(dtype, len(self.w13.spans), top)

    def _grouped(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """All experts that were hit together, each weight read once; nobody but the device knows which they are."""
        activation = self.moe.activation
        return grouped.multiply(
            x, ids, weights, self.w13.weight(), self.w2.weight(), lambda both: _activate(activation, both),
            silu_and_mul=activation == MoEActivation.SILU, invariant=cuda.batch_invariant(),
        )  # fmt: skip

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        return self.w2.linear(expert, _activate(self.moe.activation, self.w13.linear(expert, x)))

    def _pick(self, expert: torch.Tensor) -> Expert:
        up, down = self.w13.pick(expert), self.w2.pick(expert)
        return lambda x: down(_activate(self.moe.activation, up(x)))


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


def _picked(pick: Callable[[torch.Tensor], Expert], x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The same sums without asking the host, token by token: the device picks each of a token's experts."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    ids, order = ids.long().sort(dim=1)
    weights = weights.gather(1, order).float()
    for token in range(x.shape[0]):
        for slot in range(ids.shape[1]):
            number = ids[token, slot : slot + 1]
            part = pick(number.clamp(min=0))(x[token : token + 1]).float() * weights[token, slot]
            y[token : token + 1] = torch.where(number >= 0, y[token : token + 1] + part, y[token : token + 1])
    return y.to(x.dtype)
