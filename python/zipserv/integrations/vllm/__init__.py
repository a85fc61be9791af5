# SPDX-License-Identifier: Apache-2.0
"""vLLM plugin: `--quantization zipserv`, found through the entry point group `vllm.general_plugins`.

vLLM calls `register` once in each of its processes. Importing this package imports neither vLLM nor the native library.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make the quantization method "zipserv" known to vLLM. May be called any number of times."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from .config import METHOD, ZipServConfig

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(ZipServConfig)
