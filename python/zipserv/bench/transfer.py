# SPDX-License-Identifier: Apache-2.0
"""``zipserv bench --offload cpu`` and ``--load GB``: weights on their way to a GPU, from host memory at each step, or from a file once."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import zipserv
from zipserv import offload

from .gpu import WrongResult
from .machine import bus_bandwidth
from .timing import call_seconds

PIECE = 4 << 20


class Layer(nn.Module):
    """The weights of a Llama layer, for one token at a time in each row: attention to itself alone."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q_proj, self.o_proj = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.k_proj, self.v_proj = nn.Linear(hidden, hidden // 4, bias=False), nn.Linear(hidden, hidden // 4, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        attention = self.q_proj(h) * torch.sigmoid(self.k_proj(h) + self.v_proj(h)).repeat(1, 4)
        x = x + self.o_proj(attention)
        h = self.second(x)
        result: torch.Tensor = x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
        return result


class Layers(nn.Module):
    def __init__(self, count: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(hidden, inner) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def streaming(
    device: torch.device, *, layers: int = 6, hidden: int = 4096, inner: int = 14336, tokens: tuple[int, ...] = (1, 16), rounds: int = 5
) -> dict[str, Any]:
    """Tokens a second of layers that stream from host memory, plain and compressed, by the same mechanism.

    Args:
        device: where the layers compute; on the CPU they are copied to buffers there, which shows nothing but that it works.
        layers, hidden, inner: of a Llama-like model; by default of Llama-3.1-8B's shape.
        tokens: tokens of one step.
        rounds: steps that are timed; the fastest counts.

    Raises:
        WrongResult: streamed layers compute anything else than the same layers without streaming.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = Layers(layers, hidden, inner).bfloat16().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.02)
        x = {n: torch.randn(n, hidden, dtype=torch.bfloat16) for n in tokens}
    phases = {}
    for phase in ("plain", "zipserv"):
        model.to(device)
        if phase == "zipserv":
            zipserv.compress_model(model, progress=False)
        expected = {n: model(ids) for n, ids in x.items()}
        model.cpu()
        phases[phase] = _stream(model, device, x, expected, rounds)
    rows = []
    for n in tokens:
        plain, small = phases["plain"][n], phases["zipserv"][n]
        rows.append({"tokens": n, "plain": plain, "zipserv": small, "speedup": plain["seconds"] / small["seconds"]})
    return {"layers": layers, "hidden": hidden, "inner": inner, "bus_bytes_per_second": bus_bandwidth(device), "rows": rows}


def _stream(model: nn.Module, device: torch.device, x: dict[int, torch.Tensor], expected: dict[int, torch.Tensor], rounds: int) -> dict[int, Any]:
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if gpu else 0
    handle = offload.apply(model, device, stage=True)
    told = {}
    for n, ids in x.items():
        if not torch.equal(model(ids), expected[n]):
            raise WrongResult(f"layers that stream compute something else than layers that do not, with {n} tokens")
        seconds = min(call_seconds(lambda ids=ids: [model(ids) for _ in range(3)], device) for _ in range(rounds)) / 3  # type: ignore[misc]
        told[n] = {
            "seconds": seconds,
            "tokens_per_second": n / seconds,
            "streamed_bytes": handle.host_bytes,
            "buffer_bytes": handle.device_bytes,
            "peak_bytes": torch.cuda.max_memory_allocated(device) - before if gpu else None,
        }
    handle.remove()
    return told


def loading(device: torch.device, gigabytes: float, folder: Path | None = None, rounds: int = 5) -> dict[str, Any]:
    """Bytes a second from a file in the page cache, against the page cache and the bus alone, and against the safetensors library.

    Args:
        device: where the tensors go.
        gigabytes: size of the file, of random weights.
        folder: where to write it; by default the system's temporary folder.
        rounds: each is timed as often; the fastest counts.

    Raises:
        WrongResult: a tensor comes back with other bytes.
    """
    torch.manual_seed(0)
    tensors: dict[str, Any] = {}
    size = 0
    side = 4096 if gigabytes >= 0.5 else 512
    shapes = itertools.cycle(((side, side), (side // 4, side), (7 * side // 2, side), (side, 7 * side // 2)))
    while size < 1e9 * gigabytes:
        tensors[f"layers.{len(tensors)}.weight"] = z = zipserv.compress((torch.randn(next(shapes), device=device) * 0.02).bfloat16())
        size += z.nbytes
    tensors["norm.weight"] = torch.ones(side).bfloat16()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place, "model.safetensors")
        zipserv.save_file(tensors, path)
        nbytes = path.stat().st_size
        for name, value in zipserv.load_file(path, device=device).items():
            a, b = (t.blob if isinstance(t, zipserv.ZipTensor) else t for t in (value, tensors[name]))
            if not torch.equal(a.cpu(), b.cpu()):
                raise WrongResult(f"{name} comes back from the file with other bytes")
        del value, tensors

        def rate(call: Callable[[], object]) -> float:
            return nbytes / min(call_seconds(call, device) for _ in range(rounds))

        return {
            "bytes": nbytes,
            "page_cache": nbytes / min(_read_seconds(path, nbytes, device) for _ in range(rounds)),
            "bus": bus_bandwidth(device),
            "load": rate(lambda: zipserv.load_file(path, device=device)),
            "load_unverified": rate(lambda: zipserv.load_file(path, device=device, verify=False)),
            "safetensors": rate(lambda: _plain(path, device)),
        }


def _plain(path: Path, device: torch.device) -> object:
    """The safetensors library, which maps a file for the CPU and reads nothing: so each tensor is copied there."""
    loaded = safetensors.torch.load_file(path, device=str(device))
    return loaded if device.type == "cuda" else {name: tensor.clone() for name, tensor in loaded.items()}


def _read_seconds(path: Path, nbytes: int, device: torch.device) -> float:
    """Time for as many threads as processors, at most 16, to read a file into buffers of their own, page-locked where there is a GPU."""
    count = min(16, len(os.sched_getaffinity(0)))
    cuts = range(0, nbytes, PIECE)
    turns = itertools.count()
    buffers: list[Any] = [torch.zeros(PIECE, dtype=torch.uint8, pin_memory=device.type == "cuda").numpy() for _ in range(count)]
    file = os.open(path, os.O_RDONLY)

    def read(buffer: Any) -> None:
        view = memoryview(buffer)
        while (turn := next(turns)) < len(cuts):
            os.preadv(file, [view[: min(PIECE, nbytes - cuts[turn])]], cuts[turn])

    threads = [threading.Thread(target=read, args=(buffer,)) for buffer in buffers]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    os.close(file)
    return seconds


def streaming_lines(result: dict[str, Any]) -> list[str]:
    """The result of :func:`streaming` as text."""
    bus = result["bus_bytes_per_second"]
    lines = [f"{result['layers']} layers of {result['hidden']} x {result['inner']}, weights streamed from host memory"]
    if bus:
        lines[0] += f"; bus {bus / 1e9:.1f} GB/s"
    for row in result["rows"]:
        parts = []
        for phase in ("plain", "zipserv"):
            told = row[phase]
            peak = f", peak {told['peak_bytes'] / 1e9:.3f} GB on the GPU" if told["peak_bytes"] is not None else ""
            parts.append(
                f"{phase} {told['tokens_per_second']:.2f} tokens/s ({told['streamed_bytes'] / 1e9:.3f} GB a step, "
                f"{told['streamed_bytes'] / told['seconds'] / 1e9:.1f} GB/s, two blocks {told['buffer_bytes'] / 1e9:.3f} GB{peak})"
            )
        lines.append(f"{row['tokens']} tokens: {'; '.join(parts)}; speed-up {row['speedup']:.3f}x")
    return lines


def loading_lines(result: dict[str, Any]) -> list[str]:
    """The result of :func:`loading` as text."""
    bound = min(result["page_cache"], result["bus"] or result["page_cache"])
    named = (
        ("page cache into buffers, threads alone", "page_cache"),
        ("bus, from page-locked memory", "bus"),
        ("load_file, all checks", "load"),
        ("load_file, verify=False", "load_unverified"),
        ("safetensors, no checks", "safetensors"),
    )
    lines = [f"a file of {result['bytes'] / 1e9:.2f} GB in the page cache, GB/s and share of the slower of cache and bus:"]
    lines += [f"  {text:40}{result[key] / 1e9:8.1f}{result[key] / bound:8.0%}" for text, key in named if result[key] is not None]
    return lines
