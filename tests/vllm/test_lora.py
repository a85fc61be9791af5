# SPDX-License-Identifier: Apache-2.0
"""vLLM's LoRA layers over compressed base layers: adapters are added to what the compressed layer gives."""

from __future__ import annotations

import pytest
import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    LoRAMapping,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.punica_wrapper import get_punica_wrapper

from test_layers import LAYERS, K, give, weights
from zipserv.integrations.vllm.config import ZipServConfig

WRAPPERS = {
    "replicated": ReplicatedLinearWithLoRA,
    "column": ColumnParallelLinearWithLoRA,
    "row": RowParallelLinearWithLoRA,
    "merged": MergedColumnParallelLinearWithLoRA,
    "qkv": MergedQKVParallelLinearWithLoRA,
}
RANK, TOKENS = 8, 6


@pytest.mark.parametrize("kind", WRAPPERS)
def test_adapters_on_compressed_layers(dtype, kind) -> None:
    build, shapes = LAYERS[kind]
    parts = [(shard, weights(m)) for shard, m in shapes]
    adapters = [((torch.randn(RANK, K) * 0.1).bfloat16(), (torch.randn(m, RANK) * 0.1).bfloat16()) for _, m in shapes]
    config = LoRAConfig(max_lora_rank=RANK, max_loras=2, lora_dtype=torch.bfloat16)
    x = torch.randn(TOKENS, K).bfloat16()
    outputs = []
    for quantization in (ZipServConfig(), None):
        layer = build(bias=False, quant_config=quantization, prefix="x")
        give(layer, parts, "plain")
        layer.quant_method.process_weights_after_loading(layer)
        plain = layer(x)[0]
        wrapped = WRAPPERS[kind](layer)
        wrapped.create_lora_weights(2, config)
        a, b = ([pair[i] for pair in adapters] for i in (0, 1))
        wrapped.set_lora(0, *((a, b) if len(parts) > 1 else (a[0], b[0])))
        punica = get_punica_wrapper(64, max_batches=8, device="cpu", lora_config=config)
        wrapped.set_mapping(punica)
        ids = [0, 0, 5, 5, 0, 5]  # tokens with the adapter 5, which lies in slot 0, and without one
        punica.update_metadata(LoRAMapping(ids, ids), [5, None], 2, 320)
        y = wrapped(x)[0]
        for token, number in enumerate(ids):
            assert torch.equal(y[token], plain[token]) == (number == 0)
        outputs.append(y)
    assert torch.equal(*outputs)
