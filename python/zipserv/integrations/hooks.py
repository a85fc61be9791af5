# SPDX-License-Identifier: Apache-2.0
"""Registration with transformers that costs nothing where transformers is not used.

``import zipserv`` must not import transformers (seconds, and it may not be installed). So the registration runs when
``transformers.quantizers.auto``, the module that holds the registry, has been imported: at once if it is there
already, else from an import hook that waits for this one module and then takes itself away.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Register the quantizer with transformers now, or as soon as transformers loads its registry."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    try:
        # It registers itself at its end. Where it is being imported just now (and with it transformers), it still will.
        importlib.import_module(".transformers", __package__)
    except Exception as error:  # a transformers release that changed its hooks must not break `import transformers`
        warnings.warn(f"zipserv could not register itself with transformers: {error!r}", RuntimeWarning, stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the registry's module through the other finders and wraps its loader, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs the module as its own loader would, then registers."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        self._inner.exec_module(module)
        _register()
