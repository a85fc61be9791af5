# SPDX-License-Identifier: Apache-2.0
"""One safetensors file at a time: compress, decompress, compare. Only one tensor is in memory at any moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

import zipserv
from zipserv.checkpoint import FileWriter, TensorFile
from zipserv.format import SUFFIX
from zipserv.writer import VERSION_KEY

from ..progress import Bar
from . import plainfile
from .folder import write_atomically, writing
from .output import Code, Failure
from .plainfile import Entry
from .rules import Rules


@dataclass
class ShardReport:
    """What became of one file: bytes of its tensors before and after, and which of them are compressed now."""

    path: str
    before: int = 0
    after: int = 0
    kept: bool = False
    compressed: list[Entry] = field(default_factory=list)
    plain: list[Entry] = field(default_factory=list)

    def note(self, entry: Entry, before: int, after: int, *, compressed: bool) -> None:
        self.before += before
        self.after += after
        (self.compressed if compressed else self.plain).append(entry)

    def as_dict(self) -> dict[str, object]:
        return {
            "file": self.path,
            "bytes_before": self.before,
            "bytes_after": self.after,
            "tensors_compressed": len(self.compressed),
            "tensors_plain": len(self.plain),
            "kept_from_earlier_run": self.kept,
        }


@contextmanager
def opened(path: Path, *, verify: bool = True) -> Iterator[TensorFile]:
    """``zipserv.open_file`` of one file, whose errors are the input's fault and name the file."""
    try:
        with zipserv.open_file(path, verify=verify) as file:
            yield file
    except (Failure, OSError):
        raise
    except (zipserv.Error, ValueError, TypeError) as error:
        text = str(error)
        raise Failure(Code.INPUT, text if str(path) in text else f"{path}: {text}") from error


def _entries(file: TensorFile) -> list[Entry]:
    infos = [file.info(name) for name in file.keys()]
    return plainfile.ordered((info.name, tuple(info.shape), info.dtype) for info in infos)


def _own_metadata(file: TensorFile) -> dict[str, str]:
    """The file's strings without zipserv's, and with the mark that every compressed file gets."""
    return {"format": "pt", **{key: value for key, value in file.metadata().items() if key != VERSION_KEY}}


def entries(path: Path) -> list[Entry]:
    """Name, shape and dtype of every tensor; reads only headers."""
    with opened(path) as file:
        return _entries(file)


def compress_shard(source: Path, target: Path, rules: Rules, bar: Bar) -> ShardReport:
    """Compresses the tensors that the rules want; one that would not shrink stays as it is, like all others."""
    report = ShardReport(target.name)
    with opened(source) as file:
        found = _entries(file)
        if any(file.info(name).compressed for name, _, _ in found):
            raise Failure(Code.INPUT, f"{source}: already compressed by zipserv")
        room = FileWriter.room_for([name for name, _, _ in found], file.metadata())
        with writing(target), FileWriter(target, file.metadata(), header_room=room) as writer:
            for entry in found:
                name = entry[0]
                bar.say(name)
                tensor = file.get(name)
                assert isinstance(tensor, torch.Tensor)
                result: torch.Tensor | zipserv.ZipTensor = tensor
                before = after = plainfile.nbytes(entry)
                if rules.wants(*entry):
                    compressed = zipserv.compress(tensor)
                    if not compressed.is_raw:
                        result, after = compressed, compressed.nbytes
                writer.add(name, result)
                report.note(entry, before, after, compressed=result is not tensor)
                bar.step(before)
    return report


def decompress_shard(source: Path, target: Path, bar: Bar) -> ShardReport:
    """Writes every tensor plain, after its checksum has been checked."""
    report = ShardReport(target.name)
    with opened(source) as file:
        found = _entries(file)
        metadata = _own_metadata(file)

        def read(name: str) -> torch.Tensor:
            bar.say(name)
            tensor = _plain(file.get(name))
            stored = file.info(name).nbytes
            report.note((name, tuple(tensor.shape), tensor.dtype), stored, tensor.nbytes, compressed=False)
            bar.step(stored)
            return tensor

        write_atomically(target, lambda temporary: plainfile.write(temporary, found, metadata, read))
    return report


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits (so that NaN equals the same NaN)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def _plain(stored: torch.Tensor | zipserv.ZipTensor) -> torch.Tensor:
    return stored.decompress() if isinstance(stored, zipserv.ZipTensor) else stored


def differences(left: Path, right: Path, bar: Bar, *, checksums: bool = False) -> list[str]:
    """What differs between two files, one of which (or both, or none) is compressed; empty = the same bits.

    ``checksums``: the checksums that the files carry must be right as well.
    """
    found: list[str] = []
    with opened(left, verify=checksums) as a, opened(right, verify=checksums) as b:
        names, others = list(a.keys()), set(b.keys())
        found += [f"{name}: not in {right}" for name in names if name not in others]
        found += [f"{name}: not in {left}" for name in sorted(others - set(names))]
        for name in names:
            if name not in others:
                continue
            bar.say(name)
            try:
                one, two = _plain(a.get(name)), _plain(b.get(name))
            except zipserv.Error as error:
                found.append(f"{name}: {error}")
                continue
            if not same_bits(one, two):
                found.append(f"{name}: {_describe(one, two)}")
            bar.step(one.numel() * one.element_size())
    return found


def _describe(one: torch.Tensor, two: torch.Tensor) -> str:
    if one.dtype != two.dtype or one.shape != two.shape:
        return f"{one.dtype} {tuple(one.shape)} is not {two.dtype} {tuple(two.shape)}"
    width = one.element_size()
    wrong = (one.contiguous().flatten().view(torch.uint8) != two.contiguous().flatten().view(torch.uint8)).view(-1, width)
    count = int(wrong.any(dim=1).sum())
    return f"{count} of {one.numel()} values differ, the first at index {int(wrong.any(dim=1).nonzero()[0])}"


def problems(path: Path, bar: Bar) -> tuple[list[str], int, int]:
    """Checks a compressed file by its own checksums: (problems, tensors checked, tensors without a checksum)."""
    found: list[str] = []
    checked = without = 0
    with opened(path) as file:
        sealed = VERSION_KEY in file.metadata()  # then plain tensors have checksums too
        for name in file.keys():
            bar.say(name)
            try:
                info = file.info(name)
                if sealed or info.compressed:
                    checked += 1
                    file.get(name)
                else:
                    without += 1
                bar.step(info.nbytes)
            except zipserv.Error as error:
                found.append(str(error).removeprefix(f"{path}: "))
    return found, checked, without


def finished(source: Path, target: Path, rules: Rules | None, bar: Bar) -> ShardReport | None:
    """The report of a target that an earlier run has finished, after comparing it bit by bit; None = to be done (again).

    ``rules`` None: the target is plain, as from ``decompress``.
    """
    if not target.is_file():
        return None
    report = ShardReport(target.name, kept=True)
    try:
        if differences(source, target, bar, checksums=True):
            return None
        with opened(source) as original, opened(target) as file:
            if _own_metadata(original) != _own_metadata(file):
                return None
            for entry in _entries(file):
                info = file.info(entry[0])
                wanted = rules is not None and rules.wants(*entry)
                if info.compressed and not wanted:
                    return None
                if wanted and not info.compressed and not _stays_raw(file, entry[0]):
                    return None
                report.note(entry, plainfile.nbytes(entry), info.nbytes, compressed=info.compressed)
    except (Failure, OSError):
        return None
    if rules is None:
        report.before = _stored_bytes(source)
    return report


def _stays_raw(file: TensorFile, name: str) -> bool:
    tensor = file.get(name)
    assert isinstance(tensor, torch.Tensor)
    return zipserv.compress(tensor).is_raw


def _stored_bytes(path: Path) -> int:
    with opened(path) as file:
        return sum(file.info(name).nbytes for name in file.keys())


def stored_name(entry_name: str, *, compressed: bool) -> str:
    """The name of a tensor inside the file."""
    return entry_name + SUFFIX if compressed else entry_name
