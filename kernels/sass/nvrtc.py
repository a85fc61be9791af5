# SPDX-License-Identifier: Apache-2.0
"""NVRTC through ctypes, just enough to compile a kernel to a cubin without a GPU, and the tools that read cubins."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path


class MissingTool(RuntimeError):
    """Something that the checks need is not installed."""


def _package_dirs(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    return [Path(p) for p in spec.submodule_search_locations or []] if spec else []


def _find(pattern: str, packages: tuple[str, ...], cure: str) -> Path:
    for package in packages:
        for directory in _package_dirs(package):
            found = sorted(directory.glob(pattern))
            if found:
                return found[-1]
    raise MissingTool(f"{pattern} is in none of the packages {', '.join(packages)}: {cure}")


@cache
def disassembler() -> str:
    """nvdisasm of the triton package (torch brings it), or of the system."""
    try:
        return str(_find("backends/nvidia/bin/nvdisasm", ("triton",), "pip install triton"))
    except MissingTool:
        path = shutil.which("nvdisasm")
        if path is None:
            raise
        return path


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    log: str


class NVRTC:
    """One NVRTC library: that at ``path``, or the installed one."""

    def __init__(self, path: Path | None = None) -> None:
        path = path or _find("**/libnvrtc.so.*", ("nvidia",), "pip install nvidia-cuda-nvrtc")
        # NVRTC does not find its builtins by itself when it is loaded by path.
        for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._lib = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = f"{major.value}.{minor.value}"

    def _check(self, code: int) -> None:
        if code:
            self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"NVRTC: {self._lib.nvrtcGetErrorString(code).decode()}")

    def compile(self, name: str, source: str, headers: dict[str, str], options: list[str]) -> Compiled:
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*[t.encode() for t in headers.values()])
        names = (ctypes.c_char_p * len(headers))(*[n.encode() for n in headers])
        self._check(self._lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names))
        try:
            flags = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
            code = self._lib.nvrtcCompileProgram(program, len(options), flags)
            log = self._text(program, "ProgramLog").decode().strip("\0\n")
            if code:
                raise RuntimeError(f"NVRTC cannot compile {name} with {' '.join(options)}:\n{log}")
            return Compiled(self._text(program, "CUBIN"), log)
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        return subprocess.run([disassembler(), "-c", f.name], check=True, capture_output=True, text=True).stdout
