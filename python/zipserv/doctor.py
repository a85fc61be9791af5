# SPDX-License-Identifier: Apache-2.0
"""What zipserv finds on this machine, and what to do about what it does not find."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """``state``: ``ok``; ``note`` (works, could be better, or not needed); ``problem`` (something will not work)."""

    what: str
    state: str
    found: str
    cure: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _library() -> Finding:
    try:
        from . import _zipserv
    except ImportError as error:
        cure = "reinstall: pip install --force-reinstall --no-deps zipserv; its build needs no compiler on the machine"
        return Finding("native library", "problem", str(error), cure)
    path = Path(str(_zipserv.__file__))
    return Finding("native library", "ok", f"{_zipserv.version()}, {path.name}, {path.stat().st_size / 1e6:.1f} MB")


def _round_trip() -> Finding:
    """Not only present but right: 64 x 64 weights through the codec."""
    try:
        import torch

        from .tensor import compress, linear

        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        packed = compress(weight)
        same = torch.equal(packed.decompress().view(torch.int16), weight.view(torch.int16))
        linear(torch.ones(1, 64, dtype=torch.bfloat16), packed)
    except Exception as error:
        return Finding("self-test", "problem", f"{type(error).__name__}: {error}", "please report this")
    if not same:
        return Finding("self-test", "problem", "weights changed on the way", "do not use this build; please report it")
    return Finding("self-test", "ok", "compress, decompress, linear on the CPU: bit-exact")


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", "problem", str(error), "pip install torch")
    if torch.version.cuda is None:
        return Finding("torch", "note", f"{torch.__version__}, built without CUDA", "for a GPU install a CUDA build of torch")
    return Finding("torch", "ok", f"{torch.__version__}, built for CUDA {torch.version.cuda}")


def _gpus() -> list[Finding]:
    try:
        import torch

        if not torch.cuda.is_available():
            cure = "" if Path("/proc/driver/nvidia").exists() else "without an NVIDIA GPU the CPU is used"
            if Path("/proc/driver/nvidia").exists():
                cure = "a driver is loaded but torch sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES"
            return [Finding("GPU", "note", "none that torch can use", cure)]
        findings = []
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found = f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {p.total_memory / 1e9:.0f} GB"
            if p.major < 8:
                cure = "the kernels need an NVIDIA GPU of compute capability 8.0 or later (Ampere)"
                findings.append(Finding(f"GPU {i}", "problem", found, cure))
            else:
                findings.append(Finding(f"GPU {i}", "ok", found))
        return findings
    except ImportError:
        return []


def _cuda() -> list[Finding]:
    """What the CUDA side says of itself: driver, NVRTC, cache of compiled kernels."""
    try:
        from . import cuda
    except ImportError as error:
        return [Finding("CUDA kernels", "note", f"not in this build: {error}")]
    report: Callable[[], dict[str, object]] | None = getattr(cuda, "report", None)
    if report is None:
        return []
    try:
        facts = report()
    except Exception as error:
        return [Finding("CUDA kernels", "note", str(error))]
    return [Finding(f"CUDA {key.replace('_', ' ')}", "ok", str(value)) for key, value in facts.items()]


def _cache() -> Finding:
    """Where compiled kernels are kept between runs."""
    chosen = os.environ.get("ZIPSERV_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(chosen or os.path.join(home, "zipserv"))
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        cure = "set ZIPSERV_CACHE_DIR to a folder that can be written; until then kernels are compiled anew in every process"
        return Finding("kernel cache", "problem", f"{path} cannot be written", cure)
    files = [f for f in path.rglob("*") if f.is_file()] if path.exists() else []
    return Finding("kernel cache", "ok", f"{path}, {len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB")


def _package(name: str, use: str, install: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "note", f"not installed; needed only {use}", install)


def examine() -> list[Finding]:
    """Looks at everything; never raises."""
    findings = [_python(), _torch(), _library()]
    if all(finding.state != "problem" for finding in findings):
        findings.append(_round_trip())
        findings += _gpus()
        findings += _cuda()
    findings.append(_cache())
    findings.append(_package("safetensors", "to read and write files", "pip install safetensors"))
    findings.append(_package("matplotlib", "for plots", "pip install 'zipserv[plots]'"))
    findings.append(_package("transformers", "to load Hugging Face models", "pip install transformers"))
    findings.append(_package("vllm", "to serve with vLLM", "pip install vllm"))
    return findings
