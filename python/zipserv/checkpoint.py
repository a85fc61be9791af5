# SPDX-License-Identifier: Apache-2.0
"""Compressed checkpoints: ordinary safetensors files, one or several with an index, in the Hugging Face manner.

A compressed weight ``NAME`` is the uint8 tensor ``NAME_zipserv``, one blob of docs/format.md; every other tensor is stored
as it is, with a checksum in the file's metadata. Readers map files into memory and check a tensor before they hand
it out.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from . import _zipserv, devices
from .container import HEADER_KEY, Container, read_container
from .errors import Error
from .format import HEADER_BYTES, SUFFIX, Header, parse_header
from .loader import Part, load, serves
from .proof import Proofs
from .streams import forget
from .tensor import ZipTensor, read_header
from .writer import (
    CHECKSUMS_KEY,
    DTYPE_NAMES,
    OWN_KEYS,
    TIED_KEY,
    VERSION,
    VERSION_KEY,
    FileWriter,
    data_checksum,
    require_writable,
    tensor_bytes,
    write_text,
)

__all__ = ["SUFFIX", "FileWriter", "TensorFile", "TensorInfo", "load_file", "open_file", "save_file"]

Value = torch.Tensor | ZipTensor
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
#: One processor (an EPYC) looks at the lists of 55 GB/s: as much as a bus brings, so two do, while the GPU checks the blobs before.
_LISTS_AHEAD = 2
_INDEX_SUFFIX = ".safetensors.index.json"


def save_file(
    tensors: Mapping[str, Value],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    max_shard_size: int | str | None = None,
) -> list[Path]:
    """Write tensors to a safetensors file, atomically: a failure leaves the old file as it was.

    Args:
        tensors: by name; ZipTensors are stored compressed, so are the blobs in a ``state_dict()``, others as they are.
            Tensors that are one and the same under several names are stored once.
        path: the file to write, e.g. ``model.safetensors``.
        metadata: strings to keep in the file.
        max_shard_size: bytes, or ``"5GB"``: more than this is split into files ``model-00001-of-00003.safetensors`` and
            ``model.safetensors.index.json`` beside ``path``.

    Returns:
        The files written, the index last.

    Raises:
        TypeError, ValueError: names, values or metadata that can't be stored.
        OSError: the disk is full, the place is read-only, and so on.
    """
    path = Path(path)
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors must be a mapping of names to tensors, not {type(tensors).__name__}")
    odd = next((name for name in tensors if not isinstance(name, str)), None)
    if odd is not None:
        raise TypeError(f"a tensor's name is a string, not {odd!r}")
    # Larger items first: each tensor then starts where its dtype can be mapped.
    order = sorted(tensors, key=lambda name: -_item_size(tensors[name]))
    unique, aliases = _find_tied(tensors, order)
    shards = _split(unique, tensors, _parse_size(max_shard_size))
    if len(shards) == 1:
        paths = [path]
    else:
        stem = path.name.removesuffix(".safetensors")
        count = len(shards)
        index_path = path.with_name(stem + _INDEX_SUFFIX)
        for replaced in (path, index_path):
            require_writable(replaced)
        paths = [path.with_name(f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors") for i in range(count)]
    writers: list[FileWriter] = []
    try:
        for shard, target in zip(shards, paths, strict=True):
            room = FileWriter.room_for([*shard, *aliases], metadata)
            writer = FileWriter(target, metadata, header_room=room)
            writers.append(writer)
            for name in shard:
                writer.add(name, tensors[name])
            for alias, name in aliases.items():
                if name in shard:
                    writer.tie(_stored(alias, tensors[alias]), _stored(name, tensors[name]))
            writer.finish()
        for writer in writers:
            writer.commit()
    finally:
        for writer in writers:
            writer.abort()
    if len(shards) == 1:
        return paths
    weight_map = {key: writer.path.name for writer in writers for key in writer.keys}
    index = {"metadata": {"total_size": sum(writer.nbytes for writer in writers)}, "weight_map": weight_map}
    write_text(index_path, json.dumps(index, indent=2, sort_keys=True) + "\n")
    path.unlink(missing_ok=True)  # a single file of the same name would be read in place of the shards
    return [*paths, index_path]


def load_file(path: str | os.PathLike[str], device: torch.device | str = "cpu", *, verify: bool = True) -> dict[str, Value]:
    """Load all tensors of a file, an index or a folder.

    Args:
        path: a ``.safetensors`` file, a ``.safetensors.index.json``, or a folder with either.
        device: where the tensors go; on the CPU they stay mapped from the file.
        verify: compare each tensor with the checksum of its original bits. Without it only the structure is checked.

    Returns:
        Tensors and ZipTensors by their original names.

    Raises:
        Error: the file is damaged, in whatever way; there is no GPU.
        OSError: it can't be opened.
        TypeError, ValueError: ``device`` is none that zipserv runs on.
    """
    with open_file(path, device, verify=verify) as file:
        return file.load()


def open_file(path: str | os.PathLike[str], device: torch.device | str = "cpu", *, verify: bool = True) -> TensorFile:
    """Open a checkpoint to read single tensors from it; arguments and errors as for :func:`load_file`."""
    return TensorFile(path, device, verify=verify)


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor, without reading it.

    Attributes:
        name: original name.
        shape, dtype: of the original tensor.
        compressed: whether it is stored as a blob.
        nbytes: bytes in the file.
        file: which file it is in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    compressed: bool
    nbytes: int
    file: Path


class TensorFile:
    """An open checkpoint: a mapping from original names to tensors that are read and checked on access."""

    def __init__(self, path: str | os.PathLike[str], device: torch.device | str = "cpu", *, verify: bool = True) -> None:
        self.device = devices.named(device)
        self.verify = verify
        self.files, weight_map = _resolve(Path(path))
        self._raw: list[BinaryIO] = []
        self._handles: list[Any] = []
        self._containers: list[Container] = []
        self._metadata: dict[str, str] = {}
        self._checksums: dict[str, str] = {}
        self._sealed: set[int] = set()  # files that must have a checksum for every plain tensor
        self._where: dict[str, tuple[int, str]] = {}
        self._tied: dict[str, str] = {}
        try:
            for number, file in enumerate(self.files):
                self._open(file)
                self._add(number, weight_map)
            self._refuse_missing(path, weight_map)
        except BaseException:
            self.close()
            raise
        if not _is_staged(self.device):
            self._close_raw()

    def _open(self, file: Path) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist or is not a file")
        raw = open(file, "rb")
        self._raw.append(raw)
        try:
            self._handles.append(safe_open(str(file), framework="pt", device="cpu"))
            # Only the library checks a container, and it opens files by name: it must have opened the one that is read here.
            if not os.path.samestat(os.fstat(raw.fileno()), os.stat(file)):
                raise Error(f"{file}: was replaced while it was opened: try again")
            self._containers.append(read_container(raw))
        except (SafetensorError, ValueError) as error:
            raise Error(f"{file}: not a valid safetensors file: {error}") from error

    def _refuse_missing(self, path: str | os.PathLike[str], weight_map: dict[str, str] | None) -> None:
        missing = sorted(set(weight_map or ()) - {key for _, key in self._where.values()})
        if missing:
            raise Error(f"{path}: the index names {missing[0]!r} in {weight_map[missing[0]]!r}, which is not there")  # type: ignore[index]

    def _add(self, number: int, weight_map: dict[str, str] | None) -> None:
        file, handle, container = self.files[number], self._handles[number], self._containers[number]
        metadata = container.metadata
        if metadata.get(VERSION_KEY, VERSION) != VERSION:
            raise Error(f"{file}: written by a newer zipserv (version {metadata[VERSION_KEY]}), this one reads {VERSION}")
        if not metadata.keys().isdisjoint((VERSION_KEY, *OWN_KEYS)):
            self._sealed.add(number)
            if self.verify and metadata.get(HEADER_KEY) != container.digest:
                said = "has no checksum for it" if HEADER_KEY not in metadata else f"says {metadata[HEADER_KEY]}"
                raise Error(f"{file}: the header (names, shapes, offsets, metadata) is damaged: checksum {container.digest}, the file {said}")
        for key in handle.keys():
            if weight_map is not None and weight_map.get(key) != file.name:
                continue
            name = _original(key, handle)
            if name in self._where:
                raise Error(f"{file}: {name!r} is stored twice")
            self._where[name] = (number, key)
        self._checksums.update(_json_strings(file, metadata, CHECKSUMS_KEY))
        for alias, kept in _json_strings(file, metadata, TIED_KEY).items():
            alias, kept = alias.removesuffix(SUFFIX), kept.removesuffix(SUFFIX)
            if alias not in self._where and kept in self._where:
                self._tied[alias] = kept
        self._metadata.update({k: v for k, v in metadata.items() if k not in OWN_KEYS})

    def keys(self) -> list[str]:
        """Original names of all tensors."""
        return [*self._where, *self._tied]

    def metadata(self) -> dict[str, str]:
        """The file's strings; of several files the last one counts."""
        return dict(self._metadata)

    def tied(self) -> dict[str, str]:
        """Names that are stored once under another name: alias -> name."""
        return dict(self._tied)

    def info(self, name: str) -> TensorInfo:
        """What the file says of a tensor; reads at most a blob's header.

        Raises:
            KeyError: there is no such tensor.
            Error: it is damaged.
        """
        number, key = self._find(name)
        part = self._handles[number].get_slice(key)
        shape, dtype = tuple(part.get_shape()), _DTYPES.get(part.get_dtype())
        file = self.files[number]
        if dtype is None:
            raise Error(f"{file}: {name!r} has the dtype {part.get_dtype()}, which is not supported")
        if key == self._where_name(name):
            nbytes = dtype.itemsize
            for size in shape:
                nbytes *= size
            return TensorInfo(name, shape, dtype, False, nbytes, file)
        if len(shape) != 1:
            raise Error(f"{file}: {key!r} should be a vector of bytes, not of shape {shape}")
        with _named(file, name):
            header = parse_header(part[: min(HEADER_BYTES, shape[0])].contiguous())
        return TensorInfo(name, header.shape, header.dtype, True, shape[0], file)

    def get(self, name: str) -> Value:
        """One tensor, checked: a ZipTensor where it is compressed, a tensor otherwise.

        Raises:
            KeyError: there is no such tensor.
            Error: it is damaged.
        """
        name = self._where_name(name)
        self._find(name)
        return self._load([name])[name]

    def load(self) -> dict[str, Value]:
        """All tensors; names that are tied share one."""
        loaded = self._load(list(self._where))
        loaded.update({alias: loaded[name] for alias, name in self._tied.items()})
        return loaded

    def _load(self, names: list[str]) -> dict[str, Value]:
        if _is_staged(self.device):
            return self._stage(names)
        return {name: self._checked(name, self._mapped(name)).to(self.device) for name in names}

    def _stage(self, names: list[str]) -> dict[str, Value]:
        """Tensors on the device, read through page-locked buffers, checked there (zipserv.proof), or in the file's pages."""
        device = self.device
        order = sorted(names, key=self._place)
        targets, parts, pages = {}, [], {}
        for name in order:
            number, begin, end = self._place(name)
            if self._where[name][1] == name:
                pages[name] = like = self._mapped(name)
                targets[name] = torch.empty(like.shape, dtype=like.dtype, device=device)
            else:  # a blob's pages are mapped when it is there: reading begins sooner so
                targets[name] = torch.empty(end - begin, dtype=torch.uint8, device=device)
            target = targets[name].reshape(-1).view(torch.uint8)
            parts.append(Part(f"{self.files[number]}: {name!r}", self._raw[number].fileno(), begin, target))
        loaded: dict[str, Value] = {}
        proofs = Proofs()
        waiting: deque[tuple[str, torch.Tensor, Header, Future[None]]] = deque()  # for their lists to be looked at

        def check(part: int) -> None:
            name = order[part]
            mapped = pages[name] if name in pages else self._mapped(name)
            header = self._proof_header(name, mapped, targets[name], proofs)
            if header is None:
                on_cpu(name, mapped)
                return
            waiting.append((name, mapped, header, pool.submit(_zipserv.check_lists, mapped.data_ptr(), mapped.numel())))
            if len(waiting) > _LISTS_AHEAD:
                prove()

        def prove() -> None:
            name, mapped, header, lists = waiting.popleft()
            with _named(self.files[self._where[name][0]], name):
                lists.result()
            if proofs.begin(name, targets[name], header):
                loaded[name] = ZipTensor._trusted(targets[name], header)
            else:
                on_cpu(name, mapped)

        def on_cpu(name: str, mapped: torch.Tensor) -> None:
            value = self._checked(name, mapped)
            loaded[name] = ZipTensor._trusted(targets[name], value.header) if isinstance(value, ZipTensor) else targets[name]

        with ThreadPoolExecutor(_LISTS_AHEAD) as pool:
            load(parts, device, check)
            while waiting:
                prove()
        for name in proofs.open_questions():
            mapped = self._mapped(name)
            self._checked(name, mapped)
            if not torch.equal(targets[name].cpu(), mapped):
                raise Error(f"{self.files[self._where[name][0]]}: {name!r}: its bytes changed on the way to {device}")
        forget([value.blob for value in loaded.values() if isinstance(value, ZipTensor)])
        return {name: loaded[name] for name in names}

    def _proof_header(self, name: str, mapped: torch.Tensor, target: torch.Tensor, proofs: Proofs) -> Header | None:
        """The header of a blob that the GPU is to check: all of it, also where the checksum need not be right."""
        number, key = self._where[name]
        if key == name:
            return None
        with _named(self.files[number], name):
            header = read_header(mapped)
        return header if proofs.takes(target, header) else None

    def _place(self, name: str) -> tuple[int, int, int]:
        """A tensor's file, its first byte there, and the one behind the last."""
        number, key = self._where[name]
        return number, *self._containers[number].places[key]

    def _mapped(self, name: str) -> torch.Tensor:
        """A stored tensor as the file has it, mapped; nothing of it is read yet."""
        number, key = self._find(name)
        with _named(self.files[number], name):
            tensor: torch.Tensor = self._handles[number].get_tensor(key)
            if key != name and tensor.dim() != 1:
                raise Error(f"{key!r} should be a vector of bytes, not of shape {tuple(tensor.shape)}")
        return tensor

    def _checked(self, name: str, tensor: torch.Tensor) -> Value:
        """The tensor in host memory, after its checks."""
        number, key = self._where[name]
        with _named(self.files[number], name):
            if key != name:
                return ZipTensor.from_blob(tensor, verify="full" if self.verify else "structure")
            expected = self._checksums.get(key)
            if self.verify and expected is None and number in self._sealed:
                raise Error("damaged: the file has no checksum for it")
            if self.verify and expected is not None:
                found = f"{data_checksum(tensor_bytes(tensor)):08x}"
                if found != expected:
                    raise Error(f"damaged: checksum {found}, the file says {expected}")
        return tensor

    def close(self) -> None:
        """Close the files; tensors that were read stay valid."""
        self._handles = []
        self._close_raw()

    def _close_raw(self) -> None:
        for raw in self._raw:
            raw.close()
        self._raw = []

    def _find(self, name: str) -> tuple[int, str]:
        if not self._handles and self.files:
            raise ValueError("the file is closed")
        name = self._where_name(name)
        if name not in self._where:
            raise KeyError(name)
        return self._where[name]

    def _where_name(self, name: str) -> str:
        return self._tied.get(name, name)

    def __getitem__(self, name: str) -> Value:
        return self.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._where) + len(self._tied)

    def __contains__(self, name: object) -> bool:
        return name in self._where or name in self._tied

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TensorFile({', '.join(map(str, self.files))}; {len(self)} tensors)"


class _named:
    """Puts file and tensor before the message of an error from below."""

    def __init__(self, file: Path, name: str) -> None:
        self._place = f"{file}: {name!r}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, (Error, SafetensorError)):
            raise Error(f"{self._place}: {error}") from error


def _is_staged(device: torch.device) -> bool:
    """Whether tensors go to the device through a ring of page-locked buffers."""
    return device.type == "cuda" and serves(device)


def _resolve(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a checkpoint, and the index's map from key to file name where there is one."""
    if path.is_dir():
        single, indexes = path / "model.safetensors", sorted(path.glob("*" + _INDEX_SUFFIX))
        if single.is_file():
            return [single], None
        if len(indexes) > 1:
            raise Error(f"{path} has several indexes: name one of {', '.join(index.name for index in indexes)}")
        if indexes:
            return _resolve(indexes[0])
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{path} holds no .safetensors file")
        return files, None
    sharded = path.with_name(path.name.removesuffix(".safetensors") + _INDEX_SUFFIX)
    if not path.exists() and path.name.endswith(".safetensors") and sharded.is_file():
        return _resolve(sharded)
    if not path.name.endswith(".json"):
        return [path], None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Error(f"{path}: not an index of safetensors files") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise Error(f"{path}: {name!r} is not the name of a file beside the index")
    return [path.with_name(name) for name in names], dict(weight_map)


def _original(key: str, handle: Any) -> str:
    """A ``_zipserv`` tensor of bytes is a blob whatever its first bytes say: a damaged one must not pass as plain."""
    if key.endswith(SUFFIX) and key != SUFFIX and handle.get_slice(key).get_dtype() == "U8":
        return key.removesuffix(SUFFIX)
    return key


def _json_strings(file: Path, metadata: Mapping[str, str], key: str) -> dict[str, str]:
    try:
        found = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise Error(f"{file}: the metadata {key!r} are not JSON") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise Error(f"{file}: the metadata {key!r} are not strings by name")
    return found


def _stored(name: str, value: Value) -> str:
    return name + SUFFIX if isinstance(value, ZipTensor) else name


def _bytes_of(value: Value) -> torch.Tensor:
    return value.blob if isinstance(value, ZipTensor) else value


def _item_size(value: Value) -> int:
    tensor = _bytes_of(value)
    return tensor.element_size() if isinstance(tensor, torch.Tensor) else 1


def _find_tied(tensors: Mapping[str, Value], order: list[str]) -> tuple[list[str], dict[str, str]]:
    """Names to store, and names that are the same tensor as one of these."""
    unique: list[str] = []
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name in order:
        tensor = _bytes_of(tensors[name])
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta:
            kind = name.endswith(SUFFIX) or isinstance(tensors[name], ZipTensor)
            same = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), kind)
            if seen.setdefault(same, name) != name:
                aliases[name] = seen[same]
                continue
        unique.append(name)
    return unique, aliases


def _split(names: list[str], tensors: Mapping[str, Value], limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        tensor = _bytes_of(tensors[name])
        nbytes = tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0
        if limit is not None and shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _parse_size(size: int | str | None) -> int | None:
    if size is None or isinstance(size, int):
        if size is not None and size < 1:
            raise ValueError("max_shard_size must be positive")
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", str(size), re.IGNORECASE)
    if match is None:
        raise ValueError(f"max_shard_size is a number of bytes, or a string as '5GB' or '500MiB', not {size!r}")
    unit = match[2].upper()
    base = 1024 if "I" in unit else 1000
    return max(1, int(float(match[1]) * base ** "BKMGT".index(unit[0])))
