# SPDX-License-Identifier: Apache-2.0
"""The quantization method "zipserv": which layers of a vLLM model are compressed, and by which method."""

from __future__ import annotations

import fnmatch
import os
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from .blobview import BlobMapper

METHOD = "zipserv"
VERSION = 1

_HEAD = "lm_head"
_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"

_ROUTER = "a router is small, and vLLM has kernels of its own for it"

logger = init_logger("vllm.zipserv")


class ZipServConfig(QuantizationConfig):  # type: ignore[misc]
    """`quantization="zipserv"`, or `{"quant_method": "zipserv", ...}` in a checkpoint's config.json.

    Args:
        version: version of the checkpoint's layout; None for a plain checkpoint that is compressed while it loads.
        ignore: layers that stay as they are: full names, names of parents, or patterns with `*`. A layer that vLLM stacks
            (qkv_proj, gate_up_proj) is ignored when any of its parts is.
    """

    def __init__(self, version: int | None = None, ignore: list[str] | None = None) -> None:
        super().__init__()
        self.version = version
        self.ignore = list(ignore or [])
        _start_workers_by_spawn()

    def __repr__(self) -> str:
        return f"ZipServConfig(version={self.version}, ignore={self.ignore})"

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]  # layers that are not BF16 are left as they are

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ZipServConfig:
        version = config.get("version", VERSION)
        if version != VERSION:
            raise ValueError(f"the checkpoint has version {version} of the zipserv layout, this package reads version {VERSION}: use a newer zipserv")
        return cls(version, config.get("modules_to_not_convert"))

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        return BlobMapper() | QuantizationConfig.get_checkpoint_weight_mapper()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.ignore = hf_to_vllm_mapper.apply_list(self.ignore)

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        from .embedding import ZipServEmbeddingMethod
        from .linear import ZipServLinearMethod
        from .moe import ZipServMoEMethod

        if isinstance(layer, LinearBase):
            why = _ROUTER if _is_router(layer) else self._why_not(prefix, layer.params_dtype)
            return self._plain(prefix, why) or UnquantizedLinearMethod() if why else ZipServLinearMethod(prefix)
        if isinstance(layer, RoutedExperts):
            why = self._why_not(prefix, layer.params_dtype) or ZipServMoEMethod.why_not(layer.moe_config)
            return self._plain(prefix, why) if why else ZipServMoEMethod(layer.moe_config, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            # An embedding of its own is only looked up, a few rows a step: compressed, it would save memory and cost time.
            # Tied to the head it is the head's weight, kept once, and what is said of the head holds for it.
            is_head = isinstance(layer, ParallelLMHead)
            if not is_head and not _ties_embeddings():
                return None
            why = self._why_not(prefix if is_head else _HEAD, torch.get_default_dtype())
            return self._plain(prefix, why) if why else ZipServEmbeddingMethod(prefix)
        return None

    def _why_not(self, prefix: str, dtype: torch.dtype) -> str | None:
        if dtype != torch.bfloat16:
            return f"its weights are {dtype}, BF16 is compressed"
        parts = [prefix]
        parent, _, name = prefix.rpartition(".")
        for part in self.packed_modules_mapping.get(name, []):
            parts.append(f"{parent}.{part}" if parent else part)
        for part in parts:
            for pattern in self.ignore:
                same = part == pattern or part.startswith(pattern + ".") or (part == _HEAD and pattern.endswith("." + _HEAD))
                if same or fnmatch.fnmatchcase(part, pattern):
                    return f"{pattern!r} is listed in modules_to_not_convert"
        return None

    @staticmethod
    def _plain(prefix: str, why: str) -> None:
        logger.info("%s stays uncompressed: %s", prefix or "a layer without a name", why)


def _is_router(layer: Any) -> bool:
    return any(kind.__name__ == "GateLinear" for kind in type(layer).__mro__)


def _start_workers_by_spawn() -> None:
    """The native library works in no forked child of a process that has loaded it: `vllm serve` spawns its workers, `LLM` forks them."""
    if os.environ.setdefault(_METHOD, "spawn") == "fork":
        logger.warning("%s=fork: the zipserv library does not work in forked processes, spawn is used", _METHOD)
        os.environ[_METHOD] = "spawn"


def _ties_embeddings() -> bool:
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return False
    return bool(getattr(config.model_config.hf_text_config, "tie_word_embeddings", False))
