"""Registry of providers, and ``build_backbone``: build a spec's network and load its weights.

A provider is a library, or another source of networks. A new one is one file with a function like
``timm_backbone`` and one ``register_provider`` line below.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError, MovekdError, did_you_mean, shorten
from movekd.seeding import seeded
from movekd.teachers.backbone import Backbone
from movekd.teachers.checkpoints import LIBRARY_ERRORS, Published, first_line
from movekd.teachers.eva02_det import RELEASED, eva02_det_backbone
from movekd.teachers.from_python import python_backbone
from movekd.teachers.from_timm import (
    open_clip_backbone,
    open_clip_weights,
    timm_backbone,
    timm_weights,
)
from movekd.teachers.from_transformers import transformers_backbone, transformers_weights


class Provider(NamedTuple):
    """A source of networks: what ``register_provider`` was given."""

    build: Callable[[CacheSpec], Backbone]
    published: Callable[[CacheSpec], Published]


_PROVIDERS: dict[str, Provider] = {}


def register_provider(
    name: str,
    build: Callable[[CacheSpec], Backbone],
    published: Callable[[CacheSpec], Published] = lambda spec: Published(),
) -> None:
    """Make ``provider: name`` known to specs.

    Args:
        name: as specs write it.
        build: spec -> its network with its weights, in float32 on the CPU.
        published: spec -> where its weights are published. Default: nowhere.
    """
    _PROVIDERS[name] = Provider(build, published)


def find_provider(spec: CacheSpec) -> Provider:
    """Return the provider that a spec names.

    Raises:
        ConfigError: nobody registered it; names the nearest.
    """
    if spec.provider not in _PROVIDERS:
        raise ConfigError(
            f"'{spec.name}' has provider '{spec.provider}'; known providers: "
            f"{', '.join(_PROVIDERS)}.{did_you_mean(spec.provider, _PROVIDERS)} Correct "
            "`provider`, or register it with movekd.teachers.register_provider."
        )
    return _PROVIDERS[spec.provider]


def build_backbone(spec: CacheSpec) -> Backbone:
    """Return the network that ``spec`` describes, weights loaded, in float32 on the CPU.

    ``weights: random`` draws them from ``spec.seed`` and leaves PyTorch's generator unchanged.

    Raises:
        ConfigError: the provider, the model or one of ``model_args`` is unknown.
        WeightsError: the weights are missing, unreadable, or do not fit.
    """
    provider = find_provider(spec)
    try:
        with seeded(spec.seed):
            return provider.build(spec)
    except (MovekdError, torch.OutOfMemoryError):
        raise
    except LIBRARY_ERRORS as error:
        said = shorten(first_line(error))
        raise ConfigError(
            f"{spec.provider} makes no {shorten(spec.model)} for '{spec.name}' "
            f"({type(error).__name__}: {said}). Correct model_args of the spec, or its weights."
        ) from error


def published(spec: CacheSpec) -> Published:
    """Return where the weights of a spec's model are published."""
    return find_provider(spec).published(spec)


def find_downloaded(spec: CacheSpec) -> Path | None:
    """Return the weights file of a spec in the hub's cache on this machine, or None."""
    from huggingface_hub import try_to_load_from_cache

    place = published(spec)
    if place.repo is None:
        return None
    for name in place.files:
        found = try_to_load_from_cache(place.repo, name, revision=spec.revision)
        if isinstance(found, str):
            return Path(found)
    return None


register_provider("transformers", transformers_backbone, transformers_weights)
register_provider("timm", timm_backbone, timm_weights)
register_provider("open_clip", open_clip_backbone, open_clip_weights)
register_provider("movekd", eva02_det_backbone, lambda spec: RELEASED)
register_provider("python", python_backbone)
