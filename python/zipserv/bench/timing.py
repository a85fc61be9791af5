# SPDX-License-Identifier: Apache-2.0
"""Fair timing of two ways to do the same thing: CUDA graphs on a GPU, a clock on a CPU, both orders, medians.

A *rotation* is a list of calls, one for each copy of the weight, so that no call finds its weight in the cache. On a GPU
a loop of whole rotations is captured in one CUDA graph: what is timed is the device's work, not Python.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch

Call = Callable[[], object]

_CUDA: Any = torch.cuda  # torch's streams and events are not typed


def call_seconds(call: Call, device: torch.device) -> float:
    """One call from start to end on a clock, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


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


# A graph takes some microseconds to start, which its calls share: a loop is at least so long, or has so many calls.
LEAST_SECONDS = 1e-3
MOST_CALLS = 256
# A longer rotation than this is cut, as far as the cache allows.
MOST_SECONDS = 20e-3


class Rotation:
    """Calls that have all run once on the stream that will capture them, and how long one takes about.

    Every call has to run before: its kernels are compiled then, its workspace exists, and what is different about the
    first use of a weight is over, as it is in a program that does a second step.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        if not calls:
            raise ValueError("a loop needs at least one call")
        self.calls = list(calls)
        self.stream: Any = None
        self.seconds = 0.0  # not known, and not needed, on a CPU
        if device.type != "cuda":
            self.calls[0]()  # first-use costs (thread pools, compiled kernels) are not what is measured
            return
        with _CUDA.device(device):
            self.stream = _CUDA.Stream()
            self.stream.wait_stream(_CUDA.current_stream())
            self._run()
            start = time.perf_counter()
            self._run(8)
            self.seconds = (time.perf_counter() - start) / min(8, len(self.calls))  # too long where the host is slower than the device

    def _run(self, most: int | None = None) -> None:
        with _CUDA.stream(self.stream):
            for call in self.calls[:most]:
                call()
        _CUDA.current_stream().wait_stream(self.stream)
        _CUDA.synchronize()


def loop_length(calls: int, seconds: float, least: int) -> int:
    """How many calls of about ``seconds`` a loop over a rotation of ``calls`` has: whole rotations for a millisecond, but
    no more than 256 calls if one rotation has fewer; of a rotation longer than 20 ms a part, with at least ``least`` calls."""
    if calls * seconds > MOST_SECONDS:
        return min(calls, max(least, math.ceil(MOST_SECONDS / seconds)))
    return calls * max(1, min(math.ceil(LEAST_SECONDS / (calls * seconds)), MOST_CALLS // calls))


class Loop:
    """A loop of calls that can be run and timed as one; ``seconds()`` is the time for one call.

    ``length``: how many calls a graph has; the rotation is repeated for it. By default what :func:`loop_length` says.
    """

    def __init__(self, calls: Sequence[Call] | Rotation, device: torch.device, length: int | None = None) -> None:
        rotation = calls if isinstance(calls, Rotation) else Rotation(calls, device)
        self._calls = rotation.calls
        self._device = device
        self._graph: Any = None
        if device.type == "cuda":
            self._calls = list(islice(cycle(rotation.calls), length or loop_length(len(rotation.calls), rotation.seconds, len(rotation.calls))))
            self._capture(rotation.stream)

    def _capture(self, stream: Any) -> None:
        with _CUDA.device(self._device):
            self._graph = _CUDA.CUDAGraph()
            with _CUDA.graph(self._graph, stream=stream):  # what the warm-up allocated for this stream is there already
                for call in self._calls:
                    call()
            self._graph.replay()
            _CUDA.synchronize()

    def __len__(self) -> int:
        return len(self._calls)

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


def loops(first: Sequence[Call], second: Sequence[Call], device: torch.device, least: int | None = None) -> tuple[Loop, Loop]:
    """Two loops of the same length, long enough for the faster of the two; ``least``: calls that pass the cache, by default all."""
    one, two = Rotation(first, device), Rotation(second, device)
    length = None
    if device.type == "cuda":
        length = loop_length(len(one.calls), min(one.seconds, two.seconds), min(len(one.calls), least or len(one.calls)))
    return Loop(one, device, length), Loop(two, device, length)


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
