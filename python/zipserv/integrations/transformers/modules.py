# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model take compressed weights, and their replacement."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zipserv.conv import ZipConv, is_matmul
from zipserv.embedding import ZipEmbedding
from zipserv.errors import Error
from zipserv.experts import ZipExperts
from zipserv.format import SUFFIX
from zipserv.layers import ZipLinear
from zipserv.merged import MergedLinear, merge_layers, split_layers
from zipserv.model import Converter
from zipserv.tensor import ZipTensor, compress

from .config import ZipServConfig
from .experts import implementation

Payload = ZipTensor | ZipExperts
_STACKED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


class ZipConv1D(ZipLinear):
    """A linear layer that was transformers' ``Conv1D`` (GPT-2), whose weight is ``(in_features, out_features)``.

    The layer computes with the transpose; checkpoints and state dicts keep the weight as ``Conv1D`` has it.
    """

    @classmethod
    def from_conv1d_weight(cls, weight: ZipTensor, bias: torch.Tensor | None) -> ZipConv1D:
        """From the compressed weight ``(in_features, out_features)``."""
        return cast(ZipConv1D, cls.from_ziptensor(_transposed(weight), bias))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = prefix + "weight" + SUFFIX
        if key in destination and destination[key].numel() and not destination[key].is_meta:
            destination[key] = checkpoint_weight(self, dense=False)

    def _load_blob(self, name: str, value: object, *, is_plain: bool, assign: bool) -> None:
        if isinstance(value, torch.Tensor) and value.is_meta:
            super()._load_blob(name, value, is_plain=is_plain, assign=assign)
            return
        if isinstance(value, torch.Tensor):
            value = compress(value) if is_plain else ZipTensor(value)
        super()._load_blob(name, _transposed(cast(ZipTensor, value)), is_plain=False, assign=assign)


def _transposed(weight: ZipTensor) -> ZipTensor:
    return compress(weight.decompress().t())


def find_targets(model: nn.Module, config: ZipServConfig) -> dict[str, str]:
    """Parameter name -> kind of module, for every weight that can be kept compressed."""
    targets: dict[str, str] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if kind := _kind(module, config):
            targets[f"{prefix}weight"] = kind
        elif config.experts and _has_stacked_experts(module):
            for parameter in _STACKED:
                if module._parameters.get(parameter) is not None and module._parameters[parameter].dim() == 3:
                    targets[prefix + parameter] = "experts"
    return targets


def _kind(module: nn.Module, config: ZipServConfig) -> str | None:
    if type(module) is nn.Linear:
        return "linear"
    if type(module) is Conv1D:
        return "conv1d"
    if config.embeddings and isinstance(module, nn.Embedding) and _is_plain_lookup(module):
        return "embedding"
    if config.convolutions and is_matmul(module):
        return "conv"
    return None


def _has_stacked_experts(module: nn.Module) -> bool:
    """True for classes under transformers' ``use_experts_implementation``: they index their weights by expert."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "config"))


def _is_plain_lookup(module: nn.Embedding) -> bool:
    """True for nn.Embedding and for subclasses that build on its own lookup (a scaled embedding)."""
    if module.max_norm is not None or isinstance(module, ZipEmbedding):
        return False
    forward = type(module).forward
    if forward is nn.Embedding.forward:
        return True
    try:
        return "super().forward(" in inspect.getsource(forward)
    except (OSError, TypeError):
        return False


def drop_half_tied(targets: dict[str, str], tied: dict[str, str]) -> dict[str, str]:
    """Without weights that are tied to one that stays dense: both must be compressed, or neither."""
    dense = {name for pair in tied.items() if not (pair[0] in targets and pair[1] in targets) for name in pair}
    return {name: kind for name, kind in targets.items() if name not in dense}


def compress_weight(kind: str, weight: torch.Tensor) -> Payload | None:
    """The weight compressed as its module will hold it; None where it would not shrink."""
    if kind == "experts":
        experts = ZipExperts.from_tensor(weight)
        return None if experts.is_raw else experts
    zipped = compress(weight.t() if kind == "conv1d" else weight)
    return None if zipped.is_raw else zipped


def adopt_weight(kind: str, zipped: ZipTensor) -> Payload:
    """A weight that a checkpoint holds compressed, as its module will hold it."""
    if kind == "conv1d":
        return _transposed(zipped)
    if kind == "experts":
        return ZipExperts.from_tensor(zipped.decompress())
    return zipped


def checkpoint_weight(module: nn.Module, dense: bool) -> torch.Tensor:
    """A compressed module's weight as a checkpoint holds it: decompressed, or the blob."""
    if isinstance(module, ZipExperts):
        weight = module.decompress()
        return weight if dense else compress(weight).blob
    if isinstance(module, MergedLinear) and not dense:
        return module.weight_zipserv.cpu()  # a copy: not beside the model on its GPU
    assert isinstance(module, ZipLinear | ZipEmbedding | ZipConv)
    zipped = module.ziptensor
    if not isinstance(module, ZipConv1D):
        return zipped.decompress() if dense else zipped.blob
    weight = zipped.decompress().t().contiguous()
    return weight if dense else compress(weight).blob


def replace_modules(model: Any, weights: dict[str, Payload], targets: dict[str, str], *, merge: bool) -> None:
    """Put compressed modules in the place of those whose weights have arrived; tied ones share one blob.

    With ``merge``, layers that read the same input become one product; ``weights`` is emptied, so that no bytes are held twice.

    Raises:
        Error: a parameter is still a stand-in afterwards.
    """
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        for name, other in ((target, source), (source, target)):
            if name in targets and name not in weights and other in weights:
                weights[name] = weights[other]
    _share_equal(weights)
    dispatched = _take_down_hooks(model)
    names = {id(module): name for name, module in model.named_modules()}
    replaced: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        prefix = names[id(module)] + "." if names[id(module)] else ""
        for parameter in _STACKED:
            payload = weights.get(prefix + parameter)
            if isinstance(payload, ZipExperts):
                _place_experts(module, parameter, payload)
        payload = weights.get(prefix + "weight")
        if payload is not None:
            new = replaced.get(id(module))
            if new is None:
                new = replaced[id(module)] = _build(targets[prefix + "weight"], module, payload)
            _set_module(model, name, new)
        del payload
    replaced.clear()
    weights.clear()
    # What is mapped to the CPU beside a GPU travels with each call of a layer: its bytes must be its own.
    travels = dispatched is not None and "cpu" in dispatched.values()
    if merge:
        merge_layers(model, where=lambda layer: not (travels and layer.weight_zipserv.is_cpu))
    holders = []
    for module in model.modules():
        experts = [child for child in module.children() if isinstance(child, ZipExperts)]
        holders += [module] if experts else []
        for each in experts:
            if travels and each.device.type == "cpu":
                each.split()
    if holders and hasattr(model, "set_experts_implementation"):
        kinds = {implementation(module) for module in holders}
        model.set_experts_implementation(kinds.pop() if len(kinds) == 1 else "eager")
    _put_back_hooks(model, dispatched)
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and parameter.untyped_storage().nbytes() == parameter.element_size():
            raise Error(f"the weight of {name} was compressed, but its module could not be replaced")


def _share_equal(weights: dict[str, Payload]) -> None:
    """Two names with the same compressed bytes get one blob: a checkpoint may hold a tied weight twice."""
    seen: dict[tuple[int, int], ZipTensor] = {}
    for name, zipped in weights.items():
        if isinstance(zipped, ZipTensor):
            first = seen.setdefault((zipped.checksum, zipped.nbytes), zipped)
            if first is not zipped and first.device == zipped.device and torch.equal(first.blob, zipped.blob):
                weights[name] = first


def _place_experts(module: nn.Module, name: str, experts: ZipExperts) -> None:
    if name in module._parameters:
        del module._parameters[name]
        module.add_module(name, experts)


def _build(kind: str, module: Any, weight: Payload) -> nn.Module:
    assert isinstance(weight, ZipTensor)
    new: nn.Module
    if kind == "embedding":
        assert isinstance(module, nn.Embedding)
        new = ZipEmbedding.from_embedding(module, weight)
    elif kind == "conv":
        new = ZipConv.from_conv(module, weight)
    else:
        new = (ZipConv1D if kind == "conv1d" else ZipLinear).from_ziptensor(weight, module.bias)
    return new.train(module.training)


def model_converters() -> list[Converter]:
    """What ``zipserv.compress_model`` has to know of transformers' own kinds of modules."""

    def stacked(*names: str) -> Callable[[nn.Module], bool]:
        def matches(module: nn.Module) -> bool:
            parts = [module._parameters.get(name) for name in names]
            return _has_stacked_experts(module) and all(part is not None and part.dim() == 3 for part in parts)

        return matches

    def place(old: nn.Module, weights: Mapping[str, Any]) -> nn.Module:
        for name, experts in weights.items():
            _place_experts(old, name, experts)
        config: Any = old.config
        config._experts_implementation = implementation(old)
        return old

    return [
        Converter(
            matches=lambda module: type(module) is Conv1D,
            build=lambda old, weights: ZipConv1D.from_conv1d_weight(weights["weight"], cast(Conv1D, old).bias),
        ),
        *(
            Converter(matches=stacked(*names), build=place, weights=names, compress=ZipExperts.from_tensor)
            for names in (("gate_up_proj", "down_proj"), ("up_proj", "down_proj"))
        ),
    ]


def restore_modules(model: nn.Module) -> None:
    """The inverse: plain modules with decompressed weights; tied ones share one parameter again."""
    shared: dict[int, nn.Parameter] = {}

    def parameter(key: torch.Tensor, make: Callable[[], torch.Tensor]) -> nn.Parameter:
        if id(key) not in shared:
            shared[id(key)] = nn.Parameter(make(), requires_grad=False)
        return shared[id(key)]

    split_layers(model)
    done: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, ZipExperts):
            parent = model.get_submodule(name.rpartition(".")[0])
            weight = nn.Parameter(module.decompress(), requires_grad=False)
            del parent._modules[name.rpartition(".")[2]]
            parent.register_parameter(name.rpartition(".")[2], weight)
        elif isinstance(module, ZipLinear | ZipEmbedding | ZipConv):
            if id(module) not in done:
                done[id(module)] = _plain(module, parameter)
            _set_module(model, name, done[id(module)])


def _plain(module: ZipLinear | ZipEmbedding | ZipConv, parameter: Callable[..., nn.Parameter]) -> nn.Module:
    plain: nn.Module
    if isinstance(module, ZipConv1D):
        plain = Conv1D(module.out_features, module.in_features)  # type: ignore[no-untyped-call]
        plain.weight = nn.Parameter(checkpoint_weight(module, dense=True), requires_grad=False)
        plain.bias = module.bias
        return plain
    if isinstance(module, ZipLinear):
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta", dtype=module.weight_dtype)
        plain.bias = module.bias
    elif isinstance(module, ZipEmbedding):
        plain = module.to_embedding()
    else:
        return module.to_conv()
    plain.weight = parameter(module.weight_zipserv, module.ziptensor.decompress)
    return plain.train(module.training)


def _set_module(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, new)


def _take_down_hooks(model: Any) -> dict[str, Any] | None:
    """accelerate's hooks of a model on several devices; they hold on to the modules that are about to go."""
    device_map = getattr(model, "hf_device_map", None)
    if not device_map or len(set(device_map.values())) < 2:
        return None
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    return dict(device_map)


def _put_back_hooks(model: Any, device_map: dict[str, Any] | None) -> None:
    if device_map is not None:
        from accelerate import dispatch_model

        # Compressed bytes are buffers: what is mapped to the CPU is to stay there and travel when it is used. Experts
        # have no forward of their own: they travel with the module that indexes them.
        holders = {type(m).__name__ for m in model.modules() if any(isinstance(c, ZipExperts) for c in m.children())}
        dispatch_model(
            model,
            device_map,
            offload_buffers=True,
            skip_keys=getattr(model, "_skip_keys_device_placement", None),
            preload_module_classes=sorted(holders),
        )
