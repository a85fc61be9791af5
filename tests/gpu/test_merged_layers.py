# SPDX-License-Identifier: Apache-2.0
"""Merged layers on a GPU: one launch for a group, and results that follow their inputs through streams and CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zipserv
from zipserv import merged
from zipserv.merged import MergedLinear, split_layers


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(1024, 1024, bias=bias)
        self.k_proj = nn.Linear(1024, 256, bias=bias)
        self.v_proj = nn.Linear(1024, 256, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def blocks(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Plain, compressed, merged."""
    plain = nn.Sequential(Block(request.param)).to("cuda", torch.bfloat16)
    single, made = copy.deepcopy(plain), copy.deepcopy(plain)
    zipserv.compress_model(single, merge=False)
    zipserv.compress_model(made)
    assert all(isinstance(layer, MergedLinear) for layer in made[0].children())
    return plain, single, made


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a.float() - b.float()).norm() <= 6e-3 * b.float().norm())


@pytest.mark.parametrize("n", [1, 8, 33, 64, 300])
def test_results_and_gradients(n: int, blocks: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    plain, single, made = blocks
    x = torch.randn(n, 1024, device="cuda").bfloat16()
    with torch.no_grad():
        want = plain(x)
        for each in (single, made):
            assert near(each(x), want)
        for name, layer in made[0].named_children():
            assert near(layer(x), plain[0].get_submodule(name)(x))
            assert torch.equal(layer.ziptensor.decompress(), plain[0].get_submodule(name).weight)
            assert near(F.linear(x, layer.weight, layer.bias), plain[0].get_submodule(name)(x))
    grads = []
    for each in (plain, made):
        y = x.clone().requires_grad_()
        each(y).float().square().sum().backward()
        grads.append(y.grad)
    assert near(grads[1], grads[0]) or (grads[1].float() - grads[0].float()).norm() < 2e-2 * grads[0].float().norm()


@torch.no_grad()
def test_one_launch_a_group(blocks: tuple[nn.Module, nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, made = blocks
    calls = []
    monkeypatch.setattr(merged, "linear_blob", lambda *arguments: calls.append(1) or zipserv.tensor.linear_blob(*arguments))
    x = torch.randn(4, 1024, device="cuda").bfloat16()
    made(x)
    assert len(calls) == 1
    address, whole = made[0].q_proj.bias, made[0].q_proj._group
    if address is not None:
        bias = whole.bias(torch.bfloat16, x.device, views=True)
        assert bias is not None and bias.data_ptr() == address.data_ptr(), "after .to('cuda') biases lie together again"


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(2048, 2944), nn.Linear(2048, 2944)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gate_proj(x), self.up_proj(x)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="for compute capability 9.0")
@torch.no_grad()
def test_many_tokens_give_each_layer_a_result_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows in each: one product, and no result is a part of a wide one."""
    plain = nn.Sequential(Gated()).to("cuda", torch.bfloat16)
    made = copy.deepcopy(plain)
    zipserv.compress_model(made)
    calls = []
    monkeypatch.setattr(merged, "linear_parts", lambda *arguments: calls.append(1) or zipserv.rows.linear_parts(*arguments))
    for n in (129, 512, 1000, 5000):
        x = torch.randn(2, n, 2048, device="cuda").bfloat16()
        for y, want in zip(made(x), plain(x), strict=True):
            assert y.is_contiguous() and y.shape == want.shape and near(y, want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = made(x)
        eager = [y.clone() for y in made(x)]
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(result, eager, strict=True))
    assert len(calls) == 12


class MLP(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(1024, 2048, bias=bias), nn.Linear(1024, 2048, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(2048, 1024, bias=bias), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="for compute capability 9.0")
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_gated_mlp_is_one_product_and_the_last_layer(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MLP(bias).to("cuda", torch.bfloat16)
    made = copy.deepcopy(plain)
    zipserv.compress_model(made)
    results: list[torch.Tensor | None] = []
    monkeypatch.setattr(merged, "linear_gated", lambda *arguments: results.append(zipserv.rows.linear_gated(*arguments)) or results[-1])
    for n in (129, 300, 512, 700, 1024):
        x = torch.randn(n, 1024, device="cuda").bfloat16()
        want = F.silu(plain.gate_proj(x)) * plain.up_proj(x)
        assert near(made(x), plain(x))
        y = results.pop()
        assert y is not None, f"no kernel for {n} tokens"
        assert y.shape == want.shape and y.is_contiguous() and near(y, want) and not results
        rows = torch.randn(n, 2048, device="cuda").bfloat16()[:, :1024]  # tokens that lie apart
        assert near(made(rows), plain(rows)) and results.pop() is not None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = made(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, made(x)) and near(y, plain(x))
        assert all(each is not None for each in results)
        results.clear()
    made.act_fn.register_forward_hook(lambda *arguments: None)
    assert near(made(x), plain(x)) and not results
    made(x[:128])
    assert not results


@torch.no_grad()
def test_graphs_follow_their_inputs(blocks: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    plain, _, made = blocks
    x = torch.randn(2, 1024, device="cuda").bfloat16()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        made(x)
    torch.cuda.current_stream().wait_stream(side)
    graphs = []
    for layers in (("q_proj",), ("k_proj", "v_proj"), ("v_proj",)):  # parts of a group, from one static input
        made[0].forward = lambda x, layers=layers: torch.cat([made[0].get_submodule(name)(x) for name in layers], -1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = made(x)
        graphs.append((graph, y, layers))
    del made[0].forward
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        for graph, y, layers in graphs:
            graph.replay()
            assert near(y, torch.cat([plain[0].get_submodule(name)(x) for name in layers], -1))
        assert near(made(x), plain(x))


@torch.no_grad()
def test_streams(blocks: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    """A part that is taken on another stream is computed there: the first stream may be far behind."""
    plain, _, made = blocks
    x = torch.randn(2, 1024, device="cuda").bfloat16()
    want = plain[0].v_proj(x)
    made(x)
    torch.cuda.synchronize()
    slow, fast = torch.cuda.Stream(), torch.cuda.Stream()
    results = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(slow):
            torch.cuda._sleep(200_000_000)
            q = made[0].q_proj(x)
        with torch.cuda.stream(fast):
            results.append(made[0].v_proj(x).clone())
        return q

    made[0].forward = forward
    made(x)
    fast.synchronize()
    assert near(results[0], want)
    torch.cuda.synchronize()


@torch.no_grad()
def test_memory(blocks: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    _, single, made = blocks
    held = sum(buffer.numel() for buffer in made.buffers())
    assert held <= sum(buffer.numel() for buffer in single.buffers())
    x = torch.randn(2048, 1024, device="cuda").bfloat16()
    made(x)
    del single
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made(x)
    weight, result = 2 * 1536 * 1024, 2 * 2048 * 1536
    # the weight once, the wide result once and one more from it: not three decompressions side by side
    assert torch.cuda.max_memory_allocated() - before <= weight + 3 * result + (4 << 20)
    split_layers(made)
    assert near(made(x[:4]), made(x)[:4])


@torch.no_grad()
def test_loading_in_place_is_seen_at_once(blocks: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    plain, _, made = blocks
    x = torch.randn(4, 1024, device="cuda").bfloat16()
    for _ in range(5):
        made(x), made(x)
        nn.init.normal_(plain[0].k_proj.weight, std=0.02)
        made.load_state_dict(plain.state_dict())
        assert near(made(x), plain(x))
        moved = copy.deepcopy(made).to("cpu").to("cuda")
        assert near(moved(x), plain(x))


@torch.no_grad()
def test_reduce_overhead(blocks: tuple[nn.Module, nn.Module, nn.Module]) -> None:
    plain, _, made = blocks
    compiled = torch.compile(made, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(3, 1024, device="cuda").bfloat16()
        assert near(compiled(x), plain(x))
