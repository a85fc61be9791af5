# SPDX-License-Identifier: Apache-2.0
"""The scoreboard: ZipGEMM, decompression and compression against cuBLAS and the copy bandwidth, shape by shape.

The same code runs on a CPU (small shapes, a clock in place of CUDA graphs), so that it can be tested anywhere.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

import zipserv

from . import firstcall, machine, weights
from .shapes import Shape
from .timing import Loop, compare, loops, measure

# BF16 has 8 bits of precision: rounding a result is off by at most 2^-9 of it. A wrong tile is off by about 1.
TOLERANCE = 2.0**-6

# More copies than this make graphs that take long to build; only weights far below a megabyte would need them.
MOST_COPIES = 512

# The batch-invariant mode has no second loop beside it, so it takes half as long for as many rounds.
INVARIANT_SHARE = 0.5

LinearCall = Callable[[torch.Tensor, zipserv.ZipTensor], torch.Tensor]


class WrongResult(zipserv.Error):
    """What was computed is not what it should be; such a thing is not timed."""


@dataclass(frozen=True)
class Settings:
    """``budget``: seconds of measuring for one number; ``total``: seconds for the whole run (None: no limit);
    ``invariant``: also measure the batch-invariant mode, and check that it is; ``first_call``: on a GPU, also time the
    first product of fresh processes."""

    device: torch.device
    kinds: Sequence[str] = weights.KINDS
    tokens: Sequence[int] = (1,)
    budget: float = 0.3
    total: float | None = None
    min_copies: int = 8
    max_copies: int = MOST_COPIES
    min_rounds: int = 10
    seed: int = 0
    quick: bool = False
    invariant: bool = False
    first_call: bool = True


@dataclass
class Board:
    """Everything a run measured, ready for JSON."""

    about: dict[str, object]
    limits: machine.Limits
    weights: list[dict[str, object]] = field(default_factory=list)
    points: list[dict[str, object]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        return {
            "about": self.about,
            "limits": machine.limits_dict(self.limits),
            "weights": self.weights,
            "points": self.points,
            "skipped": self.skipped,
            "failed": self.failed,
        }


def number_of_copies(nbytes: int, cache: int, free: int, minimum: int = 8, most: int = MOST_COPIES) -> int:
    """How many copies of a weight rotate in a loop; ``nbytes`` is its compressed size.

    At least ``minimum``, and enough that four caches' worth passes before a weight comes round again. Where memory is
    short fewer, down to twice the cache; raises MemoryError where not even these fit.
    """
    wanted = min(max(minimum, -(-4 * cache // nbytes)), most)
    fits = free // (3 * nbytes)  # a plain and a compressed copy take less than three times the compressed size
    copies = min(wanted, fits)
    if copies < wanted and copies * nbytes < max(2 * cache, 3 * nbytes):
        raise MemoryError(f"a fair measurement needs {wanted} copies of this weight, memory has room for {fits}: free some, or choose other shapes")
    return copies


def free_memory(device: torch.device) -> int:
    """Bytes for the copies of a weight."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    return 2 << 30


def _spread(count: int, most: int, device: torch.device) -> torch.Tensor:
    """Up to ``most`` indices spread over ``0 .. count-1``, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, most), device=device).round().long()


def errors_against_float64(weight: torch.Tensor, compressed: zipserv.ZipTensor, x: torch.Tensor, linear: LinearCall) -> dict[str, float]:
    """Max and RMS error of ``linear`` and of ``F.linear`` against float64, relative to the RMS of the result.

    Both compute the whole product; the float64 product is made for up to 512 rows of the weight and 128 tokens, spread
    over all of them, which keeps it affordable for any shape.
    """
    rows = _spread(weight.shape[0], 512, weight.device)
    tokens = _spread(x.shape[0], 128, weight.device)
    exact = x[tokens].double() @ weight[rows].double().T
    scale = exact.square().mean().sqrt().clamp_min(1e-300)
    ours = linear(x, compressed)[tokens][:, rows].double() - exact
    theirs = F.linear(x, weight)[tokens][:, rows].double() - exact
    return {
        "max_error": float(ours.abs().max() / scale),
        "rms_error": float(ours.square().mean().sqrt() / scale),
        "blas_max_error": float(theirs.abs().max() / scale),
        "blas_rms_error": float(theirs.square().mean().sqrt() / scale),
    }


def _compress(weight: torch.Tensor) -> zipserv.ZipTensor:
    compressed = zipserv.compress(weight)
    return compressed if compressed.device == weight.device else compressed.to(weight.device)


def _clone(compressed: zipserv.ZipTensor) -> zipserv.ZipTensor:
    return zipserv.ZipTensor.from_blob(compressed.blob.clone(), verify="none")


class Bench:
    """One weight shape on one device: its copies, the checks, and the loops over them."""

    def __init__(self, shape: Shape, kind: str, limits: machine.Limits, settings: Settings) -> None:
        self.shape, self.kind, self.limits, self.settings = shape, kind, limits, settings
        self.budget = settings.budget  # seconds for one number
        device = settings.device
        self.weight = weights.make(kind, shape.m, shape.k, device=device, seed=settings.seed)
        self.compressed = _compress(self.weight)
        copies = number_of_copies(self.compressed.nbytes, limits.cache_bytes, free_memory(device), settings.min_copies, settings.max_copies)
        self.least = max(2, -(-4 * limits.cache_bytes // self.compressed.nbytes))
        self.plain = [self.weight, *(self.weight.clone() for _ in range(copies - 1))]
        self.zipped = [self.compressed, *(_clone(self.compressed) for _ in range(copies - 1))]

    def _identity(self) -> dict[str, object]:
        s = self.shape
        return {"model": s.model, "layer": s.layer, "m": s.m, "k": s.k, "weights": self.kind}

    def about_weight(self) -> dict[str, object]:
        """Checks the round trip bit by bit, then times compression and decompression."""
        s, settings = self.shape, self.settings
        restored = self.compressed.decompress()
        if not torch.equal(restored.view(torch.int16), self.weight.view(torch.int16)):
            raise WrongResult(f"{s.label} ({self.kind}): the decompressed weight differs from the original")
        raw = 2 * s.weights
        # Into the plain copies, which hold these very bits: no output is in the cache, and no memory is needed beside them.
        unpack = Loop([partial(z.decompress, out=w) for z, w in zip(self.zipped, self.plain, strict=True)], settings.device)
        decompress = measure(unpack, min_rounds=settings.min_rounds, budget=self.budget)
        unpack.close()
        if not all(torch.equal(restored.view(torch.int16), w.view(torch.int16)) for w in self.plain):
            raise WrongResult(f"{s.label} ({self.kind}): a weight decompressed in a loop differs from the original")
        del restored
        moved = raw + self.compressed.nbytes
        return {
            **self._identity(),
            "bits_per_weight": self.compressed.bits_per_weight,
            "ratio": self.compressed.ratio,
            "bytes": self.compressed.nbytes,
            "copies": len(self.plain),
            "bit_exact": True,
            "decompress_seconds": decompress.median,
            "decompress_spread": decompress.spread,
            "decompress_bytes_per_second": moved / decompress.median,
            "decompress_of_copy": moved / decompress.median / self.limits.copy_bandwidth,
            "compress_bytes_per_second": raw / self._compress_seconds(),
        }

    def _compress_seconds(self) -> float:
        """Compression decides its output's size on the way, so it is timed as a user sees it: call to result."""
        device, seconds = self.settings.device, []
        for weight in (self.plain * 5)[:5]:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            _compress(weight)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        return sorted(seconds)[len(seconds) // 2]

    def check(self, x: torch.Tensor, linear: LinearCall) -> dict[str, float]:
        """The errors against float64; raises WrongResult where they are no rounding errors any more."""
        errors = errors_against_float64(self.weight, self.compressed, x, linear)
        if not errors["rms_error"] <= max(TOLERANCE, 2 * errors["blas_rms_error"]):
            raise WrongResult(
                f"{self.shape.label} ({self.kind}), {x.shape[0]} tokens: the product is wrong: RMS error "
                f"{errors['rms_error']:.3g} of the result's RMS against float64; BLAS has {errors['blas_rms_error']:.3g}"
            )
        return errors

    def point(self, tokens: int, linear: LinearCall) -> dict[str, object]:
        """One number of tokens: accuracy, then both loops in turns."""
        s, settings, limits = self.shape, self.settings, self.limits
        x = weights.activations(tokens, s.k, device=settings.device, seed=settings.seed + 1)
        accuracy = self.check(x, linear)
        blas, ours = loops([partial(F.linear, x, w) for w in self.plain], [partial(linear, x, z) for z in self.zipped], settings.device, self.least)
        pair = compare(blas, ours, min_rounds=settings.min_rounds, budget=self.budget)
        calls = len(ours)
        blas.close()
        ours.close()
        invariant = self._invariant(x, linear, pair.second.median, calls) if settings.invariant else {}
        bound = limits.gemm_seconds(self.compressed.nbytes, s.m, s.k, tokens)
        return {
            **self._identity(),
            "tokens": tokens,
            "blas_seconds": pair.first.median,
            "blas_spread": pair.first.spread,
            "zip_seconds": pair.second.median,
            "zip_spread": pair.second.spread,
            "speedup": pair.ratio,
            "speedup_low": pair.ratio_low,
            "speedup_high": pair.ratio_high,
            "rounds": pair.first.rounds,
            "calls": calls,
            "compressed_bytes_per_second": self.compressed.nbytes / pair.second.median,
            "of_copy_bandwidth": self.compressed.nbytes / pair.second.median / limits.copy_bandwidth,
            "bound_seconds": bound,
            "of_bound": bound / pair.second.median,
            **accuracy,
            **invariant,
        }

    def _invariant(self, x: torch.Tensor, linear: LinearCall, usual: float, calls: int) -> dict[str, object]:
        """What the batch-invariant mode costs; WrongResult where a token's bits depend on the others after all."""
        zipserv.set_batch_invariant(True)
        try:
            together = linear(x, self.compressed)
            for token in {0, x.shape[0] // 2, x.shape[0] - 1}:
                alone = linear(x[token : token + 1], self.compressed)
                if not torch.equal(alone.view(torch.int16), together[token : token + 1].view(torch.int16)):
                    raise WrongResult(
                        f"{self.shape.label} ({self.kind}): token {token} of {x.shape[0]} has other bits than on its own in the batch-invariant mode"
                    )
            loop = Loop([partial(linear, x, z) for z in self.zipped], self.settings.device, calls)
            sample = measure(loop, min_rounds=self.settings.min_rounds, budget=self.budget * INVARIANT_SHARE)
            loop.close()
        finally:
            zipserv.set_batch_invariant(False)
        return {"invariant_seconds": sample.median, "invariant_cost": sample.median / usual - 1}

    def close(self) -> None:
        self.plain.clear()
        self.zipped.clear()
        del self.weight, self.compressed
        gc.collect()
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()


def host_costs(settings: Settings) -> dict[str, object]:
    """What one call costs the host in eager mode, where nothing hides it. GPU only."""
    device = settings.device
    if device.type != "cuda":
        return {}
    weight = weights.make("gaussian", 1024, 1024, device=device)
    x = weights.activations(1, 1024, device=device)
    compressed = _compress(weight)

    def host(call: Callable[[], object], calls: int = 200) -> float:
        """Seconds until a call returns, while the device still works; fewer calls than its queue holds."""
        rounds = []
        call()
        for _ in range(10):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            rounds.append((time.perf_counter() - start) / calls)
        return sorted(rounds)[len(rounds) // 2]

    with torch.inference_mode():
        return {
            "host_seconds_per_call": host(partial(zipserv.linear, x, compressed)),
            "host_seconds_per_blas_call": host(partial(F.linear, x, weight)),
        }


class _Clock:
    """Shares a run's time out among its points: where it is short every number is measured for less long, down to a tenth."""

    def __init__(self, settings: Settings, points: int) -> None:
        self._settings, self._left, self._done = settings, points, 0
        self._start = time.perf_counter()
        self._begun = 0.0
        self._beside = 0.0  # spent on points beside their budgets

    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def over(self) -> bool:
        return self._settings.total is not None and self.elapsed() > self._settings.total

    def begin(self) -> float:
        """The budget of the next point."""
        settings = self._settings
        self._begun, self._budget = time.perf_counter(), settings.budget
        if settings.total is not None:
            share = (settings.total - self.elapsed()) / max(1, self._left) - self._beside / max(1, self._done)
            self._budget = min(settings.budget, max(settings.budget / 10, share / self._parts()))
        return self._budget

    def end(self) -> None:
        self._beside += max(0.0, time.perf_counter() - self._begun - self._parts() * self._budget)
        self.skip(1)
        self._done += 1

    def skip(self, points: int) -> None:
        self._left -= points

    def _parts(self) -> float:
        return 1 + INVARIANT_SHARE * self._settings.invariant


def scoreboard(shapes: Iterable[Shape], settings: Settings) -> Iterator[Board]:
    """Measures every shape, kind of weights and number of tokens; yields the board after each point.

    The caller may stop at any time and keeps what was measured. Where ``settings.total`` seconds are short each number is
    measured for less long, down to a tenth of the budget; when they are over, what is left is named in ``Board.skipped``.
    A wrong result is named in ``Board.failed`` and gets no time.
    """
    shapes = list(shapes)
    each = len(settings.tokens)
    clock = _Clock(settings, len(shapes) * len(settings.kinds) * each)
    costs = host_costs(settings)
    limits = machine.measure_limits(settings.device, quick=settings.quick)
    board = Board({**machine.describe(settings.device), **costs}, limits)
    if settings.first_call and settings.device.type == "cuda":
        try:
            board.about["first_call"] = firstcall.measure(settings.device)
        except zipserv.Error as error:
            board.failed.append(str(error))
    for shape in shapes:
        for kind in settings.kinds:
            left = each
            if clock.over():
                board.skipped.append(f"{shape.label} ({kind}): out of time")
                clock.skip(left)
                continue
            try:
                bench = Bench(shape, kind, limits, settings)
            except (MemoryError, torch.OutOfMemoryError) as error:
                board.skipped.append(f"{shape.label} ({kind}): {error}")
                clock.skip(left)
                continue
            try:
                board.weights.append(bench.about_weight())
                yield board
                for tokens in settings.tokens:
                    if clock.over():
                        board.skipped.append(f"{shape.label} ({kind}), {tokens} tokens: out of time")
                        continue
                    bench.budget = clock.begin()
                    try:
                        board.points.append(bench.point(tokens, zipserv.linear))
                    except WrongResult as error:
                        board.failed.append(str(error))
                    clock.end()
                    left -= 1
                    board.about["seconds"] = clock.elapsed()
                    yield board
            except WrongResult as error:
                board.failed.append(str(error))
                yield board
            finally:
                clock.skip(left)
                bench.close()
    yield board
