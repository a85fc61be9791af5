# SPDX-License-Identifier: Apache-2.0
"""Layers that read the same input (query, key and value; gate and up) as one product.

On a GPU a small product costs its start more than its bytes. Here such layers keep their places and names in the model, but
their rows lie in one blob. Within one call of the module that holds them, the first of them that is called multiplies by all
rows, and the others take their part of that result: if they are called with the same tensor, unchanged, once each. What does
not fit that (another tensor, another stream or thread, a gradient to record, a call from outside) is computed for itself, so
results never depend on the order of calls, and nothing is kept when the call of the holder is over.

On the CPU each layer multiplies by its own rows alone, with the bits of a layer that is not merged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from threading import get_ident, local
from typing import Any

import torch
from torch import nn

from . import ops
from .errors import Error
from .format import DTYPE_CODES, SUFFIX, TILE, parse_header
from .gated import adapt, restore
from .layers import ZipLinear, take_over
from .lazy import LazyWeight
from .rows import linear_gated, linear_parts, linear_rows
from .siblings import proven, same_input
from .stacked import Part, mark_written, stack, take
from .tensor import ZipTensor, check_blob, compress, linear_blob

_transform = torch._C._functorch.peek_interpreter_stack  # vmap and its like

__all__ = ["NAMES", "MergedLinear", "apart", "merge_layers", "split_layers"]

#: Layers of one module that read the same input, by their names in it.
NAMES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
#: The query of a cross-attention reads another input than its key and value.
_CROSS = re.compile(r"cross|enc_?dec|encoder_(attn|attention|decoder)|(^|\.)attn2$", re.IGNORECASE)
#: Where one product serves all; elsewhere each layer multiplies by its own rows.
_SHARED_ON = frozenset({"cuda"})
#: Up to so many tokens a product of all rows gives one wide result, of which each layer has its columns. With more, layers of as many rows each get
#: results of their own from it.
_FEW_TOKENS = 128
#: Layers that have not as many: beyond so many elements of a result (24 MiB, half of an H100's L2) each multiplies by its own rows, as reading rows
#: that lie apart costs more than one product saves (docs/performance.md).
_MOST_RESULTS = 12 << 20

Slots = tuple[dict[str, Any], dict[str, Any]]


class _Group:
    """What merged layers have in common. It knows their tensors, not the modules: no cycle keeps a deleted model alive."""

    def __init__(self, parts: Sequence[Part], k: int) -> None:
        self.parts = list(parts)
        self.m = sum(part.rows for part in parts)
        self.k = k
        self.even = len({part.rows for part in parts}) == 1 and parts[0].rows % TILE == 0
        self.gated = self.even and len(parts) == 2 and parts[0].header.dtype is torch.bfloat16  # perhaps a gate and what it is for
        self.slots: list[Slots] = []  # each layer's own dicts of parameters and buffers
        self.proven = False  # that nothing writes into their input between them, where no counter would tell
        self.step: _Step | None = None
        # The same under torch.compile, whose tracer follows plain tuples: x, y, gradients recorded, taken.
        self.traced: tuple[Any, Any, bool, int] | None = None

    def biases(self) -> list[Any]:
        return [parameters.get("bias") for parameters, _ in self.slots]

    def is_sharded(self) -> bool:
        """True while some of the biases lie in pieces on several devices (FSDP around single layers)."""
        return any(bias.__class__.__name__ == "DTensor" for bias in self.biases())

    def bias(self, dtype: torch.dtype, device: torch.device, *, views: bool) -> torch.Tensor | None:
        """All biases in a row; with ``views`` without a copy where they lie so."""
        given = self.biases()
        if all(bias is None for bias in given):
            return None
        if views and _adjacent(given) and given[0] is not None and given[0].dtype == dtype:
            row: torch.Tensor = given[0].detach().as_strided((self.m,), (1,))
            return row
        filled = [
            torch.zeros(part.rows, dtype=dtype, device=device) if bias is None else bias.to(dtype)
            for bias, part in zip(given, self.parts, strict=True)
        ]
        return torch.cat(filled)

    def tie(self) -> None:
        """Put the biases one behind the other in memory, which saves a copy in each product."""
        given = self.biases()
        kinds = {(type(bias), getattr(bias, "dtype", None), getattr(bias, "device", None)) for bias in given}
        if len(given) != len(self.parts) or len(kinds) != 1 or type(given[0]) is not nn.Parameter or given[0].is_meta:
            return
        if type(given[0].data) is not torch.Tensor or _adjacent(given):
            return
        if torch.is_inference_mode_enabled() or any(bias.is_inference() for bias in given):
            return  # such tensors can't take the place of others
        whole = torch.cat([bias.data for bias in given if bias is not None])
        for bias, part in zip(given, self.parts, strict=True):
            assert bias is not None
            bias.data = whole[part.row0 : part.row0 + part.rows]


class _Step:
    """The product of one call of the holder, from the first layer that is called to the last."""

    __slots__ = ("biases", "blob", "key", "taken", "thread", "written", "x", "y")

    def __init__(self) -> None:
        self.thread = get_ident()
        self.x: torch.Tensor | None = None
        self.y: torch.Tensor | tuple[torch.Tensor, ...] = ()  # of all rows, or of each layer
        self.blob: torch.Tensor | None = None
        self.biases: list[Any] = []
        self.written: tuple[Any, ...] = ()
        self.key: tuple[Any, ...] = ()
        self.taken = 0


_OPEN = (None, None, False, 0)  # for a tracer: layers may share a product, there is none yet


class _Open:
    """Before the holder's forward: from now on layers may share a product."""

    def __init__(self, group: _Group) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.group.traced = _OPEN  # outside of a tracer, too: it may begin at the holder's forward
        if not torch.compiler.is_dynamo_compiling():
            self.group.step = _Step()


class _Close:
    """After it: nothing is kept."""

    def __init__(self, group: _Group) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.group.traced = None
        if not torch.compiler.is_dynamo_compiling():
            self.group.step = None


class MergedLinear(ZipLinear):
    """A ``ZipLinear`` whose rows lie in one blob with those of other layers: made by :func:`merge_layers`.

    The blob is the buffer ``merged_zipserv``, one tensor that all of them hold and no state dict shows. State dicts have
    the layer's own ``weight_zipserv``, as if it were not merged: a copy of its bytes, made when asked for.
    """

    merged_zipserv: torch.Tensor

    def __init__(self, layer: ZipLinear, group: _Group, blob: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight_dtype = layer.in_features, layer.out_features, layer.weight_dtype
        self._blob_specs = {"weight": ((self.out_features, self.in_features), self.weight_dtype)}
        self.register_buffer("merged_zipserv", blob, persistent=False)
        self.register_parameter("bias", layer.bias)
        self._group, self._index = group, len(group.slots)
        self._row0 = group.parts[self._index].row0
        group.slots.append((self._parameters, self._buffers))

    # --- the layer's own bytes ------------------------------------------------------------------------------------

    @property
    def weight_zipserv(self) -> torch.Tensor:  # type: ignore[override]
        """The compressed bytes of this layer alone, a copy."""
        if self.merged_zipserv.is_meta:
            return torch.empty(self._group.parts[self._index].header.nbytes, dtype=torch.uint8, device="meta")
        return take(self.merged_zipserv, self._group.parts[self._index])

    @property
    def nbytes(self) -> int:
        """Size of :attr:`weight_zipserv`."""
        return self._group.parts[self._index].header.nbytes

    def get_ziptensor(self, name: str = "weight") -> ZipTensor:
        if name != "weight" or self.merged_zipserv.is_meta:
            raise Error(f"this layer has no {name}, or is on the meta device, where there are no bytes")
        return ZipTensor._trusted(self.weight_zipserv, self._group.parts[self._index].header)

    def to_zip_linear(self) -> ZipLinear:
        """The same layer on its own: its bytes are copied, its bias is shared."""
        return ZipLinear.from_ziptensor(self.ziptensor, self.bias).train(self.training)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """As of :attr:`ZipLinear.weight`."""
        blob, shape = self.merged_zipserv, (self.out_features, self.in_features)
        if blob.is_meta:
            return torch.empty(shape, dtype=self.weight_dtype, device="meta")
        matrix = (self._group.m, self._group.k)
        if torch.compiler.is_compiling():
            rows: torch.Tensor = torch.ops.zipserv.decompress_rows(
                blob, *matrix, DTYPE_CODES[self.weight_dtype], self._row0, self._row0 + self.out_features
            )
            return rows
        return LazyWeight(blob, shape, matrix, self.weight_dtype, row0=self._row0)

    # --- products -------------------------------------------------------------------------------------------------

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input (..., in_features)`` -> ``(..., out_features)``; on a GPU perhaps a view into a wider result, or contiguous beside others."""
        blob = self.merged_zipserv
        if blob.device.type not in _SHARED_ON:
            return self._alone(input, blob)
        if torch.compiler.is_dynamo_compiling():
            return self._trace(input, blob)
        bias = self.bias
        if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
            return self._alone(input, blob)
        if (input.is_inference() and not self._group.proven) or self._forward_pre_hooks or self._forward_hooks:
            return self._alone(input, blob)  # somebody may write into the input between the layers, and nothing counts it
        if _transform() is not None:
            return self._alone(input, blob)
        step = self._group.step
        shares = step is not None and step.thread == get_ident()
        many = input.numel() > _FEW_TOKENS * self.in_features and not _batch_invariant(blob)
        large = many and input.numel() * self._group.m > _MOST_RESULTS * self.in_features
        if large and not (shares and self._group.even):
            return self._alone(input, blob)
        own = self._group.slots[self._index][0]
        if own is not self._parameters or own.get("bias") is not bias or self._group.is_sharded():
            return self._alone(input, blob)  # a replica with tensors of its own, a parametrized bias, one in pieces
        y = self._shared(step, input, blob, many, large) if step is not None and shares else self._product(input, blob, many, large)
        if y is None:
            return self._alone(input, blob)
        part = y.narrow(-1, self._row0, self.out_features) if isinstance(y, torch.Tensor) else y[self._index]
        # To whoever changes it in place it is a tensor of its own: no view, and with a counter of its own.
        return part.data if part.__class__ is torch.Tensor and not part.is_inference() else part

    def can_gate(self, up: nn.Module | None, x: object) -> bool:
        """Whether :meth:`gated` may give ``silu(self(x)) * up(x)`` in place of calls of the two. Hooks and tracers are looked for by whoever asks."""
        if type(x) is not torch.Tensor or x.numel() == 0:
            return False
        group = self._group
        if type(self) is not MergedLinear or type(up) is not MergedLinear or not group.gated:
            return False
        blob = self._buffers["merged_zipserv"]
        if blob is None or up._buffers["merged_zipserv"] is not blob or not _has_gates(blob.device):
            return False
        if x.dtype is not self.weight_dtype or x.shape[-1] != group.k or x.device != blob.device:
            return False
        for layer, (own, _) in zip((self, up), group.slots, strict=True):
            if own is not layer._parameters or "bias" in layer.__dict__:
                return False  # not the group's first and second, a replica with tensors of its own, a bias that is no parameter
        if torch.is_grad_enabled() and (x.requires_grad or any(bias is not None and bias.requires_grad for bias in group.biases())):
            return False
        if _transform() is not None or torch.is_autocast_enabled(blob.device.type) or group.is_sharded():
            return False
        return not _batch_invariant(blob)

    def gated(self, x: torch.Tensor) -> torch.Tensor | None:
        """By one product that stores nothing else; None where no kernel does that."""
        blob, group = self.merged_zipserv, self._group
        return linear_gated(x, blob, group.m, group.k, self.weight_dtype, self._bias(blob))

    def trace_gated(self, up: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """Both for torch.compile, as :meth:`_trace`: one op in its graph."""
        group, blob = self._group, self.merged_zipserv
        if type(self) is not MergedLinear or type(up) is not MergedLinear or up._group is not group or not group.gated or self._index != 0:
            return None
        if not _has_gates(blob.device) or x.dtype != self.weight_dtype or torch.is_autocast_enabled(blob.device.type) or group.is_sharded():
            return None
        for layer, (own, _) in zip((self, up), group.slots, strict=True):
            if (layer.bias is None) != (own.get("bias") is None):
                return None
        if torch.is_grad_enabled() and (x.requires_grad or any(bias is not None and bias.requires_grad for bias in group.biases())):
            return None
        y: torch.Tensor = torch.ops.zipserv.linear_gated(x, blob, group.m, group.k, DTYPE_CODES[self.weight_dtype], self._bias(blob))
        return y

    def _alone(self, x: torch.Tensor, blob: torch.Tensor) -> torch.Tensor:
        bias: torch.Tensor | None = self.bias
        if bias is not None and bias.dtype != self.weight_dtype:
            bias = bias.to(self.weight_dtype)
        group, row0 = self._group, self._row0
        return linear_rows(x, blob, group.m, group.k, self.weight_dtype, row0, row0 + self.out_features, bias)

    def _whole(self, x: torch.Tensor, blob: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The product with all rows."""
        return linear_blob(x, blob, self._group.m, self._group.k, self.weight_dtype, bias)

    def _bias(self, blob: torch.Tensor) -> torch.Tensor | None:
        return self._group.bias(self.weight_dtype, blob.device, views=not torch.compiler.is_compiling())

    def _product(self, x: torch.Tensor, blob: torch.Tensor, many: bool, large: bool) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
        """The product with all rows, or each layer's result of it; None where a large result would be a wide one."""
        group, bias = self._group, self._bias(blob)
        if many and group.even:
            parts = linear_parts(x, blob, group.m, group.k, self.weight_dtype, bias, len(group.parts))
            if parts is not None or large:
                return parts
        return self._whole(x, blob, bias)

    def _shared(
        self, step: _Step, x: torch.Tensor, blob: torch.Tensor, many: bool, large: bool
    ) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
        key, bit = _key(x), 1 << self._index
        same = step.x is x and step.blob is blob and step.key == key and not step.taken & bit
        if same and step.biases[self._index] is self.bias and step.written == _written(step.biases):
            y = step.y
            step.taken |= bit
        else:
            biases = self._group.biases()
            made = self._product(x, blob, many, large)
            if made is None:
                return None
            y, step.biases, step.written = made, biases, _written(biases)
            step.x, step.y, step.blob, step.key, step.taken = x, y, blob, key, bit
        if step.taken == (1 << len(self._group.parts)) - 1:
            step.x, step.y, step.blob = None, (), None
        return y

    def _trace(self, x: torch.Tensor, blob: torch.Tensor) -> torch.Tensor:
        """For torch.compile: the tracer follows the same rules, and leaves one product in its graph."""
        group, bit, grad = self._group, 1 << self._index, torch.is_grad_enabled()
        if not group.proven or self._forward_pre_hooks or self._forward_hooks:
            return self._alone(x, blob)
        if group.is_sharded() or (self.bias is None) != (group.slots[self._index][0].get("bias") is None):
            return self._alone(x, blob)
        held = group.traced
        y: torch.Tensor
        if held is not None and held[0] is x and held[2] == grad and not held[3] & bit:
            y, taken = held[1], held[3] | bit
        else:
            y, taken = self._whole(x, blob, self._bias(blob)), bit
        if held is not None:
            group.traced = _OPEN if taken == (1 << len(group.parts)) - 1 else (x, y, grad, taken)
        return y[..., self._row0 : self._row0 + self.out_features]

    # --- moves and state dicts ------------------------------------------------------------------------------------

    def _blobs(self) -> Iterator[torch.Tensor]:
        yield self.merged_zipserv

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self._group.tie()
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not apart:
            destination[prefix + "weight" + SUFFIX] = self.weight_zipserv

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._group.tie()

    def _load_blob(self, name: str, value: object, *, is_plain: bool, assign: bool) -> None:
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise TypeError("weights on the meta device can't be put into merged layers: zipserv.split_layers(model) first")
        if not isinstance(value, torch.Tensor | ZipTensor):
            raise TypeError(f"expected a tensor, not {type(value).__name__}")
        if isinstance(value, torch.Tensor):
            value = compress(value) if is_plain else ZipTensor._trusted(value, check_blob(value))
        header = value.header
        self._check_header(name, header)
        if header.raw:
            raise ValueError("this weight does not shrink and can't be merged with others: zipserv.split_layers(model) first")
        old, group = self.merged_zipserv, self._group
        if old.is_meta:
            raise TypeError("merged layers on the meta device can't be loaded: load first, then merge")
        blobs = [
            value.blob.to(old.device) if i == self._index else take(old, part) for i, part in enumerate(group.parts)
        ]
        new, parts = stack(blobs)
        group.parts[:] = parts
        if group.step is not None:
            group.step.x, group.step.y, group.step.blob = None, (), None  # of the weights before
        if new.numel() == old.numel():
            with torch.no_grad():
                old.copy_(new)  # captured CUDA graphs stay valid
            mark_written(old)
        else:
            for _, buffers in group.slots:
                buffers["merged_zipserv"] = new

    def extra_repr(self) -> str:
        bits = 8 * self.nbytes / (self.in_features * self.out_features)
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, dtype={self.weight_dtype}, {bits:.2f} bits/weight, rows {self._row0}.. of {self._group.m}"


def _has_gates(device: torch.device) -> bool:
    """Whether there are kernels that apply gates."""
    return device.type in _SHARED_ON and (device.type != "cuda" or _is_hopper(device.index))


def _is_hopper(index: int) -> bool:
    return bool(torch.cuda.get_device_capability(index) == (9, 0))


_constant: Any = torch.compiler.assume_constant_result  # untyped in torch
_constant(_is_hopper)  # for tracers


def _batch_invariant(blob: torch.Tensor) -> bool:
    return blob.is_cuda and bool(ops.cuda_module().batch_invariant())


def _written(biases: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    """How often each was written to."""
    return tuple(None if bias is None or bias.is_inference() else bias._version for bias in biases)


def _key(x: torch.Tensor) -> tuple[Any, ...]:
    """What changes when x is written to, or work moves to another stream. Inference tensors count no writes."""
    version = None if x.is_inference() else x._version
    if x.__class__ is not torch.Tensor:
        return version, torch.is_inference_mode_enabled()
    stream = ops.cuda_module()._stream(x.get_device()) if x.is_cuda else None
    return version, torch.is_inference_mode_enabled(), x.data_ptr(), stream


def _adjacent(biases: Sequence[torch.Tensor | None]) -> bool:
    """True for vectors that lie one behind the other in one storage."""
    place = storage = None
    for bias in biases:
        if bias is None or not bias.is_contiguous() or bias.__class__ not in (nn.Parameter, torch.Tensor):
            return False
        at = bias.untyped_storage().data_ptr()
        if place is not None and (bias.data_ptr() != place or at != storage):
            return False
        place, storage = bias.data_ptr() + bias.numel() * bias.element_size(), at
    return True


class _Apart:
    """``with apart:`` state dicts leave merged weights out, for those who fetch them one by one. For each thread of its own."""

    def __init__(self) -> None:
        self._local = local()

    def __bool__(self) -> bool:
        return getattr(self._local, "depth", 0) > 0

    def __enter__(self) -> None:
        self._local.depth = getattr(self._local, "depth", 0) + 1

    def __exit__(self, *args: object) -> None:
        self._local.depth -= 1


apart = _Apart()


def merge_layers(
    model: nn.Module, names: Sequence[Sequence[str]] = NAMES, *, where: Callable[[ZipLinear], bool] | None = None
) -> list[tuple[str, ...]]:
    """Merge a model's compressed layers that read the same input, in place.

    Args:
        model: weights loaded. Layers are taken that are plain :class:`zipserv.ZipLinear`, on one device, of one width and
            dtype, of a multiple of 64 rows (one of a group may have others), shared with nothing else, and held by a module that is
            called (not by a ``ModuleDict``).
        names: groups of names of layers in one module; where only some of a group are there, these are merged.
        where: layers to merge; others are left as they are.

    Returns:
        The names of the layers of each group.

    Raises:
        TypeError, ValueError: the arguments are none of that.
    """
    _require(model, where)
    for group in names if isinstance(names, Sequence) and not isinstance(names, str) else [names]:
        if isinstance(group, str) or not isinstance(group, Sequence) or not all(isinstance(name, str) for name in group):
            raise TypeError(f"names are groups of names of layers, as [('q_proj', 'k_proj', 'v_proj')], not {group!r:.80} among them")
        if len(set(group)) < 2 or len(set(group)) < len(group):
            raise ValueError(f"a group is of two layers or more, each named once, not {group!r:.80}")
    holders: dict[int, int] = {}
    owners: dict[int, int] = {}
    for module in model.modules():
        for buffer in module._buffers.values():
            holders[id(buffer)] = holders.get(id(buffer), 0) + 1
        for child in module._modules.values():
            owners[id(child)] = owners.get(id(child), 0) + 1
    merged = []
    for path, parent in _parents(model):
        if not _is_called(parent):
            continue
        for group in names:
            wanted = group[1:] if len(group) == 3 and _is_cross(path, parent) else group
            found = {name: parent._modules.get(name) for name in wanted}
            layers = {
                name: layer
                for name, layer in found.items()
                if type(layer) is ZipLinear
                and owners[id(layer)] == 1
                and holders[id(layer.weight_zipserv)] == 1
                and (where is None or where(layer))
                and _can_stack(layer)
            }
            for some in _alike(layers):
                if same_input(parent, tuple(some)):
                    _merge(parent, some)
                    merged.append(tuple(f"{path}.{name}" if path else name for name in some))
    return merged


def split_layers(model: nn.Module, where: Callable[[MergedLinear], bool] | None = None) -> list[str]:
    """The inverse of :func:`merge_layers`: layers of their own, in place.

    Args:
        model: whatever holds merged layers, all of a group.
        where: merged layers to split, with all of their group; by default all.

    Returns:
        The names of these layers.
    """
    _require(model, where)
    found = [module for module in model.modules() if isinstance(module, MergedLinear)]
    groups = {id(layer._group) for layer in found if where is None or where(layer)}
    del found
    names = []
    for path, parent in _parents(model):
        for name, child in list(parent._modules.items()):
            if isinstance(child, MergedLinear) and id(child._group) in groups:
                parent._modules[name] = take_over(child, child.to_zip_linear())
                names.append(f"{path}.{name}" if path else name)
        for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Open | _Close) and id(hook.group) in groups:
                    del hooks[key]
                    parent._forward_hooks_always_called.pop(key, None)
                    restore(parent)
    return names


def _require(model: object, where: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, not {type(model).__name__}")
    if where is not None and not callable(where):
        raise TypeError(f"where is a function of a layer, not {type(where).__name__}")


def _parents(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that hold others. Without the layers themselves: what is replaced is to be freed at once."""
    return [(path, module) for path, module in model.named_modules() if module._modules]


def _is_called(holder: nn.Module) -> bool:
    """False for containers without a ``forward`` (``nn.ModuleDict``): within no call of theirs could layers share a product."""
    forward = getattr(holder, "forward", None)
    return getattr(forward, "__func__", forward) is not nn.Module.forward


def _is_cross(path: str, parent: nn.Module) -> bool:
    told = getattr(parent, "is_cross_attention", None)
    if isinstance(told, bool):
        return told
    last = path.rpartition(".")[2]
    return bool(_CROSS.search(path) if last in ("self", "attention") else _CROSS.search(last)) or bool(_CROSS.search(type(parent).__name__))


def _can_stack(layer: ZipLinear) -> bool:
    blob = layer.weight_zipserv
    if type(blob) is not torch.Tensor or blob.is_meta or blob.numel() == 0 or "forward" in layer.__dict__:
        return False
    return not parse_header(blob[:128].cpu()).raw


def _alike(layers: dict[str, ZipLinear]) -> Iterator[dict[str, ZipLinear]]:
    """Those that fit on one another, two or more; one whose rows end within a tile comes last."""
    kinds: dict[tuple[Any, ...], dict[str, ZipLinear]] = {}
    for name, layer in layers.items():
        kinds.setdefault((layer.in_features, layer.weight_dtype, layer.weight_zipserv.device), {})[name] = layer
    for some in kinds.values():
        whole = {name: layer for name, layer in some.items() if layer.out_features % TILE == 0}
        odd = [name for name in some if name not in whole]
        if odd:
            whole[odd[0]] = some[odd[0]]
        if len(whole) > 1:
            yield whole


def _merge(parent: nn.Module, layers: dict[str, ZipLinear]) -> None:
    blob, parts = stack([layer.weight_zipserv for layer in layers.values()])
    group = _Group(parts, next(iter(layers.values())).in_features)
    group.proven = proven(parent, tuple(layers))
    for name, layer in layers.items():
        new = MergedLinear(layer, group, blob).train(layer.training)
        take_over(layer, new)
        parent._modules[name] = new
    group.tie()
    if group.gated:
        adapt(parent, tuple(layers))
    parent.register_forward_pre_hook(_Open(group))
    parent.register_forward_hook(_Close(group), always_call=True)
