# SPDX-License-Identifier: Apache-2.0
"""``zipserv inspect``, ``doctor``, usage errors, exit codes, JSON."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cli_helpers import Zipserv, make_model, weight
from zipserv import compress, doctor, survey
from zipserv.cli import inspecting, rules


@pytest.fixture
def zipserv(capsys: pytest.CaptureFixture[str]) -> Zipserv:
    return Zipserv(capsys)


def test_help_names_every_command_and_exit_code(zipserv: Zipserv) -> None:
    result = zipserv("--help")
    assert result.code == 0
    for word in ("compress", "decompress", "verify", "inspect", "doctor", "plan", "bench", "Exit codes", "130"):
        assert word in result.out
    for command in ("compress", "decompress", "verify", "inspect", "doctor", "plan", "bench"):
        help_text = zipserv(command, "--help")
        assert help_text.code == 0 and "--json" in help_text.out


def test_module_and_version() -> None:
    command = [sys.executable, "-m", "zipserv", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("zipserv ")


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys; from zipserv import cli; code = cli.run(['--help']); sys.exit(code or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(("missing", "what"), [("torch", "torch"), ("zipserv._zipserv", "native library")])
def test_doctor_where_nothing_else_works(missing: str, what: str) -> None:
    program = f"""
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == {missing!r}:
            raise ImportError("libsomething.so: cannot open shared object file")
sys.meta_path.insert(0, Broken())
from zipserv import cli
sys.exit(cli.run(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "doctor"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 5 and not result.stderr, result.stderr
    line = next(line for line in result.stdout.splitlines() if f" {what} " in line)
    assert line.startswith("!!"), result.stdout
    result = subprocess.run([*command[:-1], "inspect", "."], capture_output=True, text=True, check=False)
    assert result.returncode == 5 and "doctor" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("explode",),
        ("compress",),
        ("compress", "a"),
        ("compress", "a", "b", "c"),
        ("verify",),
        ("inspect", "a", "--fast", "--plot", "b.png"),
        ("bench", "8"),
        ("bench", "0", "8", "8"),
        ("bench", "--tokens", "1,x"),
        ("bench", "--weights", "round"),
        ("bench", "--device", "toaster"),
        ("bench", "--device", "cpu", "--models", "gpt-17"),
        ("bench", "--device", "cpu", "--shapes", "64x"),
        ("bench", "--device", "cpu", "--split-k", "2"),
        ("bench", "8", "8", "8", "--device", "cpu", "--split-k", "2"),
    ],
)
def test_wrong_usage_is_code_2(zipserv: Zipserv, arguments: tuple[str, ...]) -> None:
    result = zipserv(*arguments)
    assert result.code == 2 and result.err


def test_errors_as_json(zipserv: Zipserv) -> None:
    result = zipserv("verify", "/nowhere/model", "--json")
    assert result.code == 3
    assert result.json == {
        "ok": False,
        "error": {"code": 3, "kind": "input", "message": "/nowhere/model: no such file or folder"},
    }
    assert zipserv("compress", "--json").json["error"]["kind"] == "usage"


def test_closed_pipe_is_no_error(tmp_path: Path) -> None:
    save_file({f"tensor.{i}": weight(2, 2) for i in range(5000)}, tmp_path / "a.safetensors")
    command = f"{sys.executable} -m zipserv inspect --fast {tmp_path}/a.safetensors | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_entropy() -> None:
    assert survey.entropy([0, 7, 0]) == 0
    assert survey.entropy([4, 4, 0, 4, 4]) == 2
    assert survey.entropy([]) == 0
    assert survey.entropy([1, 1, 2]) == pytest.approx(1.5)


def test_best_window() -> None:
    assert survey.best_window([5, 0, 1, 1, 9], 2) == (3, 10)
    assert survey.best_window([1, 1, 1], 2) == (0, 2)  # the smallest of equals
    assert survey.best_window([3, 4], 8) == (0, 7)


def test_survey_against_plain_arithmetic() -> None:
    w = weight(192, 256)
    w[0, :5] = torch.tensor([0.0, 1e30, 1e-30, float("inf"), float("nan")])
    exponents = (w.view(torch.int16).int() >> 7 & 255).flatten()
    expected = torch.bincount(exponents, minlength=256).tolist()
    for tensor in (w, compress(w)):
        result = survey.survey("w", tensor)
        assert list(result.histogram) == expected
        share = torch.tensor([n for n in expected if n], dtype=torch.float64) / w.numel()
        assert result.bound == pytest.approx(8 - float((share * share.log2()).sum()))
        best = max(sum(expected[i : i + 7]) for i in range(250)) / w.numel()
        assert result.paper_bits == pytest.approx(3 + 8 * best + 16 * (1 - best))
        assert result.bits == compress(w).bits_per_weight > result.bound
        assert result.stored == ("plain" if tensor is w else "zipserv")
    assert result.literals == 5  # none of these is near the window


def test_survey_of_half_precision_and_of_other_dtypes() -> None:
    result = survey.survey("h", weight(128, 128, dtype=torch.float16))
    assert 11 < result.bound < result.bits < 15
    with pytest.raises(TypeError, match="float32"):
        survey.survey("f", torch.ones(64, 64))


def test_total_weighs_by_size() -> None:
    one, two = survey.survey("a", weight(64, 64)), survey.survey("b", weight(64, 192, seed=1) * 2**40)
    both = survey.total([one, two])
    assert both is not None and both.weights == 4096 * 4
    assert both.bits == pytest.approx((one.bits + 3 * two.bits) / 4)
    assert sum(both.histogram) == both.weights
    assert survey.total([]) is None


def test_inspect_plain_and_compressed(zipserv: Zipserv, tmp_path: Path) -> None:
    model, packed = make_model(tmp_path / "model"), tmp_path / "packed"
    assert zipserv("compress", model, packed).code == 0
    before, after = zipserv("inspect", model, "--json").json, zipserv("inspect", packed, "--json").json
    numbers = ("weights", "bits", "bound", "paper_bits", "escapes")
    assert [before["total"][n] for n in numbers] == [after["total"][n] for n in numbers]
    assert {layer["stored"] for layer in before["layers"]} == {"plain"}
    stored = {layer["name"]: layer["stored"] for layer in after["layers"]}
    assert stored["model.layers.1.q_proj.weight"] == "zipserv" and stored["model.layers.1.mlp.gate.weight"] == "plain"
    text = zipserv("inspect", packed)
    assert text.code == 0 and "model.layers.1.q_proj.weight" in text.out and "bound" in text.out
    fast = zipserv("inspect", packed, "--fast", "--json").json["tensors"]
    assert len(fast) == 14 and sum(row["bytes"] for row in fast) < 400_000
    assert "zipserv" in zipserv("inspect", packed, "--fast").out


def test_inspect_plot(zipserv: Zipserv, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_file({"a": weight(128, 128), "b": weight(64, 128) * 4, "v": torch.ones(3)}, tmp_path / "a.safetensors")
    picture = tmp_path / "new" / "a.png"
    result = zipserv("inspect", tmp_path / "a.safetensors", "--plot", picture)
    assert result.code == 0 and picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    save_file({"v": torch.ones(3)}, tmp_path / "b.safetensors")
    assert zipserv("inspect", tmp_path / "b.safetensors", "--plot", picture).code == 3


def test_missing_matplotlib_names_the_cure(zipserv: Zipserv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    save_file({"a": weight(128, 128)}, tmp_path / "a.safetensors")
    result = zipserv("inspect", tmp_path / "a.safetensors", "--plot", tmp_path / "a.png")
    assert result.code == 5 and "zipserv[plots]" in result.err
    result = zipserv("bench", "--device", "cpu", "--out", tmp_path / "out")
    assert result.code == 5 and not (tmp_path / "out").exists()


def test_doctor(zipserv: Zipserv) -> None:
    result = zipserv("doctor", "--json")
    assert result.code == 0 and result.json["ok"]
    findings = {finding["what"]: finding for finding in result.json["findings"]}
    for what in ("Python", "torch", "native library", "self-test"):
        assert findings[what]["state"] in ("ok", "note")
    assert findings["torch"]["found"].startswith(torch.__version__)
    assert any(name.startswith("GPU") for name in findings) and "kernel cache" in findings
    text = zipserv("doctor")
    assert text.code == 0 and "self-test" in text.out


def test_doctor_tells_problems_and_cures(zipserv: Zipserv, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = doctor.Finding("self-test", "problem", "weights changed on the way", "do not use this build")
    monkeypatch.setattr(doctor, "_round_trip", lambda: broken)
    result = zipserv("doctor")
    assert result.code == 5 and "do not use this build" in result.out
    document = zipserv("doctor", "--json").json
    assert document["ok"] is False


def test_doctor_catches_a_codec_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from zipserv.tensor import ZipTensor

    monkeypatch.setattr(ZipTensor, "decompress", lambda self, out=None: torch.zeros(64, 64, dtype=torch.bfloat16))
    finding = doctor._round_trip()
    assert finding.state == "problem" and "changed" in finding.found


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("model.layers.0.mlp.gate_proj.weight", (512, 128), True),
        ("lm_head.weight", (512, 128), True),
        ("model.layers.0.mlp.experts.3.up_proj.weight", (512, 128), True),
        ("model.embed_tokens.weight", (512, 128), True),
        ("embeddings.position_embeddings.weight", (512, 128), False),
        ("model.layers.0.mlp.gate.weight", (512, 128), False),
        ("model.layers.0.block_sparse_moe.router.weight", (512, 128), False),
        ("model.layers.0.input_layernorm.weight", (512,), False),
        ("visual.patch_embed.proj.weight", (512, 3, 14, 14), False),
        ("model.layers.0.q_proj.bias", (4096,), False),
        ("model.layers.0.tiny.weight", (32, 32), False),
    ],
)
def test_rules_of_a_model_folder(name: str, shape: tuple[int, ...], wanted: bool) -> None:
    folder = rules.Rules(folder=True)
    assert folder.wants(name, shape, torch.bfloat16) is wanted
    assert not folder.wants(name, shape, torch.float32)
    assert not rules.Rules(exclude=("*",), folder=True).wants(name, shape, torch.bfloat16)
    large = len(shape) >= 2 and name != "model.layers.0.tiny.weight"
    assert rules.Rules().wants(name, shape, torch.bfloat16) is large
    assert rules.Rules(include=("*weight",), folder=True).wants(name, shape, torch.bfloat16) is large


def test_debug_shows_the_traceback(zipserv: Zipserv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("a mistake in the program")

    monkeypatch.setattr(inspecting, "_read_headers", broken)
    (tmp_path / "a.safetensors").write_bytes(b"")
    result = zipserv("inspect", "--fast", tmp_path / "a.safetensors")
    assert result.code == 3 and "a mistake" in result.err
    monkeypatch.setenv("ZIPSERV_DEBUG", "1")
    with pytest.raises(AttributeError):
        zipserv("inspect", "--fast", tmp_path / "a.safetensors")
