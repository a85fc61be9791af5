# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel variant for every architecture, and counts the instructions of the decode core by pipe."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nvrtc import NVRTC, MissingTool, disassemble

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent
REPO = KERNELS.parent
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
OPTIONS = ["-std=c++17", "-default-device"]  # those of core/cuda/jit


library: Path | None = None  # of NVRTC; None: the installed one


@cache
def nvrtc() -> NVRTC:
    return NVRTC(library)


@cache
def headers() -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted(KERNELS.glob("*.cuh"))}


@dataclass(frozen=True)
class Variant:
    arch: str
    source: str
    entry: str
    defines: tuple[str, ...]
    smem: int
    block: int

    def __str__(self) -> str:
        return f"{self.arch}-{self.entry}-{','.join(d.removeprefix('ZS_') for d in self.defines)}"


@dataclass(frozen=True)
class Usage:
    registers: int
    spill_bytes: int
    stack_bytes: int
    warnings: tuple[str, ...]


@cache
def variants() -> tuple[Variant, ...]:
    """The variants that the launch plans choose, as kernels/sass/variants tells them."""
    go = shutil.which("go") or ("/usr/local/go/bin/go" if Path("/usr/local/go/bin/go").exists() else None)
    if go is None:
        raise MissingTool("the list of kernel variants comes from the Go launch plans: go is not on the PATH")
    out = subprocess.run([go, "run", "./kernels/sass/variants"], cwd=REPO, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"go run ./kernels/sass/variants: {out.stderr}")
    return tuple(Variant(v["arch"], v["source"], v["entry"], tuple(v["defines"] or ()), v["smem"], v["block"]) for v in json.loads(out.stdout))


_WHOLE = "\n-- whole"  # the last line of what is kept
_USAGE = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.S
)


@cache
def _ptxas(arch: str, source: str, defines: tuple[str, ...]) -> str:
    """What ptxas says of a source; kept by what it was told, so that test processes do not compile the same twice (some minutes, all together)."""
    options = [*OPTIONS, f"-arch={arch}", "--ptxas-options=-v", *(f"-D{d}" for d in defines)]
    text = (KERNELS / source).read_text()
    key = hashlib.sha256(repr((nvrtc().version, source, text, headers(), options)).encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"zipserv-sass-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with open(folder / key, "a+") as kept:
        fcntl.flock(kept, fcntl.LOCK_EX)  # who comes while it is being compiled waits
        kept.seek(0)
        log = kept.read()
        if not log.endswith(_WHOLE):
            log = nvrtc().compile(source, text, headers(), options).log + _WHOLE
            kept.truncate(0)
            kept.write(log)
    return log.removesuffix(_WHOLE)


@cache
def usage(v: Variant) -> Usage:
    log = _ptxas(v.arch, v.source, v.defines)
    for name, stack, stores, loads, registers in _USAGE.findall(log):
        if name == v.entry:
            warnings = tuple(line for line in log.splitlines() if "warning" in line.lower() or "serialized" in line.lower())
            return Usage(int(registers), int(stores) + int(loads), int(stack), warnings)
    raise RuntimeError(f"ptxas says nothing of {v.entry}:\n{log}")


def usages(some: Iterable[Variant]) -> dict[Variant, Usage]:
    """usage() of many variants, compiled on all cores (NVRTC does not hold the interpreter's lock)."""
    some = list(some)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in [pool.submit(_ptxas, *key) for key in dict.fromkeys((v.arch, v.source, v.defines) for v in some)]:
            result.result()
    return {v: usage(v) for v in some}


# A kernel that decodes 32 weights a lane COPIES times between a load and a store with constant addresses; the difference of two such kernels
# is the decode core alone.
_PROBE = """
#include "format.cuh"
struct __align__(16) Quad { uint32_t v[4]; };
extern "C" __global__ void probe(const Quad* in, Quad* out) {
    in += threadIdx.x * (3 * COPIES);
    out += threadIdx.x * (4 * COPIES);
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        const Quad a = in[3 * i], b = in[3 * i + 1], c = in[3 * i + 2];
        const uint32_t s[8] = {a.v[0], a.v[1], a.v[2], a.v[3], b.v[0], b.v[1], b.v[2], b.v[3]};
        uint32_t d[16];
        decode32(s, c.v[0], c.v[1], c.v[2], c.v[3], d);
#pragma unroll
        for (int q = 0; q < 4; q++) out[4 * i + q] = Quad{{d[4 * q], d[4 * q + 1], d[4 * q + 2], d[4 * q + 3]}};
    }
}
"""

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_MEMORY = ("LD", "ST", "ATOM", "RED", "CCTL", "UBLKCP", "SYNCS")
_FMA = ("IMAD", "FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2")
_CONTROL = ("BRA", "EXIT", "NOP", "BSSY", "BSYNC", "WARPSYNC", "BAR", "DEPBAR", "RET", "CALL", "YIELD", "ACQBULK", "ERRBAR", "MEMBAR")
_SPECIAL = ("S2R", "S2UR", "CS2R", "R2UR", "POPC", "FLO", "MUFU", "I2F", "F2I", "F2F", "I2I")


def pipe(opcode: str) -> str:
    """The pipe of a SASS instruction: integer, fma, memory, control, uniform or other."""
    name = opcode.split(".")[0]
    if name.startswith(_MEMORY):
        return "memory"
    if name in _FMA:
        return "fma"
    if name in _CONTROL:
        return "control"
    if name.startswith("U"):
        return "uniform"
    if name in _SPECIAL:
        return "other"
    return "integer"


def count(arch: str, copies: int) -> Counter[str]:
    options = [*OPTIONS, f"-arch={arch}", f"-DCOPIES={copies}"]
    text = disassemble(nvrtc().compile("probe.cu", _PROBE, headers(), options).cubin)
    return Counter(_INSTRUCTION.findall(text))


@cache
def decode_core(arch: str) -> dict[str, int]:
    """Warp instructions by pipe for 1024 weights: 32 in each lane."""
    few, many = count(arch, 1), count(arch, 3)
    total: Counter[str] = Counter()
    for opcode in many | few:
        total[pipe(opcode)] += many[opcode] - few[opcode]
    return {name: round(n / 2) for name, n in sorted(total.items())}


@cache
def ceilings() -> dict[str, dict[str, int]]:
    return json.loads((HERE / "ceilings.json").read_text())
