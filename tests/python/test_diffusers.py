# SPDX-License-Identifier: Apache-2.0
"""Transformers of diffusion models (diffusers): compressed in place, saved, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import zipserv  # noqa: E402
from zipserv.conv import ZipConv  # noqa: E402


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def dit() -> tuple[Any, dict[str, Any]]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=16, num_layers=2, sample_size=16, patch_size=2, norm_num_groups=8
    )
    return model, {"hidden_states": noise(1, 16, 16, 16), "timestep": torch.tensor([3]), "class_labels": torch.tensor([7])}


def flux() -> tuple[Any, dict[str, Any]]:
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=4, joint_attention_dim=64,
        pooled_projection_dim=64, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    inputs = {
        "hidden_states": noise(1, 16, 16), "encoder_hidden_states": noise(1, 8, 64), "pooled_projections": noise(1, 64),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3),
    }  # fmt: skip
    return model, inputs


@pytest.mark.parametrize("make", [dit, flux])
@torch.no_grad()
def test_compressed_in_place_and_through_a_file(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model = model.to(torch.bfloat16).eval()
    torch.manual_seed(2)
    expected = model(**inputs, return_dict=False)[0]
    report = zipserv.compress_model(model)
    assert report.ratio > 1.2
    assert make is flux or any(isinstance(module, ZipConv) for module in model.modules())
    assert torch.equal(model(**inputs, return_dict=False)[0], expected)

    zipserv.save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh, _ = make()
    zipserv.load_model(fresh.to(torch.bfloat16).eval(), tmp_path / "model.safetensors")
    assert torch.equal(fresh(**inputs, return_dict=False)[0], expected)
