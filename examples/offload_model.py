# SPDX-License-Identifier: Apache-2.0
"""A model whose weights stay in host memory and stream to the GPU, plain and compressed; without a GPU it computes on the CPU.

    python examples/offload_model.py
"""

from __future__ import annotations

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zipserv
from zipserv import offload


def small_model() -> LlamaForCausalLM:
    """Stands for a model that is larger than the GPU: made or loaded on the CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, vocab_size=1024)
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def generate(model: LlamaForCausalLM, tokens: int = 16) -> tuple[list[int], float]:
    """The new tokens, and how many came in a second."""
    prompt = torch.arange(8)[None]
    model.generate(prompt, max_new_tokens=2, do_sample=False, pad_token_id=0)
    start = time.perf_counter()
    ids = model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return ids[0, 8:].tolist(), tokens / (time.perf_counter() - start)


def main() -> None:
    plain = small_model()
    handle = offload.apply(plain)
    expected, before = generate(plain)
    print("plain:     ", handle)

    model = small_model()
    report = zipserv.compress_model(model)
    handle = offload.apply(model)  # both steps in one: zipserv.compress_model(model, offload="cpu")
    found, after = generate(model)
    print("compressed:", handle)
    print(f"{report.before / 1e6:.2f} MB -> {report.after / 1e6:.2f} MB of weights, {before:.1f} -> {after:.1f} tokens a second")
    print(f"{sum(a == b for a, b in zip(expected, found, strict=True))} of {len(found)} tokens are the same")


if __name__ == "__main__":
    main()
