# SPDX-License-Identifier: Apache-2.0
"""Weights for benchmarks, made directly on the device."""

from __future__ import annotations

import torch

KINDS = ("gaussian", "trained")

# Rows are made in blocks of this many weights, so that FP32 temporaries stay small beside the weights.
_BLOCK = 1 << 26


def make(
    kind: str,
    m: int,
    k: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> torch.Tensor:
    """An ``[m, k]`` weight.

    ``gaussian``: independent values of sigma 0.02. ``trained``: what trained layers look like: sigma varies from row to
    row (log-normal, about a factor of two either way), and the tails are heavier than Gaussian (each weight's scale is
    log-normal as well; excess kurtosis about 3).

    Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of weights {kind!r}; known are: {', '.join(KINDS)}")
    generator = torch.Generator(device=device).manual_seed(seed)
    weight = torch.empty(m, k, device=device, dtype=dtype)
    step = max(1, _BLOCK // k)
    for row in range(0, m, step):
        rows = min(step, m - row)
        block = torch.randn(rows, k, device=device, generator=generator).mul_(0.02)
        if kind == "trained":
            # E[exp(4 s z)] / E[exp(2 s z)]^2 = exp(4 s^2): kurtosis 3 exp(4 * 0.42^2) = 6.1
            block.mul_(torch.randn(rows, k, device=device, generator=generator).mul_(0.42).exp_())
            block.mul_(torch.randn(rows, 1, device=device, generator=generator).mul_(0.5).exp_())
        weight[row : row + rows] = block
    return weight


def activations(tokens: int, k: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    """Random activations ``[tokens, k]``, standard normal."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(tokens, k, device=device, generator=generator).to(dtype)
