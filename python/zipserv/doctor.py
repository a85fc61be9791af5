# SPDX-License-Identifier: Apache-2.0
"""What zipserv finds on this machine, and what to do about what it does not find."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


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
            cure = "without an NVIDIA GPU the CPU is used"
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


def _cuda(gpu: bool) -> list[Finding]:
    """What the CUDA side says of itself: driver, NVRTC, cache of compiled kernels; problems only where a GPU is."""
    try:
        from . import cuda

        facts = cuda.describe()
    except Exception as error:
        return [Finding("CUDA kernels", "problem" if gpu else "note", f"{type(error).__name__}: {error}")]

    def finding(what: str, part: dict[str, Any], found: str, cure: str) -> Finding:
        error = part.get("error")
        if not error:
            return Finding(what, "ok", found.format(**part))
        return Finding(what, "problem" if gpu else "note", str(error).split(": ", 1)[0], cure if gpu else "")

    findings = [
        finding("CUDA driver", facts["driver"], "CUDA {cuda} ({path})", "install an NVIDIA driver, or set ZIPSERV_LIBCUDA to libcuda.so.1"),
        finding("NVRTC", facts["nvrtc"], "{version} ({path})", "pip install nvidia-cuda-nvrtc, or set ZIPSERV_NVRTC to libnvrtc.so"),
        finding("kernel cache", facts["cache"], "{dir}, {files} kernels, {bytes} bytes", "set ZIPSERV_CACHE_DIR to a folder that can be written"),
    ]
    for device in facts["devices"]:
        name = f"kernels of GPU {device.get('index', '?')}"
        findings.append(finding(name, device, "compiled for {target}" if device.get("target") else "no compiler for them", "see above"))
        tuned = device.get("tuned")
        if tuned:
            found = tuned.get("error") or f"{tuned['choices']} choices" + (", switched off by ZIPSERV_TUNED" if tuned.get("off") else "")
            state, cure = ("note", "zipserv tune --clear removes it") if "error" in tuned else ("ok", "")
            findings.append(Finding(f"tuning of GPU {device['index']}", state, found, cure))
    return findings


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
        gpus = _gpus()
        findings += gpus + _cuda(gpu=any(finding.state == "ok" for finding in gpus))
    findings.append(_package("safetensors", "to read and write files", "pip install safetensors"))
    findings.append(_package("matplotlib", "for plots", "pip install 'zipserv[plots]'"))
    findings.append(_package("transformers", "to load Hugging Face models", "pip install transformers"))
    findings.append(_package("vllm", "to serve with vLLM", "pip install vllm"))
    return findings
