# SPDX-License-Identifier: Apache-2.0
"""How products are solved on a GPU: the ways there are, which one is taken, and what measurements have chosen.

A *choice* is for a :class:`Problem`: a weight shape and a bucket of tokens, or, in the batch-invariant mode, a weight shape alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from . import _zipserv

#: Numbers of tokens for which choices are made; another number belongs to the next of these, more to the last.
BUCKETS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Problem:
    """Products of ``tokens`` tokens with an ``(m, k)`` weight; ``tokens=None``: any number, in the batch-invariant mode."""

    m: int
    k: int
    tokens: int | None

    def request(self) -> dict[str, object]:
        return {"m": self.m, "k": self.k, "tokens": self.tokens or 0, "invariant": self.tokens is None}

    def __str__(self) -> str:
        return f"{self.m}x{self.k}, " + ("batch-invariant" if self.tokens is None else f"N <= {self.tokens}")


@dataclass(frozen=True)
class Choice:
    """``kernel``: mma, wgmma, pair, solo or relay (many tokens), or decompress (and multiply by cuBLAS). The kernels have ``mw`` x ``kw`` warps (mma)
    or tiles a step of a block, side by side in rows and along K (pair, solo: ``kw`` x 64 tokens a block), and deal the work to ``blocks`` blocks."""

    kernel: str
    mw: int = 0
    kw: int = 0
    blocks: int = 0

    @classmethod
    def of(cls, reply: Mapping[str, Any]) -> Choice:
        return cls(**reply)

    @property
    def fused(self) -> bool:
        return self.kernel != "decompress"

    def __str__(self) -> str:
        return f"{self.kernel} {self.mw}x{self.kw}, {self.blocks} blocks" if self.fused else "decompress, cuBLAS"


@dataclass(frozen=True)
class Entry:
    """One measured choice: seconds of a product with it, and with what is done without it."""

    problem: Problem
    choice: Choice
    seconds: float
    default_seconds: float

    def request(self) -> dict[str, object]:
        return {**self.problem.request(), "choice": asdict(self.choice), "seconds": self.seconds, "default_seconds": self.default_seconds}

    @classmethod
    def of(cls, reply: Mapping[str, Any]) -> Entry:
        problem = Problem(reply["m"], reply["k"], None if reply.get("invariant") else reply["tokens"])
        return cls(problem, Choice.of(reply["choice"]), reply["seconds"], reply["default_seconds"])


def _ask(device: int, do: str, **words: object) -> dict[str, Any]:
    reply: dict[str, Any] = json.loads(_zipserv.cuda_control(device, json.dumps({"do": do, **words})))
    return reply


def candidates(device: int, problem: Problem) -> list[Choice]:
    """The ways that are worth measuring; the first is what is done without a choice."""
    return [Choice.of(c) for c in _ask(device, "candidates", **problem.request())["choices"]]


def split(device: int, problem: Problem, shares: int) -> Choice:
    """The best layout in which ``shares`` blocks share every row of the weight, each with an equal part of K.

    Raises ValueError where the GPU has no room for so many.
    """
    return Choice.of(_ask(device, "candidates", **problem.request(), split=shares)["choices"][0])


def current(device: int, problem: Problem) -> Choice:
    """What is done now."""
    return Choice.of(_ask(device, "current", **problem.request())["current"])


def prepare(device: int, problem: Problem, choice: Choice) -> None:
    """Compiles and loads what a choice needs, and changes nothing. May be called from several threads at once."""
    _ask(device, "prepare", **problem.request(), choice=asdict(choice))


def choose(device: int, problem: Problem, choice: Choice) -> None:
    """Later products of this process are solved so, until :func:`unchoose`. Captured CUDA graphs keep what they have.

    Raises ValueError where the problem cannot be solved so.
    """
    _ask(device, "choose", **problem.request(), choice=asdict(choice))


def unchoose(device: int, problem: Problem) -> None:
    """Takes :func:`choose` back."""
    _ask(device, "unchoose", **problem.request())


@contextmanager
def chosen(device: int, problem: Problem, choice: Choice) -> Iterator[None]:
    """:func:`choose` for the time of a ``with`` block."""
    choose(device, problem, choice)
    try:
        yield
    finally:
        unchoose(device, problem)


def save(device: int, entries: Iterable[Entry]) -> tuple[str, int]:
    """Writes measured choices over those for the same problems into the device's file, from which later processes take them.

    Returns the file and how many choices it holds. Raises zipserv.Error where there is no cache directory.
    """
    reply = _ask(device, "save", entries=[entry.request() for entry in entries])
    return reply["file"], reply.get("total", 0)


def files() -> list[dict[str, Any]]:
    """All files of measured choices: ``path``, and ``error`` (why it is not used) or ``key`` (what it was measured with) and ``entries``."""
    found = []
    for file in _ask(0, "list").get("files", ()):
        if "error" in file:
            found.append({"path": file["path"], "error": file["error"]})
            continue
        table = file["table"]
        found.append({"path": file["path"], "key": table["key"], "entries": [Entry.of(entry) for entry in table["entries"] or ()]})
    return found


def clear() -> int:
    """Removes all files of measured choices and returns their number; running processes keep what they have read."""
    return int(_ask(0, "clear").get("total", 0))
