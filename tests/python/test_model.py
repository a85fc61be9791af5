# SPDX-License-Identifier: Apache-2.0
"""compress_model, prepare_model, load_model and the report."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zipserv
from helpers import assert_same_bits, weights
from zipserv import ZipLinear
from zipserv import model as models


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(128, 256)
        self.down = nn.Linear(256, 128, bias=False)
        self.norm = nn.LayerNorm(128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(x + self.down(torch.relu(self.up(x))))
        return y


class Net(nn.Module):
    """Two blocks, an embedding, and a head that may share the embedding's table."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(192, 128)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(128, 192, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        y: torch.Tensor = self.head(x)
        return y


IDS = torch.arange(24).view(2, 12)
LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]


def names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ZipLinear)]


def test_in_place_with_the_same_results() -> None:
    model = Net().bfloat16().eval()
    expected = model(IDS)
    state = copy.deepcopy(model.state_dict())
    report = zipserv.compress_model(model)
    assert names(model) == LAYERS
    assert torch.allclose(model(IDS).float(), expected.float(), rtol=2e-2, atol=2e-2)
    assert not any(module.training for module in model.modules())
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert isinstance(layer, ZipLinear)
        assert_same_bits(layer.to_linear().weight, state[name + ".weight"])
    assert [entry.name for entry in report.layers] == ["embed", *LAYERS]
    assert {name for name, _ in model.named_parameters()} == {k for k in state if "norm" in k or k.endswith("up.bias")}


def test_report() -> None:
    report = zipserv.compress_model(Net().bfloat16())
    assert report.before == 2 * (2 * 192 * 128 + 4 * 256 * 128)
    assert report.after == sum(entry.after for entry in report.layers) < 0.75 * report.before
    assert report.ratio == pytest.approx(report.before / report.after)
    lines = repr(report).splitlines()
    assert len(lines) == 1 + 6 + 1 and "blocks.1.down" in repr(report) and "128 x 256" in repr(report)
    assert "6 of 6" in lines[-1] and f"{report.ratio:.3f}x" in lines[-1]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"][1]["name"] == "blocks.0.up" and data["layers"][1]["shape"] == [256, 128]
    assert data["before"] == report.before
    assert 10.5 < report.layers[1].bits_per_weight < 11.7
    assert repr(zipserv.compress_model(nn.Sequential(nn.ReLU()))).startswith("layer")


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("*.up", None, ["blocks.0.up", "blocks.1.up"]),
        (["blocks.0.*", "head"], None, ["blocks.0.up", "blocks.0.down", "head"]),
        (None, ["head", "embed"], LAYERS[:4]),
        ("blocks.*", "*.down", ["blocks.0.up", "blocks.1.up"]),
        (lambda name, module: module.bias is not None if isinstance(module, nn.Linear) else False, None, ["blocks.0.up", "blocks.1.up"]),
        (None, lambda name, module: "blocks" in name, ["head"]),
        (lambda name, module: False, None, []),
    ],
)
def test_include_and_exclude(include: Any, exclude: Any, expected: list[str]) -> None:
    model = Net().bfloat16()
    report = zipserv.compress_model(model, include, exclude)
    assert names(model) == expected
    assert [entry.name for entry in report.layers if entry.name != "embed"] == expected


def test_include_that_matches_nothing() -> None:
    model = Net().bfloat16()
    for include, exclude in (("nothing", None), ("up", None), (["a", "b.*"], None), ("*.up", "blocks.*")):
        with pytest.raises(ValueError, match=r"no layer to compress; the model has embed, blocks\.0\.up.*whole name"):
            zipserv.compress_model(model, include, exclude)
    assert names(model) == []
    zipserv.compress_model(model, "*.up")
    assert not zipserv.compress_model(model, "*.up").layers, "done already: no slip"


def test_wrong_arguments() -> None:
    model = Net().bfloat16()
    with pytest.raises(TypeError, match="glob"):
        zipserv.compress_model(model, include=[1])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="str"):
        zipserv.compress_model("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="from_linear"):
        zipserv.compress_model(nn.Linear(64, 64).bfloat16())
    with pytest.raises(ValueError, match="offload"):
        zipserv.compress_model(model, offload="disk")
    with pytest.raises(ValueError, match=r"float32.*model\.to\(torch\.bfloat16\) first"):
        zipserv.compress_model(Net())
    assert names(model) == []


def test_layers_that_are_kept_and_why() -> None:
    model = nn.ModuleDict(
        {
            "wide": nn.Linear(64, 64),
            "good": nn.Linear(128, 128),
            "noise": nn.Linear(64, 64),
            "hooked": nn.Linear(64, 64),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
            "meta": nn.Linear(64, 64, device="meta"),
            "shared": nn.Linear(64, 64),
        }
    ).bfloat16()
    model["wide"].float()
    model["noise"].weight = nn.Parameter(torch.randint(-(2**15), 2**15, (64, 64), dtype=torch.int16).view(torch.bfloat16))
    model["hooked"].forward = lambda x: x
    model.table = model["shared"].weight
    report = zipserv.compress_model(model)
    notes = {entry.name: entry.note for entry in report.layers if entry.status == "kept"}
    assert set(notes) == {"wide", "noise", "hooked", "meta", "shared"}
    assert "to(torch.bfloat16)" in notes["wide"] and "would not shrink" in notes["noise"]
    assert "forward" in notes["hooked"] and "meta" in notes["meta"] and "shared with table" in notes["shared"]
    assert isinstance(model["good"], ZipLinear) and type(model["wide"]) is nn.Linear
    assert "kept: would not shrink" in repr(report)
    kept = [entry for entry in report.layers if entry.status == "kept"]
    assert all(entry.before == entry.after for entry in kept)


def test_tied_weights_are_compressed_once() -> None:
    model = Net(tie=True).bfloat16()
    expected = model(IDS)
    report = zipserv.compress_model(model)
    status = {entry.name: (entry.status, entry.note) for entry in report.layers}
    assert status["embed"] == ("compressed", "") and status["head"] == ("tied", "to embed")
    assert model.embed.weight_zipserv is model.head.weight_zipserv
    assert report.before == 2 * (192 * 128 + 4 * 256 * 128)
    assert torch.allclose(model(IDS).float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_a_tie_to_a_module_that_stays_is_kept() -> None:
    model = Net(tie=True).bfloat16()
    report = zipserv.compress_model(model, exclude="embed")
    (entry,) = [entry for entry in report.layers if entry.name == "head"]
    assert entry.status == "kept" and "embed.weight" in entry.note
    assert model.head.weight is model.embed.weight


def test_one_module_under_two_names() -> None:
    model = nn.Module()
    model.a = nn.Linear(128, 128).bfloat16()
    model.b = model.a
    zipserv.compress_model(model)
    assert isinstance(model.a, ZipLinear) and model.a is model.b


def test_hooks_stay() -> None:
    model = Net().bfloat16()
    seen = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    zipserv.compress_model(model)
    model(IDS)
    assert seen == ["ZipLinear"]


def test_each_weight_is_freed_as_soon_as_it_is_compressed() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)]).bfloat16()
    alive: weakref.WeakSet[nn.Parameter] = weakref.WeakSet(layer.weight for layer in model)
    most = []
    original = models.converters[0]

    def build(old: nn.Module, blobs: Any) -> nn.Module:
        gc.collect()
        most.append(len(alive))
        return original.build(old, blobs)

    models.converters.insert(0, models.Converter(matches=original.matches, build=build))
    try:
        zipserv.compress_model(model)
    finally:
        models.converters.pop(0)
    assert most == [6, 5, 4, 3, 2, 1]


def test_a_model_twice() -> None:
    model = Net().bfloat16()
    zipserv.compress_model(model)
    before = [model.get_submodule(name) for name in LAYERS]
    assert zipserv.compress_model(model).layers == []
    assert [model.get_submodule(name) for name in LAYERS] == before


PROGRESS = """
import torch, zipserv
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).bfloat16()
zipserv.compress_model(model{})
"""


@pytest.mark.parametrize(("argument", "shown"), [("", False), (", progress=True", True)])
def test_progress_is_silent_in_a_pipe(argument: str, shown: bool) -> None:
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRESS.format(argument)], capture_output=True, text=True, check=True)
    assert run.stdout == ""
    assert ("compressing" in run.stderr and "2/2" in run.stderr) if shown else run.stderr == ""


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_load_model(tie: bool, device: str, tmp_path: Path) -> None:
    source = Net(tie=tie).bfloat16()
    zipserv.compress_model(source, exclude="blocks.1.up")
    zipserv.save_file(source.state_dict(), tmp_path / "model.safetensors", {"step": "7"})
    with torch.device(device):
        model = Net(tie=tie)
    result = zipserv.load_model(model, tmp_path)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert names(model) == names(source) and type(model.blocks[1].up) is nn.Linear
    assert torch.equal(model(IDS), source(IDS))
    if tie:
        assert model.embed.weight_zipserv is model.head.weight_zipserv


def test_load_model_of_float16(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(128, 128)).half()
    zipserv.compress_model(source)
    zipserv.save_file(source.state_dict(), tmp_path / "m.safetensors")
    model = nn.Sequential(nn.Linear(128, 128)).bfloat16()
    zipserv.load_model(model, tmp_path / "m.safetensors")
    x = weights(1, 128, dtype=torch.float16)
    assert torch.equal(model(x), source(x))


def test_load_model_into_another_architecture(tmp_path: Path) -> None:
    zipserv.save_file({"lost.weight": zipserv.compress(weights(64, 64))}, tmp_path / "m.safetensors")
    with pytest.raises(zipserv.Error, match=r"lost\.weight"):
        zipserv.load_model(Net(), tmp_path / "m.safetensors")


def test_load_model_of_another_shape(tmp_path: Path) -> None:
    zipserv.save_file({"head.weight": zipserv.compress(weights(64, 64))}, tmp_path / "m.safetensors")
    with pytest.raises(zipserv.Error, match=r"\(64, 64\) in the file, \(192, 128\) in the model"):
        zipserv.load_model(Net(), tmp_path / "m.safetensors")


def test_load_model_with_a_convolution(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Conv2d(3, 128, 16, stride=16), nn.Flatten(), nn.Linear(512, 64)).bfloat16()
    x = weights(2, 3, 32, 32, sigma=1)
    zipserv.compress_model(source)
    zipserv.save_file(source.state_dict(), tmp_path / "m.safetensors")
    model = nn.Sequential(nn.Conv2d(3, 128, 16, stride=16), nn.Flatten(), nn.Linear(512, 64))
    zipserv.load_model(model, tmp_path / "m.safetensors")
    assert torch.equal(model(x), source(x)) and type(model[0]) is type(source[0]) is not nn.Conv2d


def test_patterns_may_be_any_iterable() -> None:
    model = Net().bfloat16()
    zipserv.compress_model(model, include=(glob for glob in ("*.up", "head")))
    assert names(model) == ["blocks.0.up", "blocks.1.up", "head"]


def test_prepare_model() -> None:
    model = Net().bfloat16()
    assert zipserv.prepare_model(model, include="blocks.*", exclude="*.down") == ["blocks.0.up", "blocks.1.up"]
    assert names(model) == ["blocks.0.up", "blocks.1.up"]
    with pytest.raises(zipserv.Error, match="load a state dict"):
        model(IDS)
    with pytest.raises(ValueError, match="single layer"):
        zipserv.prepare_model(nn.Linear(4, 4))


def test_prepare_model_of_every_kind() -> None:
    def make() -> nn.Module:
        return nn.ModuleDict({"conv": nn.Conv2d(3, 128, 16, stride=16), "table": nn.Embedding(128, 128), "head": nn.Linear(512, 64)})

    source, model = make().bfloat16(), make()
    zipserv.compress_model(source)
    assert zipserv.prepare_model(model) == ["conv", "table", "head"]
    model.to(torch.bfloat16).load_state_dict(source.state_dict())
    for found, expected in zip(model.buffers(), source.buffers(), strict=True):
        assert torch.equal(found, expected)


def test_include_that_is_no_pattern() -> None:
    with pytest.raises(TypeError, match="a glob, a list of globs, or a function"):
        zipserv.compress_model(nn.Sequential(nn.Linear(64, 64).bfloat16()), exclude=3)  # type: ignore[arg-type]
