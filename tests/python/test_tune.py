# SPDX-License-Identifier: Apache-2.0
"""``zipserv tune``: the search with a GPU's part played by numbers, and the whole way of a choice over a driver that only pretends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import zipserv as package
from cli_helpers import Zipserv
from zipserv import choices, tune
from zipserv.bench import single
from zipserv.bench.shapes import Shape
from zipserv.choices import Choice, Entry, Problem
from zipserv.cli import tuning

USUAL, FAST, EVEN, WIDE = Choice("mma", 2, 4, 132), Choice("mma", 4, 2, 128), Choice("mma", 2, 4, 128), Choice("decompress")


@pytest.fixture
def zipserv(capsys: pytest.CaptureFixture[str]) -> Zipserv:
    return Zipserv(capsys)


class FakeGPU:
    """What the engine would be asked, and a rig whose products take as long as the choice says."""

    def __init__(self, seconds: dict[Choice, float]) -> None:
        self.seconds, self.chosen = seconds, dict[Problem, Choice]()
        self.unusable: dict[Choice, str] = {}
        self.wrong: set[Choice] = set()
        self.saved: list[Entry] = []
        self.modes: list[bool] = []
        self.checked: list[Choice] = []
        self.open = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choices, "candidates", lambda device, problem: list(self.seconds))
        monkeypatch.setattr(choices, "prepare", self._prepare)
        monkeypatch.setattr(choices, "choose", lambda device, problem, choice: self.chosen.update({problem: choice}))
        monkeypatch.setattr(choices, "unchoose", lambda device, problem: self.chosen.pop(problem))
        monkeypatch.setattr(choices, "save", self._save)
        monkeypatch.setattr(package, "set_batch_invariant", self.modes.append)

    def _prepare(self, device: int, problem: Problem, choice: Choice) -> None:
        if choice in self.unusable:
            raise package.Error(self.unusable[choice])

    def _save(self, device: int, entries: list[Entry]) -> tuple[str, int]:
        self.saved += entries
        return "file", len(self.saved)

    # The rig.

    def check(self, problem: Problem, choice: Choice) -> None:
        assert self.chosen[problem] == choice and self.modes[-1] == (problem.tokens is None)
        self.checked.append(choice)
        if choice in self.wrong:
            raise tune.WrongResult(f"{choice} is wrong")

    def loop(self, tokens: int) -> Any:
        (choice,) = self.chosen.values()
        assert self.checked[-1] == choice, "checked before it is timed"
        self.open += 1
        return FakeLoop(self, self.seconds[choice] * tokens)

    def close(self) -> None: ...


class FakeLoop:
    def __init__(self, gpu: FakeGPU, time: float) -> None:
        self._gpu, self._time = gpu, time

    def seconds(self) -> float:
        return self._time

    def close(self) -> None:
        self._gpu.open -= 1


def search(monkeypatch: pytest.MonkeyPatch, gpu: FakeGPU, problem: Problem) -> tune.Outcome:
    gpu.install(monkeypatch)
    outcome = tune.search(gpu, 0, problem, budget=0.0)
    assert not gpu.chosen and gpu.open == 0, "nothing is left behind"
    assert gpu.modes[-1] is False
    return outcome


def test_the_fastest_way_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU({USUAL: 10e-6, FAST: 8e-6, EVEN: 9e-6, WIDE: 50e-6})
    found = search(monkeypatch, gpu, Problem(4096, 4096, 32))
    assert (found.choice, found.default) == (FAST, USUAL) and found.gain == pytest.approx(1.25)
    assert found.seconds == pytest.approx(32 * 8e-6) and set(found.measured) == {str(c) for c in gpu.seconds}
    assert gpu.checked == [USUAL, FAST, EVEN, WIDE]


def test_a_small_gain_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(monkeypatch, FakeGPU({USUAL: 10e-6, FAST: 9.95e-6}), Problem(4096, 4096, None))
    assert found.choice == found.default == USUAL and found.gain == 1


def test_wrong_and_unusable_ways_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU({USUAL: 10e-6, FAST: 1e-6, EVEN: 2e-6, WIDE: 9e-6})
    gpu.wrong, gpu.unusable = {FAST}, {EVEN: "does not compile"}
    found = search(monkeypatch, gpu, Problem(4096, 4096, 128))
    assert found.choice == WIDE
    assert found.failed == {str(EVEN): "does not compile", str(FAST): f"{FAST} is wrong"}
    gpu = FakeGPU({USUAL: 10e-6, FAST: 1e-6})
    gpu.wrong = {USUAL}
    gpu.install(monkeypatch)
    with pytest.raises(tune.WrongResult, match="is wrong"):
        tune.search(gpu, 0, Problem(4096, 4096, 128), budget=0.0)
    assert not gpu.chosen and gpu.open == 0
    gpu = FakeGPU({USUAL: 10e-6, FAST: 1e-6})
    gpu.unusable = {USUAL: "does not compile"}
    gpu.install(monkeypatch)
    with pytest.raises(package.Error, match="does not compile"):
        tune.search(gpu, 0, Problem(4096, 4096, 128), budget=0.0)


def test_problems() -> None:
    all_of_it = tune.problems([(64, 128), (64, 128), (256, 64)])
    assert len(all_of_it) == 2 * (len(choices.BUCKETS) + 1)
    assert tune.problems([(64, 128)], [1, 16, 70, 9000], invariant=False) == [Problem(64, 128, n) for n in (16, 128, 8192)]
    for n in (1, 16, 17, 8192, 100000):
        assert tune.bucket(n) in choices.BUCKETS
    with pytest.raises(ValueError, match="at least 1"):
        tune.bucket(0)
    for problem in all_of_it:
        for tokens in tune.measured_tokens(problem):
            assert problem.tokens is None or tune.bucket(tokens) == problem.tokens


def test_every_answer_is_kept_at_once_and_a_weight_too_large_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU({USUAL: 10e-6, FAST: 8e-6})
    gpu.install(monkeypatch)

    def rig(m: int, k: int) -> tune.Rig:
        if m > 1000:
            raise MemoryError("too large")
        return gpu

    todo = tune.problems([(4096, 64), (64, 64)], [1, 32])
    seen = []
    for outcome in tune.run(todo, torch.device("cuda", 0), budget=0.0, rig=rig):
        seen.append(outcome)
        assert len(gpu.saved) == sum(isinstance(x, tune.Outcome) for x in seen)
    assert seen[:3] == [f"{problem}: too large" for problem in todo[:3]]
    assert [x.problem for x in gpu.saved] == todo[3:] and all(x.choice == FAST for x in gpu.saved)
    gpu.saved.clear()
    list(tune.run(todo[3:], torch.device("cuda", 0), budget=0.0, rig=rig, keep=False))
    assert not gpu.saved


def test_the_rig_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, which has a linear as well."""
    rig = tune.GpuRig(torch.device("cpu"), 200, 192, cache=1 << 16)
    right = package.linear
    few, any_number = Problem(200, 192, 32), Problem(200, 192, None)
    rig.check(few, USUAL)
    assert rig.loop(3).seconds() > 0

    def off(x: torch.Tensor, z: package.ZipTensor) -> torch.Tensor:
        y = right(x, z)
        y[:, 64:128] *= 1.1
        return y

    calls = 0

    def restless(x: torch.Tensor, z: package.ZipTensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        y = right(x, z)
        y.view(torch.int16)[0, 0] ^= calls % 2
        return y

    def neighbours_matter(x: torch.Tensor, z: package.ZipTensor) -> torch.Tensor:
        y = torch.cat([right(x[i : i + 1], z) for i in range(x.shape[0])])
        y.view(torch.int16)[-1, -1] ^= int(x.shape[0] > 1)
        return y

    for wrong, problem, words in (
        (off, few, "the error against float64"),
        (restless, few, "other bits than the first"),
        (neighbours_matter, any_number, "other bits than on its own"),
    ):
        monkeypatch.setattr(package, "linear", wrong)
        with pytest.raises(tune.WrongResult, match=words):
            rig.check(problem, USUAL)
    monkeypatch.setattr(package, "linear", right)
    rig.check(few, WIDE)
    rig.close()


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    """The command sees a GPU whose measurements are a FakeGPU's."""
    gpu = FakeGPU({USUAL: 10e-6, FAST: 8e-6})
    gpu.install(monkeypatch)
    monkeypatch.setattr(tuning, "_device", lambda name: torch.device("cuda", 0))
    real = tune.run
    monkeypatch.setattr(tune, "run", lambda todo, device, **more: real(todo, device, rig=lambda m, k: gpu, **more))
    return gpu


def test_command(zipserv: Zipserv, gpu_machine: FakeGPU) -> None:
    result = zipserv("tune", 4096, 4096, 64, 128, "--tokens", "1,64", "--no-batch-invariant", "--budget", "0.0001")
    assert result.code == 0, result.err
    assert result.out.count("mma 4x2, 128 blocks") == 4 and "4 of 4 classes are faster now, by up to 1.250 x" in result.out
    document = zipserv("tune", 4096, 4096, "--tokens", "64", "--budget", "0.0001", "--json").json
    assert [x["tokens"] for x in document["outcomes"]] == [64, 0] and document["outcomes"][1]["invariant"]
    assert len(gpu_machine.saved) == 6


def test_interrupt_keeps_what_was_measured(zipserv: Zipserv, gpu_machine: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FakeGPU.loop

    def interrupted(self: FakeGPU, tokens: int) -> Any:
        if len(self.saved) == 2:
            raise KeyboardInterrupt
        return right(self, tokens)

    monkeypatch.setattr(FakeGPU, "loop", interrupted)
    result = zipserv("tune", 64, 128, "--budget", "0.0001")
    assert result.code == 130 and "the choices for 2 of 14 classes are kept" in result.err
    assert len(gpu_machine.saved) == 2 and not gpu_machine.chosen and gpu_machine.open == 0


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        ((), 2, "name a model"),
        (("64",), 2, "pairs of numbers"),
        (("64", "0"), 2, "pairs of numbers"),
        (("llama-3.1-8b", "qwen2.5-7b"), 2, "one model"),
        (("64", "64", "--tokens", "x"), 2, "not a positive number"),
        (("--list", "--clear"), 2, "stand alone"),
        (("64", "64", "--list"), 2, "stand alone"),
        (("64", "\u00b2"), 2, "pairs of numbers"),
        (("no-such-model",), 3, "no model configuration 'no-such-model'"),
        (("no/such/folder",), 3, "no model configuration"),
    ],
)
def test_refusals(zipserv: Zipserv, arguments: tuple[str, ...], code: int, words: str) -> None:
    result = zipserv("tune", *arguments)
    assert result.code == code and words in result.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu(zipserv: Zipserv) -> None:
    result = zipserv("tune", "llama-3.1-8b")
    assert result.code == 5 and "torch sees none" in result.err


def test_shapes_of_models(tmp_path: Path) -> None:
    assert tuning.shapes_of(["64", "128", "64", "128"], 1) == [(64, 128), (64, 128)]
    llama = tuning.shapes_of(["llama-3.1-8b"], 1)
    assert {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)} == set(llama)
    assert (3072, 4096) in tuning.shapes_of(["llama-3.1-8b"], 2)
    assert (4096, 7168) in tuning.shapes_of(["deepseek-v3"], 1)
    config = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 640,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    stacked = {(768, 256), (256, 256), (1024, 256), (256, 512), (640, 256)}
    assert set(tuning.shapes_of([str(tmp_path)], 1)) == stacked
    package.save_file({"q.weight": package.compress(torch.randn(192, 256).bfloat16())}, tmp_path / "model.safetensors")
    assert set(tuning.shapes_of([str(tmp_path)], 1)) == stacked | {(192, 256)}


def test_a_split_of_k_needs_a_gpu() -> None:
    shape = Shape("custom", "weight", 128, 192)
    with single.forced_split(torch.device("cpu"), shape, 4, None):
        assert single.solved_by(torch.device("cpu"), shape, 4) is None
    for shares, words in ((2, "CUDA kernels"), (0, "at least 1")):
        with pytest.raises(ValueError, match=words):
            single.forced_split(torch.device("cpu"), shape, 4, shares)


# --- the whole way, over a driver that pretends --------------------------------------------------------------------------------

PROGRAM = """
import ctypes, json, os, warnings
from zipserv import _zipserv, choices
from zipserv.choices import Choice, Entry, Problem
_zipserv.cuda_set_dirs(os.environ["TEST_NVRTC_DIRS"])
fake = ctypes.CDLL(os.environ["ZIPSERV_LIBCUDA"])
fake.fake_log.restype = ctypes.c_char_p
def grid(n=5):
    assert _zipserv.cuda_linear(0, 0x77, 0x1000, 4096, 4096, 0x2000, n, 4096, 0, 0x3000, 4096, 0, 0) == 0
    line = [x for x in fake.fake_log().decode().splitlines() if x.startswith("launch")][-1]
    return int(line.split(" grid ")[1].split(",")[0])
few, any_number = Problem(4096, 4096, 16), Problem(4096, 4096, None)
"""


@pytest.fixture
def program(fake_driver: Path, tmp_path: Path) -> Any:
    from zipserv.cuda import _compiler_dirs

    def run(code: str, **env: str) -> str:
        here = {"ZIPSERV_LIBCUDA": str(fake_driver), "ZIPSERV_CACHE_DIR": str(tmp_path), "TEST_NVRTC_DIRS": os.pathsep.join(_compiler_dirs())}
        command = [sys.executable, "-c", PROGRAM + code]
        done = subprocess.run(command, env={**os.environ, **here, **env}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


def test_a_choice_reaches_the_kernel_and_later_processes(program: Any, tmp_path: Path) -> None:
    out = program("""
ways = choices.candidates(0, few)
assert ways[0] == choices.current(0, few) and len(set(ways)) == len(ways) > 2, ways
usual = grid()
other = next(c for c in ways if c.fused and c.blocks != usual)
with choices.chosen(0, few, other):
    assert grid() == other.blocks and choices.current(0, few) == other
assert grid() == usual
half = choices.split(0, few, 2)
with choices.chosen(0, few, half): assert grid() == half.blocks
for wrong in (Choice("mma", 2, 4, 10**6), Choice("mma", 9, 9, 1), Choice("unknown")):
    try: choices.choose(0, few, wrong)
    except ValueError: pass
    else: raise AssertionError(wrong)
try: choices.split(0, few, 10**6)
except ValueError as error: assert "at most" in str(error)
else: raise AssertionError
assert choices.files() == []
path, total = choices.save(0, [Entry(few, other, 8e-6, 9e-6)])
assert total == 1 and os.path.exists(path)
# One choice for every number of tokens in the batch-invariant mode.
always = next(c for c in choices.candidates(0, any_number) if c.blocks != choices.current(0, any_number).blocks)
choices.save(0, [Entry(any_number, always, 8e-6, 9e-6)])
print(json.dumps([other.blocks, usual, always.blocks]))
""")
    blocks, usual, always = json.loads(out)
    program(f"""
assert grid() == {blocks}, grid()
_zipserv.cuda_set_batch_invariant(True)
assert {{grid(n) for n in (1, 5, 64, 65, 500)}} == {{{always}}}
""")
    program(f"assert grid() == {usual}, grid()", ZIPSERV_TUNED="off")
    told = program("import zipserv.cuda\nprint(zipserv.cuda.report()['device 0'])", PYTHONWARNINGS="error::UserWarning")
    assert "tuned: 2 choices" in told
    assert "tuning of GPU 0: 2 choices" in program("from zipserv import doctor\nfor f in doctor.examine(): print(f'{f.what}: {f.found}')")

    def command(*arguments: str) -> str:
        return program(f"from zipserv.cli import run\nassert run({['tune', *arguments]!r}) == 0")

    listed = command("--list")
    assert "4096x4096, N <= 16" in listed and "4096x4096, batch-invariant" in listed and "Fake GPU 0" in listed and "1.125 x" in listed
    (file,) = tmp_path.glob("tuned-*.json")
    file.write_bytes(file.read_bytes().replace(b"4096", b"4032"))
    told = program(f"import zipserv.cuda\nassert grid() == {usual}, grid()")
    assert "UserWarning" in told and "checksum" in told and str(file) in told
    assert "not used: damaged" in command("--list")
    assert '"removed": 1' in command("--clear", "--json")
    assert not list(tmp_path.glob("tuned-*.json"))
    assert "nothing was tuned" in command("--list")


def test_without_a_cache_directory(program: Any) -> None:
    program(
        """
try: choices.save(0, [])
except Exception as error: assert "cache directory" in str(error), error
else: raise AssertionError
""",
        ZIPSERV_CACHE_DIR="off",
    )
