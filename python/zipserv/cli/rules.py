# SPDX-License-Identifier: Apache-2.0
"""Which tensors ``zipserv compress`` compresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch

DTYPES = (torch.bfloat16, torch.float16)

# Below this many weights the header and the padding to whole tiles eat the gain.
SMALLEST = 64 * 64

# In a model folder: small tables and vectors that are added, not multiplied, and the routers of mixture-of-experts
# models, which engines read as plain parameters.
LEFT_PLAIN = (
    "*embed_positions*",
    "*pos_embed*",
    "*position_embedding*",
    "*relative_attention*",
    "*token_type_embedding*",
    "*wpe*",
    "*norm*",
    "*router*",
    "*.gate.weight",
    "*shared_expert_gate*",
)


@dataclass(frozen=True)
class Rules:
    """``include``: only these names (and then the defaults of a model folder do not count); ``exclude``: never these.

    Names are matched with shell wildcards. ``folder``: the input is a model folder, whose linear layers and embeddings an
    engine will run: matrices named ``*.weight`` only. A single file may hold anything: every tensor of two or more dimensions.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    folder: bool = False

    def wants(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> bool:
        weights = 1
        for size in shape:
            weights *= size
        if dtype not in DTYPES or len(shape) < 2 or weights < SMALLEST:
            return False
        if any(fnmatch(name, pattern) for pattern in self.exclude):
            return False
        if self.include:
            return any(fnmatch(name, pattern) for pattern in self.include)
        if not self.folder:
            return True
        return len(shape) == 2 and name.endswith(".weight") and not any(fnmatch(name, p) for p in LEFT_PLAIN)

    def as_dict(self) -> dict[str, object]:
        return {"include": list(self.include), "exclude": list(self.exclude), "folder": self.folder}


def plain_modules(plain: Sequence[tuple[str, Sequence[int], torch.dtype]]) -> list[str]:
    """The modules whose matrices were left as they are: ``modules_to_not_convert`` in config.json."""
    return sorted(name.removesuffix(".weight") for name, shape, dtype in plain if name.endswith(".weight") and len(shape) == 2 and dtype in DTYPES)
