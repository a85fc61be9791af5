# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run and tell the truth on tiny shapes; speed is for the real runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import zipserv as package
from cli_helpers import Zipserv
from zipserv.bench import __main__ as bare
from zipserv.bench import firstcall, gpu, machine, report, shapes, timing, weights

TINY = ("--device", "cpu", "--point-budget", "0.001", "--codec-mib", "1")


@pytest.fixture
def zipserv(capsys: pytest.CaptureFixture[str]) -> Zipserv:
    return Zipserv(capsys)


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of 64 KiB, so that few copies are well past it."""
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1 << 16)
    full = machine.measure_limits
    monkeypatch.setattr(machine, "measure_limits", lambda device, quick=False: full(device, quick=True))


def test_shapes_of_the_models() -> None:
    by_name = {(s.model, s.layer): (s.m, s.k) for s in shapes.SHAPES}
    assert by_name["llama-3.1-8b", "qkv"] == (6144, 4096)
    assert by_name["llama-3.1-8b", "gate_up"] == (28672, 4096)
    assert by_name["qwen2.5-7b", "qkv"] == (4608, 3584)
    assert by_name["mistral-24b", "o"] == (5120, 4096)
    assert by_name["llama-3.1-70b", "down"] == (8192, 28672)
    assert by_name["deepseek-v3", "gate_up"] == (4096, 7168)
    assert len(shapes.SHAPES) == 30 and shapes.TOKENS == tuple(2**i for i in range(14))


def test_select() -> None:
    assert {s.layer for s in shapes.select(["llama*8b"], ["o", "down"])} == {"o", "down"}
    assert len(shapes.select()) == 30
    with pytest.raises(ValueError, match="known are: .*qwen2.5-7b"):
        shapes.select(["gpt"])


def test_weights_are_what_they_say() -> None:
    gaussian, trained = (weights.make(kind, 512, 1024).float() for kind in weights.KINDS)
    assert gaussian.std().item() == pytest.approx(0.02, rel=0.02)

    def kurtosis(x: torch.Tensor) -> float:
        x = x / x.std(dim=1, keepdim=True)
        return float(x.pow(4).mean())

    assert kurtosis(gaussian) == pytest.approx(3, abs=0.1) and 5 < kurtosis(trained) < 8
    sigmas = trained.std(dim=1).log()
    assert 0.4 < float(sigmas.std()) < 0.6
    assert torch.equal(weights.make("trained", 64, 64, seed=5), weights.make("trained", 64, 64, seed=5))
    assert not torch.equal(weights.make("trained", 64, 64, seed=5), weights.make("trained", 64, 64, seed=6))
    with pytest.raises(ValueError, match="gaussian, trained"):
        weights.make("round", 1, 1)


def test_blocks_of_rows_make_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK", 64 * 10)
    w = weights.make("gaussian", 35, 64)
    assert bool((w != 0).any(dim=1).all())


def test_number_of_copies() -> None:
    mib = 1 << 20
    assert gpu.number_of_copies(100 * mib, 50 * mib, 100 << 30) == 8
    assert gpu.number_of_copies(5 * mib, 50 * mib, 100 << 30) == 40  # four caches' worth
    assert gpu.number_of_copies(1000 * mib, 50 * mib, 13 << 30) == 4  # memory is short, still past the cache
    assert gpu.number_of_copies(1000, 50 * mib, 100 << 30) == gpu.MOST_COPIES
    with pytest.raises(MemoryError, match="40 copies"):
        gpu.number_of_copies(5 * mib, 50 * mib, 150 * mib)
    with pytest.raises(MemoryError):
        gpu.number_of_copies(100 * mib, 10 * mib, 200 * mib)


def test_summarize() -> None:
    sample = timing.summarize([float(i) for i in range(1, 12)])
    assert (sample.median, sample.low, sample.high, sample.rounds) == (6, 2, 10, 11)
    assert sample.spread == pytest.approx(8 / 6)
    with pytest.raises(ValueError, match="nothing"):
        timing.summarize([])


class FakeLoop:
    """Counts who runs when, and takes as long as it says."""

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self.time, self.log = name, seconds, log

    def seconds(self) -> float:
        self.log.append(self.name)
        return self.time


def test_compare_takes_turns_in_both_orders() -> None:
    log: list[str] = []
    pair = timing.compare(
        FakeLoop("a", 3.0, log),  # type: ignore[arg-type]
        FakeLoop("b", 2.0, log),  # type: ignore[arg-type]
        min_rounds=4,
        max_rounds=4,
        budget=0,
    )
    assert "".join(log) == "abbaabba"
    assert (pair.ratio, pair.first.median, pair.second.median, pair.first.rounds) == (1.5, 3, 2, 4)


class FakeCuda:
    """Stands in for torch.cuda: capturing runs the calls once, replaying takes a millisecond for each."""

    def __init__(self) -> None:
        self.captured = 0
        self.replays = 0
        self.now = 0.0
        self.capturing = False
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                assert fake.captured
                fake.replays += 1
                fake.now += fake.captured

        class Stream:
            def wait_stream(self, other: object) -> None: ...

        self.Event, self.CUDAGraph, self.Stream = Event, Graph, Stream

    def device(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        assert device.type == "cuda"
        return contextlib.nullcontext()

    def stream(self, stream: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def current_stream(self) -> object:
        return self.Stream()

    def synchronize(self, device: object = None) -> None: ...

    @contextlib.contextmanager
    def graph(self, graph: object, stream: object) -> Iterator[None]:
        self.capturing = True
        yield
        self.capturing = False


def test_loop_length() -> None:
    assert timing.loop_length(8, 10e-6, 8) == 104  # whole rotations, a millisecond
    assert timing.loop_length(8, 1e-3, 8) == 8
    assert timing.loop_length(8, 1e-9, 8) == 256  # no longer than that
    assert timing.loop_length(300, 1e-9, 8) == 300  # but every copy has its turn
    assert timing.loop_length(8, 25e-3, 3) == 3 and timing.loop_length(8, 4e-3, 2) == 5  # a part, as far as the cache allows


def test_loop_on_a_gpu_times_one_graph_of_whole_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(timing, "_CUDA", fake)
    warm: list[int] = []
    seen: list[int] = []

    def call(i: int) -> None:
        (seen if fake.capturing else warm).append(i)
        fake.captured += fake.capturing

    rotation = [partial(call, i) for i in range(5)]
    loop = timing.Loop(rotation, torch.device("cuda"), length=15)
    assert warm[:5] == [0, 1, 2, 3, 4]  # every call has run before any is captured
    assert seen == [0, 1, 2, 3, 4] * 3 and fake.replays == 1 and len(loop) == 15
    assert loop.seconds() == pytest.approx(1e-3) and fake.replays == 2
    loop.close()
    chosen = timing.Loop(rotation, torch.device("cuda"))
    assert len(chosen) > 5 and len(chosen) % 5 == 0


def test_both_loops_are_as_long_as_the_faster_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(timing, "_CUDA", fake)

    def call(seconds: float) -> None:
        fake.captured += fake.capturing
        clock[0] += seconds

    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    slow, fast = timing.loops([partial(call, 2e-3)] * 2, [partial(call, 1.2e-4)] * 2, torch.device("cuda"))
    assert len(slow) == len(fast) == 10


RUN = {"import_seconds": 0.2, "first_call_seconds": 0.9, "warm_seconds": 2.0, "kernels": 1, "kernels_after_warm": 6, "rms_error": 1e-3}
CACHED = {**RUN, "first_call_seconds": 0.04, "warm_seconds": 0.1, "kernels": 6}


@pytest.mark.parametrize(
    "runs, message",
    [
        ([RUN, CACHED, {**CACHED, "first_call_seconds": 0.05}], ""),
        ([{**RUN, "kernels": 0}], "left no kernel"),
        ([RUN, CACHED, {**CACHED, "kernels": 7}], "grew from 6 to 7"),
    ],
)
def test_first_calls(monkeypatch: pytest.MonkeyPatch, runs: list[dict[str, float]], message: str) -> None:
    folders: list[str] = []

    def fresh(device: torch.device, cache: str) -> dict[str, float]:
        folders.append(cache)
        return runs[len(folders) - 1]

    monkeypatch.setattr(firstcall, "_fresh", fresh)
    if message:
        with pytest.raises(package.Error, match=message):
            firstcall.measure(torch.device("cuda"))
        return
    found = firstcall.measure(torch.device("cuda"))
    assert len(set(folders)) == 1 and not Path(folders[0]).exists()  # one cache for all, and none is left
    assert found["first_call_seconds"] == 0.9 and found["cached_first_call_seconds"] == 0.05 and found["warm_kernels"] == 5
    about = {"date": "today", "gpu": "some GPU", "sms": 1, "cuda": "13.0", "zipserv": "1", "torch": "2", "first_call": found}
    assert "900.00 ms with an empty kernel cache (1 compiled), 50.00 ms with a full one; all 6 kernels" in "\n".join(report.machine_lines(about))


def test_a_fresh_process_that_fails_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(package.Error, match="fresh process failed"):
        firstcall._fresh(torch.device("cuda:977"), str(tmp_path))  # no machine has so many


def test_time_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])
    settings = gpu.Settings(torch.device("cpu"), budget=1.0, total=10.0, invariant=True)
    clock = gpu._Clock(settings, 4)
    assert clock.begin() == 1  # 2.5 s for a point, which takes 1.5
    now[0] += 5  # but took 3.5 beside its budget
    clock.end()
    assert clock.begin() == 0.1
    clock.end()
    clock.skip(1)
    assert clock.begin() == 1
    now[0] = 11
    clock.end()
    assert clock.over()
    unlimited = gpu._Clock(gpu.Settings(torch.device("cpu"), budget=0.5), 1)
    now[0] = 1e9
    assert unlimited.begin() == 0.5 and not unlimited.over()


def test_roofline() -> None:
    limits = machine.Limits(copy_bandwidth=100.0, flops=1000.0, cache_bytes=1)
    assert limits.gemm_seconds(500, 10, 20, 1) == (500 + 60) / 100  # bound by memory
    assert limits.gemm_seconds(1, 100, 100, 10) == 2 * 100 * 100 * 10 / 1000  # bound by arithmetic


def test_errors_against_float64() -> None:
    w = weights.make("gaussian", 700, 256)
    x = weights.activations(200, 256)
    errors = gpu.errors_against_float64(w, package.compress(w), x, package.linear)
    assert 0 < errors["rms_error"] < 2**-8 and errors["rms_error"] <= 1.05 * errors["blas_rms_error"]

    def last_row_is_wrong(x: torch.Tensor, z: package.ZipTensor) -> torch.Tensor:
        y = package.linear(x, z)
        y[-1, -1] += 100
        return y

    wrong = gpu.errors_against_float64(w, package.compress(w), x, last_row_is_wrong)
    assert wrong["max_error"] > 10 * errors["max_error"]


def test_scoreboard_on_the_cpu(zipserv: Zipserv, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    result = zipserv("bench", *TINY, "--shapes", "64x128,200x256", "--tokens", "1,3", "--out", out, "--json")
    assert result.code == 0, result.err
    document = result.json
    assert document == {"ok": True, "command": "bench", **json.loads((out / "bench.json").read_text())}
    assert len(document["weights"]) == 4 and len(document["points"]) == 8 and not document["skipped"]
    for row in document["weights"]:
        assert row["bit_exact"] and row["copies"] >= 2 and row["decompress_seconds"] > 0
    for point in document["points"]:
        assert point["speedup_low"] <= point["speedup"] <= point["speedup_high"]
        assert point["rms_error"] < gpu.TOLERANCE and point["rounds"] >= 3 and 0 < point["of_bound"]
    assert [row["tokens"] for row in document["summary"]] == [1, 3]
    assert {row["weights"] for row in document["codec"]} == {"gaussian", "trained"}
    assert document["about"]["cpu"] and document["about"]["date"].endswith("UTC")
    assert not (out / "batch_invariant.png").exists()  # not measured on a CPU
    for name in ("speedup.png", "roofline.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_scoreboard_text(zipserv: Zipserv) -> None:
    arguments = ("bench", *TINY, "--shapes", "64x128", "--tokens", "2", "--weights", "gaussian")
    result = zipserv(*arguments)
    assert result.code == 0
    for text in ("limits measured in this run", "memcpy", "of copy", "speed-up", "geometric mean"):
        assert text in result.out


def test_time_budget_names_what_is_left(zipserv: Zipserv) -> None:
    result = zipserv("bench", *TINY, "--shapes", "64x64,64x128", "--time-budget", "0.000001", "--json")
    assert result.code == 0
    assert not result.json["points"] and len(result.json["skipped"]) == 4
    assert all("out of time" in text for text in result.json["skipped"])


def test_one_shape(zipserv: Zipserv) -> None:
    result = zipserv("bench", 128, 192, 4, *TINY)
    assert result.code == 0
    for text in ("W 128 x 192", "bit-exact", "F.linear (BF16)", "ZipGEMM", "decompress", "roofline"):
        assert text in result.out
    document = zipserv("bench", 128, 192, 4, *TINY, "--json").json
    assert document["point"]["tokens"] == 4 and document["weight"]["m"] == 128 and document["split_k"] is None


@pytest.mark.parametrize("arguments", [("128", "192", "4"), ("--shapes", "128x192", "--tokens", "4")])
def test_wrong_product_is_found_and_not_timed(zipserv: Zipserv, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    right = package.linear

    def wrong(x: torch.Tensor, z: package.ZipTensor) -> torch.Tensor:
        y = right(x, z)
        y[:, 64:128] = 0  # one row of tiles is missing
        return y

    monkeypatch.setattr(package, "linear", wrong)
    result = zipserv("bench", *arguments, *TINY, "--json")
    assert result.code == 1 and "the product is wrong" in result.err
    assert not result.json.get("points")


def test_wrong_weight_is_found(zipserv: Zipserv, monkeypatch: pytest.MonkeyPatch) -> None:
    right = package.ZipTensor.decompress

    def wrong(self: package.ZipTensor, out: torch.Tensor | None = None) -> torch.Tensor:
        result = right(self, out)
        result.view(torch.int16)[-1, -1] ^= 1
        return result

    monkeypatch.setattr(package.ZipTensor, "decompress", wrong)
    result = zipserv("bench", 128, 192, 4, *TINY)
    assert result.code == 1 and "differs" in result.err


@pytest.fixture
def invariant_mode(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes what the mode is set to; the CPU has no such mode, its results do not depend on it."""
    seen: list[bool] = []
    monkeypatch.setattr(package, "set_batch_invariant", seen.append)
    return seen


def test_batch_invariant_mode_is_measured_and_checked(zipserv: Zipserv, monkeypatch: pytest.MonkeyPatch, invariant_mode: list[bool]) -> None:
    def row_by_row(x: torch.Tensor, z: package.ZipTensor) -> torch.Tensor:
        return torch.cat([right(x[i : i + 1], z) for i in range(x.shape[0])])

    def neighbours_matter(x: torch.Tensor, z: package.ZipTensor) -> torch.Tensor:
        y = row_by_row(x, z)
        y.view(torch.int16)[-1, -1] ^= int(x.shape[0] > 1)
        return y

    right = package.linear
    arguments = ("bench", *TINY, "--shapes", "64x128", "--tokens", "5", "--weights", "gaussian", "--batch-invariant", "--json")
    monkeypatch.setattr(package, "linear", row_by_row)
    result = zipserv(*arguments)
    assert result.code == 0 and result.json["points"][0]["invariant_seconds"] > 0
    assert result.json["summary"][0]["invariant_speedup"] > 0 and result.json["summary"][0]["invariant_cost"] > -1
    assert invariant_mode == [True, False]
    monkeypatch.setattr(package, "linear", neighbours_matter)
    result = zipserv(*arguments)
    assert result.code == 1 and "token 4 of 5 has other bits" in result.err
    assert invariant_mode == [True, False] * 2


def test_whole_model(zipserv: Zipserv, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    arguments = ("bench", "--model", "tiny", "--device", "cpu", "--prompt", "4", "--new-tokens", "2", "--batch", "1,2")
    result = zipserv(*arguments, "--out", tmp_path / "out")
    assert result.code == 0 and "tokens/s" in result.out
    document = json.loads((tmp_path / "out" / "model.json").read_text())
    assert len(document["rows"]) == 2 and document["weights"]["ratio"] < 1 and document["about"]["cpu"]
    assert zipserv("bench", "--model", "/no/such/config", "--device", "cpu").code in (2, 3)


def test_results_from_elsewhere(zipserv: Zipserv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "bench.json"
    words = ["--device", "cpu", "--models", "qwen2.5-7b", "--layers", "o", "--tokens", "1,2", "--weights", "trained"]
    small = shapes.Shape("qwen2.5-7b", "o", 128, 192)
    monkeypatch.setattr(shapes, "select", lambda models, layers: [small])
    monkeypatch.setattr("sys.argv", ["bench", *words, "--out", str(out), "--point-budget", "0.001", "--no-batch-invariant"])
    assert bare.main() == 0
    result = zipserv("bench", "--read", out, "--out", tmp_path / "plots")
    assert result.code == 0 and "qwen2.5-7b o" in result.out and (tmp_path / "plots" / "speedup.png").exists()
    out.write_text("{}")
    assert zipserv("bench", "--read", out).code == 3
    assert zipserv("bench", "--read", tmp_path / "none").code == 3


def test_no_gpu_is_code_5(zipserv: Zipserv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = zipserv("bench", "--device", "cuda")
    assert result.code == 5 and "doctor" in result.err


def test_geometric_mean_and_units() -> None:
    assert report.geometric_mean([1.0, 4.0]) == pytest.approx(2)
    assert [report.seconds(v) for v in (2e-6, 3.25e-3, 1.5)] == ["2.0 us", "3.25 ms", "1.50 s"]
