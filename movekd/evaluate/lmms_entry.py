"""Tells lmms-eval that there is a model `movekd`; loads nothing until it is asked for.

lmms-eval calls ``manifest`` through the entry point group ``lmms_eval.models`` (pyproject.toml) as
it sets up its own table of models, so nothing of either side may be imported at the top here.
"""

from typing import Any


def manifest() -> Any:
    """Return lmms-eval's ModelManifest of ``--model movekd``.

    Source: EvolvingLMMs-Lab/lmms-eval lmms_eval/models/registry_v2.py.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("movekd", simple_class_path="movekd.evaluate.lmms.MovekdModel")
