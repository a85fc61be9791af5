# SPDX-License-Identifier: Apache-2.0
"""Fair timing of two ways to do the same thing: CUDA graphs on a GPU, a clock on a CPU, both orders, medians.

A *loop* is a list of calls, one for each copy of the weight, so that no call finds its weight in the cache. On a GPU
the whole loop is captured in one CUDA graph: what is timed is the device's work, not Python.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]

_CUDA: Any = torch.cuda  # torch's streams and events are not typed


@dataclass(frozen=True)
class Sample:
    """Seconds for one call: the median over rounds, and the spread between the 10th and 90th percentile."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def spread(self) -> float:
        """(p90 - p10) / median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def summarize(seconds: Sequence[float]) -> Sample:
    ordered = sorted(seconds)
    if not ordered:
        raise ValueError("nothing was measured")
    last = len(ordered) - 1
    return Sample(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


class Loop:
    """A loop of calls that can be run and timed as one; ``seconds()`` is the time for one call."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        if not calls:
            raise ValueError("a loop needs at least one call")
        self._calls = list(calls)
        self._device = device
        self._graph: Any = None
        self._warm_up()

    def _warm_up(self) -> None:
        if self._device.type != "cuda":
            self._calls[0]()  # first-use costs (thread pools, compiled kernels) are not what is measured
            return
        with _CUDA.device(self._device):
            side = _CUDA.Stream()
            side.wait_stream(_CUDA.current_stream())
            with _CUDA.stream(side):
                for call in self._calls[:2]:
                    call()
            _CUDA.current_stream().wait_stream(side)
            _CUDA.synchronize()
            self._graph = _CUDA.CUDAGraph()
            with _CUDA.graph(self._graph, stream=side):  # what the warm-up allocated for this stream is there already
                for call in self._calls:
                    call()
            self._graph.replay()
            _CUDA.synchronize()

    def seconds(self) -> float:
        if self._graph is None:
            start = time.perf_counter()
            for call in self._calls:
                call()
            return (time.perf_counter() - start) / len(self._calls)
        with _CUDA.device(self._device):
            begin = _CUDA.Event(enable_timing=True)
            end = _CUDA.Event(enable_timing=True)
            begin.record()
            self._graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / len(self._calls)

    def close(self) -> None:
        """Frees the graph's memory pool; without this a long scoreboard runs out of memory."""
        self._graph = None
        self._calls = []


@dataclass(frozen=True)
class Pair:
    """Two loops measured in turns. ``ratio`` is the median over rounds of first / second: above 1, the second is faster."""

    first: Sample
    second: Sample
    ratio: float
    ratio_low: float
    ratio_high: float


def compare(first: Loop, second: Loop, *, min_rounds: int = 10, max_rounds: int = 60, budget: float = 1.0) -> Pair:
    """Times both loops in turns, first-second then second-first, until ``budget`` seconds or ``max_rounds`` are used.

    Taking turns exposes both to the same clock and temperature; changing the order removes what the one that runs
    after the other gains or loses.
    """
    one: list[float] = []
    two: list[float] = []
    stop = time.perf_counter() + budget
    while len(one) < min_rounds or (len(one) < max_rounds and time.perf_counter() < stop):
        if len(one) % 2 == 0:
            one.append(first.seconds())
            two.append(second.seconds())
        else:
            two.append(second.seconds())
            one.append(first.seconds())
    ratios = summarize([a / b for a, b in zip(one, two, strict=True)])
    return Pair(summarize(one), summarize(two), ratios.median, ratios.low, ratios.high)


def measure(loop: Loop, *, min_rounds: int = 10, max_rounds: int = 60, budget: float = 1.0) -> Sample:
    """Times one loop alone."""
    seconds: list[float] = []
    stop = time.perf_counter() + budget
    while len(seconds) < min_rounds or (len(seconds) < max_rounds and time.perf_counter() < stop):
        seconds.append(loop.seconds())
    return summarize(seconds)
