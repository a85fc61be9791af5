# SPDX-License-Identifier: Apache-2.0
"""The ops of a mixture-of-experts layer whose experts are multiplied together: which were hit stays on the device.

A *pair* is a token and one of its experts, numbered ``token * top + slot``.

=================  ==================================================================================================
``moe_route``      the router's choice ``ids (tokens, top)`` -> an int32 tensor that the next one reads (``kernels/routing.cuh``)
``moe_linear``     rows of tokens or of pairs, the experts' blobs, the routing -> each pair's row by its expert, ``(pairs, m)``;
                   ``gated``: ``silu(upper half of the rows) * lower half``, ``(pairs, m / 2)``
``moe_combine``    each pair's row, ``ids``, ``weights (tokens, top)`` -> each token's weighted sum, ``(tokens, m)``
=================  ==================================================================================================

On a GPU each is one launch, whatever was chosen (``kernels/zipgemm_grouped.cu``, ``kernels/moe.cu``): nothing waits, and a CUDA graph can
hold it. A pair whose expert's number is negative, or too large, is nobody's (expert parallelism): its row of ``moe_linear`` holds anything, and
``moe_combine`` passes over it. BF16 only, and no expert may be stored raw; no gradients.

The blobs of all experts lie in one tensor at equal distances: :func:`distance`, :func:`fits`, :func:`stack`. :func:`multiply` is a whole layer, for
the integrations (vLLM, transformers), which multiply experts together where :func:`serves` says that it can be done and :func:`few` that it is
worth it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .format import DTYPES, HEADER_BYTES, TILE, parse_header, raw_nbytes
from .ops import _linear_cpu, cuda_module
from .stacked import mark_written

__all__ = [
    "MAX_EXPERTS", "MAX_GATED_TILE", "MAX_PAIRS", "MAX_TOP", "Weight", "distance", "few", "fits", "moe_combine", "moe_linear", "moe_route",
    "multiply", "serves", "stack", "tile_for", "warm",
]  # fmt: skip

#: Whether layers multiply experts together at all. One by one is for comparisons.
ENABLED = os.environ.get("ZIPSERV_GROUPED_EXPERTS") != "0"

MAX_PAIRS = 4096  #: of one call
MAX_EXPERTS = 1024
MAX_TOP = 32
TILES = (8, 16, 32, 64)
MAX_GATED_TILE = 32  #: with gates
ALIGN = 256  #: of blobs in one tensor: what the kernels' wide copies want

#: Pairs an expert beyond which experts had better run one after the other: then each product is large, and these kernels would read an expert's
#: weights once for every 64 pairs.
_MANY = 64

_BF16 = 1
_HEAD, _ITEM = 4, 4  # words of 32 bits in front of the items, and of an item

_LIB: Any = torch.library.Library("zipserv", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIB.define("moe_route(Tensor ids, int experts, int tile) -> Tensor", tags=_TAGS)
_LIB.define(
    "moe_linear(Tensor x, Tensor blobs, int experts, Tensor routing, int tile, int m, int k, int dtype_code, bool gated=False) -> Tensor",
    tags=_TAGS,
)
_LIB.define("moe_combine(Tensor y, Tensor ids, Tensor weights, int experts) -> Tensor", tags=_TAGS)

moe_route = torch.ops.zipserv.moe_route
moe_linear = torch.ops.zipserv.moe_linear
moe_combine = torch.ops.zipserv.moe_combine


def tile_for(tokens: int, top: int, experts: int) -> int:
    """How many pairs of an expert to multiply at a time: twice what each has if the router spreads them evenly, so that an expert's weights are
    seldom read twice, but no more than there are tokens. Up to 32 the kernel waits for memory whatever the tile is."""
    want = min(tokens, 2 * -(-tokens * top // experts))
    return next((tile for tile in TILES if want <= tile), TILES[-1])


def distance(blobs: Sequence[torch.Tensor]) -> int:
    """Bytes from one expert's blob to the next where they lie in one tensor."""
    return -(-max(blob.numel() for blob in blobs) // ALIGN) * ALIGN


def fits(step: int, m: int, k: int) -> bool:
    """Whether experts ``(m, k)`` whose blobs lie ``step`` bytes apart can be multiplied together. The kernel takes each for tiles and asks none;
    a raw blob, one of weights that did not shrink, is longer than any tiled one, so where the next begins earlier there is none."""
    return step < raw_nbytes(m, k)


def stack(blobs: Sequence[torch.Tensor], m: int, k: int, device: torch.device | None = None) -> torch.Tensor:
    """The experts' blobs in one tensor, as :func:`moe_linear` takes them.

    Raises:
        ValueError: one of them is raw, or saves next to nothing: see :func:`fits`.
    """
    step = distance(blobs)
    _require_fit(step, m, k)
    together = torch.zeros(len(blobs) * step, dtype=torch.uint8, device=device or blobs[0].device)
    for index, blob in enumerate(blobs):
        place = together[index * step : index * step + blob.numel()]
        place.copy_(blob)
        mark_written(place)
    return together


def _require_fit(step: int, m: int, k: int) -> None:
    if not fits(step, m, k):
        raise ValueError(
            f"experts of {m} x {k} whose blobs are {step} bytes apart can't be multiplied together: a raw blob is {raw_nbytes(m, k)} bytes long, "
            "so one of them may be raw (it would not shrink); multiply them one by one"
        )


class Weight(NamedTuple):
    """One of the two weights of a layer, a matrix ``(m, k)`` for each expert."""

    blobs: torch.Tensor  #: as :func:`stack` makes it
    experts: int
    m: int
    k: int


def serves(dtype: torch.dtype, experts: int, top: int) -> bool:
    """Whether a layer's experts can be multiplied together, if their blobs fit (:func:`fits`). It does not depend on the number of tokens: in
    batch-invariant mode a token's experts are always multiplied the same way."""
    return ENABLED and dtype == DTYPES[_BF16] and experts <= MAX_EXPERTS and top <= MAX_TOP


def few(pairs: int, experts: int) -> bool:
    """Whether so many pairs are multiplied faster together than expert by expert."""
    return pairs <= min(MAX_PAIRS, _MANY * experts)


def multiply(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: Weight, down: Weight,
    activate: Callable[[torch.Tensor], torch.Tensor], *, silu_and_mul: bool, invariant: bool,
) -> torch.Tensor:  # fmt: skip
    """A layer: each token's experts ``down(activate(up(x)))``, weighted and added. Weights that were hit are read once; only the device knows which.

    Args:
        x, ids, weights: ``(tokens, k of up)``; ``(tokens, top)``, at least one; the same shape.
        up, down: the experts' weights.
        activate: ``(pairs, m of up)`` -> ``(pairs, k of down)``.
        silu_and_mul: ``activate`` is SiLU of the first half times the second, which a kernel can have at its end.
        invariant: in batch-invariant mode. Then it has not: where gates are applied depends on the tile, and the last bit may on where.
    """
    tokens, top = ids.shape
    most = MAX_PAIRS // top
    if tokens > most:
        parts = (slice(i, i + most) for i in range(0, tokens, most))
        return torch.cat(
            [multiply(x[part], ids[part], weights[part], up, down, activate, silu_and_mul=silu_and_mul, invariant=invariant) for part in parts]
        )
    tile = tile_for(tokens, top, up.experts)
    routing = moe_route(ids, up.experts, tile)
    gated = silu_and_mul and not invariant and tile <= MAX_GATED_TILE and up.m % (2 * TILE) == 0
    inner = moe_linear(x, up.blobs, up.experts, routing, tile, up.m, up.k, _BF16, gated)
    if not gated:
        inner = activate(inner)
    y: torch.Tensor = moe_combine(moe_linear(inner, down.blobs, down.experts, routing, tile, down.m, down.k, _BF16), ids, weights, up.experts)
    return y


def warm(up: Weight, down: Weight, silu_and_mul: bool) -> None:
    """Compiles and loads on the weights' GPU what :func:`multiply` needs, for any number of tokens."""
    cuda = cuda_module()
    cuda.warm_experts(up.blobs, up.m, up.k)
    if silu_and_mul and up.m % (2 * TILE) == 0 and not cuda.batch_invariant():
        cuda.warm_experts(up.blobs, up.m, up.k, True)
    cuda.warm_experts(down.blobs, down.m, down.k)


def pairs_of(routing: torch.Tensor) -> int:
    """For how many pairs a routing was made."""
    return (routing.numel() - _HEAD) // (_ITEM + 2)


def _require_ids(ids: torch.Tensor, experts: int) -> None:
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"the chosen experts are an int32 or int64 tensor (tokens, top), not {ids.dtype} of the shape {tuple(ids.shape)}")
    if not (1 <= experts <= MAX_EXPERTS and ids.shape[1] <= MAX_TOP and ids.numel() <= MAX_PAIRS):
        wrong = f"{experts}, {ids.shape[1]} and {ids.numel()}"
        raise ValueError(f"at most {MAX_EXPERTS} experts, {MAX_TOP} of a token and {MAX_PAIRS} in all, not {wrong}")


def _require_rows(
    x: torch.Tensor, blobs: torch.Tensor, experts: int, routing: torch.Tensor, tile: int, m: int, k: int, dtype_code: int, gated: bool
) -> None:
    if dtype_code != _BF16 or x.dtype is not DTYPES[_BF16]:
        raise TypeError(f"experts are multiplied together in torch.bfloat16 only, not {x.dtype}")
    if gated and (m % (2 * TILE) or tile > MAX_GATED_TILE):
        wrong = f"{m} and {tile}"
        raise ValueError(f"gates need rows that are a multiple of {2 * TILE} and at most {MAX_GATED_TILE} pairs at a time, not {wrong}")
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"1 to {MAX_EXPERTS} experts, not {experts}")
    if routing.dtype is not torch.int32 or routing.dim() != 1 or routing.numel() < _HEAD or not routing.is_contiguous():
        raise ValueError(f"the routing is what moe_route gives, not {routing.dtype} of the shape {tuple(routing.shape)}")
    pairs = pairs_of(routing)
    if x.dim() != 2 or x.shape[1] != k or (x.shape[0] != pairs and (x.shape[0] == 0 or pairs % x.shape[0])):
        raise ValueError(f"the input has the shape {tuple(x.shape)}, it should be (tokens, {k}) or ({pairs}, {k})")
    if blobs.dim() != 1 or blobs.dtype is not torch.uint8 or blobs.numel() % (16 * experts) or not blobs.is_contiguous():
        raise ValueError("the experts' blobs are one contiguous torch.uint8 tensor, at equal distances that are multiples of 16")
    _require_fit(blobs.numel() // experts, m, k)
    if not (x.device == blobs.device == routing.device):
        raise ValueError(f"the input is on {x.device}, the experts on {blobs.device}, the routing on {routing.device}")


def _route_cpu(ids: torch.Tensor, experts: int, tile: int) -> torch.Tensor:
    _require_ids(ids, experts)
    words = [0] * (_HEAD + (_ITEM + 2) * ids.numel())
    chosen: list[list[int]] = [[] for _ in range(experts)]
    for pair, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert < experts:
            chosen[expert].append(pair)
    items: list[int] = []
    pairs: list[int] = []
    for expert, mine in enumerate(chosen):
        for start in range(0, len(mine), tile):
            items += [expert, len(pairs) + start, min(tile, len(mine) - start), 0]
        pairs += mine
    words[0] = len(items) // _ITEM
    words[_HEAD : _HEAD + len(items)] = items
    first = _HEAD + _ITEM * ids.numel()
    words[first : first + len(pairs)] = pairs
    first += ids.numel()
    words[first : first + len(pairs)] = [pair // ids.shape[1] for pair in pairs]
    return torch.tensor(words, dtype=torch.int32)


def _linear_grouped_cpu(
    x: torch.Tensor, blobs: torch.Tensor, experts: int, routing: torch.Tensor, tile: int, m: int, k: int, dtype_code: int,
    gated: bool = False,
) -> torch.Tensor:
    _require_rows(x, blobs, experts, routing, tile, m, k, dtype_code, gated)
    count, step = pairs_of(routing), blobs.numel() // experts
    items = routing[_HEAD : _HEAD + _ITEM * int(routing[0])].view(-1, _ITEM).tolist()
    pairs, owners = routing[_HEAD + _ITEM * count :].long().chunk(2) if count else (routing.long(), routing.long())
    y = x.new_zeros((count, m))
    for expert, first, length, _ in items:
        blob = blobs[expert * step : (expert + 1) * step]
        blob = blob[: parse_header(blob[:HEADER_BYTES]).nbytes]
        mine = pairs[first : first + length]
        rows = mine if x.shape[0] == count else owners[first : first + length]
        y[mine] = _linear_cpu(x[rows], blob, m, k, dtype_code, None)
    if gated:
        gates, up = y.chunk(2, dim=1)
        return F.silu(gates) * up
    return y


def _combine_cpu(y: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    _require_ids(ids, experts)
    tokens, top = ids.shape
    order = torch.where((ids >= 0) & (ids < experts), ids.long(), experts).sort(dim=1, stable=True)
    total = torch.zeros((tokens, y.shape[1]), dtype=torch.float32)
    rows = y.view(tokens, top, -1)
    at = torch.arange(tokens)
    for i in range(top):
        slot = order.indices[:, i]
        part = rows[at, slot].float() * weights[at, slot, None].float()
        total = torch.where(order.values[:, i, None] < experts, total + part, total)
    return total.to(y.dtype)


def _route_cuda(ids: torch.Tensor, experts: int, tile: int) -> torch.Tensor:
    _require_ids(ids, experts)
    out: torch.Tensor = cuda_module().moe_route(ids, experts, tile)
    return out


def _linear_grouped_cuda(
    x: torch.Tensor, blobs: torch.Tensor, experts: int, routing: torch.Tensor, tile: int, m: int, k: int, dtype_code: int,
    gated: bool = False,
) -> torch.Tensor:
    _require_rows(x, blobs, experts, routing, tile, m, k, dtype_code, gated)
    out: torch.Tensor = cuda_module().moe_linear(x, blobs, blobs.numel() // experts, routing, pairs_of(routing), tile, m, k, gated)
    return out


def _combine_cuda(y: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    _require_ids(ids, experts)
    if y.dtype is not DTYPES[_BF16] or y.dim() != 2 or y.shape[0] != ids.numel() or weights.shape != ids.shape:
        wrong = f"{y.dtype} {tuple(y.shape)} and {tuple(weights.shape)}"
        raise ValueError(f"rows of {ids.numel()} pairs in torch.bfloat16 and weights {tuple(ids.shape)}, not {wrong}")
    if not (y.device == ids.device == weights.device):
        raise ValueError(f"the rows are on {y.device}, the chosen experts on {ids.device}, their weights on {weights.device}")
    out: torch.Tensor = cuda_module().moe_combine(y, ids, weights, experts)
    return out


def _route_fake(ids: torch.Tensor, experts: int, tile: int) -> torch.Tensor:
    return ids.new_empty((_HEAD + (_ITEM + 2) * ids.numel(),), dtype=torch.int32)


def _linear_grouped_fake(
    x: torch.Tensor, blobs: torch.Tensor, experts: int, routing: torch.Tensor, tile: int, m: int, k: int, dtype_code: int,
    gated: bool = False,
) -> torch.Tensor:
    return x.new_empty((pairs_of(routing), m // 2 if gated else m))


def _combine_fake(y: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    return y.new_empty((ids.shape[0], y.shape[1]))


for _name, _on_cpu, _on_cuda, _fake in (
    ("moe_route", _route_cpu, _route_cuda, _route_fake),
    ("moe_linear", _linear_grouped_cpu, _linear_grouped_cuda, _linear_grouped_fake),
    ("moe_combine", _combine_cpu, _combine_cuda, _combine_fake),
):
    _LIB.impl(_name, _on_cpu, "CPU")
    _LIB.impl(_name, _on_cuda, "CUDA")
    torch.library.register_fake(f"zipserv::{_name}", _fake, lib=_LIB)
