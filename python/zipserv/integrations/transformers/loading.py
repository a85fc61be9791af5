# SPDX-License-Identifier: Apache-2.0
"""What happens to one tensor on its way from the checkpoint into the model, and to its name.

transformers' loader renames each checkpoint key, collects tensors, runs conversion operations on them (a merge of
experts, a split of qkv) and sets the result as a parameter. Compressed weights take the same way: an operation here
hands the loader a *stand-in*, a parameter of the right shape, dtype and device that occupies one element, and leaves
the compressed weight with the quantizer. So names, tied weights, missing keys and initialisation are the loader's
business as always; the modules are replaced when loading is over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform

from zipserv.format import SUFFIX
from zipserv.tensor import ZipTensor

Tensors = dict[str, Any]
#: Matches the end of a name, compressed or not. A lookahead: what a renaming replaces stays the name itself.
_WORD_END, _NAME_END = rf"(?={SUFFIX}$|(?!\w))", rf"(?={SUFFIX}$|$)"


class Keeper(Protocol):
    """What the operations need of the quantizer."""

    def param_needs_quantization(self, model: Any, param_name: str) -> bool: ...

    def keep_compressed(self, name: str, weight: torch.Tensor) -> torch.Tensor: ...

    def keep_blob(self, name: str, blob: torch.Tensor) -> torch.Tensor: ...


def stand_in(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
    """A parameter of this shape over one NaN, so that nothing takes it for weights or for equal to another."""
    value = torch.full((1,), float("nan"), dtype=dtype, device=device)
    return torch.nn.Parameter(value.expand(tuple(shape)), requires_grad=False)


def one(value: Any) -> Any:
    """The loader passes tensors alone or in a list of one."""
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"expected one tensor, got {len(value)}")
        return value[0]
    return value


class _Op(ConversionOps):
    """An operation that knows the quantizer. The loader deep-copies operations for each weight: not the quantizer."""

    def __init__(self, quantizer: Keeper) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Op:
        return type(self)(self.quantizer)


class Compress(_Op):
    """Dense weights in, stand-ins out: the last step for a plain checkpoint. Names are full parameter names."""

    @torch.no_grad()
    def convert(self, input_dict: Tensors, *args: Any, **kwargs: Any) -> Tensors:
        return {name: self.quantizer.keep_compressed(name, one(value)) for name, value in input_dict.items()}


class Install(_Op):
    """A blob in, a stand-in out: the only step for a compressed weight that the model's converters leave alone."""

    @torch.no_grad()
    def convert(self, input_dict: Tensors, *args: Any, **kwargs: Any) -> Tensors:
        full_layer_name = kwargs["full_layer_name"]
        self.quantizer.param_needs_quantization(kwargs["model"], full_layer_name)
        (value,) = input_dict.values()
        return {full_layer_name: self.quantizer.keep_blob(full_layer_name, one(value))}


class Decode(_Op):
    """Blobs in, dense weights out, before the model's own operations (merge, split, permute)."""

    compressed = False

    @torch.no_grad()
    def convert(self, input_dict: Tensors, *args: Any, **kwargs: Any) -> Tensors:
        out: Tensors = {}
        for pattern, value in input_dict.items():
            values = value if isinstance(value, list) else [value]
            self.compressed |= any(tensor.dtype == torch.uint8 for tensor in values)
            out[pattern] = [ZipTensor(t).decompress() if t.dtype == torch.uint8 else t for t in values]
        return out


class Recompress(_Op):
    """The last step after the model's own operations: compresses again if what came in was compressed.

    Names here are still the converter's target patterns; the full names follow as the loader derives them.
    """

    def __init__(self, quantizer: Keeper, decode: Decode | None = None) -> None:
        super().__init__(quantizer)
        self.decode = decode

    def __deepcopy__(self, memo: dict[int, Any]) -> Recompress:
        # The copy belongs to the copy of `decode` in the same chain of operations.
        decode = None if self.decode is None else memo.setdefault(id(self.decode), self.decode.__deepcopy__(memo))
        return Recompress(self.quantizer, decode)

    @torch.no_grad()
    def convert(self, input_dict: Tensors, *args: Any, **kwargs: Any) -> Tensors:
        if self.decode is not None and not self.decode.compressed:
            return input_dict
        name = kwargs["full_layer_name"].replace("*.", "0.")
        for key in input_dict:
            before, found, after = name.partition(key)
            if found:
                return {
                    key: self.quantizer.keep_compressed(before + key + after, one(value))
                    for key, value in input_dict.items()
                }
        return {key: self.quantizer.keep_compressed(key, one(value)) for key, value in input_dict.items()}


def compressed_names(
    conversions: Sequence[WeightTransform], quantizer: Keeper
) -> list[tuple[WeightTransform, WeightTransform | None]]:
    """The model's conversions, each beside its original, so that they also take names that end in ``_zipserv``.

    A renaming whose pattern ends with the weight's name must match although the name goes on. A converter matches
    both spellings with one pattern, so that the order of what it collects (experts 0, 1, ...) stays, and gets a
    decode before and a compress after its own operations.
    """
    pairs: list[tuple[WeightTransform, WeightTransform | None]] = []
    for transform in conversions:
        sources, targets = transform._original_source_patterns, transform._original_target_patterns
        if type(transform) is WeightRenaming:
            renamed = WeightRenaming([_renamed(source) for source in sources], list(targets))
            pairs.append((_scoped(renamed, transform), transform))
        elif type(transform) is WeightConverter:
            bounded = "(?!" in transform.compiled_sources.pattern
            spellings = [([_either(source, bounded) for source in sources], list(targets))]
            if not any("weight" in source for source in sources):
                # The pattern may name a module (`attn.qkv`) and leave `.weight` or `.bias` to follow.
                inner = ([_inner(source) for source in sources], [target.rstrip(".") + ".weight" for target in targets])
                spellings.insert(0, inner)
            for names, results in spellings:
                decode = Decode(quantizer)
                operations = [decode, *transform.operations, Recompress(quantizer, decode)]
                converter = WeightConverter(names, results, operations, force_cpu=transform.force_cpu)
                pairs.append((_scoped(converter, transform), transform))
        else:
            pairs.append((transform, transform))
    pairs.append((WeightConverter(rf"{SUFFIX}$", "", [Install(quantizer)]), None))
    return pairs


def _renamed(source: str) -> str:
    """A renaming's pattern that also matches where the name goes on with the suffix, which it does not consume."""
    if source.endswith("$"):
        return source[:-1] + _NAME_END
    return source + _WORD_END if re.search(r"[a-zA-Z0-9]$", source) else source


def _either(source: str, bounded: bool) -> str:
    """A converter's pattern that consumes the suffix where there is one."""
    if source.endswith("$"):
        return f"{source[:-1]}(?:{SUFFIX})?$"
    ends_name = bounded and re.search(r"[a-zA-Z0-9]$", source)
    return f"{source}(?:{SUFFIX})?" + (r"(?!\w)" if ends_name else "")


def _inner(source: str) -> str:
    """The pattern of a compressed weight within the module that a converter's pattern names."""
    return source.removesuffix("$").removesuffix(r"\.").removesuffix(".") + rf"\.weight{SUFFIX}$"


def _scoped(copy: WeightTransform, original: WeightTransform) -> WeightTransform:
    copy.scope_prefix, copy.base_model_prefix = original.scope_prefix, original.base_model_prefix
    return copy
