# SPDX-License-Identifier: Apache-2.0
"""Weight shapes of well-known models, as the scoreboard measures them.

A shape is ``(M, K)`` = ``(out_features, in_features)``; q, k and v are merged, and so are gate and up, as inference
engines do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch


@dataclass(frozen=True)
class Shape:
    """One weight matrix: the model and layer it comes from, M output features, K input features."""

    model: str
    layer: str
    m: int
    k: int

    @property
    def label(self) -> str:
        return f"{self.model} {self.layer}"

    @property
    def weights(self) -> int:
        return self.m * self.k


def _decoder(model: str, *, hidden: int, query: int, key_value: int, intermediate: int, vocabulary: int) -> tuple[Shape, ...]:
    return (
        Shape(model, "qkv", query + 2 * key_value, hidden),
        Shape(model, "o", hidden, query),
        Shape(model, "gate_up", 2 * intermediate, hidden),
        Shape(model, "down", hidden, intermediate),
        Shape(model, "lm_head", vocabulary, hidden),
    )


SHAPES: tuple[Shape, ...] = (
    *_decoder("llama-3.1-8b", hidden=4096, query=4096, key_value=1024, intermediate=14336, vocabulary=128256),
    *_decoder("qwen2.5-7b", hidden=3584, query=3584, key_value=512, intermediate=18944, vocabulary=152064),
    *_decoder("qwen2.5-32b", hidden=5120, query=5120, key_value=1024, intermediate=27648, vocabulary=152064),
    *_decoder("mistral-24b", hidden=5120, query=4096, key_value=1024, intermediate=32768, vocabulary=131072),
    *_decoder("llama-3.1-70b", hidden=8192, query=8192, key_value=1024, intermediate=28672, vocabulary=128256),
    # DeepSeek-V3: one routed expert, and the attention's low-rank down projection (q and kv merged) as "qkv".
    Shape("deepseek-v3", "qkv", 1536 + 576, 7168),
    Shape("deepseek-v3", "o", 7168, 16384),
    Shape("deepseek-v3", "gate_up", 2 * 2048, 7168),
    Shape("deepseek-v3", "down", 7168, 2048),
    Shape("deepseek-v3", "lm_head", 129280, 7168),
)

TOKENS: tuple[int, ...] = tuple(2**i for i in range(14))  # 1 .. 8192

# A machine without a GPU measures these: one layer's worth of a small model, in seconds instead of hours.
CPU_SHAPES: tuple[Shape, ...] = (
    Shape("minilm", "qkv", 1152, 384),
    Shape("minilm", "down", 384, 1536),
    Shape("llama-3.1-8b", "o", 4096, 4096),
)
CPU_TOKENS: tuple[int, ...] = (1, 8, 64)


def models() -> list[str]:
    return list(dict.fromkeys(shape.model for shape in SHAPES))


def layers() -> list[str]:
    return list(dict.fromkeys(shape.layer for shape in SHAPES))


def select(model_patterns: Iterable[str] = (), layer_patterns: Iterable[str] = (), shapes: Iterable[Shape] = SHAPES) -> list[Shape]:
    """The shapes whose model and layer match any of the patterns (shell wildcards); no pattern = all.

    Raises ValueError where a pattern matches nothing, since a benchmark of nothing helps nobody.
    """
    shapes = list(shapes)
    chosen = shapes
    for what, patterns in (("model", list(model_patterns)), ("layer", list(layer_patterns))):
        for pattern in patterns:
            if not any(fnmatch(getattr(shape, what), pattern) for shape in shapes):
                known = ", ".join(dict.fromkeys(getattr(shape, what) for shape in shapes))
                raise ValueError(f"no {what} matches {pattern!r}; known are: {known}")
        if patterns:
            chosen = [s for s in chosen if any(fnmatch(getattr(s, what), p) for p in patterns)]
    if not chosen:
        raise ValueError("no shape has both a chosen model and a chosen layer")
    return chosen
