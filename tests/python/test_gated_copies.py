# SPDX-License-Identifier: Apache-2.0
"""Gated MLPs copied, saved, moved, split again, and in whole models."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zipserv
from gated_helpers import CLOSE, MLP, Function, Reversed, Taken, X, adapter, check, filled, pair, takes
from zipserv import ZipLinear
from zipserv.merged import merge_layers, split_layers

pytestmark = pytest.mark.usefixtures("taken")


def saved(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "save": saved,
    **{f"pickle {p}": lambda model, p=p: pickle.loads(pickle.dumps(model, protocol=p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)},
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("kind", [MLP, Function])
def test_copies(kind: type[MLP], name: str, taken: Taken) -> None:
    single, made = pair(kind)
    holder = nn.Sequential(made)
    other = COPIES[name](holder)
    assert type(other[0]) is type(made) is not kind and isinstance(other[0], kind)
    check(other, single, taken, 1)
    assert other[0].gate_proj._group is not made.gate_proj._group
    nn.init.ones_(other[0].up_proj.bias)
    check(made, single, taken, 1)
    single.up_proj.bias.data.fill_(1)
    check(other, single, taken, 1)
    shallow = copy.copy(made)
    assert type(shallow) is type(made) and shallow._modules is made._modules and takes(shallow, taken) == 1
    split_layers(holder)
    assert type(made) is kind and type(COPIES[name](holder)[0]) is kind


def test_state_dicts(taken: Taken) -> None:
    single, made = pair()
    states = single.state_dict(), made.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    other = filled(MLP())
    made.load_state_dict(other.state_dict())
    single.load_state_dict(other.state_dict())
    check(made, single, taken, 1)


def test_moves(taken: Taken) -> None:
    single, made = pair()
    made.float().to("cpu").bfloat16()
    check(made, single, taken, 1)
    assert copy.deepcopy(made).to("meta")(X.to("meta")).shape == X.shape


def test_splitting_and_merging_again(taken: Taken) -> None:
    single, made = pair()
    model = nn.ModuleList([made, pair(Reversed)[1]])
    kinds = [type(each) for each in model]
    assert split_layers(model, lambda layer: layer is made.up_proj) == ["0.gate_proj", "0.up_proj"]
    assert type(made) is MLP and type(made.up_proj) is ZipLinear and type(model[1]) is kinds[1]
    check(made, single, taken, 0)
    assert merge_layers(model) == [("0.gate_proj", "0.up_proj")] and type(made) is kinds[0]
    check(made, single, taken, 1)
    split_layers(model)
    assert [type(each) for each in model] == [MLP, Reversed]


def test_layers_within_adapters_are_split(taken: Taken) -> None:
    """Their group's holder is not what holds them."""
    single, made = pair()
    for model in (single, made):
        adapter(model)
        model.up_proj = nn.Sequential(model.up_proj)
    check(made, single, taken, 0)
    base = made.gate_proj.base_layer
    made.gate_proj, made.up_proj = base, made.up_proj[0]
    assert takes(made, taken) == 1, "and the product is back with the layers"
    adapter(made)
    made.up_proj = nn.Sequential(made.up_proj)
    split_layers(made)
    assert type(made) is MLP
    check(made, single, taken, 0)


def test_nothing_is_kept(taken: Taken) -> None:
    class Local(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    made = pair(Local)[1]
    assert takes(made, taken) == 1 and type(made) is type(pair(Local)[1])
    gc.collect()
    gc.disable()
    try:
        module = weakref.ref(made)
        del made
        assert module() is None, "at once"
    finally:
        gc.enable()
    gc.collect()
    assert Local.__subclasses__() == []
    kind = weakref.ref(Local)
    del Local
    gc.collect()
    assert kind() is None


def test_fsdp(tmp_path: Path, taken: Taken) -> None:
    """It makes classes from ours in the same way."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    from torch.distributed.fsdp import FSDPModule, fully_shard

    single, made = pair()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        holder = nn.Sequential(made)
        fully_shard(made, mesh=mesh)
        fully_shard(holder, mesh=mesh)
        assert isinstance(made, FSDPModule) and isinstance(made, MLP) and made.__reduce_ex__(4)[1] == (type(made),)
        check(holder, single, taken, 1)
        single, made = pair()
        for model in (single, made):
            model.gate_proj.bias = model.up_proj.bias = None  # FSDP2 would look for them in the layers as they were
        fully_shard(made, mesh=mesh)
        check(made, single, taken, 1)
        split_layers(made)
        assert isinstance(made, FSDPModule) and type(made.up_proj) is ZipLinear
        check(made, single, taken, 0)
        merge_layers(made)
        check(made, single, taken, 1)
        single, other = pair()
        check(other, single, taken, 1)
        fully_shard(other.up_proj, mesh=mesh)
        check(other, single, taken, 0)
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_model_generates_the_same_tokens(taken: Taken) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=320
    )
    torch.manual_seed(0)
    model = filled(transformers.LlamaForCausalLM(config))
    ids, arguments = torch.arange(5)[None], {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    expected = model.generate(ids, **arguments)
    zipserv.compress_model(model)
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(sum("zipserv.linear_gated" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend=counting)
    assert torch.equal(model.generate(ids, **arguments), expected)
    assert graphs and set(graphs) == {2} and not taken


def test_a_decode_step_of_the_benchmark(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled with that product, prompts take it without a compiler."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    from zipserv.bench import fused

    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=320, mlp_bias=True
    )
    model = filled(transformers.LlamaForCausalLM(config))
    zipserv.compress_model(model)
    kind, ids = type(model.model.layers[0].mlp), torch.arange(200)
    forward = kind.forward
    graphs: list[list[str]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    prompt, step = ids.reshape(2, 100), ids.reshape(200, 1)
    wanted = [model(each).logits for each in (prompt, step)]
    assert len(taken) == 4
    taken.clear()
    with fused.fused(model):
        torch.testing.assert_close(model(prompt).logits, wanted[0], **CLOSE)
        assert len(taken) == 2
        torch.testing.assert_close(model(step).logits, wanted[1], **CLOSE)
        assert len(taken) == 2
    products = [[name for name in graph if "zipserv.linear" in name] for graph in graphs]
    assert sum(len(names) == 2 and "linear_gated" in names[0] for names in products) >= 1
    assert kind.forward is forward and len(graphs) >= 3
