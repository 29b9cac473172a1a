"""Build backbones with a user's Python function: ``provider: python``.

Input: a CacheSpec whose ``factory`` names an importable function. Output: a ``Backbone`` whose
network returns all that the spec asks for.

Importing runs code. Therefore only specs that the user gives as a YAML file get here;
``analysis.resolve_spec`` refuses those that a cache brings along.

Legend: B batch, C channels, H W pixels (in pixels_BCHW) or H heads, N patch tokens, D width,
R x S a feature map.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError, MovekdError, did_you_mean, shorten
from movekd.teachers.backbone import Backbone, TeacherOutput
from movekd.teachers.checkpoints import (
    Published,
    first_line,
    load_exactly,
    read_state_dict,
    weights_file,
)


def python_backbone(spec: CacheSpec) -> Backbone:
    """Call the factory and load what ``weights`` name into the network that it returns.

    Raises:
        ConfigError: the factory cannot be imported, fails, or returns something else.
        WeightsError: the weights are missing, unreadable, or do not fit.
    """
    if spec.weights == "hub":
        raise ConfigError(
            f"'{spec.name}' has weights: hub; the hub has no weights of your own network. Set "
            "`weights` to a .safetensors or .pth file or its directory, to `factory` if the "
            "function loads them itself, or to `random` for a trial."
        )
    module = _create(spec)
    if spec.weights not in ("random", "factory"):
        path = weights_file(spec, Published())
        load_exactly(module, read_state_dict(path), path)

    def run(pixels_BCHW: Tensor) -> TeacherOutput:
        try:
            output = module(pixels_BCHW)
        except (MovekdError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # user code may raise anything
            shape = tuple(pixels_BCHW.shape)
            raise ConfigError(
                f"the network of {spec.factory} fails on pixels {shape}: {_said(error)}. Correct "
                f"its forward, or image_size of '{spec.name}'."
            ) from error
        return _checked(spec, output, len(pixels_BCHW))

    return Backbone(module, run, is_complete=True)


def _create(spec: CacheSpec) -> nn.Module:
    """Call the factory with ``model_args`` and return its network in float32."""
    factory = _import_factory(spec)
    try:
        module = factory(**spec.model_args)
    except Exception as error:  # user code may raise anything
        raise ConfigError(
            f"{spec.factory} fails with model_args {shorten(spec.model_args)} of '{spec.name}': "
            f"{_said(error)}. Correct model_args or the function; --debug shows where."
        ) from error
    if not isinstance(module, nn.Module) or next(module.parameters(), None) is None:
        found = f"a {type(module).__name__}"
        found += " without parameters" if isinstance(module, nn.Module) else ""
        raise ConfigError(
            f"{spec.factory} returned {found}; expected a torch.nn.Module with weights, whose "
            "forward(pixels_BCHW) returns tokens (B, N, D)."
        )
    module = module.float()
    return module if next(module.parameters()).is_meta else module.cpu()


def _import_factory(spec: CacheSpec) -> Callable[..., Any]:
    """Return the function that ``factory`` names."""
    name, _, attribute = str(spec.factory).partition(":")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if missing != name and not name.startswith(f"{missing}."):  # an import inside of it
            raise _import_failed(spec, name, error) from error
        raise ConfigError(
            f"factory of '{spec.name}': Python finds no module {missing}."
            f"{did_you_mean(missing, _modules_beside(missing))} Install its package, or set "
            "PYTHONPATH to the folder that holds it."
        ) from None
    except Exception as error:  # user code may raise anything
        raise _import_failed(spec, name, error) from error
    factory = getattr(module, attribute, None)
    if factory is None:
        public = [known for known in vars(module) if not known.startswith("_")]
        raise ConfigError(
            f"factory of '{spec.name}': {name} has no {attribute}."
            f"{did_you_mean(attribute, public)} Expected a function that returns the network."
        )
    if not callable(factory):
        raise ConfigError(
            f"factory of '{spec.name}': {attribute} in {name} is a {type(factory).__name__}; "
            "expected a function that returns the network."
        )
    found: Callable[..., Any] = factory
    return found


def _import_failed(spec: CacheSpec, name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"factory of '{spec.name}': importing {name} fails: {_said(error)}. Correct the module, or "
        "install what it needs; --debug shows where."
    )


def _modules_beside(name: str) -> Iterable[str]:
    """Return the names of importable modules in the package of ``name``, which gets imported."""
    parent = name.rpartition(".")[0]
    places = getattr(importlib.import_module(parent), "__path__", []) if parent else None
    prefix = f"{parent}." if parent else ""
    return [info.name for info in pkgutil.iter_modules(places, prefix)]


def _checked(spec: CacheSpec, output: object, batch: int) -> TeacherOutput:
    """Return the parts of a network's output that the spec asks for, in float32."""
    if isinstance(output, Tensor):
        output = TeacherOutput(output)
    if not isinstance(output, TeacherOutput) or not isinstance(output.tokens_BND, Tensor):
        raise _wrong_output(spec, f"returned a {type(output).__name__}")
    tokens = output.tokens_BND
    if tokens.ndim == 4 and tokens.shape[2] == tokens.shape[3]:
        tokens = tokens.flatten(2).transpose(1, 2)
    if tokens.ndim != 3 or len(tokens) != batch:
        raise _wrong_output(spec, f"returned {tuple(tokens.shape)} for {batch} images")
    cls, attention = output.cls_BD, output.cls_attention_BHN
    for key, tensor, shape, is_wrong in (
        ("cls", cls, "cls_BD (B, D)", cls is None or cls.ndim != 2 or len(cls) != batch),
        (
            "cls_attention",
            attention,
            "cls_attention_BHN (B, H, N)",
            attention is None
            or attention.ndim != 3
            or (len(attention), attention.shape[2]) != tuple(tokens.shape[:2]),
        ),
    ):
        if getattr(spec, key) and is_wrong:
            found = "none" if tensor is None else str(tuple(tensor.shape))
            raise ConfigError(
                f"'{spec.name}' asks for {key}; forward of {spec.factory}'s network gave {found}. "
                f"Return movekd.teachers.TeacherOutput with {shape}, or set {key}: false."
            )
    kept = TeacherOutput(
        tokens, cls if spec.cls else None, attention if spec.cls_attention else None
    )
    return kept.map(lambda tensor: tensor.float().contiguous())


def _wrong_output(spec: CacheSpec, found: str) -> ConfigError:
    return ConfigError(
        f"forward of {spec.factory}'s network {found}; expected patch tokens (B, N, D) without "
        "prefix tokens, a square map (B, D, R, R), or a movekd.teachers.TeacherOutput."
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error).rstrip('.')}"
