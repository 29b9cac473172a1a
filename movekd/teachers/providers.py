"""``build_backbone``: a spec's architecture with its weights, from the library that defines it.

Comes in: a CacheSpec. Goes out: a ``Backbone``, which ``teachers.teacher`` wraps.
"""

from collections.abc import Callable

from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError
from movekd.seeding import seeded
from movekd.teachers.backbone import Backbone, check_name
from movekd.teachers.checkpoints import load_exactly, read_state_dict, weights_file
from movekd.teachers.eva02_det import Eva02Det, backbone_weights
from movekd.teachers.from_python import python_backbone
from movekd.teachers.from_timm import open_clip_backbone, timm_backbone
from movekd.teachers.from_transformers import transformers_backbone
from movekd.teachers.hub import published


def build_backbone(spec: CacheSpec) -> Backbone:
    """Return the network that ``spec`` describes, weights loaded, in float32 on the CPU.

    ``weights: random`` draws them from ``spec.seed`` and leaves PyTorch's generator as it was.

    Raises:
        ConfigError: the model or one of ``model_args`` is unknown.
        WeightsError: the weights are missing, unreadable, or do not fit.
    """
    with seeded(spec.seed):
        return _PROVIDERS[spec.provider](spec)


def movekd_backbone(spec: CacheSpec) -> Backbone:
    """Build the one network that lives here, EVA-02's detection backbone."""
    check_name(spec, ["eva02_det"])
    try:
        module = Eva02Det(**spec.model_args)
    except TypeError as error:
        raise ConfigError(
            f"model_args of '{spec.name}' make no eva02_det: {error}. Correct them."
        ) from None
    if spec.weights != "random":
        place = published(spec)
        path = weights_file(spec, place.repo, place.files)
        load_exactly(module, backbone_weights(read_state_dict(path)), path)
    return Backbone(module, module.forward, blocks=tuple(module.blocks))


_PROVIDERS: dict[str, Callable[[CacheSpec], Backbone]] = {
    "transformers": transformers_backbone,
    "timm": timm_backbone,
    "open_clip": open_clip_backbone,
    "movekd": movekd_backbone,
    "python": python_backbone,
}
