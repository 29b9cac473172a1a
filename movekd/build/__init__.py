"""Pipeline 1: frozen teachers run once over a corpus; their features go to a cache.

``build_cache`` builds, ``plan_cache`` says what it will cost, ``measure_fidelity`` what each codec
loses.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from movekd.build.codec_fidelity import Fidelity
    from movekd.build.fidelity import FidelityReport, measure_fidelity
    from movekd.build.options import BuildOptions
    from movekd.build.partition import Partition, parse_partition
    from movekd.build.plan import CachePlan, TeacherPlan, plan_cache
    from movekd.build.run import BuildSummary, build_cache

__all__ = [
    "BuildOptions",
    "BuildSummary",
    "CachePlan",
    "Fidelity",
    "FidelityReport",
    "Partition",
    "TeacherPlan",
    "build_cache",
    "measure_fidelity",
    "parse_partition",
    "plan_cache",
]

_MODULES = {
    "BuildOptions": "movekd.build.options",
    "BuildSummary": "movekd.build.run",
    "CachePlan": "movekd.build.plan",
    "Fidelity": "movekd.build.codec_fidelity",
    "FidelityReport": "movekd.build.fidelity",
    "Partition": "movekd.build.partition",
    "TeacherPlan": "movekd.build.plan",
    "build_cache": "movekd.build.run",
    "measure_fidelity": "movekd.build.fidelity",
    "parse_partition": "movekd.build.partition",
    "plan_cache": "movekd.build.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
