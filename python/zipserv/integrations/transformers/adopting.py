# SPDX-License-Identifier: Apache-2.0
"""Models that ``zipserv.compress_model`` has compressed in place, made known to transformers."""

from __future__ import annotations

from typing import Any

from transformers.core_model_loading import PrefixChange

from zipserv.layers import BlobModule

from .config import ZipServConfig
from .quantizer import ZipServQuantizer

__all__ = ["adopt"]


def adopt(model: Any) -> None:
    """Make a model that ``zipserv.compress_model`` has compressed in place known to transformers as compressed.

    Then ``save_pretrained`` writes a folder that ``from_pretrained`` loads, and ``dequantize`` works. Other modules, and
    models that are known already, are left alone.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import PreTrainedModel  # which imports the registry that imports this

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
