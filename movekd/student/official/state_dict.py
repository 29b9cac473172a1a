"""Rename the student's weights to the names of the released code, and back.

Input: a student of ``vlm.build_vlm`` or of an export, with all experts of a layer in one tensor.
Output: one tensor per expert, named as in the released ``move_llava_llama``, with the tower under
the names of transformers 4. ``export_checkpoint`` writes them.

Both directions use one table: official name -> a view into our parameter. Reading copies the views
and loading copies into them, so each is exactly the inverse of the other.

Dimensions: E experts, R rank, I features in, O features out.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from movekd.errors import ConfigError, WeightsError, did_you_mean
from movekd.student.parameters import mole_layers, plain_parameters
from movekd.student.tensor_files import Shapes, describe_difference

TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."
ADAPTERS = {"eva02": "eva", "convnext": "convnext", "sam": "sam", "pix2struct": "pix2struct"}
"""Name of a teacher in movekd -> prefix of its adapters in the released code."""

_EXPERTS = re.compile(r"^(.*\.mlp)\.mole_(fc1|fc2)\.(lora_A|lora_B)(_bias)?$")
_ROUTER = re.compile(r"^(.*\.mlp)\.mole_router\.(weight|bias)$")
_BASE = re.compile(r"^(.*\.mlp)\.(fc[12]\.(?:weight|bias))$")
_ADAPTER = re.compile(rf"({'|'.join(ADAPTERS.values())})_adapter_([12])\.(weight|bias)")
_BRANCH = {"fc1": "moe_down", "fc2": "moe_up"}
_LAYER = {"linear_1": "0", "linear_2": "2"}


def official_state_dict(vlm: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a student under their official names.

    Only renames. ``require_official`` checks whether the released code computes the same function.

    Args:
        vlm: a LLaVA with the student as its tower, from ``build_vlm`` or ``from_pretrained``; or
            only that tower, as ``get_peft_model`` returns it.

    Raises:
        ConfigError: another kind of model, or one with several adapters.
    """
    views = official_views(_parameters_of_student(vlm))
    return {
        name: view.detach().clone(memory_format=torch.contiguous_format)
        for name, view in views.items()
    }


def load_official_state_dict(vlm: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights under their official names into a student, or into only its tower.

    Raises:
        ConfigError: as ``official_state_dict``.
        WeightsError: a name is missing, unknown or of another shape; nothing is copied.
    """
    views = official_views(_parameters_of_student(vlm))
    require_exact(
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        {name: tuple(view.shape) for name, view in views.items()},
        "the state dict",
    )
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(state[name])


def _parameters_of_student(model: nn.Module) -> dict[str, Tensor]:
    """Return ``plain_parameters`` under the names of a LLaVA, also of a bare tower."""
    plain = {n.removeprefix("base_model.model."): t for n, t in plain_parameters(model).items()}
    if any(".modules_to_save." in name for name in plain):
        raise ConfigError(
            "the adapter has modules_to_save, copies of base weights that the official format has "
            "no name for; train the base's own weights instead (requires_grad_)."
        )
    if any(name.startswith("model.vision_tower.") for name in plain):
        return plain
    if "embeddings.class_embedding" in plain:
        return {f"model.vision_tower.{name}": tensor for name, tensor in plain.items()}
    raise ConfigError(
        f"{type(model).__name__} is neither a LLaVA nor a CLIP vision tower; expected one of them, "
        "whose parts have official names."
    )


def official_views(plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return official name -> a view into one of ``plain`` (all or some of a student's)."""
    with_experts = {match[1] for name in plain if (match := _ROUTER.match(name))}
    views: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        if match := _EXPERTS.match(name):
            mlp, linear, factor, bias = match.groups()
            for expert, part in enumerate(tensor):
                key = f"{_BRANCH[linear]}.{expert}.{factor}.{'bias' if bias else 'weight'}"
                is_transposed = factor == "lora_B" and not bias  # (R, O) here, (O, R) there
                views[_tower(f"{mlp}.{key}")] = part.T if is_transposed else part
        elif match := _ROUTER.match(name):
            views[_tower(f"{match[1]}.router.{match[2]}")] = tensor
        else:
            match = _BASE.match(name)
            views[official_name(name, match is not None and match[1] in with_experts)] = tensor
    return views


def official_name(name: str, has_experts: bool) -> str:
    """Return the official name of a parameter that is no expert's.

    Args:
        name: as in ``plain_parameters``.
        has_experts: whether it is of an MLP with experts around it.
    """
    if name.startswith("model.vision_tower."):
        name = name.replace(".mlp.fc", ".mlp.original_module.fc") if has_experts else name
        return _tower(name)
    if name.startswith("model.multi_modal_projector."):
        linear, kind = name.split(".")[-2:]
        return f"{PROJECTOR}{_LAYER[linear]}.{kind}"
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name  # lm_head


def official_adapters(adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return teacher adapters (``eva02.channels.weight``) under their official names.

    Raises:
        ConfigError: they are the revised recipe's heads, or of a teacher that has no name there.
    """
    known = ADAPTERS | {there: there for there in ADAPTERS.values()}
    official = {}
    for name, tensor in adapters.items():
        teacher, _, rest = name.partition(".")
        part, _, kind = rest.partition(".")
        if part not in ("channels", "tokens"):
            raise ConfigError(
                f"'{name}' belongs to a head of the revised recipe; the official format has only "
                "adapters of teachers. Export it as --format hf."
            )
        if teacher not in known:
            raise ConfigError(
                f"the adapter of teacher '{teacher}' has no official name; expected one of "
                f"{', '.join(ADAPTERS)}.{did_you_mean(teacher, ADAPTERS)}"
            )
        number = 1 if part == "channels" else 2
        official[f"{known[teacher]}_adapter_{number}.{kind}"] = tensor
    return official


def adapters_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return official adapters under movekd's names, the inverse of ``official_adapters``."""
    teachers = {there: here for here, there in ADAPTERS.items()}
    adapters = {}
    for name, tensor in state.items():
        match = _ADAPTER.fullmatch(name)
        assert match is not None  # adapter_shapes said so
        part = "channels" if match[2] == "1" else "tokens"
        adapters[f"{teachers[match[1]]}.{part}.{match[3]}"] = tensor
    return adapters


def adapter_shapes(found: Shapes, width: int, num_tokens: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the adapters among ``found`` must have, all four of each teacher.

    The teacher's own width and number of tokens are taken as they are.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for prefix in sorted({match[1] for name in found if (match := _ADAPTER.fullmatch(name))}):
        for part, out in ((1, width), (2, num_tokens)):
            weight = f"{prefix}_adapter_{part}.weight"
            shape = found.get(weight, ())
            expected[weight] = (out, shape[1] if len(shape) == 2 else 0)
            expected[f"{prefix}_adapter_{part}.bias"] = (out,)
    return expected


def require_exact(found: Shapes, expected: Shapes, source: str) -> None:
    """Check that names and shapes are exactly the expected ones.

    Raises:
        WeightsError: names what is missing, unexpected and of another shape.
    """
    if difference := describe_difference(found, expected):
        raise WeightsError(
            f"{source} does not hold the weights that were expected: {difference}. "
            "docs/compatibility.md lists every name; compare the config.json beside the weights."
        )


def require_official(vlm: Any) -> None:
    """Check that the released code computes the same function from the renamed weights.

    Raises:
        ConfigError: no experts, experts multiplied by their gate or missing from some blocks, or
            a language model that is no Llama.
    """
    layers, num_layers = mole_layers(vlm), vlm.config.vision_config.num_hidden_layers
    way_out = "Export it as --format hf, which holds any student."
    if not layers:
        raise ConfigError(
            f"the student has no experts, and the official format needs them. {way_out}"
        )
    if any(shape["use_gate"] for shape in layers.values()):
        raise ConfigError(
            "the student's experts are multiplied by their gate (mole.use_gate), as in the revised "
            "recipe; the released code has no gate and would compute something else from the same "
            f"weights. {way_out}"
        )
    if len(layers) < num_layers:
        raise ConfigError(
            f"the student has experts in {len(layers)} of {num_layers} blocks "
            f"(mole.layers_to_transform); the released code expects them in every one. {way_out}"
        )
    for what, config, known in (
        ("vision tower", vlm.config.vision_config, ("clip_vision_model", "movekd_clip_vision")),
        ("language model", vlm.config.text_config, ("llama",)),
    ):
        if config.model_type not in known:
            raise ConfigError(
                f"the {what} is of type '{config.model_type}'; the released code knows "
                f"only '{known[0]}'. {way_out}"
            )


def _tower(name: str) -> str:
    return TOWER + name.removeprefix("model.vision_tower.")
