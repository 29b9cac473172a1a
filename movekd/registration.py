"""Makes transformers know movekd's vision tower once both are imported, and loads neither.

``import movekd`` is to cost nothing, and transformers is slow to import: so nothing happens before
transformers' own table of configs is there, be that before or after movekd. Even then the tower is
not imported (CLIP may be half imported at that moment) but looked up when a config of its type is.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODEL_TYPE = "movekd_clip_vision"
_TABLE = "transformers.models.auto.configuration_auto"
_OURS = "movekd.student.export.configuration_movekd"


def register_with_transformers() -> None:
    """Put the tower's type into transformers' table now, or as soon as there is one."""
    if _TABLE in sys.modules:
        _register(sys.modules[_TABLE])
    elif not any(isinstance(finder, _AfterTable) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTable())


def _register(table: Any) -> None:
    mapping = table.CONFIG_MAPPING
    if MODEL_TYPE not in mapping:
        mapping._extra_content = _Lazy(mapping._extra_content)


class _Lazy(dict[str, Any]):
    """Configs that were registered from outside, ours among them but not imported yet."""

    def __init__(self, registered: dict[str, Any]) -> None:
        super().__init__(registered)
        self[MODEL_TYPE] = None

    def __getitem__(self, key: str) -> Any:
        if super().__getitem__(key) is None:
            importlib.import_module(_OURS)  # which registers itself in place of the None
        return super().__getitem__(key)

    def values(self) -> Any:
        """Return the configs, all imported."""
        return [self[key] for key in self]

    def items(self) -> Any:
        """Return types and configs, all imported."""
        return [(key, self[key]) for key in self]


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
