# SPDX-License-Identifier: Apache-2.0
"""A language model, compressed while it loads, saved, loaded and run: the same tokens from 30 % less.

    python examples/transformers_model.py [MODEL]

MODEL is a folder or a name on the hub; without it a tiny model with random weights is made.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import zipserv


def random_model(folder: str) -> str:
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=1024)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def main(path: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = path or random_model(f"{folder}/plain")
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=zipserv.ZipServConfig())
        model.save_pretrained(f"{folder}/small")
        again = AutoModelForCausalLM.from_pretrained(f"{folder}/small")

        ids = torch.arange(3, 11)[None]
        outputs = [m.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (plain, model, again)]
        before, after = (sum(t.numel() * t.element_size() for t in m.state_dict().values()) for m in (plain, model))
        print(f"weights: {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB")
        print("tokens:", outputs[0][0, 8:].tolist())
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        print("the same from the plain, the compressed and the loaded model")


if __name__ == "__main__":
    main(*sys.argv[1:2])
