# SPDX-License-Identifier: Apache-2.0
"""Writing safetensors files in one pass: tensors as they come, the header last, the file in place only when complete."""

from __future__ import annotations

import json
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from . import _zipserv
from .container import HEADER_KEY, header_digest
from .format import SUFFIX
from .tensor import ZipTensor, check_blob

VERSION_KEY = "zipserv"
CHECKSUMS_KEY = "zipserv.checksums"
TIED_KEY = "zipserv.tied"
VERSION = "1"
#: Metadata that belong to one file and its bytes; they are never handed on.
OWN_KEYS = (CHECKSUMS_KEY, TIED_KEY, HEADER_KEY)

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

_CHECKSUM_ROW = 1 << 20


class FileWriter:
    """Writes one safetensors file, tensor by tensor, holding none of them.

    The data goes to a temporary file beside ``path``, behind room for the header. When the ``with`` block ends, the
    header is written and the file renamed to ``path``; when it ends with an exception, the temporary file is removed
    and whatever was at ``path`` is as it was.

    Args:
        path: the file to write.
        metadata: strings to keep in the file.
        header_room: bytes to reserve for the header: :meth:`room_for` of the names to come.

    Raises:
        TypeError: metadata that is not strings.
        OSError: the place can't be written to; PermissionError also for a file at ``path`` that is marked read-only.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None, *, header_room: int = 1 << 20) -> None:
        self.path = Path(path)
        self._metadata = _checked_metadata(metadata)
        self._room = -(-(8 + header_room) // 64) * 64 - 8
        self._entries: dict[str, dict[str, Any]] = {}
        self._checksums: dict[str, str] = {}
        self._tied: dict[str, str] = {}
        self._size = 0
        require_writable(self.path)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
        self._file = os.fdopen(os.open(self._temporary, flags, 0o666), "wb")
        self._file.seek(8 + self._room)

    @staticmethod
    def room_for(names: Iterable[str], metadata: Mapping[str, str] | None = None) -> int:
        """Bytes that suffice for a header of these tensors (original names) and this metadata."""
        room = 1024 + len(json.dumps(dict(metadata or {})))
        # A name may stand in the header, in the checksums (JSON in JSON: quotes doubled) and among the tied ones.
        return room + sum(5 * len(json.dumps(name)) + 400 for name in names)

    def add(self, name: str, value: torch.Tensor | ZipTensor) -> None:
        """Write one tensor, from any device.

        Args:
            name: its original name; a ZipTensor is stored under ``NAME_zipserv``.
            value: a ZipTensor, or a dense tensor of any dtype that safetensors knows; a uint8 tensor whose name ends in
                ``_zipserv`` (as in state dicts) must be a valid blob.

        Raises:
            TypeError: another type, layout or dtype.
            ValueError: the name exists; a tensor follows one of smaller items at an offset where it can't be mapped (add
                tensors of larger items first).
            Error: a ``_zipserv`` tensor that is not a valid blob.
            OSError: the disk is full, or another failure to write.
        """
        if not isinstance(name, str):
            raise TypeError(f"a tensor's name is a string, not {type(name).__name__}")
        if isinstance(value, ZipTensor):
            key, tensor = name + SUFFIX, value.blob
        else:
            key, tensor = name, _require_storable(name, value)
            if key.endswith(SUFFIX) and tensor.dtype == torch.uint8:
                check_blob(tensor)
        twin = key.removesuffix(SUFFIX) if key.endswith(SUFFIX) else key + SUFFIX
        if key in self._entries or twin in self._entries or key in self._tied or key == "__metadata__":
            raise ValueError(f"{name!r} is in the file already, or can't be a tensor's name")
        if self._size % tensor.element_size():
            raise ValueError(f"{name!r} ({tensor.dtype}) would not be aligned: add tensors of larger items first")
        data = tensor_bytes(tensor)
        self._file.write(data)
        end = self._size + data.nbytes
        self._entries[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._size, end],
        }
        self._size = end
        if not key.endswith(SUFFIX):
            self._checksums[key] = f"{data_checksum(data):08x}"

    def tie(self, alias: str, name: str) -> None:
        """Note that ``alias`` is the same tensor as ``name`` (stored keys), which was added before."""
        if name not in self._entries or alias in self._entries:
            raise ValueError(f"can't tie {alias!r} to {name!r}")
        self._tied[alias] = name

    @property
    def keys(self) -> list[str]:
        """Stored keys so far."""
        return list(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of tensors so far."""
        return self._size

    def finish(self) -> None:
        """Write the header and bring all to the disk, still under the temporary name."""
        metadata = {"format": "pt", **self._metadata, VERSION_KEY: VERSION}
        if self._checksums:
            metadata[CHECKSUMS_KEY] = json.dumps(self._checksums, separators=(",", ":"))
        if self._tied:
            metadata[TIED_KEY] = json.dumps(self._tied, separators=(",", ":"))
        metadata[HEADER_KEY] = header_digest({"__metadata__": metadata, **self._entries})
        header = json.dumps({"__metadata__": metadata, **self._entries}, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise ValueError(f"the header has {len(header)} bytes, {self._room} were reserved: give a larger header_room")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def commit(self) -> None:
        """Put the finished file in its place, at once."""
        commit_file(self._temporary, self.path)

    def abort(self) -> None:
        """Remove the temporary file; does nothing after :meth:`commit`."""
        try:
            self._file.close()
        except OSError:
            pass  # a full disk shows again when the buffer is flushed; the file goes anyway
        finally:
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
                self.commit()
        finally:
            self.abort()


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a temporary file beside ``path``, then put it in place in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        fill(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        commit_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def commit_file(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError:
            pass  # some file systems can't sync folders; the rename is done all the same
        finally:
            os.close(folder)


def tensor_bytes(tensor: torch.Tensor) -> Any:
    """The tensor's bytes in host memory as a NumPy array; no copy where it lies there contiguously."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy()


def data_checksum(data: Any) -> int:
    """Checksum of any bytes: that of docs/format.md, section 7, over them as a matrix of 16-bit numbers.

    Whole rows of 2**20 numbers are one matrix, the rest is a matrix of one row; an odd last byte counts as a number
    of its own. The sums are added.
    """
    count = data.size // 2
    rows, rest = divmod(count, _CHECKSUM_ROW)
    total = int(data[-1]) if data.size % 2 else 0
    address = data.ctypes.data
    if rows:
        total += _zipserv.checksum(address, rows, _CHECKSUM_ROW)
    if rest:
        total += _zipserv.checksum(address + 2 * rows * _CHECKSUM_ROW, 1, rest)
    return total % 2**32


def _require_storable(name: str, value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name!r} is a {type(value).__name__}: a file holds tensors and ZipTensors")
    if value.layout != torch.strided or value.is_quantized:
        raise TypeError(f"{name!r} is sparse or quantized, safetensors holds dense tensors: .to_dense() or .dequantize()")
    if value.dtype not in DTYPE_NAMES:
        raise TypeError(f"{name!r} is {value.dtype}, which safetensors does not know")
    if value.is_meta:
        raise ValueError(f"{name!r} is on the meta device and has no values to save")
    return value


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    checked = dict(metadata or {})
    for key, value in checked.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata are strings by strings, not {key!r}: {value!r}")
    return {key: value for key, value in checked.items() if key not in (VERSION_KEY, *OWN_KEYS)}


def require_writable(path: Path) -> None:
    """Raise OSError where a rename to ``path`` would replace what is not to be replaced."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, a file's name is needed")
    if not path.exists():
        return
    if not path.is_file():  # a rename would put a file in the place of /dev/null itself
        raise OSError(f"{path} is a device or a pipe, a file's name is needed")
    # A rename would replace a read-only file without asking; its owner marked it for a reason.
    if not stat.S_IMODE(path.stat().st_mode) & 0o222 or not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is read-only")
