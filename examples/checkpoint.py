# SPDX-License-Identifier: Apache-2.0
"""A compressed checkpoint in several files: written, read one tensor at a time, loaded to the GPU where there is one, and damaged.

    python examples/checkpoint.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

import zipserv


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {f"layers.{i}.weight": (torch.randn(1024, 2048) * 0.02).bfloat16() for i in range(8)}
    with tempfile.TemporaryDirectory() as folder:
        tensors: dict[str, torch.Tensor | zipserv.ZipTensor] = {name: zipserv.compress(weight) for name, weight in weights.items()}
        tensors["norm.weight"] = torch.ones(2048).bfloat16()
        files = zipserv.save_file(tensors, Path(folder, "model.safetensors"), max_shard_size="10MB")
        print("written:", ", ".join(file.name for file in files))

        with zipserv.open_file(folder) as file:  # headers only; a tensor is read when it is asked for
            print(file.info("layers.3.weight"))
            assert torch.equal(file["layers.3.weight"].decompress(), weights["layers.3.weight"])

        start = time.perf_counter()
        loaded = zipserv.load_file(folder, device=device)  # every checksum is compared on the way
        size = sum(file.stat().st_size for file in files)
        print(f"{size / 1e6:.1f} MB loaded to {device} and checked in {(time.perf_counter() - start) * 1e3:.1f} ms")
        assert all(torch.equal(loaded[name].decompress().cpu(), weight) for name, weight in weights.items())

        data = bytearray(files[0].read_bytes())
        data[len(data) // 2] ^= 1
        files[0].write_bytes(data)
        try:
            zipserv.load_file(folder, device=device)
        except zipserv.Error as error:
            print("one flipped bit:", error)
        else:
            raise SystemExit("a flipped bit was not noticed")


if __name__ == "__main__":
    main()
