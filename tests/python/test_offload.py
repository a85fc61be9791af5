# SPDX-License-Identifier: Apache-2.0
"""Weights that stream from host memory: on the CPU the order of events, on a GPU the streams too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import zipserv
from zipserv import offload
from zipserv.embedding import ZipEmbedding


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, blocks: int = 4, size: int = 128, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, size)
        self.layers = nn.ModuleList(Block(size) for _ in range(blocks))
        self.head = nn.Linear(size, 256, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        x = self.embed(ids)
        for index in order or range(len(self.layers)):
            x = self.layers[index](x)
        return self.head(x)


@pytest.fixture(autouse=True)
def small_weights_stream_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(offload, "SMALL_BYTES", 4096)
    yield


def model(**kwargs: Any) -> Model:
    torch.manual_seed(0)
    return Model(**kwargs).to(torch.bfloat16).eval()


def compressed(**kwargs: Any) -> Model:
    made = model(**kwargs)
    for block in made.layers:
        zipserv.compress_model(block)
    table = zipserv.compress(made.embed.weight)
    made.embed, made.head = ZipEmbedding.from_ziptensor(table), zipserv.ZipLinear.from_ziptensor(table)
    return made


IDS = torch.arange(24).view(2, 12)


@torch.no_grad()
def test_experts_stream_in_one_piece_and_each_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products know an expert by the address of its own blob."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = zipserv.ZipExperts.from_tensor((torch.randn(3, 192, 192) * 0.02).bfloat16())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index in range(3):
                x = torch.nn.functional.linear(x, self.weight[index])
            return x

    made = nn.Sequential(nn.ModuleList([Experts(), Experts(), Experts()]))
    made.forward = lambda x: [x := layer(x) for layer in made[0]][-1]
    x = torch.randn(5, 192).bfloat16()
    expected, parts = made(x), [[experts.weight._blob(str(i)).clone() for i in range(3)] for experts in made[0]]
    forgotten: list[torch.Tensor] = []
    monkeypatch.setattr(offload, "forget", lambda blobs: forgotten.extend(blob.clone() for blob in blobs))
    offload.apply(made, "cpu", stage=True)
    assert torch.equal(made(x), expected) and torch.equal(made(x), expected)
    assert len(forgotten) == 18 and all(torch.equal(blob, parts[i // 3 % 3][i % 3]) for i, blob in enumerate(forgotten))


@pytest.mark.parametrize("make", [model, compressed], ids=["plain", "compressed"])
@torch.no_grad()
def test_streams_blocks_and_gives_the_same_result(make: Any) -> None:
    made = make()
    expected = made(IDS)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    handle = offload.apply(made, "cpu", stage=True)
    assert handle.blocks == ["layers.0", "layers.1", "layers.2", "layers.3", "head"]
    pool = handle._pool
    assert pool is not None
    for step in range(3):
        assert torch.equal(made(IDS), expected)
        # The first block of the next step comes while the head computes: five fetches a step, no more.
        assert pool.fetches == 5 * (step + 1) + 1
    assert handle.device_bytes == 2 * max(block.nbytes for block in handle._blocks) < 0.7 * handle.host_bytes
    after = made.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    handle.remove()
    assert torch.equal(made(IDS), expected) and pool.fetches == 16


@torch.no_grad()
def test_a_weight_is_read_from_the_buffer_and_only_then() -> None:
    made = compressed()
    handle = offload.apply(made, "cpu", stage=True)
    seen = []
    layer = made.layers[1].up
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight_zipserv.untyped_storage().data_ptr()))
    made(IDS)
    slots = {slot.untyped_storage().data_ptr() for slot in handle._pool.slots}
    assert set(seen) <= slots and layer.weight_zipserv.untyped_storage().data_ptr() not in slots


@torch.no_grad()
def test_any_order_of_blocks() -> None:
    made = compressed()
    orders = [[3, 0, 2], [1, 1, 1], [2, 3]]
    expected = [made(IDS, order) for order in orders]
    offload.apply(made, "cpu", stage=True)
    assert all(torch.equal(made(IDS, order), result) for order, result in zip(orders, expected, strict=True))


@torch.no_grad()
def test_a_block_that_fails_leaves_the_model_whole() -> None:
    made = compressed()
    expected = made(IDS)
    offload.apply(made, "cpu", stage=True)
    handle = made.layers[2].down.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(IDS)
    handle.remove()
    assert torch.equal(made(IDS), expected)


@torch.no_grad()
def test_tied_weights_stay_one_in_host_memory() -> None:
    made = compressed()
    offload.apply(made, "cpu", stage=True)
    assert made.embed.weight_zipserv.data_ptr() == made.head.weight_zipserv.data_ptr()


def test_without_a_gpu_the_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = model()
    blobs = zipserv.compress_model(made, exclude="head", offload="cpu")
    assert blobs.ratio > 1.2
    handle = offload.apply(made)
    assert handle.device.type == "cpu" and handle.device_bytes == 0 and len(handle.blocks) == 5
    assert not any(module._forward_pre_hooks for module in made.modules())


def test_training_through_a_streamed_weight_raises() -> None:
    made = compressed()
    offload.apply(made, "cpu", stage=True)
    x = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
    y = x
    for layer in made.layers:
        y = layer(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_refusals() -> None:
    with pytest.raises(TypeError, match="torch.nn.Module"):
        offload.apply([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="CUDA device or the CPU"):
        offload.apply(model(), "meta")
    with pytest.raises(ValueError, match="on meta"):
        offload.apply(model().to("meta"), "cpu")
    hooked = model()
    hooked.layers[0]._hf_hook = object()
    with pytest.raises(zipserv.Error, match="accelerate"):
        offload.apply(hooked, "cpu")


@torch.no_grad()
def test_a_block_that_is_refused_has_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a capture: the hook before a block raises, and torch calls the one after it nevertheless."""
    made = compressed()
    pool = offload.apply(made, "cpu", stage=True)._pool
    assert pool is not None
    expected, done = made(IDS), []
    held = list(pool.holds)
    monkeypatch.setattr(pool, "enter", lambda index: 1 / 0)
    monkeypatch.setattr(pool, "mark_done", done.append)
    with pytest.raises(ZeroDivisionError):
        made(IDS)
    assert done == [] and pool.holds == held
    monkeypatch.undo()
    assert torch.equal(made(IDS), expected)


@torch.no_grad()
def test_torch_compile_leaves_the_streaming_to_the_hooks() -> None:
    made = compressed()
    expected = made(IDS)
    handle = offload.apply(made, "cpu", stage=True)
    run = torch.compile(made, backend="eager")
    for step in range(3):
        assert torch.equal(run(IDS), expected)
        assert handle._pool is not None and handle._pool.fetches == 5 * (step + 1) + 1


# --- on GPUs ----------------------------------------------------------------------------------------------------------

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TWO = pytest.param("cuda:1", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("device", ["cuda:0", TWO])
@pytest.mark.parametrize("make", [model, compressed], ids=["plain", "compressed"])
@torch.no_grad()
def test_streams_to_a_gpu(make: Any, device: str) -> None:
    made, plain = make(blocks=8, size=1024), make(blocks=8, size=1024)
    expected = plain.to(device)(IDS.to(device))
    del plain
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    base = torch.cuda.memory_allocated(device)
    handle = offload.apply(made, device)
    assert all(block.data is not None and block.data.is_pinned() for block in handle._blocks)
    for _ in range(5):
        found = made(IDS)
        assert found.device == torch.device(device)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert torch.cuda.max_memory_allocated(device) - base < handle.device_bytes + (64 << 20)
    handle.remove()
    assert all(parameter.device.type == "cpu" for parameter in made.layers[0].up.parameters() if parameter.numel() > 2048)


class Products(nn.Module):
    """Blocks that begin with a product, and little to compute: the weights are read as soon as their copy is there, if not sooner."""

    def __init__(self, blocks: int, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)) for _ in range(blocks))

    def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        for index in order or range(len(self.layers)):
            x = self.layers[index](x)
        return x


@pytest.mark.gpu
@GPU
@torch.no_grad()
def test_no_product_reads_what_was_in_its_buffer_before() -> None:
    torch.manual_seed(0)
    made = Products(6, 2048).bfloat16()
    zipserv.compress_model(made)
    made.cuda()
    x = torch.randn(4, 2048, device="cuda").bfloat16()
    orders = [list(range(6)), [5, 0, 0, 3], [2, 1, 0], [4, 4, 4]]
    expected = [made(x, order) for order in orders]
    made.cpu()
    offload.apply(made)
    found = [made(x, order) for _ in range(30) for order in orders]
    for index, one in enumerate(found):
        assert torch.equal(one, expected[index % len(orders)])


@pytest.mark.gpu
@GPU
@torch.no_grad()
def test_a_capture_is_refused() -> None:
    made = compressed()
    offload.apply(made)
    expected = made(IDS)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(zipserv.Error, match="CUDA graph"), torch.cuda.graph(graph):
        made.layers[0](torch.zeros(2, 128, device="cuda", dtype=torch.bfloat16))
    assert torch.equal(made(IDS), expected)
