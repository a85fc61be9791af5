# SPDX-License-Identifier: Apache-2.0
"""What a tensor's exponents look like, and how small it can get: for ``zipserv inspect``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from . import _zipserv
from .format import DTYPE_CODES
from .tensor import ZipTensor, compress

WINDOW = 8
PAPER_WINDOW = 7

# Bits of a weight that no lossless exponent code can save: sign and mantissa.
_FIXED_BITS = {torch.bfloat16: 8, torch.float16: 11}


@dataclass(frozen=True)
class LayerSurvey:
    """Sizes in bits per weight.

    ``bits``: this format. ``bound``: sign, mantissa and the entropy of the exponent, which no code that looks at each
    weight on its own can beat. ``paper_bits``: three bitmaps with seven codes for the seven most frequent consecutive
    exponents of the matrix, and 16 bits for every other weight (the layout of the ZipServ paper, without its offsets).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    weights: int
    bits: float
    bound: float
    paper_bits: float
    escapes: int
    literals: int
    dense_tiles: int
    tiles: int
    window: int
    histogram: tuple[int, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def entropy(histogram: Sequence[int]) -> float:
    """Shannon entropy in bits of one symbol drawn from the histogram."""
    total = sum(histogram)
    if total == 0:
        return 0.0
    return -sum(n / total * math.log2(n / total) for n in histogram if n)


def best_window(histogram: Sequence[int], width: int) -> tuple[int, int]:
    """The start of the ``width`` consecutive exponents that hold the most weights, and how many they hold."""
    starts = range(max(1, len(histogram) - width + 1))
    counts = [sum(histogram[start : start + width]) for start in starts]
    start = max(starts, key=lambda i: (counts[i], -i))
    return start, counts[start]


def survey(name: str, tensor: torch.Tensor | ZipTensor) -> LayerSurvey:
    """Surveys one BF16 or FP16 tensor; a plain one is compressed to see what it would take.

    Raises TypeError for other dtypes.
    """
    if tensor.dtype not in DTYPE_CODES:
        raise TypeError(f"{name}: exponents of bfloat16 and float16 can be surveyed, not of {tensor.dtype}")
    stored = "zipserv" if isinstance(tensor, ZipTensor) else "plain"
    plain = tensor.decompress() if isinstance(tensor, ZipTensor) else tensor.contiguous()
    packed = tensor if isinstance(tensor, ZipTensor) else compress(plain)
    count = plain.numel()
    histogram = _zipserv.histogram(plain.data_ptr(), count, DTYPE_CODES[plain.dtype])
    fixed = _FIXED_BITS[plain.dtype]
    _, covered = best_window(histogram, PAPER_WINDOW)
    window, _ = best_window(histogram, WINDOW)
    stats = packed.stats()
    return LayerSurvey(
        name=name,
        shape=tuple(plain.shape),
        dtype=str(plain.dtype).removeprefix("torch."),
        stored=stored,
        weights=count,
        bits=packed.bits_per_weight,
        bound=fixed + entropy(histogram),
        paper_bits=3 + (fixed * covered + 16 * (count - covered)) / count,
        escapes=int(stats["escapes"]),
        literals=int(stats["literals"]),
        dense_tiles=int(stats["dense_tiles"]),
        tiles=int(stats["tiles"]),
        window=window,
        histogram=tuple(histogram),
    )


@dataclass(frozen=True)
class Total:
    """Averages over layers, each weight counting the same."""

    weights: int
    bits: float
    bound: float
    paper_bits: float
    escapes: int
    histogram: tuple[int, ...]
    window: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def total(layers: Sequence[LayerSurvey]) -> Total | None:
    """The whole model; None where there is nothing to add up."""
    weights = sum(layer.weights for layer in layers)
    if not weights:
        return None

    def mean(what: str) -> float:
        return sum(float(getattr(layer, what)) * layer.weights for layer in layers) / weights

    histogram = tuple(sum(column) for column in zip(*(layer.histogram for layer in layers), strict=True))
    return Total(
        weights,
        mean("bits"),
        mean("bound"),
        mean("paper_bits"),
        sum(layer.escapes for layer in layers),
        histogram,
        best_window(histogram, WINDOW)[0],
    )
