# SPDX-License-Identifier: Apache-2.0
"""Writes plain safetensors files just as the safetensors library does, one tensor at a time.

Same order, same header: a file that this library wrote comes back byte for byte after compressing and decompressing.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from ..writer import DTYPE_NAMES, tensor_bytes

Entry = tuple[str, tuple[int, ...], torch.dtype]

# The library's order of dtypes in a file, last first.
_RANKS = "BOOL U8 I8 F8_E5M2 F8_E4M3 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64".split()


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """The library's order: larger dtypes first, so that all tensors are aligned, then by name."""
    return sorted(entries, key=lambda entry: (-_RANKS.index(DTYPE_NAMES[entry[2]]), entry[0].encode()))


def nbytes(entry: Entry) -> int:
    """Bytes of a tensor."""
    return math.prod(entry[1]) * entry[2].itemsize


def write(path: Path, entries: Iterable[Entry], metadata: Mapping[str, str], read: Callable[[str], torch.Tensor]) -> None:
    """Writes all tensors in order; ``read`` gives each by name and is called once."""
    entries = ordered(entries)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        name, shape, dtype = entry
        end = offset + nbytes(entry)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            tensor = read(entry[0])
            if (tuple(tensor.shape), tensor.dtype) != entry[1:]:
                raise ValueError(f"{entry[0]!r} is {tensor.dtype} {tuple(tensor.shape)}, announced as {entry[2]} {entry[1]}")
            file.write(tensor_bytes(tensor))
