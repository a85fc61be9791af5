# SPDX-License-Identifier: Apache-2.0
"""The quantizer that ``from_pretrained`` drives. It is lossless: the name is transformers', not ours."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from zipserv.experts import ZipExperts
from zipserv.format import DTYPE_CODES
from zipserv.tensor import ZipTensor

from .config import ZipServConfig
from .loading import Compress, compressed_names, stand_in
from .modules import adopt_weight, compress_weight, drop_half_tied, find_targets, replace_modules, restore_modules
from .saving import checkpoint_state_dict

_DTENSOR: Any = getattr(getattr(torch.distributed, "tensor", None), "DTensor", ())

logger = logging.getLogger(__name__)

#: What to expect of trained weights, in bytes a weight: for planning a device map before the sizes are known.
BYTES_PER_WEIGHT = 11.3 / 8


class ZipServQuantizer(HfQuantizer):
    """Compresses weights as they arrive, or takes compressed ones, and replaces the modules when all are there."""

    requires_calibration = False
    quantization_config: ZipServConfig

    def __init__(self, quantization_config: ZipServConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        #: Parameter name -> how its module is replaced.
        self.targets: dict[str, str] = {}
        #: Parameter name -> compressed weight, from its arrival until the module is replaced.
        self.weights: dict[str, ZipTensor | ZipExperts] = {}
        #: The model's key renamings and tensor operations: as used in loading, beside the originals.
        self._conversions: list[tuple[Any, Any]] = []
        #: Those that loading used; saving undoes them.
        self.original_conversions: list[Any] = []

    # --- before loading -------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map puts modules on 'disk', which compressed weights can't be streamed from: map them to 'cpu' "
                "or a GPU"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        skip = config.modules_to_not_convert
        found = find_targets(model, config)
        found = {name: kind for name, kind in found.items() if should_convert_module(_module_name(name), skip)}
        self.targets = drop_half_tied(found, getattr(model, "all_tied_weights_keys", {}))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        if param_name in self.targets:
            refuse_sharded(model, param_name)
        return param_name in self.targets

    @property
    def quantized_element_size(self) -> float:
        return BYTES_PER_WEIGHT

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        if param_name in self.targets and param.dtype in DTYPE_CODES:
            return BYTES_PER_WEIGHT
        return float(param.element_size())

    # --- while loading --------------------------------------------------------------------------------------------

    def get_quantize_ops(self) -> Any:
        return Compress(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        name = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        return None if name in ("U8", "torch.uint8") else dtype

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        self._conversions = [(conversion, conversion) for conversion in weight_conversions]
        if self.pre_quantized:
            self._conversions = compressed_names(weight_conversions, self)
        return [used for used, _ in self._conversions]

    def keep_compressed(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Compress an arriving weight; a stand-in for the loader, or the weight itself where it must stay dense."""
        if name not in self.targets or weight.dtype not in DTYPE_CODES:
            return weight
        zipped = compress_weight(self.targets[name], weight)
        return weight if zipped is None else self._keep(name, zipped, weight.shape, weight)

    def keep_blob(self, name: str, blob: torch.Tensor) -> torch.Tensor:
        """Take an arriving blob; a stand-in for the loader, or the dense weight where the module takes no other."""
        zipped = ZipTensor(blob)
        if name not in self.targets:
            return zipped.decompress()
        return self._keep(name, adopt_weight(self.targets[name], zipped), zipped.shape, zipped)

    def _keep(self, name: str, zipped: Any, shape: torch.Size, like: Any) -> torch.Tensor:
        self.weights[name] = zipped
        return stand_in(shape, like.dtype, like.device)

    # --- after loading --------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Renaming back at save time is done here, on compressed names (see saving.py); transformers must not do it too.
        used = [(conversion, original) for conversion, original in self._conversions if conversion.was_used()]
        self._conversions = []
        self.original_conversions = [original for _, original in used if original is not None]
        if not self.weights:
            logger.warning(
                "zipserv compressed nothing: no weight of this model is BF16 or FP16 (load it with dtype=torch.bfloat16) "
                "or all its modules are in modules_to_not_convert"
            )
        replace_modules(model, self.weights, self.targets, merge=self.quantization_config.merge)
        self.weights = {}
        model._weight_conversions = []
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        # No "zipserv" in the metadata: that is what zipserv's own writer says of files that carry checksums, and transformers writes none.
        return checkpoint_state_dict(model, self.original_conversions), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        restore_modules(model)
        model._weight_conversions = self.original_conversions
        return model

    # --- what it can do -------------------------------------------------------------------------------------------

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained (PEFT); the compressed weights themselves are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def refuse_sharded(model: Any, name: str) -> None:
    """Tensor parallelism of transformers cuts parameters; whole compressed weights do not fit into the pieces."""
    if name.rpartition(".")[2] in model.get_submodule(_module_name(name))._parameters and isinstance(model.get_parameter(name), _DTENSOR):
        raise ValueError(
            f"{name} is sharded over devices (tp_plan, FSDP): load compressed models without tp_plan, or serve them with vLLM, "
            "whose tensor parallelism zipserv supports"
        )


def _module_name(parameter: str) -> str:
    return parameter.rpartition(".")[0]
