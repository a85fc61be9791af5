# SPDX-License-Identifier: Apache-2.0
"""ZipLinear and BlobModule: what people expect of a layer that replaces nn.Linear."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import zipserv
from helpers import DTYPES, assert_same_bits, bits, flipped, weights
from zipserv import ZipLinear

KEY = "weight_zipserv"


def make(m: int = 190, k: int = 250, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Linear, ZipLinear]:
    linear = nn.Linear(k, m, bias=bias).to(dtype)
    return linear, ZipLinear.from_linear(linear)


class Tied(nn.Module):
    """Two layers that share a weight, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(256, 192, bias=False)
        self.b = nn.Linear(256, 192, bias=True)
        self.c = nn.Linear(256, 192)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.a(x) + self.b(x) + self.c(x)
        return y


def tied() -> Tied:
    model = Tied().bfloat16()
    zipserv.compress_model(model)
    return model


def is_tied(model: nn.Module) -> bool:
    a, b, c = (getattr(model, name).weight_zipserv for name in "abc")
    return a is b and a is not c


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_from_linear_forward_to_linear(dtype: torch.dtype, bias: bool) -> None:
    linear, layer = make(bias=bias, dtype=dtype)
    x = weights(2, 3, 250, dtype=dtype, sigma=1)
    assert torch.allclose(layer(x).float(), linear(x).float(), rtol=1e-2, atol=1e-2)
    assert torch.equal(bits(layer(x)), bits(zipserv.linear(x, zipserv.compress(linear.weight), linear.bias)))
    back = layer.to_linear()
    assert type(back) is nn.Linear and back.in_features == 250 and back.out_features == 190
    assert_same_bits(back.weight, linear.weight)
    assert back.bias is linear.bias and layer.bias is linear.bias
    assert layer(x[:0]).shape == (0, 3, 190)


def test_only_the_bias_is_a_parameter() -> None:
    _, layer = make()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert [name for name, _ in layer.named_buffers()] == [KEY]
    assert set(layer.state_dict()) == {KEY, "bias"}
    assert isinstance(layer, nn.Linear) and layer.weight_zipserv.dtype == torch.uint8
    _, layer = make(bias=False)
    assert list(layer.parameters()) == [] and layer.bias is None


def test_an_optimizer_and_training_step_leave_the_weight_alone() -> None:
    _, layer = make()
    before = layer.weight_zipserv.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    x = weights(4, 250, sigma=1).requires_grad_()
    layer(x).sum().backward()
    optimizer.step()
    assert x.grad is not None and layer.bias.grad is not None and bool((layer.bias.grad == 4).all())
    assert torch.equal(layer.weight_zipserv, before)


def test_repr() -> None:
    _, layer = make()
    text = repr(layer)
    for part in ("ZipLinear(", "in_features=250", "out_features=190", "bias=True", "bfloat16", "bits/weight"):
        assert part in text
    assert "no weight yet" in repr(ZipLinear(4, 5))


def test_a_new_layer_has_no_weight_until_one_is_loaded() -> None:
    layer = ZipLinear(250, 190)
    with pytest.raises(zipserv.Error, match="load a state dict"):
        layer(weights(1, 250))
    with pytest.raises(zipserv.Error, match="load a state dict"):
        _ = layer.ziptensor
    with pytest.raises(zipserv.Error, match="initialised anew"):
        layer.reset_parameters()
    with pytest.raises(TypeError, match="float32"):
        ZipLinear(4, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="at least one element"):
        ZipLinear(0, 4)


def test_from_linear_refuses_what_does_not_fit() -> None:
    with pytest.raises(TypeError, match=r"tensor\.to\(torch\.bfloat16\)"):
        ZipLinear.from_linear(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="Conv1d"):
        ZipLinear.from_linear(nn.Conv1d(1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ZipLinear"):
        ZipLinear.from_linear(make()[1])
    with pytest.raises(ValueError, match="two dimensions"):
        ZipLinear.from_ziptensor(zipserv.compress(weights(2, 64, 64)))
    with pytest.raises(ValueError, match=r"\(190,\)"):
        ZipLinear.from_ziptensor(zipserv.compress(weights(190, 250)), weights(191))


def test_from_ziptensor_shares_the_bytes() -> None:
    z = zipserv.compress(weights(190, 250))
    layer = ZipLinear.from_ziptensor(z)
    assert layer.weight_zipserv is z.blob and layer.ziptensor.blob is z.blob
    assert layer.ziptensor.header == z.header


# --- the weight attribute -------------------------------------------------------------------------------------------


def test_weight_is_there_for_those_who_look() -> None:
    linear, layer = make()
    weight = layer.weight
    assert weight.shape == (190, 250) and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    assert torch.equal(weight + 0, linear.weight) and type(weight + 0) is torch.Tensor
    assert torch.equal(weight.data.clone(), linear.weight)
    x = weights(2, 250)
    assert torch.equal(bits(F.linear(x, weight)), bits(zipserv.linear(x, layer.ziptensor)))
    assert hasattr(layer, "weight") and "weight" not in layer._parameters


def test_changes_of_the_weight_are_refused_not_lost() -> None:
    _, layer = make()
    weight = layer.weight
    changes = [
        lambda: weight.add_(1),
        lambda: weight.data.add_(1),
        lambda: weight.__setitem__(0, 0),
        lambda: setattr(weight, "data", torch.zeros(190, 250, dtype=torch.bfloat16)),
        lambda: weight.data.__iadd__(1),
        lambda: nn.init.normal_(weight),
        lambda: torch.add(torch.zeros(190, 250), 1, out=weight),
    ]
    for change in changes:
        with pytest.raises(zipserv.Error):
            change()
    for value in (torch.zeros(190, 250), nn.Parameter(torch.zeros(190, 250))):
        with pytest.raises(AttributeError, match="from_linear"):
            layer.weight = value


# --- moves and conversions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.type(torch.float32),
    ],
)
def test_dtype_conversions_leave_the_compressed_bytes_alone(convert: object) -> None:
    _, layer = make()
    before = layer.weight_zipserv.clone()
    x = weights(2, 250, sigma=1)
    expected = layer(x).float()
    assert callable(convert)
    convert(layer)
    assert layer.weight_zipserv.dtype == torch.uint8 and torch.equal(layer.weight_zipserv, before)
    assert torch.allclose(layer(x).float(), expected, rtol=1e-2, atol=1e-2)
    assert layer(x).dtype == torch.bfloat16


def test_the_bias_follows_a_conversion() -> None:
    _, layer = make()
    assert layer.float().bias.dtype == torch.float32


def test_shared_blobs_stay_shared() -> None:
    model = tied()
    assert is_tied(model)
    x = weights(2, 256, sigma=1)
    y = model(x)
    assert is_tied(model.to("cpu")) and is_tied(model.float().bfloat16())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_tied(other) and other.a.weight_zipserv is not model.a.weight_zipserv
        assert torch.equal(other(x), y)
    moved = copy.deepcopy(model).to("meta")
    assert is_tied(moved) and moved.a.weight_zipserv.is_meta
    back = moved.to_empty(device="cpu")
    assert is_tied(back) and not back.a.weight_zipserv.is_meta
    back.load_state_dict(model.state_dict())
    assert is_tied(back) and torch.equal(back(x), y)


def test_a_blob_changed_after_a_move_is_not_replaced_by_the_old_one() -> None:
    model = tied()
    model.a.to("meta")
    with torch.no_grad():
        model.b.weight_zipserv.copy_(model.c.weight_zipserv.new_zeros(model.b.weight_zipserv.shape))
    kept = model.a.weight_zipserv
    model.b.to("meta")
    assert model.b.weight_zipserv is not kept


# --- state dicts ----------------------------------------------------------------------------------------------------


def test_state_dict_round_trip_through_a_file() -> None:
    linear, layer = make()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = ZipLinear(250, 190)
    assert other.load_state_dict(state).missing_keys == []
    assert_same_bits(other.to_linear().weight, linear.weight)
    assert torch.equal(other.bias, linear.bias)
    assert other.weight_zipserv.data_ptr() != state[KEY].data_ptr()


def test_loading_a_blob_of_another_size() -> None:
    _, layer = make()
    other = nn.Linear(250, 190).bfloat16()
    with torch.no_grad():
        other.weight.mul_(torch.rand(190, 250).mul(20).exp2())  # many exponents: a larger blob
    bigger = ZipLinear.from_linear(other)
    assert bigger.weight_zipserv.numel() != layer.weight_zipserv.numel()
    layer.load_state_dict(bigger.state_dict())
    assert_same_bits(layer.to_linear().weight, other.weight)


def test_loading_a_blob_of_the_same_size_is_in_place() -> None:
    _, layer = make()
    address = layer.weight_zipserv.data_ptr()
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert layer.weight_zipserv.data_ptr() == address


def test_tied_layers_load_tied() -> None:
    model, other = tied(), Tied().bfloat16()
    zipserv.prepare_model(other)
    other.b.weight_zipserv = other.a.weight_zipserv
    assert is_tied(other)
    other.load_state_dict(model.state_dict())
    assert is_tied(other)
    x = weights(2, 256)
    assert torch.equal(other(x), model(x))
    other.c.load_state_dict(model.a.state_dict(), strict=False)
    assert torch.equal(other.c.weight_zipserv, model.a.weight_zipserv)


def test_assign_takes_the_given_tensors() -> None:
    model = tied()
    with torch.device("meta"):
        other = Tied().bfloat16()
    zipserv.prepare_model(other)
    assert other.a.weight_zipserv.is_meta and other.c.bias.is_meta
    state = model.state_dict()
    other.load_state_dict(state, assign=True)
    assert other.a.weight_zipserv is state["a." + KEY]
    x = weights(2, 256)
    assert torch.equal(other(x), model(x))


def test_loading_into_meta_without_assign_warns() -> None:
    _, layer = make()
    other = ZipLinear(250, 190, device="meta")
    with pytest.warns(UserWarning, match="assign=True"):
        other.load_state_dict(layer.state_dict())
    assert other.weight_zipserv.is_meta
    assert other(torch.empty(3, 250, dtype=torch.bfloat16, device="meta")).shape == (3, 190)


def test_loading_an_uncompressed_weight_or_a_ziptensor() -> None:
    linear, layer = make()
    plain = nn.Linear(250, 190).bfloat16()
    layer.load_state_dict(plain.state_dict())
    assert_same_bits(layer.to_linear().weight, plain.weight)
    layer.load_state_dict({"weight": zipserv.compress(linear.weight), "bias": linear.bias})
    assert_same_bits(layer.to_linear().weight, linear.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {**state, KEY: flipped(state[KEY], 2)}, "weight"),
        (lambda state: {**state, KEY: flipped(state[KEY], 131)}, "weight"),
        (lambda state: {**state, KEY: state[KEY][:-16]}, "weight"),
        (lambda state: {**state, KEY: torch.zeros(10)}, "uint8"),
        (lambda state: {**state, KEY: "weight"}, "not str"),
        (lambda state: {**state, KEY: zipserv.compress(weights(190, 251)).blob}, r"\(190, 251\), the module needs \(190, 250\)"),
        (lambda state: {**state, KEY: zipserv.compress(weights(190, 250, dtype=torch.float16)).blob}, "dtype=torch.float16"),
        (lambda state: {"bias": state["bias"], "weight": torch.zeros(190, 250)}, r"to\(torch\.bfloat16\)"),
        (lambda state: {"bias": state["bias"]}, "Missing key.*" + KEY),
        (lambda state: {**state, "other": state["bias"]}, "Unexpected key.*other"),
        (lambda state: {KEY: state[KEY]}, "Missing key.*bias"),
        (lambda state: {**state, "bias": weights(191)}, "size mismatch for bias"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change: object, message: str) -> None:
    _, layer = make()
    assert callable(change)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        layer.load_state_dict(change(make()[1].state_dict()))


def test_a_refused_blob_leaves_the_old_one() -> None:
    linear, layer = make()
    with pytest.raises(RuntimeError):
        layer.load_state_dict({**make()[1].state_dict(), KEY: flipped(layer.weight_zipserv, 60)})
    assert_same_bits(layer.to_linear().weight, linear.weight)


def test_not_strict() -> None:
    linear, layer = make()
    result = layer.load_state_dict({}, strict=False)
    assert result.unexpected_keys == [] and "bias" in result.missing_keys
    assert_same_bits(layer.to_linear().weight, linear.weight)


# --- compile --------------------------------------------------------------------------------------------------------


def test_compile_fullgraph_of_a_module() -> None:
    model = tied()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = weights(3, 256, sigma=1)
    assert torch.equal(bits(compiled(x)), bits(model(x)))
    # Another weight of another size in the same module is followed.
    model.c.load_state_dict({"weight": weights(192, 256, sigma=30), "bias": model.c.bias})
    assert torch.equal(bits(compiled(x)), bits(model(x)))


def test_autocast() -> None:
    linear, layer = make()
    x = torch.randn(2, 250)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(layer(x).float(), linear(x).float(), rtol=1e-2, atol=1e-2)


def test_frozen_layer_in_a_checkpointed_block() -> None:
    _, layer = make()
    x = weights(3, 250, sigma=1).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad[0].float(), layer.to_linear().weight.float().sum(0), rtol=1e-2, atol=1e-2)
