# SPDX-License-Identifier: Apache-2.0
"""Checks and times variants of the ZipGEMM kernels beside cuBLAS, past the engine: for finding plans, not for claims.

    python tools/gpu/variants.py mma 2,4 1,8 4,2 --shapes 4096x4096,28672x4096 --tokens 1,8,16
    python tools/gpu/variants.py wgmma 1,2,1,11,12,4 2,1,1,11,12,4 --tokens 8,32 --weights trained
    python tools/gpu/variants.py mma 2,4 --compile-only      # without a GPU: registers and spills

A variant of mma is MW,KW (gemm.cuh); one of wgmma is MW,KW,GROUPS,DECODERS,STAGES,XSTAGES (zipgemm_wgmma.cu). Each is compiled for the present
GPU with the number of tokens rounded up, checked against float64, then timed in CUDA graphs in turns with F.linear, over copies of the weight
(500 MB or more in rotation), with programmatic dependent launch, as the engine does. `zipserv tune` measures what the engine can choose.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "kernels" / "sass")]

import zipserv  # noqa: E402
from nvrtc import NVRTC  # noqa: E402
from zipserv.bench import weights  # noqa: E402
from zipserv.bench.timing import compare, loops  # noqa: E402

MMA_XSTAGES = 2
PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
# What the source says of its launches, to be read from the loaded module.
LAUNCH = '\nextern "C" __device__ unsigned zs_launch[2] = {ZS_GEMM_SMEM, ZS_THREADS};\n'
MAX_SMEM = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


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
    """A variant for up to ``n`` tokens."""

    kernel: str
    numbers: tuple[int, ...]
    n: int

    @classmethod
    def parse(cls, kernel: str, text: str, n: int) -> Spec:
        numbers = tuple(int(part) for part in text.split(","))
        if len(numbers) != (2 if kernel == "mma" else 6):
            raise SystemExit(f"{text!r} is no variant of {kernel}: see --help")
        return cls(kernel, numbers, n)

    @property
    def mw(self) -> int:
        return self.numbers[0]

    @property
    def kw(self) -> int:
        return self.numbers[1]

    @property
    def defines(self) -> list[str]:
        names = ("MW", "KW") if self.kernel == "mma" else ("MW", "KW", "GROUPS", "DECODERS", "STAGES", "XSTAGES")
        values = [f"-DZS_{name}={value}" for name, value in zip(names, self.numbers, strict=True)]
        return [f"-DZS_N={self.n}", *values, *([f"-DZS_XSTAGES={MMA_XSTAGES}"] if self.kernel == "mma" else [])]


def compiled(spec: Spec, arch: str) -> tuple[bytes, str]:
    folder = ROOT / "kernels"
    headers = {path.name: path.read_text() for path in folder.glob("*.cuh")}
    name = f"zipgemm_{spec.kernel}.cu"
    source = (folder / name).read_text() + LAUNCH
    result = NVRTC().compile(name, source, headers, [f"-arch={arch}", "--std=c++17", "-Xptxas", "-v", *spec.defines])
    registers, spills = re.search(r"Used (\d+) registers", result.log), re.search(r"(\d+) bytes spill stores", result.log)
    return result.cubin, f"{registers[1] if registers else '?'} registers, {spills[1] if spills else '?'} bytes spilled"


class Variant:
    """One compiled variant on the present device."""

    def __init__(self, spec: Spec, arch: str) -> None:
        self.spec = spec
        self.blocks = torch.cuda.get_device_properties(0).multi_processor_count
        self.cuda = ctypes.CDLL("libcuda.so.1")
        cubin, self.note = compiled(spec, arch)
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.cuda.cuModuleLoadData(ctypes.byref(module), cubin))
        self.check(self.cuda.cuModuleGetFunction(ctypes.byref(self.function), module, f"zs_zipgemm_{spec.kernel}".encode()))
        address, size, launch = ctypes.c_uint64(), ctypes.c_size_t(), (ctypes.c_uint32 * 2)()
        self.check(self.cuda.cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), module, b"zs_launch"))
        self.check(self.cuda.cuMemcpyDtoH_v2(launch, address, ctypes.c_size_t(8)))
        self.smem, self.threads = launch
        self.check(self.cuda.cuFuncSetAttribute(self.function, MAX_SMEM, self.smem))
        # The kernel's own flag for "no sum here yet" (gemm.cuh).
        self.workspace = torch.full((self.blocks * spec.mw * 64 * spec.n,), -1, dtype=torch.int32, device="cuda")

    def check(self, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"CUDA error {code}: {(text.value or b'?').decode()}")

    def tensor_map(self, x: torch.Tensor) -> ctypes.Array[ctypes.c_uint64]:
        """x in boxes of n rows of 64 columns, in the 128-byte swizzle; the driver wants it at a multiple of 64 bytes."""
        memory = (ctypes.c_uint64 * 24)()
        room = (ctypes.c_uint64 * 16).from_buffer(memory, -ctypes.addressof(memory) % 64)
        sides, strides = (ctypes.c_uint64 * 2)(x.shape[1], x.shape[0]), (ctypes.c_uint64 * 1)(2 * x.stride(0))
        box, steps = (ctypes.c_uint32 * 2)(64, self.spec.n), (ctypes.c_uint32 * 2)(1, 1)
        bf16, swizzle_128, promote_128 = 9, 3, 2
        start = ctypes.c_void_p(x.data_ptr())
        self.check(self.cuda.cuTensorMapEncodeTiled(room, bf16, 2, start, sides, strides, box, steps, 0, swizzle_128, promote_128, 0))
        return room

    def __call__(self, blob: torch.Tensor, x: torch.Tensor, y: torch.Tensor, m: int, k: int) -> None:
        spec = self.spec
        units = ceil_div(ceil_div(m, 64), spec.mw) * ceil_div(ceil_div(k, 64), spec.kw)
        u32, u64, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
        values: list[Any] = [pointer(blob.data_ptr()), pointer(x.data_ptr()), u64(x.stride(0)), pointer(0), pointer(y.data_ptr()), u64(y.stride(0))]
        values += [u32(m), u32(k), u32(x.shape[0]), pointer(self.workspace.data_ptr())]
        if spec.kernel == "wgmma":
            values.append(self.tensor_map(x))
        array = (pointer * len(values))(*[ctypes.addressof(value) for value in values])
        attribute = Attribute(id=PROGRAMMATIC)
        attribute.value[0] = 1
        three = ctypes.c_uint * 3
        stream = torch.cuda.current_stream().cuda_stream
        config = Config(three(min(self.blocks, units), 1, 1), three(self.threads, 1, 1), self.smem, stream, ctypes.pointer(attribute), 1)
        self.check(self.cuda.cuLaunchKernelEx(ctypes.byref(config), self.function, array, None))


def microseconds(first: list[Callable[[], object]], second: list[Callable[[], object]]) -> tuple[float, float]:
    """Median times of one call of each, the calls one after the other in graphs, in turns."""
    blas, ours = loops(first, second, torch.device("cuda"))
    pair = compare(blas, ours, min_rounds=7, budget=0.05)
    blas.close()
    ours.close()
    return pair.first.median * 1e6, pair.second.median * 1e6


def shape_of(text: str) -> tuple[int, int]:
    m, k = text.split("x")
    return int(m), int(k)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=("mma", "wgmma"))
    parser.add_argument("variants", nargs="+", help="MW,KW or MW,KW,GROUPS,DECODERS,STAGES,XSTAGES")
    parser.add_argument("--shapes", default="4096x4096,6144x4096,5120x5120,4096x14336,28672x4096")
    parser.add_argument("--tokens", default="1,8,16,32,64")
    parser.add_argument("--weights", default="gaussian", choices=weights.KINDS)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    tokens = [int(n) for n in options.tokens.split(",")]
    classes = {n: max(8, 1 << (n - 1).bit_length()) for n in tokens}
    specs = {(text, n): Spec.parse(options.kernel, text, n) for text in options.variants for n in sorted(set(classes.values()))}
    if options.compile_only:
        for (text, n), spec in specs.items():
            print(f"N={n} {options.kernel} {text}: {compiled(spec, options.arch)[1]}")
        return 0

    torch.zeros(1, device="cuda")  # makes the context in which the variants are loaded
    torch.cuda.synchronize()
    wrong = 0
    built = {key: Variant(spec, options.arch) for key, spec in specs.items()}
    for m, k in map(shape_of, options.shapes.split(",")):
        weight = weights.make(options.weights, m, k, device="cuda")
        blob = zipserv.compress(weight).blob
        copies = max(8, 500_000_000 // blob.numel() + 1)
        plain, blobs = [weight.clone() for _ in range(copies)], [blob.clone() for _ in range(copies)]
        for n in tokens:
            x = weights.activations(n, k, device="cuda")
            exact = x.double() @ weight.double().T
            bound = 1.05 * float((F.linear(x, weight).double() - exact).norm() / exact.norm()) + 1e-4
            print(f"{m}x{k} {options.weights} N={n}: {blob.numel() * 8 / weight.numel():.3f} bits")
            for text in options.variants:
                variant, y = built[text, classes[n]], torch.full((n, m), float("nan"), dtype=torch.bfloat16, device="cuda")
                variant(blob, x, y, m, k)
                error = float((y.double() - exact).norm() / exact.norm())
                if not error <= bound or bool((variant.workspace != -1).any()):
                    wrong += 1
                    print(f"  {text}: WRONG, error {error:.3g} over {bound:.3g}, or the workspace was not left as it was")
                    continue
                blas, time = microseconds([partial(F.linear, x, w) for w in plain], [partial(variant, b, x, y, m, k) for b in blobs])
                speed = f"{blas / time:.3f} x, {blob.numel() / time / 1e6:.2f} TB/s"
                print(f"  {text}: {time:.2f} us, F.linear {blas:.2f} us, {speed}, {variant.note}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
