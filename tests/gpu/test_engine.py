# SPDX-License-Identifier: Apache-2.0
"""First use and the kernel cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import zipserv
import zipserv.cuda
from zipserv.bench import firstcall

FIRST_CALL = """
import torch, zipserv
z = zipserv.compress(torch.randn(512, 512).bfloat16() * 0.02).cuda()
x = torch.randn(1, 512, device="cuda").bfloat16()
zipserv.linear(x, z)
torch.cuda.synchronize()
"""


def test_first_call_compiles_once_and_is_then_cached() -> None:
    found = firstcall.measure(torch.device("cuda"))
    print(f"first call {found['first_call_seconds'] * 1e3:.0f} ms, from the cache {found['cached_first_call_seconds'] * 1e3:.0f} ms")
    assert found["first_call_kernels"] == 1 and found["warm_kernels"] >= 1
    assert 0 < found["cached_first_call_seconds"] < found["first_call_seconds"]  # how long they take is the benchmark's to say


def test_many_processes_share_a_cache(tmp_path: Path) -> None:
    env = dict(os.environ, ZIPSERV_CACHE_DIR=str(tmp_path))
    runs = [subprocess.Popen([sys.executable, "-c", FIRST_CALL], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    for run in runs:
        _, err = run.communicate(timeout=300)
        assert run.returncode == 0, err.decode()
    assert len(list(tmp_path.glob("*.kernel"))) == 1


def test_report_names_this_gpu() -> None:
    facts = zipserv.cuda.describe()
    assert "error" not in facts["driver"] and "error" not in facts["nvrtc"]
    assert facts["devices"][0]["name"] == torch.cuda.get_device_name(0)
    major, minor = torch.cuda.get_device_capability(0)
    assert facts["devices"][0]["capability"] == f"{major}.{minor}"
