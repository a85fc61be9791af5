# SPDX-License-Identifier: Apache-2.0
"""ZipServ: lossless compression of BF16 model weights that are multiplied without being decompressed first.

Example::

    z = zipserv.compress(weight)            # ZipTensor: about 11 bits a weight, every bit kept
    y = zipserv.linear(x, z, bias)          # as torch.nn.functional.linear
    report = zipserv.compress_model(model)  # every nn.Linear becomes a ZipLinear
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .integrations import hooks as _hooks

if TYPE_CHECKING:
    from .checkpoint import FileWriter, TensorFile, TensorInfo, load_file, open_file, save_file
    from .conv import ZipConv1d, ZipConv2d, ZipConv3d
    from .cpu import cpu_linear, set_cpu_linear
    from .cuda import set_batch_invariant
    from .embedding import ZipEmbedding
    from .errors import Error
    from .experts import ZipExperts
    from .integrations.transformers import ZipServConfig
    from .layers import ZipLinear
    from .merged import merge_layers, split_layers
    from .model import CompressionReport, LayerReport, compress_model, load_model, prepare_model
    from .tensor import ZipTensor, compress, decompress, linear

    __version__: str

__all__ = [
    "CompressionReport",
    "Error",
    "FileWriter",
    "LayerReport",
    "TensorFile",
    "TensorInfo",
    "ZipConv1d",
    "ZipConv2d",
    "ZipConv3d",
    "ZipEmbedding",
    "ZipExperts",
    "ZipLinear",
    "ZipServConfig",
    "ZipTensor",
    "__version__",
    "compress",
    "compress_model",
    "cpu_linear",
    "decompress",
    "linear",
    "load_file",
    "load_model",
    "merge_layers",
    "open_file",
    "prepare_model",
    "save_file",
    "set_batch_invariant",
    "set_cpu_linear",
    "split_layers",
]

# Which module each name is in. Modules are imported at the first use of one of their names, so that the command line
# answers at once, and can still say what is wrong where torch or the native library does not load.
_MODULES = {
    "checkpoint": ("FileWriter", "TensorFile", "TensorInfo", "load_file", "open_file", "save_file"),
    "conv": ("ZipConv1d", "ZipConv2d", "ZipConv3d"),
    "cpu": ("cpu_linear", "set_cpu_linear"),
    "cuda": ("set_batch_invariant",),
    "embedding": ("ZipEmbedding",),
    "errors": ("Error",),
    "experts": ("ZipExperts",),
    "integrations.transformers": ("ZipServConfig",),
    "layers": ("ZipLinear",),
    "merged": ("merge_layers", "split_layers"),
    "model": ("CompressionReport", "LayerReport", "compress_model", "load_model", "prepare_model"),
    "tensor": ("ZipTensor", "compress", "decompress", "linear"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.import_module("._zipserv", __name__).version()
    elif name in _WHERE:
        value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    else:
        raise AttributeError(f"module 'zipserv' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Where torch is in use already, its ops (zipserv::linear and others) are there from the import on, as programs saved
# by torch.export expect.
if "torch" in sys.modules:
    for _module in (".ops", ".rows", ".gather"):
        importlib.import_module(_module, __name__)

# Registers with transformers if and when that is imported; never imports it.
_hooks.install()
