# SPDX-License-Identifier: Apache-2.0
"""Modules whose weights stay compressed: ``ZipLinear`` and what it is built on, ``BlobModule``.

Compressed bytes are buffers: no optimizer sees them, ``.to(device)`` moves them, ``.to(dtype)`` leaves them alone,
``state_dict`` holds them under ``weight_zipserv``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .errors import Error
from .format import DTYPE_CODES, SUFFIX, Header
from .lazy import LazyWeight
from .stacked import mark_written
from .tensor import ZipTensor, check_blob, compress, linear_blob

__all__ = ["BlobModule", "ZipLinear", "take_over"]


class _Successors:
    """Which tensor took the place of another.

    Two modules may share one blob (tied weights), but each replaces its own buffer when a model moves or loads. The
    second one finds here what the first one put in the blob's place, and takes the same.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[torch.Tensor], object, weakref.ref[torch.Tensor]]] = {}

    def get(self, old: torch.Tensor, token: object) -> torch.Tensor | None:
        entry = self._entries.get(id(old))
        return entry[2]() if entry is not None and entry[0]() is old and entry[1] == token else None

    def put(self, old: torch.Tensor, token: object, new: torch.Tensor) -> None:
        key = id(old)
        self._entries[key] = (weakref.ref(old, lambda _: self._entries.pop(key, None)), token, weakref.ref(new))


_successors = _Successors()


class BlobModule(nn.Module):
    """Base of modules that hold compressed weights.

    A subclass calls :meth:`register_blob` for each weight and runs on ``self.get_buffer(name + SUFFIX)``. It inherits moves
    that keep shared blobs shared, dtype conversions that leave blobs alone, and ``load_state_dict`` of blobs of any
    size, from ``NAME_zipserv`` (a blob) or ``NAME`` (a ZipTensor, or a plain tensor, which is compressed on the way).
    """

    _blob_specs: dict[str, tuple[tuple[int, ...], torch.dtype]]

    def register_blob(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        blob: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the buffer ``NAME_zipserv`` for a weight of this shape and dtype; empty where ``blob`` is None.

        Raises:
            TypeError: the dtype is neither ``torch.bfloat16`` nor ``torch.float16``.
        """
        if dtype not in DTYPE_CODES:
            raise TypeError(f"compressed weights are torch.bfloat16 or torch.float16, not {dtype}")
        if "_blob_specs" not in self.__dict__:
            self._blob_specs = {}
        self._blob_specs[name] = (tuple(shape), dtype)
        self.register_buffer(name + SUFFIX, blob if blob is not None else torch.empty(0, dtype=torch.uint8, device=device))

    def get_ziptensor(self, name: str = "weight") -> ZipTensor:
        """The weight ``name`` as a ZipTensor over the module's own bytes.

        Raises:
            Error: no weight has been loaded yet.
        """
        blob = self._blob(name)
        if blob.is_meta or blob.numel() == 0:
            raise Error(f"{type(self).__name__} holds no {name} yet: load a state dict, or make it from a loaded layer")
        return ZipTensor.from_blob(blob, verify="none")

    def _blob(self, name: str) -> torch.Tensor:
        """The compressed bytes of the weight ``name``."""
        return self.get_buffer(name + SUFFIX)

    def _blobs(self) -> Iterator[torch.Tensor]:
        """The buffers that hold compressed bytes."""
        return (self.get_buffer(name + SUFFIX) for name in self._blob_specs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        blobs = {id(blob) for blob in self._blobs()}
        return super()._apply(lambda t: _apply_to_blob(fn, t) if id(t) in blobs else fn(t), recurse)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for blob in self._blobs():
            mark_written(blob)  # a deep copy, or unpickled

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = dict(state_dict)
        names = {name + SUFFIX for name in self._blob_specs}
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        for name in self._blob_specs:
            plain = state.pop(prefix + name, None)
            value = state.pop(prefix + name + SUFFIX, plain)
            if value is None:
                if strict:
                    missing_keys.append(prefix + name + SUFFIX)
                continue
            try:
                self._load_blob(name, value, is_plain=value is plain, assign=assign)
            except (TypeError, ValueError, Error) as error:
                error_msgs.append(f"{prefix}{name}: {error}")
        # The rest (bias and what a subclass adds) loads as always; the blobs are hidden from it.
        hidden = names - self._non_persistent_buffers_set
        self._non_persistent_buffers_set |= hidden
        try:
            super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        finally:
            self._non_persistent_buffers_set -= hidden

    def _check_header(self, name: str, header: Header) -> None:
        shape, dtype = self._blob_specs[name]
        if header.shape != shape:
            raise ValueError(f"the compressed weight has the shape {header.shape}, the module needs {shape}")
        if header.dtype != dtype:
            raise TypeError(f"the compressed weight is {header.dtype}, the module was made for {dtype}: give dtype={header.dtype}")

    def _load_blob(self, name: str, value: object, *, is_plain: bool, assign: bool) -> None:
        if isinstance(value, torch.Tensor) and value.is_meta:
            if assign:
                self._buffers[name + SUFFIX] = value
            return
        owned = False
        if isinstance(value, ZipTensor):
            blob, header = value.blob, value.header
        elif not isinstance(value, torch.Tensor):
            raise TypeError(f"expected a tensor, not {type(value).__name__}")
        elif is_plain:
            compressed = compress(value)
            blob, header, owned = compressed.blob, compressed.header, True
        else:
            blob, header = value, check_blob(value)
        self._check_header(name, header)
        self._buffers[name + SUFFIX] = _replace_blob(self.get_buffer(name + SUFFIX), blob, header, owned, assign)


def _apply_to_blob(fn: Callable[[torch.Tensor], torch.Tensor], old: torch.Tensor) -> torch.Tensor:
    # What the function does is learnt on an empty tensor: bytes must not become numbers of another dtype
    # (Module.type does that), and a blob that another module has moved already is taken from there.
    probe = fn(old.new_empty(0))
    token = (probe.device, 0 if old.is_inference() else old._version)
    known = _successors.get(old, token)
    if known is not None:
        return known
    new = fn(old) if probe.dtype == torch.uint8 else old.to(probe.device)
    if new is not old:
        mark_written(new)
        _successors.put(old, token, new)
    return new


def _replace_blob(old: torch.Tensor, blob: torch.Tensor, header: Header, owned: bool, assign: bool) -> torch.Tensor:
    if assign:
        return blob
    if old.is_meta:
        warnings.warn("loading into a module on the meta device does nothing: pass assign=True", stacklevel=2)
        return old
    if old.numel() == blob.numel():
        # In place, as for every other tensor: shared blobs stay shared and captured CUDA graphs stay valid.
        with torch.no_grad():
            old.copy_(blob)
        return mark_written(old)  # the next product must not fetch weights ahead of this copy
    known = _successors.get(old, header)
    if known is not None:
        return known
    new = mark_written(blob.to(old.device, copy=not owned))
    _successors.put(old, header, new)
    return new


class ZipLinear(BlobModule, nn.Linear):
    """``nn.Linear`` with a losslessly compressed BF16 or FP16 weight.

    The weight is the uint8 buffer ``weight_zipserv`` and never exists decompressed as a whole in ``forward``. Only the
    bias is a parameter. Gradients flow to the input and the bias. A new layer holds no weight: use
    :meth:`from_linear`, or load a state dict.

    Args:
        in_features: K, size of the last dimension of the input.
        out_features: M, size of the last dimension of the output.
        bias: whether there is a bias, zeros at first.
        device: any device, ``"meta"`` included.
        dtype: dtype of the weight, ``torch.bfloat16`` or ``torch.float16``.

    Raises:
        TypeError: another dtype.
        ValueError: a size is below 1.
    """

    __constants__ = ["in_features", "out_features"]
    weight_zipserv: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a compressed weight needs at least one element, not {out_features} x {in_features}")
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight_dtype = dtype
        self.register_blob("weight", (out_features, in_features), dtype, device=device)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None)

    @classmethod
    def from_ziptensor(cls, weight: ZipTensor, bias: torch.Tensor | None = None) -> ZipLinear:
        """A layer over an existing compressed weight ``(out_features, in_features)``; its bytes are shared, not copied.

        Args:
            weight: compressed, two dimensions.
            bias: ``(out_features,)``; a Parameter is taken as it is.

        Raises:
            TypeError: ``weight`` is no ZipTensor.
            ValueError: it has not two dimensions, or the bias another shape.
        """
        if not isinstance(weight, ZipTensor):
            raise TypeError(f"expected a zipserv.ZipTensor, not {type(weight).__name__}")
        if weight.ndim != 2:
            raise ValueError(f"ZipLinear needs a weight of two dimensions, this one has the shape {tuple(weight.shape)}")
        if bias is not None and bias.shape != (weight.m,):
            raise ValueError(f"bias has the shape {tuple(bias.shape)}, it should be ({weight.m},)")
        layer = cls(weight.k, weight.m, bias=False, device="meta", dtype=weight.dtype)
        layer.weight_zipserv = weight.blob
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> ZipLinear:
        """The same layer with its weight compressed; the bias is shared with the original.

        Raises:
            TypeError: not an ``nn.Linear``, or its weight is not BF16 or FP16.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, ZipLinear):
            raise TypeError(f"expected a torch.nn.Linear, not {type(linear).__name__}")
        layer = cls.from_ziptensor(compress(linear.weight), linear.bias)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with the decompressed weight, equal to the original bit for bit; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.weight_dtype)
        linear.weight = nn.Parameter(self.ziptensor.decompress())
        linear.bias = self.bias
        return linear.train(self.training)

    @property
    def ziptensor(self) -> ZipTensor:
        """The compressed weight, over this layer's own bytes. Raises Error where none is loaded."""
        return self.get_ziptensor("weight")

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight ``(out_features, in_features)`` for code that looks at it.

        Shape, dtype and device cost nothing; its values are decompressed anew each time they are asked for. Changes in
        place would be lost, so they raise :class:`zipserv.Error`; :meth:`to_linear` gives a weight that can be changed.
        """
        blob, m, k = self.weight_zipserv, self.out_features, self.in_features
        if blob.is_meta or not blob.numel():
            return torch.empty((m, k), dtype=self.weight_dtype, device="meta")
        if torch.compiler.is_compiling():
            weight: torch.Tensor = torch.ops.zipserv.decompress(blob, m, k, DTYPE_CODES[self.weight_dtype])
            return weight
        return LazyWeight(blob, (m, k), (m, k), self.weight_dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "the weight of a ZipLinear is compressed and can't be set: use ZipLinear.from_linear(linear) for a new layer, "
                "or load_state_dict({'weight': tensor}, strict=False)"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Not possible: a compressed weight is never drawn anew. Raises Error."""
        raise Error("a compressed weight can't be initialised anew: initialise an nn.Linear, then ZipLinear.from_linear")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input (..., in_features)``, the weight's dtype -> ``(..., out_features)``: see :func:`zipserv.linear`."""
        bias: torch.Tensor | None = self.bias
        if bias is not None and bias.dtype != self.weight_dtype:
            bias = bias.to(self.weight_dtype)  # after .float() or .half(), which the compressed weight ignores
        blob = self.weight_zipserv
        if blob.numel() == 0 and not blob.is_meta:
            raise Error("ZipLinear holds no weight yet: load a state dict, or make it from a loaded layer")
        return linear_blob(input, blob, self.out_features, self.in_features, self.weight_dtype, bias)

    def extra_repr(self) -> str:
        blob = self.weight_zipserv
        size = "no weight yet"
        if blob.numel():
            size = f"{8 * blob.numel() / (self.in_features * self.out_features):.2f} bits/weight"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, dtype={self.weight_dtype}, {size}"


# Hooks of nn.Module live in these dicts.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def take_over(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give a module that takes another's place its mode and the hooks that its user had put there."""
    new.train(old.training)
    for name in _HOOKS:
        if getattr(old, name, None):
            getattr(new, name).update(getattr(old, name))
    return new
