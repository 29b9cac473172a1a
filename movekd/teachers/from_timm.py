"""Build backbones from timm, and from open_clip, whose newer image towers are timm models.

Input: a CacheSpec. Output: a ``Backbone`` for ``teachers.providers``. Both libraries are imported
only when a spec asks for them.

Legend: B batch, C channels, H x W pixels.
"""

from typing import Any

from torch import Tensor, nn

from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError, shorten
from movekd.teachers.attention_pool import find_pool
from movekd.teachers.backbone import Backbone, check_name
from movekd.teachers.checkpoints import (
    Published,
    keys_differ,
    load_exactly,
    quiet,
    read_state_dict,
    tensors_below,
    weights_file,
)

_NOT_OF_THE_ARCHITECTURE = {
    "cache_dir",
    "checkpoint_path",
    "device",
    "dtype",
    "exportable",
    "model_name",
    "no_jit",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "scriptable",
}
"""Arguments of ``timm.create_model`` that fetch or write files, or override ``weights``.

They are refused because a spec may come from another person's cache.
"""


def timm_weights(spec: CacheSpec) -> Published:
    """Return where timm finds the weights of a model."""
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(spec.model)
    name = (config.hf_hub_filename if config else None) or "model.safetensors"
    return Published(config.hf_hub_id if config else None, (name, "pytorch_model.bin"))


def timm_backbone(spec: CacheSpec) -> Backbone:
    """Build a timm model, ``architecture`` or ``architecture.tag``."""
    import timm

    known = [*timm.list_models(), *timm.list_pretrained()]
    check_name(spec, known)
    if spec.weights == "random":
        return _backbone(_create(spec, spec.model))
    path = weights_file(spec, timm_weights(spec))
    # Only timm's own loader converts the older layouts of its weights. It is strict if both sides
    # have the same number of classes.
    overlay: dict[str, Any] = {"state_dict": read_state_dict(path)}
    if "num_classes" in spec.model_args:
        overlay["num_classes"] = spec.model_args["num_classes"]
    try:
        module = _create(spec, spec.model, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError) as error:
        raise keys_differ(path, RuntimeError(str(error))) from None
    module.pretrained_cfg.pop("state_dict", None)  # frees the second copy of the tensors
    return _backbone(module)


def _create(spec: CacheSpec, name: str, **options: Any) -> Any:
    import timm

    if refused := sorted(_NOT_OF_THE_ARCHITECTURE & spec.model_args.keys()):
        raise ConfigError(
            f"model_args of '{spec.name}' hold {', '.join(refused)}, which is about files and "
            "downloads; expected only keys of the architecture. Say where weights come from under "
            "`weights`."
        )
    try:
        with quiet():
            return timm.create_model(name, **spec.model_args, **options)
    except (TypeError, AssertionError) as error:
        raise ConfigError(
            f"model_args of '{spec.name}' make no {name}: {shorten(error)}. Correct them."
        ) from None


def _backbone(module: Any) -> Backbone:
    is_channels_last = str(getattr(module, "output_fmt", "NCHW")) == "NHWC"  # Swin

    def run(pixels_BCHW: Tensor) -> Tensor:
        output: Tensor = module.forward_features(pixels_BCHW)
        return output.permute(0, 3, 1, 2) if is_channels_last and output.ndim == 4 else output

    reads_prefix = bool(getattr(module, "pool_include_prefix", False))
    is_transformer = hasattr(module, "num_prefix_tokens")  # EfficientNets have `blocks` as well
    return Backbone(
        module,
        run,
        blocks=tuple(module.blocks) if is_transformer and hasattr(module, "blocks") else (),
        num_prefix=int(getattr(module, "num_prefix_tokens", 0)),
        has_cls=getattr(module, "cls_token", None) is not None,
        pool=None if reads_prefix else find_pool(module),
    )


def open_clip_weights(spec: CacheSpec) -> Published:
    """Return where open_clip finds the weights of a model."""
    import open_clip

    name, _, tag = spec.model.partition(".")
    repo, _, file = (
        (open_clip.get_pretrained_cfg(name, tag) if tag else {}).get("hf_hub") or ""
    ).rpartition("/")
    either = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return Published(repo or None, (file,) if file else either)


def open_clip_backbone(spec: CacheSpec) -> Backbone:
    """Build the timm backbone of an open_clip model, ``architecture`` or ``architecture.tag``.

    The backbone is the image tower without its head (pooling and projection).
    """
    import open_clip

    pairs = [".".join(pair) for pair in open_clip.list_pretrained()]
    check_name(spec, [*open_clip.list_models(), *pairs])
    name, _, _ = spec.model.partition(".")
    tower = open_clip.get_model_config(name)["vision_cfg"]
    if "timm_model_name" not in tower:
        raise ConfigError(
            f"open_clip model '{name}' has no timm backbone; movekd reads only those. Use provider "
            "timm or transformers for this vision transformer."
        )
    module = _create(spec, tower["timm_model_name"])
    module.head = nn.Identity()
    if spec.weights == "random":
        return _backbone(module)
    path = weights_file(spec, open_clip_weights(spec))
    inside = tensors_below("visual.trunk.", read_state_dict(path))
    load_exactly(module, {n: t for n, t in inside.items() if not n.startswith("head.")}, path)
    return _backbone(module)
