# SPDX-License-Identifier: Apache-2.0
"""What the machine can do, measured in the same run: copy bandwidth and matmul rate. And what machine it is."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F

import zipserv

from .timing import Loop, call_seconds, measure


@dataclass(frozen=True)
class Limits:
    """``copy_bandwidth``: bytes read plus bytes written per second by a large copy; ``flops``: BF16 matmul rate."""

    copy_bandwidth: float
    flops: float
    cache_bytes: int

    def gemm_seconds(self, weight_bytes: int, m: int, k: int, tokens: int) -> float:
        """The roofline: the least time a matmul can take that reads ``weight_bytes`` of weights."""
        traffic = weight_bytes + 2 * tokens * (m + k)
        return max(traffic / self.copy_bandwidth, 2.0 * m * k * tokens / self.flops)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 64 MiB where it cannot be found out."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20
    try:
        size = int(os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    except (ValueError, OSError):
        size = 0
    return size if size > 0 else 64 << 20


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The best of several: a limit is what the machine can do, not what it does on average."""
    loop = Loop([call] * 4, device)
    seconds = measure(loop, min_rounds=5, max_rounds=20, budget=0.5).low
    loop.close()
    return seconds


def bus_bandwidth(device: torch.device) -> float | None:
    """Bytes a second from pinned host memory to a GPU: 256 MiB, the best of five. None for a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return source.numel() / min(call_seconds(partial(target.copy_, source, non_blocking=True), device) for _ in range(5))


def _copy_bandwidth(nbytes: int, device: torch.device) -> float:
    source = torch.ones(nbytes // 4, dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    if device.type == "cuda":
        # A copy in a graph goes to the copy engine, which is slower than the multiprocessors (2.7 against 4.2 TB/s on an H200).
        return 2.0 * nbytes / _best_seconds(partial(torch.bitwise_not, source, out=target), device)
    return 2.0 * nbytes / _best_seconds(partial(target.copy_, source), device)


def _matmul_rate(side: int, device: torch.device) -> float:
    a = torch.randn(side, side, device=device).to(torch.bfloat16)
    b = torch.randn(side, side, device=device).to(torch.bfloat16)
    return 2.0 * side**3 / _best_seconds(partial(F.linear, a, b), device)


def measure_limits(device: torch.device, *, quick: bool = False) -> Limits:
    """Measures copy bandwidth and matmul rate, a second or two; ``quick`` is for tests."""
    if device.type == "cuda":
        copied, side = 1 << 30, 8192
    else:
        copied, side = (1 << 25, 256) if quick else (1 << 28, 1024)
    bandwidth, flops = _copy_bandwidth(copied, device), _matmul_rate(side, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Limits(bandwidth, flops, cache_bytes(device))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, object]:
    """Date, machine and versions: what a figure is worth nothing without."""
    about: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "zipserv": zipserv.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["gpu"] = properties.name
        about["capability"] = f"sm_{properties.major}{properties.minor}"
        about["sms"] = properties.multi_processor_count
        about["cuda"] = torch.version.cuda
    return about


def limits_dict(limits: Limits) -> dict[str, object]:
    return asdict(limits)
