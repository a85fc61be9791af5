# SPDX-License-Identifier: Apache-2.0
"""From files to a GPU at the speed of the files.

Threads read pieces into a small ring of pinned buffers, and a stream of the engine's copies each piece on from there. The host waits for a
buffer that is to be filled again, never for the device as a whole; its memory is the ring, whatever the size of the files.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from .errors import Error
from .streams import copy_stream

#: Bytes of one buffer: large enough for the bus, small enough that a tensor is cut into work for many threads.
CHUNK = 4 << 20
MOST_THREADS = 16
BUFFERS = 2  # of each thread: one is filled while the other is copied
_CUDA: Any = torch.cuda  # torch's streams and events are not typed


@dataclass(frozen=True)
class Part:
    """Bytes of a file and where they go.

    Attributes:
        what: names them in errors.
        file: descriptor of the open file.
        offset: the first byte in the file.
        target: contiguous ``(nbytes,)`` uint8 tensor on the loader's device.
    """

    what: str
    file: int
    offset: int
    target: torch.Tensor


class Loader:
    """Copies parts of files to one device. Not for use by several threads at once.

    On the CPU it does the same without streams: that is for tests, since mapping a file costs less.

    Args:
        device: where the targets are.
        threads: readers; by default one for each processor, at most 16.
    """

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.threads = threads or min(MOST_THREADS, _processors())
        self._lanes: list[_Lane] = []
        self._pool: ThreadPoolExecutor | None = None
        self._stream = copy_stream(device) if device.type == "cuda" else None

    def load(self, parts: Sequence[Part], check: Callable[[int], None]) -> None:
        """Fill the targets. Work that the current stream gets afterwards sees them filled.

        Args:
            parts: what to read, best in the order in which it lies in the files.
            check: called with the number of each part, in order, once all of the part was read; while later parts are.

        Raises:
            Error: a file ends before a part does.
            OSError: it can't be read.
            Exception: what ``check`` raises. Nothing is under way any more that the current stream would not wait for.
        """
        run = _Run(parts)
        if self._stream is not None:  # the targets may be memory that queued work still uses
            self._stream.wait_stream(_CUDA.current_stream(self.device))
        readers = [self._start(lane, run) for lane in self._ready_lanes(min(self.threads, len(run.chunks)))]
        try:
            for number in range(len(parts)):
                run.await_part(number)
                check(number)
        except BaseException:
            run.stop = True
            raise
        finally:
            for reader in readers:
                reader.exception()  # waits; a failure of its own came up in await_part
            if self._stream is not None:
                _CUDA.current_stream(self.device).wait_stream(self._stream)

    def close(self) -> None:
        """End the threads and let the buffers go."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool, self._lanes = None, []

    def _ready_lanes(self, count: int) -> list[_Lane]:
        if len(self._lanes) < count:
            ring = torch.empty(count * BUFFERS * CHUNK, dtype=torch.uint8, pin_memory=self._stream is not None)
            pieces = iter(torch.split(ring, CHUNK))
            self._lanes = [_Lane([_Slot(next(pieces), self._stream) for _ in range(BUFFERS)]) for _ in range(count)]
        return self._lanes[:count]

    def _start(self, lane: _Lane, run: _Run) -> Future[None]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, "zipserv-loader")
        return self._pool.submit(self._read, lane, run)

    def _read(self, lane: _Lane, run: _Run) -> None:
        # Inference mode: the targets of a caller in that mode may be written to by no other.
        with torch.inference_mode(), _CUDA.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            for chunk in run:
                try:
                    slot = lane.next()
                    slot.fill(chunk)
                    slot.send(chunk)
                except BaseException as error:
                    run.fail(error)
                    raise
                run.done(chunk)


@dataclass(frozen=True)
class _Chunk:
    number: int  # of its part
    part: Part
    begin: int
    end: int


class _Run:
    """One call of ``load``: what is left to read, and which parts are complete."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.stop = False
        self.chunks: list[_Chunk] = []
        self._left: list[int] = []
        for number, part in enumerate(parts):
            size = part.target.numel()
            cuts = range(0, size, CHUNK)
            self.chunks += [_Chunk(number, part, begin, min(size, begin + CHUNK)) for begin in cuts]
            self._left.append(len(cuts))
        self._next = itertools.count()
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def __iter__(self) -> _Run:
        return self

    def __next__(self) -> _Chunk:
        number = next(self._next)
        if self.stop or number >= len(self.chunks):
            raise StopIteration
        return self.chunks[number]

    def done(self, chunk: _Chunk) -> None:
        with self._changed:
            self._left[chunk.number] -= 1
            if not self._left[chunk.number]:
                self._changed.notify()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self.stop = True
            self._error = self._error or error
            self._changed.notify()

    def await_part(self, number: int) -> None:
        """Wait until a part was read; raises what a reader raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._left[number])
            if self._error is not None:
                raise self._error


class _Slot:
    """One buffer of the ring."""

    def __init__(self, buffer: torch.Tensor, stream: Any) -> None:
        self._buffer, self._stream = buffer, stream
        data: Any = buffer.numpy()
        self._bytes = memoryview(data)
        # Blocking: a thread that waits for the bus leaves its processor to those that check.
        self._sent = _CUDA.Event(blocking=True) if stream is not None else None

    def fill(self, chunk: _Chunk) -> None:
        if self._sent is not None:
            self._sent.synchronize()  # returns at once for an event that was never recorded
        place, end = 0, chunk.end - chunk.begin
        while place < end:
            got = os.preadv(chunk.part.file, [self._bytes[place:end]], chunk.part.offset + chunk.begin + place)
            if got == 0:
                raise Error(f"{chunk.part.what}: the file was cut short")
            place += got

    def send(self, chunk: _Chunk) -> None:
        size = chunk.end - chunk.begin
        chunk.part.target[chunk.begin : chunk.end].copy_(self._buffer[:size], non_blocking=True)
        if self._sent is not None:
            self._sent.record(self._stream)


class _Lane:
    """The buffers of one thread, in turns."""

    def __init__(self, slots: list[_Slot]) -> None:
        self._slots = itertools.cycle(slots)

    def next(self) -> _Slot:
        return next(self._slots)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
