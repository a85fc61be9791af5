# SPDX-License-Identifier: Apache-2.0
"""LoRA on a compressed model: adapters train, the base stays compressed; then they are merged.

    python examples/lora.py [MODEL]     # without one: a small Llama with random weights
"""

from __future__ import annotations

import sys
import tempfile

import peft
import torch
import transformers

import zipserv
from zipserv.integrations.peft import decompress_adapted


def small(folder: str) -> str:
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024
    )
    transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        name = sys.argv[1] if len(sys.argv) > 1 else small(folder)
        base = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, quantization_config=zipserv.ZipServConfig())
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    compressed = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("_zipserv"))
    print(f"{sum(p.numel() for p in trained):,} weights of adapters to train on {compressed:,} compressed bytes")

    torch.manual_seed(0)
    ids = torch.randint(0, base.config.vocab_size, (4, 32))
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for step in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")

    print(f"decompressed for the merge: {len(decompress_adapted(model))} layers")
    merged = model.merge_and_unload()
    print(zipserv.compress_model(merged))  # and compressed again


if __name__ == "__main__":
    main()
