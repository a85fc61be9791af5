# SPDX-License-Identifier: Apache-2.0
"""ZipServ: lossless compression of BF16 model weights that are multiplied without being decompressed first.

Example::

    z = zipserv.compress(weight)            # ZipTensor: about 11 bits a weight, every bit kept
    y = zipserv.linear(x, z, bias)          # as torch.nn.functional.linear
    report = zipserv.compress_model(model)  # every nn.Linear becomes a ZipLinear
"""

from __future__ import annotations

import importlib
from typing import Any

from . import _zipserv
from . import ops as ops  # registers torch.ops.zipserv.*
from .checkpoint import FileWriter, TensorFile, TensorInfo, load_file, open_file, save_file
from .errors import Error
from .integrations import hooks as _hooks
from .layers import ZipLinear
from .model import CompressionReport, LayerReport, compress_model, load_model, prepare_model
from .tensor import ZipTensor, compress, decompress, linear

__version__: str = _zipserv.version()

__all__ = [
    "CompressionReport",
    "Error",
    "FileWriter",
    "LayerReport",
    "TensorFile",
    "TensorInfo",
    "ZipLinear",
    "ZipTensor",
    "__version__",
    "compress",
    "compress_model",
    "decompress",
    "linear",
    "load_file",
    "load_model",
    "open_file",
    "prepare_model",
    "save_file",
]

# Names that need more than torch to import, or that few need: loaded at first use.
_LAZY = {
    "ZipConv2d": "zipserv.conv",
    "ZipEmbedding": "zipserv.embedding",
    "ZipExperts": "zipserv.experts",
    "ZipServConfig": "zipserv.integrations.transformers",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'zipserv' has no attribute {name!r}")


# Registers with transformers if and when that is imported; never imports it.
_hooks.install()
