"""Build backbones from transformers: any vision model, also as a part of a larger checkpoint.

Input: a CacheSpec. Output: a ``Backbone`` for ``teachers.providers``. transformers is imported only
when a spec asks for it. Code from the hub never runs.

Legend: B batch, C channels, H x W pixels.
"""

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError, MovekdError, WeightsError, did_you_mean, shorten
from movekd.teachers import pix2struct
from movekd.teachers.attention_pool import find_pool
from movekd.teachers.backbone import Backbone
from movekd.teachers.checkpoints import (
    LIBRARY_ERRORS,
    NO_ANSWER,
    Published,
    first_line,
    given_path,
    hub_answers,
    quiet,
    read_state_dict,
    unreachable,
)

_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
"""Names of models on the hub; any other one transformers takes for a folder of this machine."""


def transformers_weights(spec: CacheSpec) -> Published:
    """Return where the hub has the weights of a model."""
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return Published(spec.model, files)


def transformers_backbone(spec: CacheSpec) -> Backbone:
    """Build a vision model of transformers.

    The architecture comes from the config.json beside the weights (of a larger model, from its
    vision part). Without a config.json (``random``, a single file) it comes from ``model_args``,
    which then need ``model_type``. If both give a value, the values must agree.
    """
    with quiet():
        module = _model(spec)
    config = module.config
    is_pix2struct = config.model_type == pix2struct.MODEL_TYPE
    if is_pix2struct:
        pix2struct.check_input(spec)
    extra: dict[str, bool] = {}
    is_resized = getattr(config, "image_size", spec.image_size) != spec.image_size
    if is_resized and "interpolate_pos_encoding" in inspect.signature(module.forward).parameters:
        extra["interpolate_pos_encoding"] = True

    def run(pixels_BCHW: Tensor) -> Tensor:
        if is_pix2struct:
            return pix2struct.run_pix2struct(module, pixels_BCHW)
        output: Tensor = module(pixel_values=pixels_BCHW, **extra).last_hidden_state
        return output

    depth = getattr(config, "num_hidden_layers", None)
    stacks = (m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    leaves = {name.rsplit(".", 1)[-1] for name, _ in module.named_parameters()}
    num_prefix = len(leaves & {"cls_token", "class_embedding", "distillation_token"})
    num_prefix += getattr(config, "num_register_tokens", 0) if num_prefix else 0
    return Backbone(
        module,
        run,
        blocks=tuple(next(stacks, ())) if depth else (),
        num_prefix=num_prefix,
        has_cls=num_prefix > 0,
        pool=find_pool(module),
        has_neck=any(name.rsplit(".", 1)[-1] == "neck" for name, _ in module.named_modules()),
    )


def _model(spec: CacheSpec) -> Any:
    """Return the model in float32 with the weights that the spec names."""
    from transformers import AutoConfig

    if spec.weights == "random":
        config = _config_from_args(spec)
        return _model_class(spec, config)._from_config(config, dtype=torch.float32)
    path = None if spec.weights == "hub" else given_path(spec)
    if path is not None and path.is_file():
        config = _config_from_args(spec)
        return _load_all(spec, path, config, config, None, state_dict=read_state_dict(path))
    source = str(path or spec.model)
    is_local = path is not None or not hub_answers()
    where: dict[str, Any] = {"local_files_only": is_local}
    where |= {"revision": spec.revision} if path is None else {}
    try:
        if path is None and not _REPOSITORY.fullmatch(spec.model):
            raise ValueError("it is no NAME or OWNER/NAME of the hub")
        whole = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
        config = getattr(whole, "vision_config", whole)
        _check_args_agree(spec, config, source)
        return _load_all(spec, source, config, whole, source, **where)
    except MovekdError:
        raise
    except LIBRARY_ERRORS as error:
        if path is None:
            names = ("config.json with model.safetensors", "pytorch_model.bin")
            raise unreachable(
                spec,
                spec.model,
                names,
                NO_ANSWER if is_local and isinstance(error, OSError) else error,
            ) from None
        raise WeightsError(
            f"weights of '{spec.name}': {path} is not a transformers checkpoint "
            f"({first_line(error)}). Expected config.json and model.safetensors in it, as "
            "save_pretrained writes them."
        ) from None


def _load_all(
    spec: CacheSpec, shown: object, config: Any, whole: Any, source: str | None, **options: Any
) -> Any:
    """Return the base model of ``config`` with every weight loaded and none left over.

    ``whole`` is the checkpoint's config. If it describes a larger model (CLIP with its text tower,
    a classifier), the checkpoint may hold more weights than the vision model has.
    """
    model_class = _model_class(spec, config)
    module, report = model_class.from_pretrained(
        source,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # the report lists them, and they are refused below
        output_loading_info=True,
        key_mapping=pix2struct.KEY_MAPPING if config.model_type == pix2struct.MODEL_TYPE else None,
        **options,
    )
    is_larger = model_class.__name__ not in (whole.architectures or [model_class.__name__])
    wrong = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": [] if is_larger else sorted(report["unexpected_keys"]),
        "of another shape": sorted(str(entry[0]) for entry in report["mismatched_keys"]),
    }
    said = "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
        for kind, names in wrong.items()
        if names
    )
    if said:
        raise WeightsError(
            f"{shown} does not fit {model_class.__name__}: {said}. Take weights that were saved "
            "from this architecture, or correct `model_args`."
        )
    return module


def _model_class(spec: CacheSpec, config: Any) -> Any:
    """Return the class of the base model of ``config``."""
    from transformers import MODEL_MAPPING, Pix2StructVisionModel

    if config.model_type == pix2struct.MODEL_TYPE:
        return Pix2StructVisionModel  # transformers lists it in no mapping
    if type(config) not in MODEL_MAPPING:
        raise ConfigError(
            f"'{spec.name}': transformers has no base model for {type(config).__name__}; expected "
            "a vision model such as clip_vision_model, dinov2 or convnextv2."
        )
    return MODEL_MAPPING[type(config)]


def _config_from_args(spec: CacheSpec) -> Any:
    """Return the config that ``model_args`` describe."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    args = dict(spec.model_args)
    model_type = args.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        found = "no model_type" if model_type is None else f"model_type '{model_type}'"
        raise ConfigError(
            f"model_args of '{spec.name}' have {found}; weights without a config.json need one "
            f"that transformers knows, such as clip_vision_model."
            f"{did_you_mean(str(model_type), CONFIG_MAPPING.keys())}"
        )
    known = AutoConfig.for_model(model_type).to_dict()
    for key in args:
        if key not in known:
            raise ConfigError(
                f"model_args of '{spec.name}': unknown key '{key}' for {model_type}."
                f"{did_you_mean(key, known)}"
            )
    try:
        return AutoConfig.for_model(model_type, **args)
    except (StrictDataclassError, TypeError, ValueError) as error:
        said = shorten(" ".join(str(error).split()))
        raise ConfigError(
            f"model_args of '{spec.name}' make no {model_type}: {said}. Correct them."
        ) from None


def _check_args_agree(spec: CacheSpec, config: Any, source: str) -> None:
    for key, asked in spec.model_args.items():
        found = getattr(config, key, None)
        found = list(found) if isinstance(found, tuple) else found
        if found != (list(asked) if isinstance(asked, tuple) else asked):
            raise WeightsError(
                f"{source}/config.json has {key}: {found}; model_args of '{spec.name}' ask for "
                f"{asked}. Use other weights, or drop the key from model_args."
            )
