# SPDX-License-Identifier: Apache-2.0
"""The names of vLLM that `zipserv.integrations.vllm` imports, where vLLM is not installed: `install()` puts them into `sys.modules`.

So that the plugin's own classes (configuration, linear, embedding and expert methods, weight loading) run unchanged on a GPU machine that
vLLM does not fit onto. The layers around them are small and say in few lines what vLLM's do on the path that the methods see: which shard
of a checkpoint tensor goes where, and what `apply` gets. Nothing of vLLM's engine, scheduler, attention or kernels is here. What the plugin
does with the real classes is tested by `tests/vllm`.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# --- vllm.config, vllm.envs, vllm.logger -----------------------------------------------------------------------------

_current: list[Any] = [None]


@contextlib.contextmanager
def set_current_vllm_config(config: Any) -> Iterator[None]:
    before, _current[0] = _current[0], config
    try:
        yield
    finally:
        _current[0] = before


def vllm_config(*, tied: bool = False, dummy: bool = False) -> Any:
    """The three attributes that the plugin asks for."""
    hf = types.SimpleNamespace(tie_word_embeddings=tied)
    load = types.SimpleNamespace(load_format="dummy" if dummy else "auto")
    return types.SimpleNamespace(model_config=types.SimpleNamespace(hf_text_config=hf), load_config=load)


class _Envs(types.ModuleType):
    @property
    def VLLM_BATCH_INVARIANT(self) -> bool:  # noqa: N802
        return os.environ.get("VLLM_BATCH_INVARIANT") == "1"


# --- tensor parallel -------------------------------------------------------------------------------------------------


def tp_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def tp_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    if tp_size() > 1:
        dist.all_reduce(x)
    return x


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """Along the last dimension."""
    if tp_size() == 1:
        return x
    out = x.new_empty(tp_size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out.view(tp_size(), *x.shape).movedim(0, -2).reshape(*x.shape[:-1], -1)


# --- quantization ----------------------------------------------------------------------------------------------------


class QuantizeMethodBase:
    def process_weights_after_loading(self, layer: Any) -> None:
        return None


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        return WeightsMapper()


@dataclass
class WeightsMapper:
    def __or__(self, other: WeightsMapper) -> WeightsMapper:
        return WeightsMapper()

    def apply(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        return weights


QUANTIZATION_METHODS: list[str] = []
_CONFIGS: dict[str, Any] = {}


def register_quantization_config(name: str) -> Callable[[Any], Any]:
    def register(kind: Any) -> Any:
        QUANTIZATION_METHODS.append(name)
        _CONFIGS[name] = kind
        return kind

    return register


def get_quantization_config(name: str) -> Any:
    return _CONFIGS[name]


def set_weight_attrs(weight: torch.Tensor, attrs: dict[str, Any] | None) -> None:
    for name, value in (attrs or {}).items():
        setattr(weight, name, value)


class ModelWeightParameter(nn.Parameter):
    def __new__(cls, data: torch.Tensor, **attrs: Any) -> ModelWeightParameter:
        made: ModelWeightParameter = super().__new__(cls, data, requires_grad=False)
        return made

    def __init__(self, data: torch.Tensor, input_dim: int, output_dim: int, weight_loader: Callable[..., None]) -> None:
        self.input_dim, self.output_dim, self.weight_loader = input_dim, output_dim, weight_loader


# --- linear layers ---------------------------------------------------------------------------------------------------


class LinearMethodBase(QuantizeMethodBase):
    pass


def register_weight_loader_v2_supported_method(kind: Any) -> Any:
    return kind


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int, output_size: int,
        params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        weight = nn.Parameter(torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype), requires_grad=False)
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, extra_weight_attrs)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, layer.weight, bias)

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, layer.weight)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        layer.weight = embed_tokens.weight
        return layer


class LinearBase(nn.Module):
    """`parts`: output rows of this rank, one number for each matrix that is stacked; `k`: input columns of this rank."""

    def __init__(self, k: int, parts: list[int], bias: bool, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.prefix, self.params_dtype, self.parts = prefix, torch.get_default_dtype(), parts
        method = quant_config.get_quant_method(self, prefix) if quant_config else None
        self.quant_method = method or UnquantizedLinearMethod()
        self.quant_method.create_weights(self, k, parts, k, sum(parts), self.params_dtype, weight_loader=self.weight_loader)
        self.bias = nn.Parameter(torch.empty(sum(parts)), requires_grad=False) if bias else None
        if self.bias is not None:
            set_weight_attrs(self.bias, {"weight_loader": self.weight_loader})

    def shard(self, loaded: torch.Tensor, part: int) -> torch.Tensor:
        """What of a checkpoint tensor (or bias) is this rank's."""
        return loaded

    def weight_loader(self, param: torch.Tensor, loaded: torch.Tensor, part: int | str | None = None) -> None:
        index = {None: 0, "q": 0, "k": 1, "v": 2}.get(part, part)  # type: ignore[call-overload]
        mine = self.shard(loaded, index)
        start = sum(self.parts[:index])
        param.data.narrow(0, start, self.parts[index]).copy_(mine)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.quant_method.apply(self, x, self.bias), None


class ReplicatedLinear(LinearBase):
    def __init__(self, k: int, m: int, bias: bool = True, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(k, [m], bias, quant_config, prefix)


class MergedColumnParallelLinear(LinearBase):
    def __init__(self, k: int, sizes: list[int], bias: bool = True, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(k, [size // tp_size() for size in sizes], bias, quant_config, prefix)

    def shard(self, loaded: torch.Tensor, part: int) -> torch.Tensor:
        return loaded.narrow(0, tp_rank() * self.parts[part], self.parts[part])


class QKVParallelLinear(LinearBase):
    def __init__(self, k: int, head_size: int, heads: int, kv_heads: int, bias: bool = True, quant_config: Any = None, prefix: str = "") -> None:
        self.copies = max(1, tp_size() // kv_heads)  # ranks that hold the same key and value heads
        q, kv = heads // tp_size() * head_size, max(1, kv_heads // tp_size()) * head_size
        super().__init__(k, [q, kv, kv], bias, quant_config, prefix)

    def shard(self, loaded: torch.Tensor, part: int) -> torch.Tensor:
        rank = tp_rank() if part == 0 else tp_rank() // self.copies
        return loaded.narrow(0, rank * self.parts[part], self.parts[part])


class RowParallelLinear(LinearBase):
    def __init__(self, k: int, m: int, bias: bool = True, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(k // tp_size(), [m], bias, quant_config, prefix)

    def shard(self, loaded: torch.Tensor, part: int) -> torch.Tensor:
        width = loaded.shape[1] // tp_size()
        return loaded.narrow(1, tp_rank() * width, width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(self.quant_method.apply(self, x, self.bias)), None


# --- embedding and head ----------------------------------------------------------------------------------------------


class VocabParallelEmbedding(nn.Module):
    def __init__(self, rows: int, k: int, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.prefix, self.per_rank, self.bias = prefix, rows // tp_size(), None
        method = quant_config.get_quant_method(self, prefix) if quant_config else None
        self.quant_method = method or UnquantizedLinearMethod()
        self.quant_method.create_weights(self, k, [self.per_rank], k, rows, torch.get_default_dtype(), weight_loader=self.weight_loader)

    def weight_loader(self, param: torch.Tensor, loaded: torch.Tensor) -> None:
        param.data.copy_(loaded.narrow(0, tp_rank() * self.per_rank, self.per_rank))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if tp_size() == 1:
            return self.quant_method.embedding(self, ids)  # type: ignore[no-any-return]
        local = ids - tp_rank() * self.per_rank
        here = (local >= 0) & (local < self.per_rank)
        rows = self.quant_method.embedding(self, torch.where(here, local, 0))
        return all_reduce(rows * here.unsqueeze(-1))


class ParallelLMHead(VocabParallelEmbedding):
    def tie_weights(self, embedding: VocabParallelEmbedding) -> Any:
        return self.quant_method.tie_weights(self, embedding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the whole vocabulary (vLLM's LogitsProcessor does it)."""
        return all_gather(self.quant_method.apply(self, x, None))


# --- experts ---------------------------------------------------------------------------------------------------------


class MoEActivation(enum.Enum):
    SILU, GELU, GELU_TANH = "silu", "gelu", "gelu_tanh"


def apply_moe_activation(activation: MoEActivation, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """vLLM has one kernel for it; two of PyTorch's here."""
    gate, up = x.chunk(2, dim=-1)
    return torch.mul(F.silu(gate), up, out=out)


@dataclass
class FusedMoEConfig:
    activation: MoEActivation = MoEActivation.SILU
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    swiglu_beta: float | None = None
    has_bias: bool = False
    is_lora_enabled: bool = False
    w13_num_shards: int = 2
    moe_parallel_config: Any = field(default_factory=lambda: types.SimpleNamespace(use_all2all_kernels=False))


class FusedMoEMethodBase(QuantizeMethodBase):
    def __init__(self, moe: FusedMoEConfig) -> None:
        self.moe = moe


class UnquantizedFusedMoEMethod(FusedMoEMethodBase):
    """One product over all experts' groups of tokens, which asks the host nothing; a loop where there is none."""

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int, params_dtype: torch.dtype, **attrs: Any
    ) -> None:
        inner = intermediate_size_per_partition
        for name, shape in (("w13_weight", (num_experts, 2 * inner, hidden_size)), ("w2_weight", (num_experts, hidden_size, inner))):
            weight = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
            layer.register_parameter(name, weight)
            set_weight_attrs(weight, attrs)

    def apply(self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *shared: Any) -> torch.Tensor:
        w13, w2 = layer.w13_weight, layer.w2_weight
        if not (x.is_cuda and hasattr(torch, "_grouped_mm")):
            y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            for expert in range(w13.shape[0]):
                token, slot = (ids == expert).nonzero(as_tuple=True)
                gate, up = (x[token] @ w13[expert].T).chunk(2, dim=-1)
                y.index_add_(0, token, ((F.silu(gate) * up) @ w2[expert].T).float() * weights[token, slot, None])
            return y.to(x.dtype)
        top = ids.shape[1]
        order = ids.flatten().argsort(stable=True)
        ends = (ids.flatten()[:, None] == torch.arange(w13.shape[0], device=x.device)).sum(0).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(x[order // top], w13.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        part = torch._grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends).float() * weights.flatten()[order, None]
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add_(0, order // top, part).to(x.dtype)


class RoutedExperts(nn.Module):
    expert_map = None
    apply_router_weight_on_input = False

    def __init__(self, count: int, hidden: int, inner: int, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.prefix, self.params_dtype, self.moe_config = prefix, torch.get_default_dtype(), FusedMoEConfig()
        self.inner = inner // tp_size()
        method = quant_config.get_quant_method(self, prefix) if quant_config else None
        self.quant_method = method or UnquantizedFusedMoEMethod(self.moe_config)
        self.quant_method.create_weights(self, count, hidden, self.inner, self.params_dtype, weight_loader=self.weight_loader)

    def weight_loader(self, param: torch.Tensor, loaded: torch.Tensor, name: str, shard_id: str, expert_id: int) -> None:
        target = param.data[expert_id]
        if shard_id == "w2":
            target.copy_(loaded.narrow(1, tp_rank() * self.inner, self.inner))
        else:
            rows = target.narrow(0, 0 if shard_id == "w1" else self.inner, self.inner)
            rows.copy_(loaded.narrow(0, tp_rank() * self.inner, self.inner))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return all_reduce(self.quant_method.apply(self, x, weights, ids, None, None))


# --- the modules -----------------------------------------------------------------------------------------------------

_LAYERS = "vllm.model_executor.layers"
_MODULES: dict[str, dict[str, Any]] = {
    "vllm.config": dict(get_current_vllm_config_or_none=lambda: _current[0], set_current_vllm_config=set_current_vllm_config),
    "vllm.logger": dict(init_logger=logging.getLogger),
    f"{_LAYERS}.quantization": dict(
        QUANTIZATION_METHODS=QUANTIZATION_METHODS, register_quantization_config=register_quantization_config,
        get_quantization_config=get_quantization_config,
    ),
    f"{_LAYERS}.quantization.base_config": dict(QuantizationConfig=QuantizationConfig, QuantizeMethodBase=QuantizeMethodBase),
    f"{_LAYERS}.linear": dict(
        LinearBase=LinearBase, LinearMethodBase=LinearMethodBase, UnquantizedLinearMethod=UnquantizedLinearMethod,
        register_weight_loader_v2_supported_method=register_weight_loader_v2_supported_method,
    ),
    f"{_LAYERS}.vocab_parallel_embedding": dict(VocabParallelEmbedding=VocabParallelEmbedding, ParallelLMHead=ParallelLMHead),
    f"{_LAYERS}.fused_moe": dict(RoutedExperts=RoutedExperts, FusedMoEMethodBase=FusedMoEMethodBase),
    f"{_LAYERS}.fused_moe.activation": dict(MoEActivation=MoEActivation, apply_moe_activation=apply_moe_activation),
    f"{_LAYERS}.fused_moe.config": dict(
        FusedMoEConfig=FusedMoEConfig, FusedMoEQuantConfig=object, FUSED_MOE_UNQUANTIZED_CONFIG=object(),
    ),
    "vllm.model_executor.models.utils": dict(WeightsMapper=WeightsMapper),
    "vllm.model_executor.parameter": dict(ModelWeightParameter=ModelWeightParameter),
    "vllm.model_executor.utils": dict(set_weight_attrs=set_weight_attrs),
}  # fmt: skip


def install() -> None:
    """Put the names where `import vllm...` finds them. Not in a process that has the real vLLM."""
    if "vllm" in sys.modules:
        raise RuntimeError("vllm is imported already")
    for name, names in _MODULES.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                sys.modules[path] = types.ModuleType(path)
                if end > 1:
                    setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], sys.modules[path])
        vars(sys.modules[name]).update(names)
    sys.modules["vllm.envs"] = sys.modules["vllm"].envs = _Envs("vllm.envs")  # type: ignore[attr-defined]
