# SPDX-License-Identifier: Apache-2.0
"""Checks and times variants of the ZipGEMM kernels beside cuBLAS, past the engine: for finding layouts, not for claims.

    python tools/gpu/variants.py wgmma:N=64,MW=1,KW=2,STAGES=16,XSTAGES=4 wgmma:N=64,STAGES=16,XSTAGES=8 --tokens 33,64
    python tools/gpu/variants.py pair:N=256 pair:N=192,XSTAGES=5 pair:N=256,CLUSTER=1 relay --tokens 384,768 --weights gaussian,trained
    python tools/gpu/variants.py build/try/wgmma:N=128 wgmma:N=128 --sustained    # kernels changed in build/try, beside those of the tree
    python tools/gpu/variants.py pair:N=192,XSTAGES=5 --compile-only              # without a GPU: registers and spills

A variant is [FOLDER/]KERNEL[:NAME=VALUE,..]: the kernel is mma, wgmma, pair or relay, the names are the macros of its source without ZS_, and
GRID is a number of blocks, ``all``, or ``even`` (whole groups of strips or tiles; the default). Sources in FOLDER replace those of the tree.

Each is compiled for the present GPU, checked against float64, then timed in CUDA graphs in turns with F.linear and the others, over copies of the
weight (300 MB or more in rotation), with programmatic dependent launch, as the engine does. --sustained: each for some tenths of a second, at
whatever clock the GPU keeps up. `zipserv tune` measures what the engine can choose. Exit code 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "kernels" / "sass")]

import zipserv  # noqa: E402
from nvrtc import NVRTC, Compiled  # noqa: E402
from zipserv.bench import weights  # noqa: E402
from zipserv.bench.timing import Loop, Rotation  # noqa: E402

KERNELS = ("mma", "wgmma", "pair", "relay")
# What the source says of its launches, to be read from the loaded module.
LAUNCH = """
#ifndef ZS_CLUSTER
#define ZS_CLUSTER 1
#endif
extern "C" __device__ unsigned zs_launch[6] = {ZS_GEMM_SMEM, ZS_THREADS, ZS_CLUSTER, ZS_N, ZS_MW, ZS_KW};
"""
MAX_SMEM = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CLUSTER, PROGRAMMATIC = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, .._PROGRAMMATIC_STREAM_SERIALIZATION
MOST_SHARERS = 4  # clusters a tile of the kernels for many tokens (turns.cuh)
CONTROL = 32  # words before the flags of the relay kernel


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("smem", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    ]


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


@dataclass(frozen=True)
class Spec:
    """What the text of a variant says."""

    text: str
    folder: Path | None
    kernel: str
    defines: tuple[str, ...]
    grid: str = "even"

    @classmethod
    def parse(cls, text: str) -> Spec:
        match = re.fullmatch(r"(?:(.+)/)?(\w+)(?::([\w=,]+))?", text)
        settings = [part.partition("=") for part in match[3].split(",")] if match and match[3] else []
        if match is None or match[2] not in KERNELS or not all(name and value for name, _, value in settings):
            raise SystemExit(f"{text!r} is no variant: see --help")
        values = {name: value for name, _, value in settings}
        grid = values.pop("GRID", "even")
        if grid not in ("even", "all") and not grid.isdecimal():
            raise SystemExit(f"{text!r}: GRID is {grid!r}, allowed are even, all or a number of blocks")
        folder = Path(match[1]) if match[1] else None
        if folder is not None and not folder.is_dir():
            raise SystemExit(f"{text!r}: {folder} is no folder")
        return cls(text, folder, match[2], tuple(f"-DZS_{name}={value}" for name, value in values.items()), grid)

    def compile(self, arch: str) -> Compiled:
        files: dict[str, str] = {}
        for folder in (ROOT / "kernels", self.folder):
            files |= {path.name: path.read_text() for path in folder.glob("*.cu*")} if folder else {}
        name = f"zipgemm_{self.kernel}.cu"
        headers = {name: text for name, text in files.items() if name.endswith(".cuh")}
        return NVRTC().compile(name, files[name] + LAUNCH, headers, [f"-arch={arch}", "--std=c++17", "-Xptxas", "-v", *self.defines])


def note(compiled: Compiled) -> str:
    registers, spills = re.search(r"Used (\d+) registers", compiled.log), re.search(r"(\d+) bytes spill stores", compiled.log)
    serial = ", wgmma SERIALIZED" if "serializ" in compiled.log else ""
    return f"{registers[1] if registers else '?'} registers, {spills[1] if spills else '?'} bytes spilled{serial}"


@dataclass
class Scratch:
    """Memory of the relay kernel for one shape of the weight."""

    flags: torch.Tensor
    decoded: torch.Tensor


@dataclass
class Variant:
    """One compiled variant on the present device."""

    spec: Spec
    compiled: Compiled
    scratch: dict[tuple[int, int], Scratch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.blocks = torch.cuda.get_device_properties(0).multi_processor_count
        self.cuda = ctypes.CDLL("libcuda.so.1")
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.cuda.cuModuleLoadData(ctypes.byref(module), self.compiled.cubin))
        self.check(self.cuda.cuModuleGetFunction(ctypes.byref(self.function), module, f"zs_zipgemm_{self.spec.kernel}".encode()))
        address, size, launch = ctypes.c_uint64(), ctypes.c_size_t(), (ctypes.c_uint32 * 6)()
        self.check(self.cuda.cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), module, b"zs_launch"))
        self.check(self.cuda.cuMemcpyDtoH_v2(launch, address, ctypes.c_size_t(24)))
        self.smem, self.threads, self.cluster, self.n, self.mw, self.kw = launch
        self.check(self.cuda.cuFuncSetAttribute(self.function, MAX_SMEM, self.smem))
        each = ctypes.c_int()  # blocks of a multiprocessor
        self.check(self.cuda.cuOccupancyMaxActiveBlocksPerMultiprocessor(ctypes.byref(each), self.function, self.threads, ctypes.c_size_t(self.smem)))
        blocks = int(self.spec.grid) if self.spec.grid.isdecimal() else self.blocks
        if blocks > each.value * self.blocks:
            raise SystemExit(f"{self.spec.text}: blocks wait for each other, and {each.value * self.blocks} are on this GPU at once")
        # The kernels' own flag for "no sum here yet" (gemm.cuh).
        self.workspace = torch.full((blocks * self.mw * 64 * self.n,), -1, dtype=torch.int32, device="cuda")

    @property
    def few(self) -> bool:
        """Of a kernel that takes no more than N tokens."""
        return self.spec.kernel in ("mma", "wgmma")

    def check(self, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{self.spec.text}: CUDA error {code}: {(text.value or b'?').decode()}")

    def grid(self, m: int, k: int, n: int) -> int:
        if self.spec.grid.isdecimal():
            return int(self.spec.grid)
        strips, columns = ceil_div(m, 64), ceil_div(k, 64)
        if self.few:
            groups = ceil_div(strips, self.mw)
            most = min(self.blocks, groups * ceil_div(columns, self.kw))
            if self.spec.grid == "all":
                return most
            return groups * (most // groups) if groups <= most else ceil_div(groups, ceil_div(groups, most))
        clusters = self.blocks // self.cluster
        tiles = ceil_div(strips, self.mw) * ceil_div(n, self.n * self.cluster)
        if self.spec.grid == "even" and self.spec.kernel == "pair" and tiles < clusters:
            clusters = tiles * min(clusters // tiles, MOST_SHARERS, columns)
        return clusters * self.cluster

    def tensor_map(self, x: torch.Tensor, rows: int) -> ctypes.Array[ctypes.c_uint64]:
        """x in boxes of so many rows of 64 columns, in the 128-byte swizzle; the driver wants it at a multiple of 64 bytes."""
        memory = (ctypes.c_uint64 * 24)()
        room = (ctypes.c_uint64 * 16).from_buffer(memory, -ctypes.addressof(memory) % 64)
        sides, strides = (ctypes.c_uint64 * 2)(x.shape[1], x.shape[0]), (ctypes.c_uint64 * 1)(2 * x.stride(0))
        box, steps = (ctypes.c_uint32 * 2)(64, rows), (ctypes.c_uint32 * 2)(1, 1)
        bf16, swizzle_128, promote_128 = 9, 3, 2
        start = ctypes.c_void_p(x.data_ptr())
        self.check(self.cuda.cuTensorMapEncodeTiled(room, bf16, 2, start, sides, strides, box, steps, 0, swizzle_128, promote_128, 0))
        return room

    def relay_scratch(self, m: int, k: int) -> Scratch:
        if (m, k) not in self.scratch:
            pairs = ceil_div(ceil_div(m, 64), 2) * ceil_div(k, 64)
            flags = torch.full((CONTROL + pairs,), -1, dtype=torch.int32, device="cuda")
            self.scratch = {(m, k): Scratch(flags, torch.empty(pairs * 2 * 8192, dtype=torch.uint8, device="cuda"))}
        return self.scratch[m, k]

    def clean(self) -> bool:
        """Whether the memory that launches share is as they have to leave it."""
        return not any(bool((t != -1).any()) for t in (self.workspace, *(s.flags for s in self.scratch.values())))

    def __call__(self, blob: torch.Tensor, x: torch.Tensor, y: torch.Tensor, m: int, k: int) -> None:
        n, u32, u64, pointer = x.shape[0], ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
        product: list[Any] = [pointer(x.data_ptr()), u64(x.stride(0)), pointer(0), pointer(y.data_ptr()), u64(y.stride(0)), u32(m), u32(k), u32(n)]
        product.append(pointer(self.workspace.data_ptr()))
        values: list[Any]
        if self.few:
            values = [pointer(blob.data_ptr()), *product]
            if self.spec.kernel == "wgmma":
                values.append(self.tensor_map(x, min(self.n, ceil_div(n, 8) * 8)))
        else:
            tiles = ceil_div(m, 64) * ceil_div(k, 64)
            headers = blob.data_ptr() + 128  # docs/format.md section 1
            fixed = headers + ceil_div(8 * tiles, 128) * 128
            values = [pointer(headers), pointer(fixed), pointer(fixed + 5632 * tiles), *product]
            rows = self.n * self.cluster // 4
            if self.spec.kernel == "relay":
                scratch = self.relay_scratch(m, k)
                values += [pointer(scratch.flags.data_ptr()), pointer(scratch.decoded.data_ptr())]
                rows = self.n // self.cluster
            values += [self.tensor_map(x, rows), self.tensor_map(y, self.n)]
        array = (pointer * len(values))(*[ctypes.addressof(value) for value in values])
        attributes = (Attribute * 2)(Attribute(id=PROGRAMMATIC), Attribute(id=CLUSTER))
        attributes[0].value[0] = 1
        attributes[1].value[0], attributes[1].value[1], attributes[1].value[2] = self.cluster, 1, 1
        three = ctypes.c_uint * 3
        stream = torch.cuda.current_stream().cuda_stream
        count = 2 if self.cluster > 1 else 1
        config = Config(three(self.grid(m, k, n), 1, 1), three(self.threads, 1, 1), self.smem, stream, attributes, count)
        self.check(self.cuda.cuLaunchKernelEx(ctypes.byref(config), self.function, array, None))


def in_turns(loops: Sequence[Loop], rounds: int, seconds: Callable[[Loop], float]) -> list[float]:
    """Median microseconds of one call of each, timed by ``seconds``, forwards and backwards in turn."""
    times: list[list[float]] = [[] for _ in loops]
    for turn in range(rounds):
        for i in range(len(loops)) if turn % 2 else reversed(range(len(loops))):
            times[i].append(seconds(loops[i]) * 1e6)
    return [statistics.median(t) for t in times]


def sustained(one: Loop, period: float = 0.7) -> float:
    """Seconds of a call when it has run for a quarter of ``period`` seconds, over such a period."""
    repeats = max(1, round(period / (one.seconds() * len(one))))
    for _ in range(ceil_div(repeats, 4)):
        one.seconds()
    start = time.perf_counter()
    for _ in range(repeats):
        one.seconds()
    return (time.perf_counter() - start) / (repeats * len(one))


def loop(calls: Sequence[Callable[[], object]]) -> Loop:
    device = torch.device("cuda")
    return Loop(Rotation(calls, device), device)


def shape_of(text: str) -> tuple[int, int]:
    m, k = text.split("x")
    return int(m), int(k)


def measure(variants: Sequence[Variant], m: int, k: int, kind: str, tokens: Sequence[int], options: argparse.Namespace) -> int:
    """Prints a line for each variant and number of tokens; returns how many were wrong."""
    weight = weights.make(kind, m, k, device="cuda")
    blob = zipserv.compress(weight).blob
    copies = max(4, 300_000_000 // blob.numel() + 1)
    plain, blobs = [weight.clone() for _ in range(copies)], [blob.clone() for _ in range(copies)]
    wrong = 0
    for n in tokens:
        x = weights.activations(n, k, device="cuda")
        exact = x.double() @ weight.double().T
        bound = 1.05 * float((F.linear(x, weight).double() - exact).norm() / exact.norm()) + 1e-4
        loops, chosen = [loop([partial(F.linear, x, w) for w in plain])], []
        for variant in variants:
            if variant.few and n > variant.n:
                continue
            y = torch.full((n, m), float("nan"), dtype=torch.bfloat16, device="cuda")
            variant(blob, x, y, m, k)
            error = float((y.double() - exact).norm() / exact.norm())
            if not error <= bound or not variant.clean():
                wrong += 1
                print(f"  {variant.spec.text}: WRONG, error {error:.3g} over {bound:.3g}, or the workspace was not left as it was", flush=True)
                continue
            chosen.append(variant)
            loops.append(loop([partial(variant, b, x, y, m, k) for b in blobs]))
        blas, *times = in_turns(loops, 3, sustained) if options.sustained else in_turns(loops, options.rounds, Loop.seconds)
        print(f"{m}x{k} {kind} N={n}: {blob.numel() * 8 / weight.numel():.3f} bits, F.linear {blas:.2f} us", flush=True)
        for variant, took in zip(chosen, times, strict=True):
            print(f"  {blas / took:.3f} x, {took:.2f} us, {blob.numel() / took / 1e6:.2f} TB/s  {variant.spec.text}", flush=True)
        for one in loops:
            one.close()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", type=Spec.parse, help="[FOLDER/]KERNEL[:NAME=VALUE,..]")
    parser.add_argument("--shapes", default="4096x4096,6144x4096,4096x14336,28672x4096")
    parser.add_argument("--tokens", default="64")
    parser.add_argument("--weights", default="gaussian", help=f"of {', '.join(weights.KINDS)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sustained", action="store_true")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda spec: spec.compile(options.arch), options.variants))
    for spec, one in zip(options.variants, compiled, strict=True):
        print(f"{spec.text}: {note(one)}")
    if options.compile_only:
        return 0
    torch.zeros(1, device="cuda")  # makes the context in which the variants are loaded
    torch.cuda.synchronize()
    variants = [Variant(spec, one) for spec, one in zip(options.variants, compiled, strict=True)]
    tokens = [int(n) for n in options.tokens.split(",")]
    wrong = 0
    for m, k in map(shape_of, options.shapes.split(",")):
        for kind in options.weights.split(","):
            wrong += measure(variants, m, k, kind, tokens, options)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
