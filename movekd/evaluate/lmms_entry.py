"""Register the model `movekd` in lmms-eval.

lmms-eval calls ``manifest`` through the entry point group ``lmms_eval.models`` (pyproject.toml)
while it builds its table of models. So this module must not import lmms-eval or movekd at the top.
"""

from typing import Any


def manifest() -> Any:
    """Return lmms-eval's ModelManifest of ``--model movekd``.

    Source: EvolvingLMMs-Lab/lmms-eval lmms_eval/models/registry_v2.py.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("movekd", simple_class_path="movekd.evaluate.lmms.MovekdModel")
