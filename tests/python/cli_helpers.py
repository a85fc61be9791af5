# SPDX-License-Identifier: Apache-2.0
"""What the tests of the command line share: a way to call it, and small models on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zipserv import cli


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Zipserv:
    """``zipserv("compress", a, b)`` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Result:
        self._capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        assert "Traceback" not in captured.err, captured.err
        return Result(code, captured.out, captured.err)


def weight(m: int, k: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def any_bits(m: int, k: int) -> torch.Tensor:
    """All 65,536 bit patterns, NaN payloads among them; does not shrink."""
    return torch.arange(m * k, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(m, k)


def bits_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and a[n].contiguous().flatten().view(torch.uint8).tolist() == b[n].contiguous().flatten().view(torch.uint8).tolist()
        for n in a
    )


def make_model(root: Path, layers: int = 3) -> Path:
    """A sharded Hugging Face folder: one shard a layer, index, configuration, tokenizer, a subfolder, a link."""
    root.mkdir()
    weight_map: dict[str, str] = {}
    total = 0
    for i in range(layers):
        tensors = {
            f"model.layers.{i}.q_proj.weight": weight(192, 128, seed=i),
            f"model.layers.{i}.q_proj.bias": weight(1, 192, seed=i)[0],
            f"model.layers.{i}.mlp.gate.weight": weight(64, 128, seed=20 + i),
            f"model.layers.{i}.norm.weight": torch.ones(128, dtype=torch.float32),
        }
        if i == 0:
            tensors["model.embed_tokens.weight"] = weight(250, 128, seed=9)
            tensors["model.layers.0.odd.weight"] = any_bits(256, 256)
        name = f"model-{i + 1:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, root / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (root / "config.json").write_text(json.dumps({"architectures": ["Tiny"], "dtype": "bfloat16"}, indent=2) + "\n")
    (root / "tokenizer.json").write_text("{}")
    (root / "extra").mkdir()
    (root / "extra" / "notes.txt").write_text("kept")
    (root / "link.txt").symlink_to(root / "extra" / "notes.txt")
    return root


def read_all(root: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(root.rglob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def temporary_files(root: Path) -> list[Path]:
    return [path for path in root.rglob(".*") if path.name.endswith(".tmp")]
