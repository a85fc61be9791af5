# SPDX-License-Identifier: Apache-2.0
"""Merged layers: one product for those that read the same input, and nobody sees a difference."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import zipserv
from zipserv import ZipLinear, merged, stacked, tiles
from zipserv.merged import MergedLinear, merge_layers, split_layers

Counter = list[tuple[int, ...]]


class Attention(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q_proj = nn.Linear(128, 128, bias=bias)
        self.k_proj = nn.Linear(128, 64, bias=False)
        self.v_proj = nn.Linear(128, 64, bias=bias)
        self.o_proj = nn.Linear(64, 128, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(torch.sigmoid(q[..., :64] * k + q[..., 64:]) * v)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(128, 192), nn.Linear(128, 192), nn.Linear(192, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(F.rms_norm(x, (128,)))
        return x + self.mlp(F.rms_norm(x, (128,)))


X = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
GROUPS = [("attention.q_proj", "attention.k_proj", "attention.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    made = Net().to(torch.bfloat16).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return made


def pair(seed: int = 0) -> tuple[Net, Net]:
    """The same model, not merged and merged."""
    single, made = net(seed), net(seed)
    zipserv.compress_model(single, merge=False)
    zipserv.compress_model(made)
    return single, made


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """As on a GPU: one product serves a group. Gives the shapes of the inputs of all products of merged layers."""
    calls: Counter = []

    def counted(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return zipserv.tensor.linear_blob(x, *arguments)

    monkeypatch.setattr(merged, "_SHARED_ON", frozenset({"cpu"}))
    monkeypatch.setattr(merged, "linear_blob", counted)
    return calls


def blobs(model: nn.Module) -> int:
    return sum(buffer.numel() for buffer in model.buffers())


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stacked_bytes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [(torch.randn(rows, 448) * 0.02).to(dtype) for rows in (128, 64, 120)]
    weights[0][:, 0] *= 2**10  # escapes
    weights[1][5, 7:20] = 0
    small = [zipserv.compress(weight).blob for weight in weights]
    blob, parts = stacked.stack(small)
    assert torch.equal(blob[128:], tiles.stack(small)[128:])
    whole = zipserv.ZipTensor(blob).decompress()
    assert torch.equal(whole.view(torch.int16), torch.cat(weights).view(torch.int16))
    for part, one in zip(parts, small, strict=True):
        assert torch.equal(stacked.take(blob, part), one)
    odd = torch.cat([blob.new_zeros(1), small[0]])[1:]  # bytes that begin anywhere
    assert torch.equal(stacked.stack([odd, *small[1:]])[0], blob)
    with pytest.raises(ValueError, match="multiple of 64"):
        stacked.stack(small[::-1])
    with pytest.raises(ValueError, match="same width and dtype"):
        stacked.stack([small[0], zipserv.compress((torch.randn(128, 128) * 0.02).to(dtype)).blob])
    with pytest.raises(ValueError, match="same width and dtype"):
        stacked.stack([small[0], zipserv.compress(torch.randint(0, 30000, (64, 448), dtype=torch.int16).view(dtype)).blob])


# --- what is merged -------------------------------------------------------------------------------------------------


def test_which_layers() -> None:
    single, made = pair()
    assert [name for name, m in made.named_modules() if isinstance(m, MergedLinear)] == [name for group in GROUPS for name in group]
    assert split_layers(copy.deepcopy(made)) == [name for group in GROUPS for name in group]
    assert merge_layers(single) == GROUPS
    assert merge_layers(single) == []


def zipped(rows: int, columns: int = 128, dtype: torch.dtype = torch.bfloat16) -> ZipLinear:
    return ZipLinear.from_linear(nn.Linear(columns, rows, bias=False).to(dtype))


class Called(nn.ModuleDict):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.values()]


def test_layers_that_do_not_fit() -> None:
    shared = zipped(64)
    noise = nn.Linear(128, 64, bias=False).bfloat16()
    noise.weight.data = torch.randint(0, 30000, (64, 128), dtype=torch.int16).view(torch.bfloat16)
    holders = {
        "odd": ({"q_proj": zipped(248), "k_proj": zipped(64), "v_proj": zipped(64)}, ("k_proj", "v_proj", "q_proj")),
        "two_odd": ({"w1": zipped(248), "w3": zipped(248)}, None),
        "width": ({"q": zipped(64), "k": zipped(64, 256), "v": zipped(64, 256)}, ("k", "v")),
        "dtype": ({"gate_proj": zipped(64), "up_proj": zipped(64, dtype=torch.float16)}, None),
        "raw": ({"wq": zipped(64), "wk": ZipLinear.from_linear(noise), "wv": zipped(64)}, ("wq", "wv")),
        "plain": ({"query": zipped(64), "key": nn.Linear(128, 64).bfloat16(), "value": nn.Identity()}, None),
        "empty": ({"query": zipped(64), "key": ZipLinear(128, 64)}, None),
        "twice": ({"wi_0": shared, "wi_1": zipped(64)}, None),
        "again": ({"wi_0": shared, "wi_1": zipped(64)}, None),
        "tied": ({"wi_0": ZipLinear.from_ziptensor(shared.ziptensor), "wi_1": zipped(64)}, None),
        "cross_attention": ({"q_proj": zipped(64), "k_proj": zipped(64), "v_proj": zipped(64)}, ("k_proj", "v_proj")),
        "other_names": ({"left": zipped(64), "right": zipped(64)}, None),
    }
    model = nn.ModuleDict({name: Called(layers) for name, (layers, _) in holders.items()})
    expected = [tuple(f"{name}.{layer}" for layer in layers) for name, (_, layers) in holders.items() if layers]
    assert merge_layers(model) == expected
    assert merge_layers(model, [("left", "right")]) == [("other_names.left", "other_names.right")]


def test_a_holder_that_is_never_called_shares_nothing() -> None:
    """Nobody calls a ModuleDict: each of its layers would multiply by the rows of all."""
    layers = {name: zipped(64) for name in ("q_proj", "k_proj", "v_proj")}
    assert merge_layers(nn.ModuleDict(layers)) == [] == merge_layers(nn.ModuleList([nn.ModuleDict(layers)]))
    assert all(type(layer) is ZipLinear for layer in layers.values())
    assert merge_layers(Called(layers)) == [("q_proj", "k_proj", "v_proj")]


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ((zipped(64).ziptensor,), TypeError, "torch.nn.Module, not ZipTensor"),
        ((None,), TypeError, "not NoneType"),
        ((nn.Identity(), "q_proj"), TypeError, "groups of names of layers"),
        ((nn.Identity(), ["q_proj", "k_proj"]), TypeError, "groups of names of layers"),
        ((nn.Identity(), [("q_proj", 3)]), TypeError, "groups of names of layers"),
        ((nn.Identity(), True), TypeError, "groups of names of layers"),
        ((nn.Identity(), [("q_proj",)]), ValueError, "two layers or more"),
        ((nn.Identity(), [("q_proj", "q_proj")]), ValueError, "each named once"),
    ],
)
def test_wrong_arguments(arguments: tuple[object, ...], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        merge_layers(*arguments)
    with pytest.raises(TypeError, match="function of a layer, not str"):
        merge_layers(nn.Identity(), where="q_proj")
    with pytest.raises(TypeError):
        split_layers("model")


class Writes(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x)
        x += 1
        return q[..., :64] * self.k_proj(x) * self.v_proj(x)


class WritesByMethod(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x)
        x.mul_(2)
        return q[..., :64] * self.k_proj(x) * self.v_proj(x)


class WritesByIndex(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x)
        x[0] = 3
        return q[..., :64] * self.k_proj(x) * self.v_proj(x)


@pytest.mark.parametrize("kind", [Writes, WritesByMethod, WritesByIndex])
def test_code_that_changes_the_input_in_between(kind: type[Attention], shared: Counter) -> None:
    torch.manual_seed(0)
    made = nn.Sequential(kind().bfloat16())
    expected = copy.deepcopy(made)
    zipserv.compress_model(expected, merge=False)
    zipserv.compress_model(made)
    assert not any(isinstance(m, MergedLinear) for m in made.modules())
    with torch.inference_mode():
        assert torch.equal(made(X.clone()), expected(X.clone()))
    # merged by force, the tensor's own counter of writes tells
    assert merge_layers(made, [("k_proj", "v_proj")]) == [("0.k_proj", "0.v_proj")]
    with torch.no_grad():
        assert torch.equal(made(X.clone()), expected(X.clone()))


def test_switched_off() -> None:
    made = net()
    zipserv.compress_model(made, merge=False)
    assert not any(isinstance(m, MergedLinear) for m in made.modules())


# --- the same results -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_same_bits_on_the_cpu() -> None:
    single, made = pair()
    for x in (X, X[:1, :1], X[:0]):
        assert torch.equal(made(x), single(x))
    for name in GROUPS[0] + GROUPS[1]:
        one, other = single.get_submodule(name), made.get_submodule(name)
        assert torch.equal(one(X), other(X))
        assert torch.equal(one.weight_zipserv, other.weight_zipserv)
        assert torch.equal(other.to_linear().weight, one.to_linear().weight)
        assert torch.equal(other.weight.float(), one.weight.float()) and other.weight.shape == one.weight.shape
        assert torch.equal(F.linear(X, other.weight), F.linear(X, one.weight))
        other.ziptensor.verify()
    assert blobs(made) <= blobs(single)


@pytest.mark.parametrize("on", [False, True])
def test_gradients(on: bool, request: pytest.FixtureRequest) -> None:
    single, made = pair()
    if on:
        request.getfixturevalue("shared")
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    single(x).float().square().sum().backward()
    made(y).float().square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for (name, a), (other, b) in zip(single.named_parameters(), made.named_parameters(), strict=True):
        assert name == other and torch.equal(a.grad, b.grad)
    z = X[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(made.mlp.up_proj(z).float().square().sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.float().sum(), z)
    assert second.isfinite().all() and second.abs().sum() > 0


@torch.no_grad()
def test_one_product_a_group(shared: Counter) -> None:
    single, made = pair()
    assert torch.allclose(made(X).float(), single(X).float(), rtol=2e-2, atol=2e-2)
    assert shared == [X.shape, X.shape]
    with torch.inference_mode():
        made(X)
    assert len(shared) == 4


@torch.no_grad()
def test_large_results_are_of_the_own_rows(shared: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    single, made = pair()
    single, made = single.attention, made.attention
    assert not made.q_proj._group.even
    monkeypatch.setattr(merged, "_MOST_RESULTS", 200 * made.q_proj._group.m)
    x = torch.randn(201, 128).bfloat16()
    assert torch.equal(made(x), single(x)) and not shared
    made(x[:200])
    assert len(shared) == 1
    monkeypatch.setattr(merged, "_MOST_RESULTS", 0)
    made(x[:128])
    assert len(shared) == 2, "few tokens"
    shared.clear()
    made.q_proj(x)
    assert not shared, "outside of a call of the holder the others' rows would be for nothing"


@torch.no_grad()
def test_layers_of_as_many_rows_have_results_of_their_own(shared: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    single, made = pair()
    single, made = single.mlp, made.mlp
    assert made.gate_proj._group.even
    monkeypatch.setattr(merged, "_MOST_RESULTS", 0)
    calls: list[tuple[int, ...]] = []

    def parts(x: torch.Tensor, blob: torch.Tensor, m: int, k: int, dtype: torch.dtype, bias: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        calls.append((*x.shape, m, count))
        y = zipserv.tensor.linear_blob(x, blob, m, k, dtype, bias)
        return torch.stack(y.split(m // count, -1)).unbind()

    monkeypatch.setattr(merged, "linear_parts", parts)
    x = torch.randn(3, 43, 128).bfloat16()
    assert torch.allclose(made(x).float(), single(x).float(), rtol=2e-2, atol=2e-2)
    assert calls == [(3, 43, 128, 384, 2)] and not shared, "one product"
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "forward", lambda x: seen.extend((made.up_proj(x), made.gate_proj(x))), raising=False)
        made(x)
    assert all(y.is_contiguous() and y._base is None for y in seen) and torch.equal(seen[0], single.up_proj(x))
    made(x[:, :42])
    assert len(calls) == 2 and len(shared) == 1, "few tokens: columns of a wide result"
    monkeypatch.setattr(merged, "_batch_invariant", lambda blob: True)
    made(x)
    assert len(calls) == 2 and len(shared) == 2
    monkeypatch.setattr(merged, "_batch_invariant", lambda blob: False)
    shared.clear()
    monkeypatch.setattr(merged, "linear_parts", lambda *arguments: None)
    assert torch.equal(made(x), single(x)) and not shared, "where there is no such product each multiplies by its own rows,"
    monkeypatch.setattr(merged, "_MOST_RESULTS", 1 << 20)
    made(x)
    assert len(shared) == 1, "or takes columns of a wide result that is not large"


@torch.no_grad()
@pytest.mark.parametrize("tokens", [5, 300])
def test_traces(tokens: int, shared: Counter) -> None:
    _, made = pair()
    x = torch.randn(tokens, 128).bfloat16()
    traced = torch.jit.trace(made.mlp, x)
    assert torch.equal(traced(x), made.mlp(x))


@torch.no_grad()
def test_a_product_that_fails_leaves_the_one_before_as_it_is(shared: Counter) -> None:
    """In particular it does not pass off a bias that came since for one that is in the result."""
    _, made = pair()
    mlp, seen = made.mlp, []

    def forward(x: torch.Tensor) -> torch.Tensor:
        mlp.gate_proj(x)
        mlp.up_proj.bias = nn.Parameter(mlp.up_proj.bias + 100, requires_grad=False)
        with pytest.raises(ValueError, match="shape"):
            mlp.gate_proj(x[..., :64])
        seen.append(mlp.up_proj(x))
        return x

    before = mlp.up_proj(X)
    mlp.forward = forward
    mlp(X)
    assert torch.allclose(seen[0].float(), before.float() + 100, atol=0.6)


@pytest.mark.parametrize("work", [merge_layers, split_layers])
def test_one_group_at_a_time(work: Any) -> None:
    """Bytes that are not needed any more go before the next group's are copied."""
    model = nn.ModuleList([Attention(), *(MLP() for _ in range(8))]).bfloat16()
    zipserv.compress_model(model, merge=work is split_layers)
    before = [weakref.ref(buffer) for buffer in model.buffers()]
    most, stack, take = [0], stacked.stack, stacked.take

    def watched(*arguments: Any) -> Any:
        most[0] = max(most[0], sum(each() is None for each in before))
        return (stack if work is merge_layers else take)(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merged, "stack" if work is merge_layers else "take", watched)
        work(model)
    assert most[0] >= (7 if work is split_layers else 17), most


@torch.no_grad()
def test_any_order_alone_and_outside(shared: Counter) -> None:
    _, made = pair()
    attention = made.attention
    x = X.clone()
    expected = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert len(shared) == 3, "outside of the holder's forward each call is for itself"
    results: list[torch.Tensor] = []

    def forward(*orders: str) -> int:
        shared.clear()
        attention.forward = lambda x: [results.append(getattr(attention, f"{name}_proj")(x)) or name for name in orders]
        results.clear()
        attention(x)
        for name, result in zip(orders, results, strict=True):
            assert torch.equal(result, expected["qkv".index(name)])
        return len(shared)

    assert [forward(*order) for order in ("qkv", "vkq", "kqv", "v", "kv")] == [1, 1, 1, 1, 1]
    assert forward("q", "q") == 2, "each result is given once: whoever has it may write into it"
    assert forward("q", "k", "v", "q", "k", "v") == 2
    assert forward("q", "k", "q", "k", "v", "v") == 3
    # writing into a result changes no other
    attention.forward = lambda x: (attention.q_proj(x).zero_(), attention.k_proj(x).zero_(), attention.v_proj(x))[2]
    assert torch.equal(attention(x), expected[2])


@torch.no_grad()
def test_never_a_stale_result(shared: Counter) -> None:
    _, made = pair()
    attention = made.attention
    fresh = lambda x: attention.v_proj(x.clone())  # noqa: E731

    def run(change: Any, x: torch.Tensor) -> torch.Tensor:
        def forward(x: torch.Tensor) -> torch.Tensor:
            attention.q_proj(x)
            return attention.v_proj(change(x))

        attention.forward = forward
        return attention(x)

    for change in (lambda x: x.add_(1), lambda x: x.clone().mul_(2), lambda x: x[:1], lambda x: x.zero_()):
        x = X.clone()
        after = run(change, x)
        assert torch.equal(after, fresh(change(X.clone())))

    def swapped(x: torch.Tensor) -> torch.Tensor:
        x.data = X + 5
        return x

    assert torch.equal(run(swapped, X.clone()), fresh(X + 5))
    # partly used in one call, the rest in the next, with memory that was written behind torch's back
    x = X.clone()
    attention.forward = lambda x: attention.q_proj(x)
    attention(x)
    x.data.copy_(X * 2)
    attention.forward = lambda x: attention.v_proj(x)
    assert torch.equal(attention(x), fresh(X * 2))
    # another bias
    other = nn.Parameter(torch.ones(64).bfloat16())
    attention.forward = lambda x: (attention.q_proj(x), setattr(attention.v_proj, "bias", other), attention.v_proj(x))[2]
    assert torch.equal(attention(x), fresh(x))
    attention.v_proj.bias.data.fill_(7)
    attention.forward = lambda x: attention.v_proj(x)
    assert torch.equal(attention(x), fresh(x))


@torch.no_grad()
def test_nothing_is_kept(shared: Counter) -> None:
    _, made = pair()
    attention = made.attention
    seen: list[Any] = []

    def partly(x: torch.Tensor, layer: nn.Module = attention.q_proj) -> torch.Tensor:
        y = x * 2
        seen.append(weakref.ref(y))
        q = layer(y)
        seen.append(weakref.ref(q._base if q._base is not None else q))
        if len(seen) > 2:
            raise RuntimeError("stop")
        return q.clone()

    attention.forward = partly
    attention(X)
    with pytest.raises(RuntimeError, match="stop"):
        attention(X)
    assert [each() for each in seen] == [None] * 4 and attention.q_proj._group.step is None
    # and a deleted model is gone at once, without the garbage collector
    gc.disable()
    try:
        blob = weakref.ref(made.mlp.up_proj.merged_zipserv)
        del made, attention, partly
        assert blob() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_threads(shared: Counter) -> None:
    _, made = pair()
    inputs = [torch.randn(2, 1, 128).bfloat16() for _ in range(4)]
    expected = [made(x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(40):
            if not torch.equal(made(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- torch's own ways with modules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compile_leaves_one_product(shared: Counter, mode: Any) -> None:
    from torch._dynamo.backends.common import aot_autograd

    _, made = pair()
    counts = []

    def counting(graph: Any, inputs: Any) -> Any:
        counts.append(sum("zipserv.linear" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend=aot_autograd(fw_compiler=counting, bw_compiler=lambda graph, inputs: graph))
    with mode():
        for x in (X, X + 1, X[:1]):
            torch.testing.assert_close(compiled(x), made(x), rtol=2e-2, atol=2e-2)
    assert set(counts) == {4}  # qkv, o, gate and up, down
    assert made.attention.q_proj._group.traced is None


@torch.no_grad()
def test_compile_only_the_forward_of_a_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks then run outside of the tracer."""
    from torch._dynamo.backends.common import aot_autograd

    monkeypatch.setattr(merged, "_SHARED_ON", frozenset({"cpu"}))
    _, made = pair()
    expected = made(X)
    graphs = []
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph) or graph)
    for holder in (made.mlp, made.attention):
        holder.forward = torch.compile(holder.forward, fullgraph=True, backend=backend)
    for _ in range(3):
        torch.testing.assert_close(made(X), expected, rtol=2e-2, atol=2e-2)
        assert made.mlp.up_proj._group.traced is None and made.mlp.up_proj._group.step is None
    counts = [[sum("zipserv.linear" in str(node.target) for node in g.graph.nodes), len(list(g.graph.output_node().args[0]))] for g in graphs]
    assert counts == [[2, 1], [2, 1]]  # one product and the last layer; nothing but the result leaves the graph


def test_compile_with_a_gradient(shared: Counter) -> None:
    _, made = pair()
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    compiled(x).float().square().sum().backward()
    made(y).float().square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=3e-2, atol=3e-2)


def test_compile_one_layer_alone(shared: Counter) -> None:
    _, made = pair()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(made.attention.v_proj, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), made.attention.v_proj(X))
    assert made.attention.q_proj._group.traced is None


@pytest.mark.parametrize("on", [False, True])
@torch.no_grad()
def test_export(on: bool, request: pytest.FixtureRequest) -> None:
    _, made = pair()
    if on:
        request.getfixturevalue("shared")
    program = torch.export.export(made.requires_grad_(False), (X,))
    count = sum("zipserv.linear" in str(node.target) for node in program.graph.nodes)
    assert count == (4 if on else 7)
    torch.testing.assert_close(program.module()(X), made(X))


@torch.no_grad()
def test_copies_and_moves(shared: Counter) -> None:
    single, made = pair()
    expected = made(X)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.load(buffer, weights_only=False), copy.deepcopy(made).to("cpu").half()]
    copies[-1].bfloat16()
    for each in copies:
        shared.clear()
        assert torch.equal(each(X), expected) and len(shared) == 2
        attention = each.attention
        assert attention.q_proj.merged_zipserv is attention.k_proj.merged_zipserv is attention.v_proj.merged_zipserv
        assert attention.q_proj.merged_zipserv is not made.attention.q_proj.merged_zipserv
        assert attention.q_proj._group is attention.v_proj._group is not made.attention.q_proj._group
        nn.init.ones_(attention.q_proj.bias)
        assert torch.equal(each.attention.q_proj(X), attention.q_proj(X)) and not torch.equal(each(X), expected)
    assert torch.equal(made(X), expected)
    empty = copy.deepcopy(made).to("meta")
    assert empty(X.to("meta")).shape == X.shape
    alone = copy.deepcopy(made.mlp.up_proj)
    assert torch.equal(alone(X), single.mlp.up_proj(X))


def test_biases_lie_together_and_are_the_parameters() -> None:
    _, made = pair()
    gate, up = made.mlp.gate_proj, made.mlp.up_proj
    for _ in range(2):
        whole = gate._group.bias(torch.bfloat16, gate.bias.device, views=True)
        assert whole is not None and whole.data_ptr() == gate.bias.data_ptr()
        assert torch.equal(whole, torch.cat([gate.bias, up.bias]))
        with torch.no_grad():
            up.bias.add_(1)
        assert torch.equal(whole, torch.cat([gate.bias, up.bias]))
        made.float().bfloat16()  # moves each parameter for itself; they are put together again
    up.bias.data = torch.ones(192).bfloat16()
    whole = gate._group.bias(torch.bfloat16, gate.bias.device, views=True)
    assert whole is not None and torch.equal(whole[192:], torch.ones(192).bfloat16())


@torch.no_grad()
def test_state_dicts_are_as_without_merging() -> None:
    single, made = pair()
    states = single.state_dict(), made.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert [name for name, _ in made.named_parameters()] == [name for name, _ in single.named_parameters()]
    for source in (net(5), pair(5)[0], pair(5)[1]):
        for target in (pair(0)[0], pair(0)[1]):
            result = target.load_state_dict(source.state_dict())
            assert not result.missing_keys and not result.unexpected_keys
            assert torch.equal(target(X), pair(5)[0](X))
    target = pair(0)[1]
    target.load_state_dict(pair(5)[0].state_dict(), assign=True)
    assert torch.equal(target(X), pair(5)[0](X))
    # the same bytes again stay where they are: captured graphs point there
    address = made.mlp.up_proj.merged_zipserv.data_ptr()
    made.load_state_dict(states[0])
    assert made.mlp.up_proj.merged_zipserv.data_ptr() == address and torch.equal(made(X), single(X))


def test_state_dicts_that_do_not_fit() -> None:
    _, made = pair()
    state = net().state_dict()
    for key, value, words in (
        ("mlp.up_proj.weight", torch.zeros(64, 64).bfloat16(), "shape"),
        ("mlp.up_proj.weight", torch.zeros(192, 128).half(), "float16"),
        ("mlp.up_proj.weight", torch.randint(0, 30000, (192, 128), dtype=torch.int16).view(torch.bfloat16), "does not shrink.*split_layers"),
        ("mlp.up_proj.weight", torch.empty(192, 128, device="meta"), "meta"),
        ("mlp.up_proj.weight", 3, "expected a tensor"),
    ):
        with pytest.raises(RuntimeError, match=words):
            made.load_state_dict({**state, key: value})
    with pytest.raises(RuntimeError, match="Missing key.*up_proj.weight_zipserv"):
        made.load_state_dict({key: value for key, value in state.items() if key != "mlp.up_proj.weight"})
    with pytest.raises(zipserv.Error, match="meta device"):
        _ = made.to("meta").mlp.up_proj.ziptensor


def test_bytes_that_were_just_written_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU engine reads a blob early from its second product on, by address: memory may have held another before."""
    seen: list[int] = []
    for module in (zipserv.layers, zipserv.tensor, stacked, merged):
        monkeypatch.setattr(module, "mark_written", lambda blob: seen.append(blob.data_ptr()) or blob)

    def marked(model: nn.Module) -> bool:
        return all(buffer.data_ptr() in seen for buffer in model.buffers())

    single, made = pair()
    assert all(layer.merged_zipserv.data_ptr() in seen for layer in (made.mlp.up_proj, made.attention.q_proj))
    for model in (single, made):
        for change in (
            copy.deepcopy,
            lambda m: pickle.loads(pickle.dumps(m)),
            lambda m: copy.deepcopy(m).to("meta").to_empty(device="cpu"),
            lambda m: (m.load_state_dict(m.state_dict()), m)[1],
            lambda m: (m.load_state_dict(net(4).state_dict()), m)[1],
        ):
            seen.clear()
            assert marked(change(model))
    seen.clear()
    split_layers(made)
    assert marked(made.attention.q_proj) and marked(made.mlp.up_proj)
    seen.clear()
    assert copy.deepcopy(single.mlp.up_proj.ziptensor).blob.data_ptr() in seen


@torch.no_grad()
def test_files(tmp_path: Path) -> None:
    single, made = pair()
    for model, name in ((single, "single"), (made, "made")):
        zipserv.save_file(model.state_dict(), tmp_path / name)
    assert (tmp_path / "single").read_bytes() == (tmp_path / "made").read_bytes()
    for merge in (True, False):
        fresh = net(3)
        zipserv.load_model(fresh, tmp_path / "made", merge=merge)
        assert torch.equal(fresh(X), made(X)) and isinstance(fresh.mlp.up_proj, MergedLinear) == merge


@pytest.mark.parametrize("around_each", [False, True])
def test_sharded_biases(around_each: bool, tmp_path: Path, shared: Counter) -> None:
    """FSDP2: around the model biases are whole during forward; around single layers those of the others are not."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    from torch.distributed.fsdp import fully_shard

    _, made = pair()
    with torch.no_grad():
        expected = made(X)
    shared.clear()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        if around_each:
            for layer in [module for module in made.modules() if isinstance(module, MergedLinear)]:
                fully_shard(layer, mesh=mesh)
        fully_shard(made, mesh=mesh)
        with torch.no_grad():
            torch.testing.assert_close(made(X), expected, rtol=2e-2, atol=2e-2)
        assert len(shared) == (0 if around_each else 2)
        x = X.clone().requires_grad_()
        made(x).float().sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
def test_splitting_again(shared: Counter) -> None:
    single, made = pair()
    hooked = []
    made.mlp.up_proj.register_forward_hook(lambda *arguments: hooked.append(1))
    names = split_layers(made, lambda layer: layer is made.mlp.up_proj)
    assert names == list(GROUPS[1]) and isinstance(made.attention.q_proj, MergedLinear)
    assert type(made.mlp.up_proj) is ZipLinear and not made.mlp._forward_hooks and not made.mlp._forward_pre_hooks
    split_layers(made)
    assert not made.attention._forward_hooks and not made.attention._forward_hooks_always_called
    assert torch.equal(made(X), single(X)) and not shared and hooked == [1]


def test_a_replica_with_tensors_of_its_own(shared: Counter) -> None:
    """What nn.DataParallel does: dicts are replaced, the group still points to the original's."""
    _, made = pair()
    layer = made.mlp.up_proj
    replica = copy.copy(layer)
    replica._parameters = {"bias": nn.Parameter(torch.zeros_like(layer.bias))}
    with torch.no_grad():
        assert torch.equal(replica(X), zipserv.linear(X, layer.ziptensor))


class Doubled(nn.Module):
    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        return 2 * bias


@torch.no_grad()
def test_a_parametrized_bias(shared: Counter) -> None:
    """It is no parameter of the layer any more: the group does not know it."""
    single, made = pair()
    for model in (single, made):
        parametrize.register_parametrization(model.mlp.up_proj, "bias", Doubled())
        parametrize.register_parametrization(model.attention.q_proj, "bias", Doubled())
    expected = single(X)
    torch.testing.assert_close(made(X), expected, rtol=2e-2, atol=2e-2)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(made, backend="aot_eager")(X), expected, rtol=2e-2, atol=2e-2)


def test_moves_in_inference_mode(shared: Counter) -> None:
    _, made = pair()
    with torch.inference_mode():
        expected = made(X)
        assert torch.equal(made.float().bfloat16()(X), expected)
    with torch.no_grad():
        assert torch.equal(made(X), expected)


def test_autocast_and_wrong_inputs(shared: Counter) -> None:
    _, made = pair()
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(made.mlp(X.float()), made.mlp(X))
        with pytest.raises(TypeError, match="float32"):
            made.mlp(X.float())
        with pytest.raises(ValueError, match="128"):
            made.mlp(X[..., :64])
    with pytest.raises(TypeError, match="float32"):
        made.mlp(X.float().requires_grad_())
