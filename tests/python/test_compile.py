# SPDX-License-Identifier: Apache-2.0
"""What PyTorch does with modules: compile, export, save, copy, meta, sharding, optimizers."""

from __future__ import annotations

import copy
import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zipserv
from zipserv import ZipEmbedding, ZipLinear
from zipserv.bench.fused import DYNAMIC
from zipserv.conv import ZipConv


class Net(nn.Module):
    """One of each: a table, linear layers with and without bias, a patch convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 128, 8, stride=8)
        self.embed = nn.Embedding(192, 128)
        self.up = nn.Linear(128, 256)
        self.down = nn.Linear(256, 128, bias=False)

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        patches = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.embed(ids), patches], 1)
        return x + self.down(F.silu(self.up(x)))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(torch.bfloat16).eval()


def compressed(seed: int = 0) -> Net:
    made = net(seed)
    made.embed, made.patch = ZipEmbedding.from_embedding(made.embed), ZipConv.from_conv(made.patch)
    zipserv.compress_model(made)
    assert isinstance(made.up, ZipLinear) and isinstance(made.down, ZipLinear)
    return made


IDS = torch.arange(10).view(2, 5)
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


@torch.no_grad()
def test_compile_fullgraph() -> None:
    made = compressed()
    expected = made(IDS, IMAGE)
    # aot_eager runs the whole of tracing, fake kernels and functionalisation, and leaves out only the C++ compiler.
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS, IMAGE), expected)
    torch.testing.assert_close(compiled(IDS[:1], IMAGE[:1]), expected[:1], rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="TorchInductor needs a C++ compiler for the CPU")
@torch.no_grad()
def test_compile_inductor() -> None:
    made = compressed()
    compiled = torch.compile(made, fullgraph=True)
    torch.testing.assert_close(compiled(IDS, IMAGE), made(IDS, IMAGE), rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not hasattr(torch.compiler.config, "dynamic_sources"), reason="a setting of newer releases of torch")
@torch.no_grad()
def test_blocks_compiled_one_by_one_are_one_compilation() -> None:
    """What docs/troubleshooting.md says to set: the compressed sizes of equal layers differ."""
    from torch._dynamo.testing import CompileCounter

    blocks = [torch.nn.Linear(128, 64, bias=False).to(torch.bfloat16) for _ in range(3)]
    for i, block in enumerate(blocks):
        block.weight.data[:, :i] = 1e-30  # escapes
    layers = [ZipLinear.from_linear(block) for block in blocks]
    assert len({layer.weight_zipserv.numel() for layer in layers}) == 3
    counter = CompileCounter()

    def run(layer: ZipLinear, x: torch.Tensor) -> torch.Tensor:
        return layer(x) + 1

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    x = torch.randn(3, 128).to(torch.bfloat16)
    with torch.compiler.config.patch(dynamic_sources=DYNAMIC):
        for layer in layers:
            assert torch.equal(compiled(layer, x), run(layer, x))
    assert counter.frame_count == 1


def test_compile_with_a_gradient_for_the_input() -> None:
    made = compressed()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).requires_grad_()
    y = torch.compile(made.up, fullgraph=True, backend="aot_eager")(x)
    (compiled,) = torch.autograd.grad(y.sum(), x)
    (eager,) = torch.autograd.grad(made.up(x).sum(), x)
    assert torch.equal(compiled, eager)


@torch.no_grad()
def test_export_save_load_run(tmp_path: Path) -> None:
    made = compressed()
    program = torch.export.export(made, (IDS, IMAGE))
    names = {str(node.target) for node in program.graph.nodes}
    assert {"zipserv.linear.default", "zipserv.embedding.default"} <= names
    torch.export.save(program, tmp_path / "net.pt2")
    again = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.equal(again(IDS, IMAGE), made(IDS, IMAGE))


@torch.no_grad()
def test_state_dict_saves_and_loads_with_weights_only() -> None:
    made, buffer = compressed(), io.BytesIO()
    torch.save(made.state_dict(), buffer)
    buffer.seek(0)
    other = compressed(seed=7)
    assert not torch.equal(other(IDS, IMAGE), made(IDS, IMAGE))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(IDS, IMAGE), made(IDS, IMAGE))
    # and from an uncompressed state dict: compressed on the way
    third = compressed(seed=7)
    third.load_state_dict(net().state_dict())
    assert torch.equal(third(IDS, IMAGE), made(IDS, IMAGE))


@torch.no_grad()
def test_whole_modules_pickle_and_copy() -> None:
    made, buffer = compressed(), io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    for each in (torch.load(buffer, weights_only=False), copy.deepcopy(made)):
        assert torch.equal(each(IDS, IMAGE), made(IDS, IMAGE))
        assert each.up.weight_zipserv.data_ptr() != made.up.weight_zipserv.data_ptr()


@torch.no_grad()
def test_meta_device() -> None:
    with torch.device("meta"):
        empty: Any = nn.ModuleDict({"embed": ZipEmbedding(192, 128), "up": ZipLinear(128, 256)})
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    made = compressed()
    source = nn.ModuleDict({"embed": made.embed, "up": made.up})
    empty.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(empty.up(empty.embed(IDS)), made.up(made.embed(IDS)))


def test_optimizers_see_no_compressed_bytes() -> None:
    made = compressed().train()
    names = [name for name, _ in made.named_parameters()]
    assert names == ["patch.bias", "up.bias"]
    before = {name: buffer.clone() for name, buffer in made.named_buffers()}
    assert set(before) == {f"{name}.weight_zipserv" for name in ("patch", "embed", "up", "down")}
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.5)
    made(IDS, IMAGE).float().square().mean().backward()
    optimizer.step()
    assert all(torch.equal(buffer, before[name]) for name, buffer in made.named_buffers())
    assert made.up.bias.grad is not None


def test_conversions_leave_the_bytes_alone() -> None:
    made = compressed()
    expected = made.down.weight_zipserv.clone()
    for convert in (lambda m: m.to(torch.float32), lambda m: m.half(), lambda m: m.type(torch.float64)):
        each = convert(copy.deepcopy(made))
        assert each.down.weight_zipserv.dtype == torch.uint8 and torch.equal(each.down.weight_zipserv, expected)


def test_sharding_over_processes(tmp_path: Path) -> None:
    """FSDP2 shards parameters; compressed bytes are buffers, which every process keeps whole: right, and said so."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        made = compressed()
        expected = made(IDS, IMAGE)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        fully_shard(made, mesh=mesh)
        assert not any(type(buffer).__name__ == "DTensor" for buffer in made.buffers())
        assert torch.equal(made(IDS, IMAGE), expected)
        with pytest.raises(TypeError, match="DTensor"):
            zipserv.compress(torch.distributed.tensor.distribute_tensor(net().down.weight.detach(), mesh))
    finally:
        torch.distributed.destroy_process_group()


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import zipserv
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
zipserv.set_cpu_linear("exact")
plain = torch.nn.Sequential(torch.nn.Linear(192, 256), torch.nn.GELU(), torch.nn.Linear(256, 192), torch.nn.LayerNorm(192)).bfloat16()
inputs = torch.randn(2, 5, 192).bfloat16()  # one batch for each rank
made = torch.nn.Sequential(*plain)
zipserv.compress_model(made)
before = [buffer.clone() for buffer in made.buffers()]
expected = [made(x) for x in inputs]
loss = sum(y.float().square().mean() for y in expected) / 2
want = {name: grad for (name, _), grad in zip(made.named_parameters(), torch.autograd.grad(loss, list(made.parameters())))}
mesh = dist.init_device_mesh("cpu", (2,))
for layer in made:
    if isinstance(layer, zipserv.ZipLinear):
        fully_shard(layer, mesh=mesh)
fully_shard(made, mesh=mesh)
assert sum(p.to_local().numel() for p in made.parameters()) < sum(g.numel() for g in want.values()), "nothing was sharded"
y = made(inputs[rank])
assert torch.equal(y, expected[rank])
y.float().square().mean().backward()
for name, parameter in made.named_parameters():
    torch.testing.assert_close(parameter.grad.full_tensor(), want[name], rtol=2e-2, atol=1e-3)
torch.optim.AdamW(made.parameters(), lr=0.1).step()
assert len(before) == 2 and all(torch.equal(a, b) for a, b in zip(made.buffers(), before)), "compressed bytes are whole on each rank"
dist.destroy_process_group()
"""


def test_sharding_over_two_ranks(tmp_path: Path) -> None:
    """FSDP2 with a batch for each rank: the outputs and gradients of one process, and whole compressed bytes on both."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    commands = [[sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path / "store")] for rank in (0, 1)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands]
    try:
        for process in ranks:
            told, _ = process.communicate(timeout=120)
            assert process.returncode == 0, told
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.slow
def test_generate_with_static_cache_and_compile() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=192
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.arange(5)[None]
    arguments = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    expected = model.generate(ids, **arguments)
    model.model.embed_tokens = ZipEmbedding.from_embedding(model.model.embed_tokens)
    zipserv.compress_model(model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(model.generate(ids, **arguments), expected)
