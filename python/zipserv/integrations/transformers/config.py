# SPDX-License-Identifier: Apache-2.0
"""``ZipServConfig``: what a user passes to ``from_pretrained`` and what ``config.json`` carries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from zipserv.errors import Error

METHOD = "zipserv"
VERSION = 1


class ZipServConfig(QuantizationConfigMixin):
    """Lossless compression of a model's BF16 (and FP16) weights while ``from_pretrained`` loads it.

    Args:
        modules_to_not_convert: names of modules to leave as they are: a full name, a prefix that ends at a dot, a
            suffix, or a regular expression (the rules of transformers).
        embeddings: compress ``nn.Embedding`` too; an output layer that is tied to it shares the compressed weight.
        experts: compress the stacked (three-dimensional) expert weights of mixture-of-experts models.
        convolutions: compress convolutions that are matrix products (patch embeddings, 1x1).
        merge: layers that read the same input (query, key, value; gate, up) share one blob, so that a GPU computes them
            in one product. Concerns the model in memory only: it is not saved, and files are the same either way.
        version: version of the format (``docs/format.md``).

    Raises:
        TypeError: an argument that does not exist or is of the wrong type.
        zipserv.Error: ``version`` is newer than this package reads.
    """

    def __init__(
        self,
        modules_to_not_convert: Iterable[str] | None = None,
        *,
        embeddings: bool = True,
        experts: bool = True,
        convolutions: bool = True,
        merge: bool = True,
        version: int = VERSION,
        quant_method: str = METHOD,
    ) -> None:
        if isinstance(modules_to_not_convert, str):
            raise TypeError(
                f"modules_to_not_convert takes a list of names, not one string: [{modules_to_not_convert!r}]"
            )
        if quant_method != METHOD:
            raise ValueError(f"quant_method is {quant_method!r}, this configuration is for {METHOD!r}")
        if version != VERSION:
            raise Error(f"zipserv format version {version}, this package reads version {VERSION}: use a newer zipserv")
        names = list(modules_to_not_convert or ())
        if not all(isinstance(name, str) for name in names):
            raise TypeError("modules_to_not_convert takes a list of names (str)")
        self.quant_method: Any = METHOD
        self.version = version
        self.modules_to_not_convert = names
        self.embeddings = bool(embeddings)
        self.experts = bool(experts)
        self.convolutions = bool(convolutions)
        self.merge = bool(merge)

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return {key: value for key, value in super().to_dict().items() if key != "merge"}
