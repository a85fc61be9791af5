# SPDX-License-Identifier: Apache-2.0
"""Small makers and checks for tests."""

from __future__ import annotations

import torch

import zipserv

DTYPES = (torch.bfloat16, torch.float16)


def weights(*shape: int, dtype: torch.dtype = torch.bfloat16, sigma: float = 0.02) -> torch.Tensor:
    """Gaussian weights, as a trained layer's nearly are."""
    return (torch.randn(shape) * sigma).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's 16-bit patterns, for comparisons that see NaN payloads and signed zeros."""
    return tensor.detach().contiguous().view(torch.int16)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert torch.equal(bits(found), bits(expected))


def flipped(blob: torch.Tensor, at: int, bit: int = 0) -> torch.Tensor:
    """A copy of a blob with one bit changed."""
    blob = blob.clone()
    blob[at] ^= 1 << bit
    return blob


def linear64(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The exact result, near enough: everything in float64."""
    return torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


def compressed(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, zipserv.ZipTensor]:
    weight = weights(*shape, dtype=dtype)
    return weight, zipserv.compress(weight)
