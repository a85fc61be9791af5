# SPDX-License-Identifier: Apache-2.0
"""A model folder as it lies on disk: weight shards, their indexes, configurations, and all other files."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..writer import replace_file, require_writable
from .output import Code, Failure, WriteFailure

SHARD = ".safetensors"
INDEX = ".safetensors.index.json"
UNFINISHED = ".zipserv-unfinished.json"
METHOD = "zipserv"

_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")

# A configuration or an index is text written by tools; one larger than this is not what it says it is.
_LARGEST_JSON = 256 << 20


@dataclass
class Folder:
    """Paths are relative to ``root``."""

    root: Path
    shards: list[Path] = field(default_factory=list)
    indexes: list[Path] = field(default_factory=list)
    configs: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    def shard_bytes(self, shard: Path) -> int:
        return (self.root / shard).stat().st_size


def scan(root: Path) -> Folder:
    """Sorts the files of a folder. Links to files are read as files (as in the Hugging Face cache); ``.git`` is left out.

    Raises Failure where the folder holds no safetensors file.
    """
    folder = Folder(root)
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error

    for directory, subdirectories, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(directory)
        subdirectories[:] = [] if real in seen else sorted(d for d in subdirectories if d != ".git")
        if real in seen:  # a link that leads back up
            continue
        seen.add(real)
        for name in sorted(names):
            path = Path(directory, name).relative_to(root)
            if name == UNFINISHED or not (root / path).is_file():
                continue
            if name.endswith(INDEX):
                folder.indexes.append(path)
            elif name.endswith(SHARD):
                folder.shards.append(path)
            else:
                folder.others.append(path)
    if not folder.shards:
        raise Failure(Code.INPUT, f"{root}: no *.safetensors file in this folder; a model in another form must be saved as safetensors first")
    homes = {shard.parent for shard in folder.shards}
    folder.configs = [path for path in folder.others if path.name == "config.json" and path.parent in homes]
    folder.others = [path for path in folder.others if path not in set(folder.configs)]
    return folder


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file; Failure where it is anything else."""
    if path.stat().st_size > _LARGEST_JSON:
        raise Failure(Code.INPUT, f"{path}: {path.stat().st_size} bytes is too large for a configuration or an index")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Failure(Code.INPUT, f"{path}: not a JSON document: {error}") from error
    if not isinstance(document, dict):
        raise Failure(Code.INPUT, f"{path}: a JSON object is expected, found {type(document).__name__}")
    return document


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tells failures to write apart from all others."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteFailure(reason if str(path) in reason else f"{path}: cannot be written: {reason}") from error


def write_atomically(path: Path, fill: Callable[[Path], object]) -> None:
    """Lets ``fill`` write a temporary file beside ``path``, then puts it in place in one step.

    Whatever goes wrong, ``path`` is either as it was or complete. Raises WriteFailure.
    """
    with writing(path):
        require_writable(path)
        replace_file(path, fill)


def write_json(path: Path, document: Mapping[str, object]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy(source: Path, target: Path) -> None:
    """Copies one file with its time, unless the target has the same size and time already."""
    was = source.stat()
    if target.is_file():
        now = target.stat()
        if was.st_size == now.st_size and was.st_mtime_ns == now.st_mtime_ns:
            return
    make_directory(target.parent)

    def fill(temporary: Path) -> None:
        shutil.copyfile(source, temporary)
        os.utime(temporary, ns=(was.st_atime_ns, was.st_mtime_ns))

    write_atomically(target, fill)


@contextmanager
def locked(marker: Path) -> Iterator[None]:
    """Keeps a second run out of the same folder; WriteFailure where there is one at work."""
    with open(marker, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WriteFailure(f"{marker.parent}: another run is writing into this folder") from error
        except OSError:
            pass  # a file system without locks
        yield


def make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteFailure(f"{path}: cannot be created: {error.strerror or error}") from error


def remove_leftovers(root: Path) -> None:
    """Removes temporary files that a killed run has left behind."""
    for path in root.rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def rewrite_index(index: Mapping[str, object], rename: Callable[[str], str], total: int, where: Path) -> dict[str, object]:
    """The index with tensors renamed and its total size set anew; Failure where it is not an index."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise Failure(Code.INPUT, f"{where}: no index: 'weight_map' must map tensor names to file names")
    metadata = index.get("metadata")
    fresh = dict(metadata) if isinstance(metadata, dict) else {}
    fresh["total_size"] = total
    return {**index, "metadata": fresh, "weight_map": {rename(name): shard for name, shard in weight_map.items()}}
