# SPDX-License-Identifier: Apache-2.0
"""Checks and times variants of the ZipGEMM kernels beside cuBLAS, past the engine: for finding plans, not for claims.

    python tools/gpu/variants.py mma 2,6 1,12 2,4 --shapes 4096x4096,28672x4096 --tokens 1,8,16
    python tools/gpu/variants.py wgmma 2,2 1,4 --tokens 64,128 --weights trained
    python tools/gpu/variants.py mma 2,6 --compile-only      # without a GPU: registers and spills

A variant is MW,KW (gemm.cuh). Each is compiled for the present GPU with the number of tokens rounded up, checked against float64, then
timed in a CUDA graph over copies of the weight (500 MB or more in rotation) with programmatic dependent launch, as the engine does.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "kernels" / "sass")]

import zipserv  # noqa: E402
from nvrtc import NVRTC  # noqa: E402
from zipserv.bench import weights  # noqa: E402
from zipserv.bench.timing import compare, loops  # noqa: E402

XSTAGES = 2
PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
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


def smem_bytes(kernel: str, mw: int, kw: int, n: int) -> int:
    """ZS_GEMM_SMEM of the kernel's source."""
    if kernel == "mma":
        return mw * kw * 8192 + kw * XSTAGES * n * 144 + kw * XSTAGES * 16 + 16
    return mw * kw * 2 * 8192 + kw * XSTAGES * n * 128 + kw * XSTAGES * 16


def compiled(kernel: str, mw: int, kw: int, n: int, arch: str) -> tuple[bytes, str]:
    folder = ROOT / "kernels"
    headers = {path.name: path.read_text() for path in folder.glob("*.cuh")}
    defines = [f"-DZS_N={n}", f"-DZS_MW={mw}", f"-DZS_KW={kw}", f"-DZS_XSTAGES={XSTAGES}"]
    name = f"zipgemm_{kernel}.cu"
    result = NVRTC().compile(name, (folder / name).read_text(), headers, [f"-arch={arch}", "--std=c++17", "-Xptxas", "-v", *defines])
    registers, spills = re.search(r"Used (\d+) registers", result.log), re.search(r"(\d+) bytes spill stores", result.log)
    return result.cubin, f"{registers[1] if registers else '?'} registers, {spills[1] if spills else '?'} bytes spilled"


class Variant:
    """One compiled variant on the present device."""

    def __init__(self, kernel: str, mw: int, kw: int, n: int, arch: str) -> None:
        self.mw, self.kw = mw, kw
        self.threads = (32 if kernel == "mma" else 128) * mw * kw
        self.smem = smem_bytes(kernel, mw, kw, n)
        self.blocks = torch.cuda.get_device_properties(0).multi_processor_count
        self.cuda = ctypes.CDLL("libcuda.so.1")
        cubin, self.note = compiled(kernel, mw, kw, n, arch)
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.cuda.cuModuleLoadData(ctypes.byref(module), cubin))
        self.check(self.cuda.cuModuleGetFunction(ctypes.byref(self.function), module, f"zs_zipgemm_{kernel}".encode()))
        self.check(self.cuda.cuFuncSetAttribute(self.function, MAX_SMEM, self.smem))
        # The kernel's own flag for "no sum here yet" (gemm.cuh).
        self.workspace = torch.full((self.blocks * mw * 64 * n,), -1, dtype=torch.int32, device="cuda")

    def check(self, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"CUDA error {code}: {(text.value or b'?').decode()}")

    def __call__(self, blob: torch.Tensor, x: torch.Tensor, y: torch.Tensor, m: int, k: int) -> None:
        units = ceil_div(ceil_div(m, 64), self.mw) * ceil_div(ceil_div(k, 64), self.kw)
        u32, u64, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
        values = [pointer(blob.data_ptr()), pointer(x.data_ptr()), u64(x.stride(0)), pointer(0), pointer(y.data_ptr()), u64(y.stride(0))]
        values += [u32(m), u32(k), u32(x.shape[0]), pointer(self.workspace.data_ptr())]
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
    parser.add_argument("variants", nargs="+", help="MW,KW")
    parser.add_argument("--shapes", default="4096x4096,6144x4096,5120x5120,4096x14336,28672x4096")
    parser.add_argument("--tokens", default="1,8,16,32,64")
    parser.add_argument("--weights", default="gaussian", choices=weights.KINDS)
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    pairs = [(int(mw), int(kw)) for mw, kw in (variant.split(",") for variant in options.variants)]
    tokens = [int(n) for n in options.tokens.split(",")]
    least = 8
    classes = {n: max(least, 1 << (n - 1).bit_length()) for n in tokens}
    if options.compile_only:
        for n in sorted(set(classes.values())):
            for mw, kw in pairs:
                note = compiled(options.kernel, mw, kw, n, options.arch)[1]
                print(f"N={n} MW={mw} KW={kw}: {note}, {smem_bytes(options.kernel, mw, kw, n)} bytes shared")
        return 0

    torch.zeros(1, device="cuda")  # makes the context in which the variants are loaded
    torch.cuda.synchronize()
    wrong = 0
    built = {(pair, n): Variant(options.kernel, *pair, n, options.arch) for pair in pairs for n in sorted(set(classes.values()))}
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
            for pair in pairs:
                variant, y = built[pair, classes[n]], torch.full((n, m), float("nan"), dtype=torch.bfloat16, device="cuda")
                variant(blob, x, y, m, k)
                error = float((y.double() - exact).norm() / exact.norm())
                if not error <= bound:
                    wrong += 1
                    print(f"  {pair}: WRONG, error {error:.3g} over {bound:.3g}")
                    continue
                blas, time = microseconds([partial(F.linear, x, w) for w in plain], [partial(variant, b, x, y, m, k) for b in blobs])
                speed = f"{blas / time:.3f} x, {blob.numel() / time / 1e6:.2f} TB/s"
                print(f"  {pair}: {time:.2f} us, F.linear {blas:.2f} us, {speed}, {variant.note}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
