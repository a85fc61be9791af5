# SPDX-License-Identifier: Apache-2.0
"""What the commands print, and the exit codes they end with."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Code(IntEnum):
    """Exit codes; documented in ``zipserv --help``."""

    OK = 0
    FAILED_CHECK = 1
    USAGE = 2
    INPUT = 3
    OUTPUT = 4
    MISSING = 5
    INTERRUPTED = 130


class Failure(Exception):
    """Ends a command with an exit code and a message."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class WriteFailure(Failure):
    """The output cannot be written; what was there before is untouched."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.OUTPUT, message)


_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def explain(error: Exception) -> tuple[Code, str]:
    """The exit code and the one-line message for an error that no command caught itself."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = error.strerror or str(error)
        return (Code.OUTPUT if error.errno in _WRITE_ERRORS else Code.INPUT), f"{where}{text}"
    if isinstance(error, ImportError):
        return Code.MISSING, f"{error}; `zipserv doctor` says what to install"
    if isinstance(error, MemoryError):
        return Code.MISSING, f"out of memory: {error}" if str(error) else "out of memory"
    text = str(error).strip() or type(error).__name__
    if isinstance(error, (ValueError, TypeError, RuntimeError, KeyError)):  # zipserv.Error is a RuntimeError
        return Code.INPUT, text
    return Code.INPUT, f"{type(error).__name__}: {text}"


def existing(path: Path) -> Path:
    """The path, if there is something; Failure otherwise."""
    if not path.exists():
        raise Failure(Code.INPUT, f"{path}: no such file or folder")
    return path


def json_option(command: F) -> F:
    """``--json``: one JSON document on standard output instead of text."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document for machines.")(command)


def emit(document: Mapping[str, object]) -> None:
    """Prints the JSON document of a command that succeeded."""
    click.echo(json.dumps({"ok": True, **document}, indent=1))


def size(nbytes: float) -> str:
    """``12.3 MB``: decimal units, as disks and model cards count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s"
