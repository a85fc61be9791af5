# SPDX-License-Identifier: Apache-2.0
"""PEFT: adapters train on top of compressed layers as they are; merging an adapter needs the layer decompressed."""

from __future__ import annotations

from torch import nn

from zipserv.layers import ZipLinear
from zipserv.merged import MergedLinear, split_layers

__all__ = ["decompress_adapted"]


def decompress_adapted(model: nn.Module) -> list[str]:
    """Decompress the layers that carry an adapter, so that it can be merged into them; all others stay compressed.

    A compressed weight can't be added to: ``merge_and_unload`` raises on it. After this call it works, and
    ``ZipLinear.from_linear`` (or ``zipserv.compress_model``) compresses the merged layers again.

    Args:
        model: a PEFT model; changed in place.

    Returns:
        Names of the decompressed layers.
    """
    bases = [module._modules.get("base_layer") for module in model.modules()]
    groups = {id(base._group) for base in bases if isinstance(base, MergedLinear)}
    del bases
    split_layers(model, where=lambda layer: id(layer._group) in groups)  # the others of a group must not carry dead bytes
    names = []
    for name, module in model.named_modules():
        base = module._modules.get("base_layer")
        if isinstance(base, ZipLinear):
            linear = base.to_linear()
            linear.weight.requires_grad_(False)
            module._modules["base_layer"] = linear
            names.append(f"{name}.base_layer")
    return names
