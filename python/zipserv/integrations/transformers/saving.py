# SPDX-License-Identifier: Apache-2.0
"""The state dict that ``save_pretrained`` writes: the names of the original checkpoint, weights as blobs."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from zipserv.conv import ZipConv
from zipserv.embedding import ZipEmbedding
from zipserv.experts import ZipExperts
from zipserv.format import DTYPE_CODES, SUFFIX
from zipserv.layers import ZipLinear
from zipserv.merged import MergedLinear, apart
from zipserv.tensor import compress

from .modules import checkpoint_weight

_LAYER = re.compile(r"^.*?\.\d+\.")


def checkpoint_state_dict(model: Any, conversions: list[Any]) -> dict[str, torch.Tensor]:
    """Names as in the checkpoint that the model came from, compressed weights under ``NAME_zipserv``.

    Weights that transformers merges or splits while loading (experts, fused qkv) are decompressed, taken apart again
    and compressed one by one, one layer at a time.
    """
    zipped = _compressed_modules(model)
    tied = getattr(model, "all_tied_weights_keys", {})
    hidden = tuple(f"{name}." for name in zipped)
    with apart:  # merged layers give copies of their bytes: one at a time, below
        dense = model.state_dict()
    names: list[str] = [key for key in dense if not (key.endswith(SUFFIX) and key.startswith(hidden))]
    converts = any(isinstance(conversion, WeightConverter) for conversion in conversions)

    groups: dict[str, list[str]] = defaultdict(list)
    for key in [*names, *(_parameter_name(name, module) for name, module in zipped.items())]:
        match = _LAYER.match(key)
        groups[match.group(0) if match else ""].append(key)

    modules = {_parameter_name(name, module): module for name, module in zipped.items()}
    result: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for keys in groups.values():
        part: dict[str, torch.Tensor] = {}
        blobs: set[int] = set()
        for key in keys:
            module = modules.get(key)
            if module is None:
                part[key] = dense[key]
                continue
            if not isinstance(module, ZipExperts | MergedLinear):
                identity = id(module.weight_zipserv)
                if identity in seen and (key in tied or key in tied.values()):
                    continue
                seen.add(identity)
            part[key] = checkpoint_weight(module, dense=converts)
            blobs.add(id(part[key]))
        result.update(_original(model, part, blobs, conversions, converts))
    return result


def _original(
    model: Any, part: dict[str, torch.Tensor], blobs: set[int], conversions: list[Any], converts: bool
) -> dict[str, torch.Tensor]:
    """One group of tensors under the names of the original checkpoint."""
    was_dense = {id(tensor) for tensor in part.values() if id(tensor) not in blobs}
    kept, model._weight_conversions = model._weight_conversions, conversions
    try:
        renamed = revert_weight_conversion(model, part)
    finally:
        model._weight_conversions = kept
    out: dict[str, torch.Tensor] = {}
    for name, tensor in renamed.items():
        if id(tensor) in blobs and not converts:
            out[name + SUFFIX] = tensor
        elif not blobs or id(tensor) in was_dense or tensor.dim() < 2 or tensor.dtype not in DTYPE_CODES:
            out[name] = tensor
        else:
            small = compress(tensor)
            out.update({name: tensor} if small.is_raw else {name + SUFFIX: small.blob})
    return out


def _compressed_modules(model: Any) -> dict[str, Any]:
    kinds = (ZipLinear, ZipEmbedding, ZipConv, ZipExperts)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _parameter_name(name: str, module: Any) -> str:
    return name if isinstance(module, ZipExperts) else f"{name}.weight"
