"""Analyse a cache before and after its build: cost, codec error, correct features."""

from movekd.analysis.codec_trial import Fidelity
from movekd.analysis.fidelity import FidelityReport, measure_fidelity
from movekd.analysis.plan import CachePlan, TeacherPlan, plan_cache
from movekd.analysis.verify_features import verify_features

__all__ = [
    "CachePlan",
    "Fidelity",
    "FidelityReport",
    "TeacherPlan",
    "measure_fidelity",
    "plan_cache",
    "verify_features",
]
