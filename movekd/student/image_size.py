"""Let a vision tower look at another image size than its own: ``student.image_size``.

A tower with a learned table of positions gets a larger or smaller one, made by its class's
``interpolate_pos_encoding``. One with rotary positions needs nothing. Either way
its config then has the new size, so that every count of tokens, every checkpoint and every export
follows, and stock transformers computes the same tokens without interpolation.

Used by ``tower_loading``.
"""

import copy
from typing import Any

import torch

from movekd.errors import ConfigError
from movekd.student.config import StudentConfig
from movekd.student.towers import tower_type


def choose_image_size(config: StudentConfig, tower_config: Any) -> int:
    """Return the side in pixels of what the tower will look at, from its own config.

    Raises:
        ConfigError: the tower's input is no square, the size is no multiple of the patches, or
            nothing says how the tower's positions are resized.
    """
    own, patch = tower_config.image_size, tower_config.patch_size
    if not isinstance(own, int) or not isinstance(patch, int):
        raise ConfigError(
            f"student.vision_tower '{config.vision_tower}' has image_size {own} and patch_size "
            f"{patch}; expected one number each, because a student sees squares. Take another "
            "tower."
        )
    size = config.image_size
    if size is None or size == own:
        return own
    if size % patch:
        near = [side for side in (size // patch * patch, (size // patch + 1) * patch) if side]
        raise ConfigError(
            f"student.image_size is {size}, but the patches of '{config.vision_tower}' have "
            f"{patch} pixels; expected a multiple of {patch}. Set student.image_size: "
            f"{' or '.join(map(str, near))}."
        )
    kind = tower_type(tower_config)
    if kind.positions is None and kind.rotary is None:
        raise ConfigError(
            f"student.image_size is {size}, but the tower type '{tower_config.model_type}' names "
            f"neither a table of positions nor a rotary module, so only its own {own} pixels are "
            "known. Leave student.image_size out, or correct its entry (student/towers.py)."
        )
    return size


def resize_tower(tower: Any, image_size: int) -> None:
    """Make a loaded tower look at images of another size, in place.

    Args:
        tower: one of ``towers.TOWERS``, without experts.
        image_size: side of its new input, in pixels, as ``choose_image_size`` returned it.
    """
    config = tower.config
    if image_size == config.image_size:
        return
    kind = tower_type(config)
    if kind.positions is None:
        config.image_size = image_size
        return
    old = tower.embeddings
    state = old.state_dict()
    num_patches = (image_size // config.patch_size) ** 2
    exact = copy.deepcopy(old).float()  # half precision would shift the table
    width = config.hidden_size
    tokens_BND = torch.empty(1, kind.num_special + num_patches, width)  # only its shape is read
    with torch.no_grad():
        table_BND = exact.interpolate_pos_encoding(tokens_BND, image_size, image_size)
    config.image_size = image_size
    new = type(old)(config).to(state[kind.positions].dtype)
    state[kind.positions] = table_BND.reshape(new.state_dict()[kind.positions].shape)
    new.load_state_dict(state)
    tower.embeddings = new.train(old.training)
