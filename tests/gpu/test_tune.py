# SPDX-License-Identifier: Apache-2.0
"""Every way of a product that can be chosen gives right results, and tuning keeps what it finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_cases import assert_like_cublas, on_gpu, trained

import zipserv
from zipserv import choices, tune
from zipserv.choices import Problem

TUNE = """
import json, torch
from zipserv import choices, tune
found = list(tune.run(tune.problems([(1024, 2048)], [1], invariant=False), torch.device("cuda", 0), budget=0.01))
assert all(isinstance(x, tune.Outcome) and not x.failed for x in found), found
print(json.dumps([[str(x.problem), str(x.choice)] for x in found]))
"""

LATER = """
import json
from zipserv import choices
from zipserv.choices import Problem
print(json.dumps([[str(p), str(choices.current(0, p))] for p in (Problem(1024, 2048, 16),)]))
"""


@pytest.mark.parametrize("m, k", [(1000, 776), (4096, 1024)])
@pytest.mark.parametrize("tokens", [3, 64, 100, 200])
def test_every_way_is_right(m: int, k: int, tokens: int) -> None:
    weight = trained(m, k).cuda()
    z = on_gpu(weight)
    x = torch.randn(tokens, k, device="cuda").to(torch.bfloat16)
    problem = Problem(m, k, tune.bucket(tokens))
    ways = choices.candidates(0, problem)
    splits = []
    for shares in (1, 2, 3):
        try:
            splits.append(choices.split(0, problem, shares))
        except ValueError:  # no room for so many
            continue
    assert not tune.prepare(0, problem, [*ways, *splits])
    for way in [*ways, *splits]:
        with choices.chosen(0, problem, way):
            for _ in range(3):
                y = zipserv.linear(x, z)
        assert_like_cublas(y, x, weight, None)


def test_tuned_choices_are_used_by_the_next_process(tmp_path: Path) -> None:
    env = dict(os.environ, ZIPSERV_CACHE_DIR=str(tmp_path))

    def run(code: str) -> list[list[str]]:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        result: list[list[str]] = json.loads(done.stdout)
        return result

    assert run(TUNE) == run(LATER)
