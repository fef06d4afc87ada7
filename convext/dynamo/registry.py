"""The name "convext" among the backends of torch.compile.

An installed package says it in its metadata, which torch reads when it first looks for a name that it does not know. A
source tree on the path has no metadata, so `import convext` says it as well. To import torch's registry for that would
take a second, all of Dynamo with it: where nobody has done so yet, it is told when somebody does.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

_REGISTRY = "torch._dynamo.backends.registry"
ENTRY = EntryPoint("convext", "convext.dynamo:backend", "torch_dynamo_backends")


def _tell(registry: Any) -> None:
    registry._BACKENDS.setdefault(ENTRY.name, ENTRY)


class _Told(Loader):
    """The registry's own loader, and the name told behind it."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # sources and file names, for those who ask

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _tell(module)


class _WhenImported(MetaPathFinder):
    """Finds the registry once, as others find it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Told(spec.loader)
        return spec


def register() -> None:
    """Makes the name known, now or when torch's registry is imported."""
    if _REGISTRY in sys.modules:
        _tell(sys.modules[_REGISTRY])
    elif not any(type(finder) is _WhenImported for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
