# SPDX-License-Identifier: Apache-2.0
"""The state dict that ``save_pretrained`` writes: the names of the original checkpoint, weights as blobs."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from transformers.core_model_loading import PrefixChange, WeightConverter, revert_weight_conversion

from zipserv.conv import ZipConv
from zipserv.embedding import ZipEmbedding
from zipserv.experts import ZipExperts
from zipserv.format import DTYPE_CODES, SUFFIX
from zipserv.layers import BlobModule, ZipLinear
from zipserv.tensor import compress

from .config import ZipServConfig
from .modules import checkpoint_weight

_LAYER = re.compile(r"^.*?\.\d+\.")


def adopt(model: Any) -> None:
    """Make a model that ``zipserv.compress_model`` has compressed in place known to transformers as compressed.

    Then ``save_pretrained`` writes a folder that ``from_pretrained`` loads, and ``dequantize`` works. Other modules, and
    models that are known already, are left alone.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import PreTrainedModel

    from .quantizer import ZipServQuantizer

    if not isinstance(model, PreTrainedModel) or getattr(model, "hf_quantizer", None) is not None:
        return
    if not any(isinstance(module, BlobModule) for module in model.modules()):
        return
    known: Any = model
    quantizer = ZipServQuantizer(ZipServConfig(), pre_quantized=False)
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # as transformers does for a model that was not loaded
        conversions = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    quantizer.original_conversions = conversions
    known._weight_conversions = []
    known.hf_quantizer = quantizer
    known.is_quantized = True
    known.quantization_method = quantizer.quantization_config.quant_method
    known.config.quantization_config = quantizer.quantization_config
    known.config._is_quantized = True


def checkpoint_state_dict(model: Any, conversions: list[Any]) -> dict[str, torch.Tensor]:
    """Names as in the checkpoint that the model came from, compressed weights under ``NAME_zipserv``.

    Weights that transformers merges or splits while loading (experts, fused qkv) are decompressed, taken apart again
    and compressed one by one, one layer at a time.
    """
    zipped = _compressed_modules(model)
    tied = getattr(model, "all_tied_weights_keys", {})
    hidden = tuple(f"{name}." for name in zipped)
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
            if not isinstance(module, ZipExperts):
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
