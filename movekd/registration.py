"""Makes transformers know movekd's vision tower once both are imported, and loads neither.

``import movekd`` is to cost nothing, and transformers is slow to import: so the tower is registered
when transformers' own table of configs is there, be that before or after movekd.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_TABLE = "transformers.models.auto.configuration_auto"
_CONFIGURATION = "movekd.student.hub.configuration_movekd"


def register_with_transformers() -> None:
    """Register the tower's config now, or as soon as transformers has its table."""
    if _TABLE in sys.modules:
        _register(sys.modules[_TABLE])
    elif not any(isinstance(finder, _AfterTable) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTable())


def _register(table: Any) -> None:
    config = importlib.import_module(_CONFIGURATION).MovekdClipVisionConfig
    table.AutoConfig.register(config.model_type, config, exist_ok=True)


class _AfterTable(MetaPathFinder):
    """Finds transformers' table as Python does, and registers the tower behind its import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Another loader, and the registration after it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(module)
