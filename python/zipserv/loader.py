# SPDX-License-Identifier: Apache-2.0
"""From files to a GPU at the speed of the files.

The native library does the work (core/cuda/engine/load.go): threads of its own read pieces into page-locked buffers, and a stream of its own
copies them on. Here parts are handed over, and checked as they arrive.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import _zipserv
from .errors import Error

#: Eight read 50 GB/s from the page cache of a server and 16 read 83; a bus takes 55.
MOST_LANES = 16
#: Processors that are left to those that check: as many threads as there are processors would keep all of them, and the Go scheduler's places.
OTHERS = 2


@dataclass(frozen=True)
class Part:
    """Bytes of a file and where they go.

    Attributes:
        what: names them in errors.
        file: descriptor of the open file.
        offset: the first byte in the file.
        target: contiguous ``(nbytes,)`` uint8 tensor on a GPU.
    """

    what: str
    file: int
    offset: int
    target: torch.Tensor


def serves(device: torch.device) -> bool:
    """Whether the native library can load to this device."""
    try:
        _zipserv.cuda_side_stream(_index(device), 0)
    except Error:
        return False
    return True


def load(parts: Sequence[Part], device: torch.device, check: Callable[[int], None], lanes: int | None = None) -> None:
    """Fill the targets; all copies are done on return.

    Args:
        parts: what to read, best in the order in which it lies in the files.
        device: where the targets are.
        check: called with the number of each part, in order, while later parts are read. Work that it queues on the current stream sees
            the part complete.
        lanes: threads that read; by default one for each processor but two, at most 16.

    Raises:
        Error: a file ends before a part does, or can't be read; the device fails.
        Exception: what ``check`` raises. Nothing is under way any more then.
    """
    index, current = _index(device), _current_stream(device)
    table = array("Q")
    for part in parts:
        table.extend((part.file, part.offset, part.target.numel(), part.target.data_ptr()))
    run = _zipserv.cuda_load_start(index, current, table.buffer_info()[0], len(parts), lanes or max(1, min(MOST_LANES, _processors() - OTHERS)))
    failed = -1
    try:
        for number in range(len(parts)):
            failed = _zipserv.cuda_load_wait(run, number, current)
            if failed >= 0:
                break
            check(number)
    except BaseException:
        _finish(run, stop=True)
        raise
    error = _finish(run, stop=failed >= 0)
    if error is not None:
        raise Error(f"{parts[failed].what}: {error}" if failed >= 0 else str(error)) from error


def _finish(run: int, *, stop: bool) -> Error | None:
    try:
        _zipserv.cuda_load_finish(run, stop)
    except Error as error:
        return error
    return None


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return device.index if device.index is not None else torch.cuda.current_device()


def _current_stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
