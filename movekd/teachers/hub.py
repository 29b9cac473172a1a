"""Where the weights of a spec are published, and whether this machine has them already.

A spec comes in; a hub repository with the names of the files that would do goes out. The providers
load by it; `movekd doctor` asks without loading anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from movekd.cache.spec import CacheSpec
from movekd.teachers.eva02_det import RELEASED_FILE, RELEASED_REPO


@dataclass(frozen=True)
class Published:
    """Where weights can be had.

    Attributes:
        repo: the hub repository, None where nothing is published.
        files: names of files that would do, the preferred one first.
    """

    repo: str | None
    files: Sequence[str]

    @property
    def url(self) -> str | None:
        """The repository's page."""
        return None if self.repo is None else f"https://huggingface.co/{self.repo}"


def published(spec: CacheSpec) -> Published:
    """Return where the weights of a spec's model are published."""
    if spec.provider == "transformers":
        return Published(
            spec.model, ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
        )
    if spec.provider == "timm":
        from timm.models import get_pretrained_cfg

        config = get_pretrained_cfg(spec.model)
        name = (config.hf_hub_filename if config else None) or "model.safetensors"
        return Published(config.hf_hub_id if config else None, (name, "pytorch_model.bin"))
    if spec.provider == "open_clip":
        import open_clip

        name, _, tag = spec.model.partition(".")
        repo, _, file = (
            (open_clip.get_pretrained_cfg(name, tag) if tag else {}).get("hf_hub") or ""
        ).rpartition("/")
        either = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        return Published(repo or None, (file,) if file else either)
    if spec.provider == "movekd":
        return Published(RELEASED_REPO, (RELEASED_FILE,))
    return Published(None, ())


def find_downloaded(spec: CacheSpec) -> Path | None:
    """Return the file that the hub's cache on this machine holds of a spec's weights, or None."""
    from huggingface_hub import try_to_load_from_cache

    place = published(spec)
    if place.repo is None:
        return None
    for name in place.files:
        found = try_to_load_from_cache(place.repo, name, revision=spec.revision)
        if isinstance(found, str):
            return Path(found)
    return None
