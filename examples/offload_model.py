# SPDX-License-Identifier: Apache-2.0
"""A model whose weights stay in host memory and stream to the GPU; without a GPU it computes on the CPU."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zipserv
from zipserv import offload


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, vocab_size=1024)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    report = zipserv.compress_model(model)
    handle = offload.apply(model)
    print(f"{report.before / 1e6:.2f} MB -> {report.after / 1e6:.2f} MB of weights;", handle)
    with torch.no_grad():
        print("logits:", tuple(model(torch.arange(8)[None]).logits.shape))


if __name__ == "__main__":
    main()
