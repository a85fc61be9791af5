# SPDX-License-Identifier: Apache-2.0
"""What a program waits for at its first product on a GPU: kernels compiled after installation, or read from the cache later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import zipserv

# A layer of an 8 B model's attention; the kernels are the same for larger ones.
M, K = 4096, 4096

ATTEMPTS = 2
_LIMIT = 120.0  # seconds for one process, importing torch included


def measure(device: torch.device) -> dict[str, Any]:
    """Times the first product of a fresh process with empty caches, zipserv's and the driver's, then of two more that find the kernel there.

    A first call begins with torch imported, its context made and cuBLAS loaded, and with the compressed weight in host memory.
    It holds: copying the weight to the GPU, importing ``zipserv.cuda``, opening the driver, finding and loading NVRTC,
    compiling the kernel or reading it from disk, loading it, the workspace, the launch and the product itself. ``import
    zipserv`` is timed by itself, and so is ``zipserv.cuda.warm``, which makes ready all that the weight needs for up to 64
    tokens. Of the two processes with a cache the slower counts.

    Raises zipserv.Error where a process fails, its product is wrong, or a cache was not what it should have been.
    """
    with tempfile.TemporaryDirectory(prefix="zipserv-bench-") as folder:
        empty = _fresh(device, folder)
        if empty["kernels"] < 1:
            raise zipserv.Error(f"the first call of a process with an empty kernel cache left no kernel in it ({folder})")
        cached = [_fresh(device, folder) for _ in range(ATTEMPTS)]
    for run in cached:
        if run["kernels"] != empty["kernels_after_warm"]:
            before = empty["kernels_after_warm"]
            raise zipserv.Error(f"a process compiled what it should have found in the cache, which grew from {before} to {run['kernels']}")
    return {
        "import_seconds": max(run["import_seconds"] for run in cached),
        "first_call_seconds": empty["first_call_seconds"],
        "first_call_kernels": empty["kernels"],
        "warm_seconds": empty["warm_seconds"],
        "warm_kernels": empty["kernels_after_warm"] - empty["kernels"],
        "cached_first_call_seconds": max(run["first_call_seconds"] for run in cached),
        "cached_warm_seconds": max(run["warm_seconds"] for run in cached),
        "runs": [empty, *cached],
    }


def _fresh(device: torch.device, cache: str) -> dict[str, Any]:
    variables = {
        **os.environ,
        "ZIPSERV_CACHE_DIR": cache,
        "CUDA_CACHE_PATH": os.path.join(cache, "cuda"),  # from 12.9 on NVRTC keeps what it has compiled in the driver's cache
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    program = Path(__file__).with_name("fresh.py")
    command = [sys.executable, str(program), str(device), str(M), str(K)]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=_LIMIT, check=False)
    except subprocess.TimeoutExpired as error:
        raise zipserv.Error(f"a fresh process did not finish its first product within {_LIMIT:.0f} s") from error
    if done.returncode:
        raise zipserv.Error(f"a fresh process failed: {done.stderr.strip()[-800:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    if not result["rms_error"] < 2.0**-6:
        raise zipserv.Error(f"the first product of a fresh process is wrong: RMS error {result['rms_error']:.3g} of the result's RMS")
    return result
