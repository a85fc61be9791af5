# SPDX-License-Identifier: Apache-2.0
"""transformers integration: ``from_pretrained`` compresses while it loads, and loads what was compressed before.

    import zipserv
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16", quantization_config=zipserv.ZipServConfig())
    model.save_pretrained("small")                          # 30 % smaller, the same bits
    model = AutoModelForCausalLM.from_pretrained("small")   # needs nothing but `import zipserv` before it
"""

from .adopting import adopt
from .config import METHOD, ZipServConfig
from .quantizer import ZipServQuantizer

__all__ = ["ZipServConfig", "ZipServQuantizer", "adopt", "register"]


def register() -> None:
    """Enter the configuration and the quantizer into transformers' registries, and transformers' own kinds of modules
    into those that ``zipserv.compress_model`` knows. Doing it twice does no harm."""
    from transformers.quantizers import auto

    from zipserv import model

    from .experts import register as register_experts
    from .modules import model_converters

    register_experts()
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(ZipServConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(ZipServQuantizer)
        model.converters += model_converters()


register()
