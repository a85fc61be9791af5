# SPDX-License-Identifier: Apache-2.0
"""vLLM's lm_head, and the embedding tied to it, over one compressed weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.parameter import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from zipserv import gather

from .weight import ZipWeight


class ZipServEmbeddingMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Logits by ZipGEMM; rows are looked up without decompressing the rest."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype, device="meta")
        weight = Parameter(data, requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0})
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, extra_weight_attrs)
        layer.zip_weight = ZipWeight(layer, self.prefix, weight)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        layer.weight = embed_tokens.weight
        if not hasattr(embed_tokens, "zip_weight"):  # the model built its embedding without us: share the plain weight
            layer.quant_method = embed_tokens.quant_method
            return layer
        layer.zip_weight = embed_tokens.zip_weight
        layer.zip_weight.layers.append(layer)
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.zip_weight.settle()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.zip_weight.linear(layer, x, bias)  # type: ignore[no-any-return]

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        weight = layer.zip_weight
        if weight.plain is not None:
            return F.embedding(input_, layer.weight)
        rows: torch.Tensor = gather.embedding(input_, layer.weight, weight.m, weight.k, weight.code)
        return rows
