# SPDX-License-Identifier: Apache-2.0
"""ZipEmbedding, compressed convolutions, stacked experts, and the lazy weight they share."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zipserv
from zipserv.conv import ZipConv, ZipConv1d, ZipConv2d, ZipConv3d, is_matmul
from zipserv.embedding import ZipEmbedding
from zipserv.experts import ZipExperts
from zipserv.format import DTYPE_CODES
from zipserv.lazy import LazyWeight


def weights(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def table(kind: str, rows: int, columns: int) -> torch.Tensor:
    """Gaussian; with tiles of random bits (dense mode) and far outliers (literal exponents); FP16; raw."""
    w = weights(rows, columns, dtype=torch.float16 if kind == "fp16" else torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    if kind == "odd":
        w[:64, :64] = torch.randint(-(2**15), 2**15 - 1, (64, 64), dtype=torch.int16, generator=generator).view(torch.bfloat16)
        w[100, 0], w[101, 1], w[102, 62] = 1e30, float("nan"), -0.0
    if kind == "raw":
        w = torch.randint(-(2**15), 2**15 - 1, (rows, columns), dtype=torch.int16, generator=generator).view(torch.bfloat16)
    return w


@pytest.mark.parametrize("kind", ["bf16", "fp16", "odd", "raw"])
@pytest.mark.parametrize("shape", [(320, 448), (130, 1030), (1000, 64)])
def test_rows_are_exact(kind: str, shape: tuple[int, int]) -> None:
    w = table(kind, *shape)
    z = zipserv.compress(w)
    ids = torch.randint(0, shape[0], (5, 7), generator=torch.Generator().manual_seed(2))
    ids[0] = torch.arange(7)
    ids[1] = torch.arange(98, 105)
    ids[2] = shape[0] - 1
    rows = torch.ops.zipserv.embedding(ids, z.blob, z.m, z.k, DTYPE_CODES[w.dtype])
    assert rows.shape == (5, 7, shape[1]) and torch.equal(bits(rows), bits(w[ids]))


def test_embedding_compiles_in_one_graph() -> None:
    layer = ZipEmbedding.from_embedding(nn.Embedding(320, 448, _weight=weights(320, 448)))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for ids in (torch.tensor([5, 319]), torch.arange(12).view(3, 4), torch.tensor(7)):
        assert torch.equal(compiled(ids), layer(ids))


def test_embedding_module() -> None:
    plain = nn.Embedding(320, 448, padding_idx=3, _weight=weights(320, 448))
    layer = ZipEmbedding.from_embedding(plain)
    ids = torch.tensor([[0, 3, 319], [5, 5, 64]])
    assert torch.equal(layer(ids), plain(ids)) and layer.padding_idx == 3
    assert layer(ids.int()).equal(plain(ids)) and layer(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 448)
    assert [*layer.parameters()] == [] and list(layer.state_dict()) == ["weight_zipserv"]
    assert torch.equal(layer.to_embedding().weight, plain.weight)
    assert "bits/weight" in repr(layer)
    with pytest.raises(IndexError, match="0 .. 319"):
        layer(torch.tensor([320]))
    with pytest.raises(zipserv.Error):
        layer.reset_parameters()
    with pytest.raises(AttributeError, match="from_embedding"):
        layer.weight = plain.weight


def test_embedding_copies_saves_and_loads() -> None:
    layer = ZipEmbedding.from_embedding(nn.Embedding(320, 448, _weight=weights(320, 448)))
    ids = torch.arange(320)
    expected = layer(ids)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    empty = ZipEmbedding(320, 448, device="meta")
    empty.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    other = ZipEmbedding.from_embedding(nn.Embedding(320, 448, _weight=weights(320, 448, seed=9)))
    other.load_state_dict(layer.state_dict())
    from_plain = ZipEmbedding(320, 448)
    from_plain.load_state_dict({"weight": expected}, strict=True)
    for each in (copy.deepcopy(layer), empty, other, from_plain, layer.to(torch.float32)):
        assert torch.equal(each(ids), expected)


class Scaled(nn.Embedding):
    """As Gemma's: adds to the lookup and looks at the weight's dtype."""

    def __init__(self) -> None:
        super().__init__(320, 448, _weight=weights(320, 448))
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.scale.to(self.weight.dtype)


def test_embedding_subclass_keeps_what_it_adds() -> None:
    plain = Scaled()
    layer = ZipEmbedding.from_embedding(plain)
    ids = torch.arange(320)
    assert isinstance(layer, Scaled) and isinstance(layer, ZipEmbedding)
    assert torch.equal(layer(ids), plain(ids))
    assert torch.equal(copy.deepcopy(layer)(ids), plain(ids))
    back = layer.to_embedding()
    assert type(back) is Scaled and torch.equal(back(ids), plain(ids))
    with pytest.raises(ValueError, match="max_norm"):
        ZipEmbedding.from_embedding(nn.Embedding(320, 448, max_norm=1.0, _weight=weights(320, 448)))


@pytest.mark.parametrize(
    ("conv", "zipped", "sizes"),
    [
        (nn.Conv2d(3, 192, 16, stride=16), ZipConv2d, (50, 37)),
        (nn.Conv2d(128, 192, 1, bias=False), ZipConv2d, (5, 7)),
        (nn.Conv2d(128, 192, 1, stride=(2, 3)), ZipConv2d, (5, 7)),
        (nn.Conv1d(32, 192, 8, stride=8), ZipConv1d, (41,)),
        (nn.Conv3d(3, 192, (2, 8, 8), stride=(2, 8, 8)), ZipConv3d, (4, 19, 16)),
    ],
)
@torch.no_grad()
def test_convolutions_without_overlap(conv: nn.Module, zipped: type[ZipConv], sizes: tuple[int, ...]) -> None:
    conv = conv.to(torch.bfloat16)
    layer = ZipConv.from_conv(conv)
    assert type(layer) is zipped and isinstance(layer, type(conv)) and is_matmul(conv)
    x = torch.randn(2, conv.in_channels, *sizes, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    exact = type(conv).forward(copy.deepcopy(conv).double(), x.double())
    assert layer(x).shape == exact.shape
    # One rounding to BF16 and the order of additions are all the difference.
    assert (layer(x).double() - exact).abs().max() <= 2 * (conv(x).double() - exact).abs().max()
    # One input without a batch is a batch of one. (Not a row of a larger batch: how a CPU orders additions may depend on the rows.)
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    assert torch.equal(layer.to_conv().weight, conv.weight) and torch.equal(layer.to_conv()(x), conv(x))
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape == conv.weight.shape


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Conv2d(64, 64, 16, stride=8),
        nn.Conv2d(64, 64, 1, padding=1),
        nn.Conv2d(64, 64, 2, stride=2, dilation=2),
        nn.Conv2d(64, 64, 1, groups=2),
        nn.Conv2d(64, 64, 1, padding="same"),
        nn.ConvTranspose2d(64, 64, 2, stride=2),
    ],
)
def test_other_convolutions_are_left_alone(conv: nn.Module) -> None:
    assert not is_matmul(conv)
    with pytest.raises((TypeError, ValueError)):
        ZipConv.from_conv(conv.to(torch.bfloat16))


def test_experts() -> None:
    w = weights(4, 192, 128)
    experts = ZipExperts.from_tensor(w)
    assert experts.shape == w.shape and torch.equal(experts.decompress(), w) and len(experts) == 4
    x = weights(5, 128, seed=1)
    for index in (0, torch.tensor(3)):
        assert isinstance(experts[index], LazyWeight)
        assert torch.equal(F.linear(x, experts[index]), F.linear(x, w[index]))
        assert torch.equal(x @ experts[index].T, x @ w[index].T)
    with pytest.raises(IndexError):
        experts[4]
    copied = copy.deepcopy(experts)
    copied.load_state_dict(experts.state_dict())
    assert torch.equal(copied.decompress(), w)
    with pytest.raises(ValueError, match="three dimensions"):
        ZipExperts.from_tensor(w[0])


def noise(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(-(2**15), 2**15 - 1, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)


def test_experts_lie_in_one_buffer_that_no_state_dict_shows() -> None:
    w = weights(4, 192, 128)
    experts = ZipExperts.from_tensor(w)
    assert [name for name, _ in experts.named_buffers()] == ["experts_zipserv"]
    state = experts.state_dict()
    assert list(state) == [f"{i}_zipserv" for i in range(4)]
    for index in range(4):
        assert torch.equal(state[f"{index}_zipserv"], zipserv.compress(w[index]).blob), "the bytes that a module of its own would have"
    together = experts.together()
    assert together is not None and together[1:] == (4, 192, 128) and together.blobs is experts.get_buffer("experts_zipserv")
    assert experts.nbytes == sum(blob.numel() for blob in state.values()) and not experts.is_raw

    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts)), copy.deepcopy(experts).to(torch.float16)):
        assert torch.equal(other.decompress(), w) and other.dtype == torch.bfloat16
        assert other.together().blobs.data_ptr() != together.blobs.data_ptr()
    assert len(pickle.dumps(experts)) < 1.1 * experts.nbytes
    meta = copy.deepcopy(experts).to("meta")
    assert meta.device.type == "meta" and meta.state_dict()["3_zipserv"].is_meta
    with pytest.raises(zipserv.Error, match="holds no"):
        meta.decompress()


def test_experts_load_what_they_saved() -> None:
    first, second = weights(3, 192, 128), weights(3, 192, 128, seed=1)
    experts = ZipExperts.from_tensor(first)
    at = experts.get_buffer("experts_zipserv").data_ptr()
    experts.load_state_dict(ZipExperts.from_tensor(-first).state_dict())  # of the same lengths
    assert torch.equal(experts.decompress(), -first)
    assert experts.get_buffer("experts_zipserv").data_ptr() == at, "in place: captured graphs stay valid"
    experts.load_state_dict(ZipExperts.from_tensor(second).state_dict())  # other lengths
    assert torch.equal(experts.decompress(), second)
    experts.load_state_dict({"1": first[1]}, strict=False)  # plain, one of them
    assert torch.equal(experts.decompress(), torch.stack([second[0], first[1], second[2]]))
    experts.load_state_dict({f"{i}_zipserv": zipserv.compress(first[i]) for i in range(3)}, assign=True)
    assert torch.equal(experts.decompress(), first)
    meta = copy.deepcopy(experts).to("meta")
    with pytest.warns(UserWarning, match="assign=True"):
        meta.load_state_dict(experts.state_dict())
    meta.load_state_dict(experts.state_dict(), assign=True)
    assert torch.equal(meta.decompress(), first) and meta.together() is not None
    for wrong, said in (({"0_zipserv": zipserv.compress(weights(128, 128)).blob}, "shape"), ({"0": "?"}, "expected a tensor"), ({}, "0_zipserv")):
        with pytest.raises(RuntimeError, match=said):
            experts.load_state_dict(wrong)
    assert torch.equal(experts.decompress(), first)


def test_experts_of_which_one_does_not_shrink_are_apart() -> None:
    """The kernel for all at once would take a raw blob's weights for tiles."""
    w = weights(3, 192, 128)
    w[1] = noise(192, 128)
    experts = ZipExperts.from_tensor(w)
    assert experts.together() is None and list(experts.state_dict()) == ["0_zipserv", "1_zipserv", "2_zipserv"]
    assert torch.equal(bits(experts.decompress()), bits(w)) and not experts.is_raw
    shrunk = ZipExperts.from_tensor(weights(3, 192, 128))
    shrunk.load_state_dict(experts.state_dict())
    assert shrunk.together() is None and torch.equal(bits(shrunk.decompress()), bits(w))
    small = ZipExperts.from_tensor(weights(3, 130, 72))  # padding costs more than is saved
    assert small.together() is None and small.is_raw


def test_experts_that_are_split_keep_names_and_bytes() -> None:
    w = weights(3, 192, 128)
    experts = ZipExperts.from_tensor(w)
    state, at = experts.state_dict(), experts.get_buffer("experts_zipserv").untyped_storage().data_ptr()
    experts.split()
    assert experts.together() is None and [name for name, _ in experts.named_buffers()] == list(state)
    assert all(torch.equal(buffer, state[name]) and buffer.untyped_storage().data_ptr() != at for name, buffer in experts.named_buffers())
    experts.load_state_dict(ZipExperts.from_tensor(weights(3, 192, 128, seed=1)).state_dict())
    assert torch.equal(experts.decompress(), weights(3, 192, 128, seed=1))
    assert torch.equal(copy.deepcopy(experts).to(torch.float32).decompress(), experts.decompress())


def test_lazy_weight_decompresses_only_for_values(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(192, 128)
    z = zipserv.compress(w)
    lazy = LazyWeight(z.blob, (192, 128), (192, 128), torch.bfloat16)
    calls = []
    whole = LazyWeight.decompress
    monkeypatch.setattr(LazyWeight, "decompress", lambda self: calls.append(1) or whole(self))
    assert (lazy.shape, lazy.dtype, lazy.device.type, lazy.numel(), lazy.dim()) == (w.shape, w.dtype, "cpu", w.numel(), 2)
    assert torch.equal(F.linear(w[:3], lazy), F.linear(w[:3], w)) and "LazyWeight" in repr(lazy) and not calls
    assert torch.equal(lazy + 1, w + 1) and type(lazy + 1) is torch.Tensor and calls
    assert torch.equal(lazy.t()[3:5], w.t()[3:5]) and lazy.float().dtype == torch.float32
    for change in (lambda: lazy.mul_(2), lambda: lazy.__setitem__(0, 1.0), lambda: torch.add(lazy, 1, out=lazy), lambda: setattr(lazy, "data", w)):
        with pytest.raises(zipserv.Error, match="in place"):
            change()


def test_before_torch_is_imported() -> None:
    """`import zipserv` first: its op is there all the same."""
    code = """
import zipserv
import torch
table = torch.nn.Embedding(192, 64).to(torch.bfloat16)
assert torch.equal(zipserv.ZipEmbedding.from_embedding(table)(torch.arange(3)), table(torch.arange(3)))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
