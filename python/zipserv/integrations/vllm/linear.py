# SPDX-License-Identifier: Apache-2.0
"""vLLM's linear layers over compressed weights.

Column-, row- and unsharded layers and the stacked ones (qkv_proj, gate_up_proj): the rank's shard of all parts together is one
compressed matrix, so a layer is one kernel launch.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs

from .weight import ZipWeight


@register_weight_loader_v2_supported_method
class ZipServLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """`y = x W^T + b` with W compressed. With `VLLM_BATCH_INVARIANT=1` a token has the same bits whatever else is in the batch."""

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
        loader = extra_weight_attrs.pop("weight_loader")
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype, device="meta")
        weight = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, extra_weight_attrs)
        layer.zip_weight = ZipWeight(layer, self.prefix, weight)

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.zip_weight.settle()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.zip_weight.linear(layer, x, bias)  # type: ignore[no-any-return]
