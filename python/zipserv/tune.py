# SPDX-License-Identifier: Apache-2.0
"""Measures which way of solving a product is the fastest on the GPU at hand, and keeps the answers for later processes.

Every way is checked before it is timed. What is timed is what the benchmark times: CUDA graphs over copies of the weight well past the
cache, in turns.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

import zipserv

from . import choices
from .bench import machine, weights
from .bench.gpu import free_memory, number_of_copies
from .bench.timing import Loop
from .choices import BUCKETS, Choice, Entry, Problem

# Another way has to be so much faster than what is done without it: less is noise, and would change from run to run.
MARGIN = 0.01
# Ways that are measured closely, beside what is done without a choice.
FINALISTS = 3
# A way whose first measurement is slower than this many times the best is no finalist.
HOPELESS = 1.15


class WrongResult(zipserv.Error):
    """A way gives wrong results; nothing is chosen for that problem."""


class Rig(Protocol):
    """One weight with everything to check and time products with it."""

    def check(self, problem: Problem, choice: Choice) -> None:
        """Raises WrongResult where products as now chosen are wrong."""

    def loop(self, tokens: int) -> Loop:
        """A loop over products as now chosen."""

    def close(self) -> None: ...


@dataclass
class Outcome:
    """What was found for one problem. ``seconds``: of every way that was timed; ``failed``: ways that cannot be used, and why."""

    problem: Problem
    default: Choice
    choice: Choice
    default_seconds: float
    seconds: float
    measured: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        return self.default_seconds / self.seconds

    @property
    def entry(self) -> Entry:
        return Entry(self.problem, self.choice, self.seconds, self.default_seconds)


def problems(shapes: Iterable[tuple[int, int]], tokens: Sequence[int] = (), *, invariant: bool = True) -> list[Problem]:
    """What is to be measured for weights of these shapes: the buckets that hold ``tokens`` (default: all), and the batch-invariant mode."""
    buckets = sorted({bucket(n) for n in tokens}) if tokens else list(BUCKETS)
    found = []
    for m, k in dict.fromkeys(shapes):
        found += [Problem(m, k, n) for n in buckets]
        if invariant:
            found.append(Problem(m, k, None))
    return found


def bucket(tokens: int) -> int:
    """The bucket that a number of tokens belongs to."""
    if tokens < 1:
        raise ValueError(f"a number of tokens must be at least 1, got {tokens}")
    return next((b for b in BUCKETS if tokens <= b), BUCKETS[-1])


def measured_tokens(problem: Problem) -> tuple[int, ...]:
    """The numbers of tokens that stand for a problem; their times' geometric mean counts."""
    if problem.tokens is None:
        return (1, 16, 64)
    if problem.tokens == BUCKETS[0]:
        return (1, 8, 16)
    return (problem.tokens,) if problem.tokens <= 1024 else (3 * problem.tokens // 4,)


class GpuRig:
    """A random weight with trained-like values, its compressed copies and its reference results."""

    def __init__(self, device: torch.device, m: int, k: int, cache: int, seed: int = 0) -> None:
        self._device, self._seed = device, seed
        self._weight = weights.make("trained", m, k, device=device, seed=seed)
        first = zipserv.compress(self._weight)
        copies = number_of_copies(first.nbytes, cache, free_memory(device), minimum=4)
        self._zipped = [first, *(zipserv.ZipTensor.from_blob(first.blob.clone(), verify="none") for _ in range(copies - 1))]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._rows = torch.linspace(0, m - 1, min(m, 512), device=device).round().long()

    def _input(self, tokens: int) -> torch.Tensor:
        return weights.activations(tokens, self._weight.shape[1], device=self._device, seed=self._seed + 1)

    def check(self, problem: Problem, choice: Choice) -> None:
        for tokens in measured_tokens(problem):
            x = self._input(tokens)
            y = zipserv.linear(x, self._zipped[0])
            some = torch.linspace(0, tokens - 1, min(tokens, 64), device=self._device).round().long()
            exact = x[some].double() @ self._weight[self._rows].double().T
            ours = float((y[some][:, self._rows].double() - exact).norm() / exact.norm())
            theirs = float((F.linear(x, self._weight)[some][:, self._rows].double() - exact).norm() / exact.norm())
            what = f"{problem}, {tokens} tokens, {choice}"
            if not ours <= 1.1 * theirs + 2.0**-10:
                raise WrongResult(f"{what}: the error against float64 is {ours:.3g} of the result, that of F.linear {theirs:.3g}")
            if choice.fused and not _same_bits(y, zipserv.linear(x, self._zipped[0])):
                raise WrongResult(f"{what}: a second product has other bits than the first")
            if problem.tokens is None and not _same_bits(y[-1:], zipserv.linear(x[-1:], self._zipped[0])):
                raise WrongResult(f"{what}: a token has other bits than on its own")

    def loop(self, tokens: int) -> Loop:
        x = self._input(tokens)
        return Loop([partial(zipserv.linear, x, z) for z in self._zipped], self._device)

    def close(self) -> None:
        self._zipped.clear()
        del self._weight
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@contextmanager
def _mode(problem: Problem) -> Iterator[None]:
    """The mode that a problem belongs to."""
    from .cuda import batch_invariant

    before = batch_invariant()
    zipserv.set_batch_invariant(problem.tokens is None)
    try:
        yield
    finally:
        zipserv.set_batch_invariant(before)


def prepare(device: int, problem: Problem, ways: Sequence[Choice]) -> dict[Choice, str]:
    """Compiles all ways at once, a thread each; returns those that cannot be had, and why."""

    def one(way: Choice) -> str | None:
        try:
            choices.prepare(device, problem, way)
        except (zipserv.Error, ValueError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(one, ways))
    return {way: reason for way, reason in zip(ways, reasons, strict=True) if reason is not None}


def search(rig: Rig, device: int, problem: Problem, *, budget: float = 0.1) -> Outcome:
    """Checks and times all ways to solve a problem; takes another than the default only where it is clearly faster.

    Args:
        rig: the weight.
        device: number of the GPU.
        problem: what to solve.
        budget: seconds of close measurement.

    Raises:
        WrongResult: what is done without a choice gives wrong results.
        zipserv.Error: what is done without a choice cannot be prepared.
    """
    ways = choices.candidates(device, problem)
    default = ways[0]
    failed = prepare(device, problem, ways)
    if default in failed:
        raise zipserv.Error(f"{problem}: {default}: {failed[default]}")
    tokens = measured_tokens(problem)
    loops: dict[Choice, list[Loop]] = {}
    with _mode(problem):
        try:
            quick: dict[Choice, float] = {}
            for way in ways:
                if way in failed:
                    continue
                with choices.chosen(device, problem, way):
                    try:
                        rig.check(problem, way)
                    except WrongResult as error:
                        if way == default:
                            raise
                        failed[way] = str(error)
                        continue
                    loops[way] = []
                    for n in tokens:  # one by one, so that those of an interrupted way are closed too
                        loops[way].append(rig.loop(n))
                quick[way] = _mean([min(loop.seconds() for _ in range(3)) for loop in loops[way]])
            best = sorted(quick, key=lambda way: quick[way])
            finalists = [default, *(way for way in best[:FINALISTS] if way != default and quick[way] <= HOPELESS * quick[best[0]])]
            closely = _closely({way: loops[way] for way in finalists}, budget)
        finally:
            for loop in (loop for made in loops.values() for loop in made):
                loop.close()
    winner = min(closely, key=lambda way: closely[way])
    if closely[default] < (1 + MARGIN) * closely[winner]:
        winner = default
    measured = {str(way): closely.get(way, quick[way]) for way in quick}
    return Outcome(problem, default, winner, closely[default], closely[winner], measured, {str(way): reason for way, reason in failed.items()})


def _closely(loops: dict[Choice, list[Loop]], budget: float) -> dict[Choice, float]:
    """Times all in turns, forwards and backwards; the geometric mean over the numbers of tokens of the medians."""
    seconds: dict[Choice, list[list[float]]] = {way: [[] for _ in made] for way, made in loops.items()}
    order = list(loops)
    stop = time.perf_counter() + budget
    rounds = 0
    while rounds < 5 or (rounds < 50 and time.perf_counter() < stop):
        for way in order if rounds % 2 == 0 else reversed(order):
            for times, loop in zip(seconds[way], loops[way], strict=True):
                times.append(loop.seconds())
        rounds += 1
    return {way: _mean([statistics.median(times) for times in all_times]) for way, all_times in seconds.items()}


def run(
    todo: Sequence[Problem],
    device: torch.device,
    *,
    budget: float = 0.1,
    keep: bool = True,
    rig: Callable[[int, int], Rig] | None = None,
) -> Iterator[Outcome | str]:
    """Measures problems one after the other; each answer is kept before the next is measured, so that it may be stopped at any time.

    Yields an :class:`Outcome` for every problem, or a text that says why there is none: a weight too large for the memory.

    Args:
        todo: the problems; those of one weight shape together.
        device: a CUDA device.
        budget: seconds of close measurement for a problem.
        keep: write the choices for later processes.
        rig: makes what a weight shape is measured with; for tests.

    Raises:
        WrongResult: what is done without a choice gives wrong results.
        zipserv.Error: there is no cache directory to keep choices in.
    """
    index = device.index or 0
    if keep:
        choices.save(index, [])  # finds out before any work whether choices can be kept
    if rig is None:
        cache = machine.cache_bytes(device)

        def rig(m: int, k: int) -> Rig:
            return GpuRig(device, m, k, cache)

    shapes = dict.fromkeys((p.m, p.k) for p in todo)
    for m, k in shapes:
        mine = [p for p in todo if (p.m, p.k) == (m, k)]
        try:
            made = rig(m, k)
        except (MemoryError, torch.OutOfMemoryError) as error:
            yield from (f"{problem}: {error}" for problem in mine)
            continue
        try:
            for problem in mine:
                try:
                    outcome = search(made, index, problem, budget=budget)
                except torch.OutOfMemoryError as error:
                    yield f"{problem}: {error}"
                    continue
                if keep:
                    choices.save(index, [outcome.entry])
                yield outcome
        finally:
            made.close()
