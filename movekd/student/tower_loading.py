"""Load a vision tower of transformers for a student, at the size of its images.

Input: a StudentConfig. ``read_tower_config`` reads only a config.json and refuses what cannot be a
student, before any weights are loaded. ``load_tower`` loads the tower itself, without experts. A
checkpoint may hold a text tower beside it, as CLIP's and SigLIP's do. Used by ``vlm``.
"""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedConfig, SiglipVisionConfig

from movekd.corpus.anyres import TILE
from movekd.errors import ConfigError
from movekd.student.config import StudentConfig
from movekd.student.hf_loading import load_kwargs, loading, require_whole
from movekd.student.image_size import choose_image_size, resize_tower
from movekd.student.towers import check_tower, tower_type


def read_tower_config(config: StudentConfig) -> Any:
    """Return the config of a student's tower, with the image size that it will have.

    Raises:
        WeightsError: the tower's config cannot be found.
        ConfigError: the tower is of an unknown type, experts do not fit into it, or it cannot look
            at ``student.image_size``.
    """
    tower_config = _own_config(config)
    tower_config.image_size = choose_image_size(config, tower_config)
    return tower_config


def load_tower(config: StudentConfig) -> Any:
    """Return the vision tower of a checkpoint, without experts.

    Raises:
        WeightsError: the tower cannot be found, or lacks weights.
        ConfigError: as ``read_tower_config``, or the layer that is read does not exist.
    """
    tower_config = _own_config(config)
    image_size = choose_image_size(config, tower_config)
    with loading(config.vision_tower, "student.vision_tower"):
        tower, info = AutoModel.from_pretrained(
            config.vision_tower, config=tower_config, **load_kwargs(config)
        )
    for part in ("embeddings.", f"{tower_type(tower.config).blocks}."):  # not of pooling heads
        require_whole(info, config.vision_tower, "student.vision_tower", part)
    check_tower(tower)
    layer, num_states = config.vision_feature_layer, tower.config.num_hidden_layers + 1
    if -layer >= num_states:  # the first is the input of the first block: nothing learns there
        raise ConfigError(
            f"student.vision_feature_layer is {layer}, but {config.vision_tower} has {num_states} "
            f"hidden states; expected -1 to -{num_states - 1}."
        )
    resize_tower(tower, image_size)
    return tower


def require_tile_size(config: StudentConfig, image_size: int) -> None:
    """Refuse a tower that does not look at the tiles of LLaVA-NeXT, if the student is one.

    Args:
        config: the student.
        image_size: side in pixels of what its tower looks at.

    Raises:
        ConfigError: names both sizes.
    """
    if config.architecture == "llava_next" and image_size != TILE:
        raise ConfigError(
            f"student.vision_tower '{config.vision_tower}' looks at {image_size} pixels; "
            f"student.architecture: llava_next cuts tiles of {TILE}. Set student.image_size: "
            f"{TILE}, take a tower of {TILE} pixels, or architecture: llava."
        )


def require_same_image_size(earlier: Mapping[str, Any], config: StudentConfig, source: str) -> None:
    """Refuse a tower that was trained at another image size than this run's.

    Args:
        earlier: the ``student`` section of the run that trained the tower.
        config: this run's student.
        source: the earlier run, shown in the error.

    Raises:
        ConfigError: names both sizes.
    """
    if earlier.get("image_size") == config.image_size:
        return
    own = _own_config(config)
    if tower_type(own).positions is None:  # nothing in its weights depends on the size
        return
    then, now = (size or own.image_size for size in (earlier.get("image_size"), config.image_size))
    if then != now:
        raise ConfigError(
            f"init_from {source} trained its vision tower at {then} pixels, and this run has "
            f"student.image_size {now}: the trained table of positions does not fit. Set "
            f"student.image_size: {then}, or start from a run that did not train the vision_tower."
        )


def own_image_size(config: StudentConfig) -> int:
    """Return the side in pixels of the images that the tower was made for.

    Raises:
        WeightsError: the tower's config cannot be found.
    """
    return int(_own_config(config).image_size)


def _own_config(config: StudentConfig) -> Any:
    """Return the tower's config as its checkpoint has it, if a student can have such a tower."""
    with loading(config.vision_tower, "student.vision_tower"):
        whole = AutoConfig.from_pretrained(config.vision_tower, trust_remote_code=False)
        tower_config = getattr(whole, "vision_config", whole)
        if whole.model_type == "siglip2":  # transformers takes any tower in it for NaFlex
            keys, _ = PreTrainedConfig.get_config_dict(config.vision_tower)
            if (keys.get("vision_config") or {}).get("model_type") == "siglip_vision_model":
                tower_config = SiglipVisionConfig(**keys["vision_config"])
    kind = tower_type(tower_config)
    if config.mole is not None and kind.gated_by and getattr(tower_config, kind.gated_by, False):
        raise ConfigError(
            f"student.vision_tower '{config.vision_tower}' has gated MLPs ({kind.gated_by}: true), "
            "and student.mole puts experts only around MLPs of two linear layers. Set "
            "student.mole: null to train the tower itself, or take a smaller model of its family."
        )
    return tower_config
