# SPDX-License-Identifier: Apache-2.0
"""``zipserv verify``."""

from __future__ import annotations

from pathlib import Path

import click

from ..progress import Bar
from . import folder as folders
from . import shards
from .output import Code, Failure, emit, existing, json_option


def _pairs(path: Path, original: Path) -> list[tuple[Path, Path]]:
    if path.is_dir() != original.is_dir():
        raise Failure(Code.USAGE, "PATH and ORIGINAL must both be files or both be folders")
    if not path.is_dir():
        return [(path, original)]
    mine, theirs = folders.scan(path).shards, folders.scan(original).shards
    if mine != theirs:
        odd = sorted(map(str, set(mine) ^ set(theirs)))
        raise Failure(Code.FAILED_CHECK, f"the folders hold different weight files: {', '.join(odd[:5])}")
    return [(path / shard, original / shard) for shard in mine]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / folders.UNFINISHED).exists():
        raise Failure(Code.FAILED_CHECK, f"{path}: an unfinished run; the same `zipserv compress` command goes on with it")
    return [path / shard for shard in folders.scan(path).shards]


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("original", required=False, type=click.Path(path_type=Path))
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors; the exit code tells.")
@json_option
def verify(path: Path, original: Path | None, quiet: bool, as_json: bool) -> None:
    """Check that PATH holds the weights of ORIGINAL bit by bit.

    Without ORIGINAL, every compressed tensor is decompressed and compared with the checksum of its original weights.
    Exit code 1 where anything differs.
    """
    existing(path)
    found: list[str] = []
    checked = unchecked = 0
    if original is not None:
        pairs = _pairs(path, existing(original))
        with Bar(sum(b.stat().st_size for _, b in pairs), "verify", quiet=quiet or as_json) as bar:
            for mine, theirs in pairs:
                found += [f"{mine.name}: {text}" for text in shards.differences(mine, theirs, bar)]
                checked += len(shards.entries(theirs))
    else:
        files = _files(path)
        with Bar(sum(file.stat().st_size for file in files), "verify", quiet=quiet or as_json) as bar:
            for file in files:
                wrong, with_checksum, without = shards.problems(file, bar)
                found += [f"{file.name}: {text}" for text in wrong]
                checked, unchecked = checked + with_checksum, unchecked + without
        if not checked and not found:
            raise Failure(Code.INPUT, f"{path}: holds no compressed tensor, so no checksum; give the ORIGINAL to compare with")
    if found:
        shown = "\n  ".join(found[:20]) + (f"\n  and {len(found) - 20} more" if len(found) > 20 else "")
        raise Failure(Code.FAILED_CHECK, f"{path}: {len(found)} of {checked} tensors differ:\n  {shown}")
    if as_json:
        emit({"command": "verify", "tensors": checked, "without_checksum": unchecked, "against_original": original is not None})
    elif not quiet:
        how = "identical to the original, bit by bit" if original else "match the checksums of their original weights"
        extra = f"; {unchecked} plain tensors carry no checksum" if unchecked else ""
        click.echo(f"{path}: {checked} tensors {how}{extra}")
