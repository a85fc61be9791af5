# SPDX-License-Identifier: Apache-2.0
"""The Python API in one minute: a tensor, a layer, a model, a file. Needs no download and no GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import zipserv

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

# A tensor: compressed, multiplied as it is, restored bit by bit.
weight = (torch.randn(2048, 1024, device=device) * 0.02).bfloat16()
packed = zipserv.compress(weight)
print(packed)
x = torch.randn(4, 1024, device=device).bfloat16()
y = zipserv.linear(x, packed)
assert torch.equal(packed.decompress().view(torch.int16), weight.view(torch.int16))
print("largest difference to F.linear:", (y - nn.functional.linear(x, weight)).abs().max().item())

# A model: its nn.Linear layers become ZipLinear layers, in place.
model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)).bfloat16().to(device)
report = zipserv.compress_model(model)
print(report)
print("output:", tuple(model(x).shape))

# A file: safetensors, readable by any safetensors reader; checked when it is loaded.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "weights.safetensors")
    zipserv.save_file({"weight": packed.cpu(), "scale": torch.ones(3)}, path)
    print("on disk:", path.stat().st_size, "bytes; back:", zipserv.load_file(path)["weight"])
