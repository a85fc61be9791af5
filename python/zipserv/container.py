# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file: where its tensors lie, and the checksum that zipserv's own files have of it.

The safetensors library has checked a file before anything here reads it: offsets, sizes and dtypes fit.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

HEADER_KEY = "zipserv.header"
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Container:
    """What a file's header says.

    Attributes:
        metadata: the file's strings.
        places: for each stored name the first byte in the file, and the one behind the last.
        digest: checksum of the header as it is; ``metadata[HEADER_KEY]`` says what it was.
    """

    metadata: dict[str, str]
    places: dict[str, tuple[int, int]]
    digest: str


def read_container(file: BinaryIO) -> Container:
    """Read the header of a file that the safetensors library has opened without a complaint.

    Raises:
        ValueError: it is not JSON without repeated names after all.
    """
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    header: dict[str, Any] = json.loads(file.read(length), object_pairs_hook=_unique)
    places = {name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1]) for name, entry in _tensors(header).items()}
    return Container(dict(header.get(_METADATA) or {}), places, header_digest(header))


def header_digest(header: Mapping[str, Any]) -> str:
    """SHA-256 over all that a header says, however it is spelled, but for the entry that holds this very checksum.

    Args:
        header: the parsed JSON: ``__metadata__`` and, by name, each tensor's dtype, shape and offsets.
    """
    metadata = {key: value for key, value in (header.get(_METADATA) or {}).items() if key != HEADER_KEY}
    text = json.dumps({_METADATA: metadata, **_tensors(header)}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _tensors(header: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in header.items() if name != _METADATA}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in the header twice")
    return found
