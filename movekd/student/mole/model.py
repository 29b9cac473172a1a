"""MoleModel: the PEFT tuner that puts ``MoleLayer`` around the MLPs of a vision tower.

PEFT builds it for a ``MoleConfig`` (``get_peft_model``, ``PeftModel.from_pretrained``,
``inject_adapter_in_model``, ``model.load_adapter``); nobody else needs to.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn

from movekd.errors import ConfigError
from movekd.student.mole.config import MoleConfig
from movekd.student.mole.layer import MoleLayer, merge_refusal

_base_is_saved: ContextVar[bool] = ContextVar("base_is_saved", default=False)


class MoleModel(BaseTuner):
    """Mixture of LoRA Experts on a vision tower of transformers."""

    prefix = "mole_"
    tuner_layer_cls = MoleLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {
        name: ["mlp"]
        for name in ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers")
    }

    @staticmethod
    def _check_target_module_exists(peft_config: MoleConfig, key: str) -> Any:
        """Match as PEFT does, but take plain names to mean the MLPs of numbered blocks.

        SigLIP's pooling head has an ``mlp`` too, which no hidden state passes through.
        """
        in_block = any(part.isdigit() for part in key.split("."))
        if isinstance(peft_config.target_modules, str) or in_block:
            return check_target_module_exists(peft_config, key)
        return False

    def _create_and_replace(
        self,
        peft_config: MoleConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, MoleLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = MoleLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter on a layer that had none
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Swap the two; PEFT's own also moves devices and expects a ``weight``, as MLPs have none.

        The layer creates its parameters where its base has them.
        """
        setattr(parent, child_name, new_module)

    def _post_injection_hook(self, model: nn.Module, config: MoleConfig, adapter_name: str) -> None:
        if _WATCH not in model.__dict__:
            setattr(model, _WATCH, _BaseWatch(model))
            model.register_forward_pre_hook(_notice_training)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse an adapter for each sample, which PEFT asks for here and nowhere else.

        Raises:
            ConfigError: ``adapter_names`` was given.
        """
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                f"adapter_names={list(kwargs['adapter_names'])} was given to a forward pass; a "
                "MoLE routes a whole batch by one adapter and would have used "
                f"'{', '.join(self.active_adapters)}' for every sample. Call set_adapter, and run "
                "the samples of each adapter as a batch of their own."
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise merge_refusal()

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return an adapter's own tensors, which PEFT and transformers are about to save.

        Raises:
            ConfigError: base weights have learned as well, and would be lost without a word.
        """
        learned = _learned_base_weights(model)
        if learned and not _base_is_saved.get():
            raise ConfigError(
                f"a MoLE adapter alone was to be saved, but {len(learned)} weights of its base "
                f"have been trained as well ({', '.join(learned[:2])}); expected a frozen base, "
                "because the adapter's files do not hold them. Save the tower whole, with "
                "movekd.student.save_tower(model, directory)."
            )
        tensors: dict[str, Any] = super()._get_adapter_state_dict(model, *args, **kwargs)
        return tensors


@contextmanager
def base_is_saved() -> Iterator[None]:
    """Let adapters be saved whose base has learned: the caller saves that, too."""
    token = _base_is_saved.set(True)
    try:
        yield
    finally:
        _base_is_saved.reset(token)


def base_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of a tower's tensors that its base has, under the base's own names."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in tensors.items()
        if ".mole_" not in name and ".modules_to_save." not in name
    }


_WATCH = "_mole_base_watch"


class _BaseWatch:
    """Where a tower's base has its parameters, and which were seen to learn.

    RowIds and not the parameters themselves: FSDP puts others there.
    """

    def __init__(self, tower: nn.Module) -> None:
        self.learned: list[str] = []
        self.places: list[tuple[nn.Module, str, str]] = []
        for name, parameter in tower.named_parameters():
            module, _, key = name.rpartition(".")
            for plain in base_tensors({name: parameter}):  # none of an adapter's own
                self.places.append((tower.get_submodule(module), key, plain))


def _notice_training(tower: nn.Module, args: Any) -> None:
    """Remember which base weights a training pass could have changed; a hook on the tower.

    Plain loops over lists, so that torch.compile can look through it.
    """
    watch = getattr(tower, _WATCH)
    if watch.learned or not tower.training or not torch.is_grad_enabled():
        return
    for module, key, name in watch.places:
        parameter = module._parameters[key]
        if parameter is not None and parameter.requires_grad:
            watch.learned.append(name)


def _learned_base_weights(model: nn.Module) -> list[str]:
    """Return the names of base weights that learn, or did in a training pass before."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    watches = [module.__dict__.get(_WATCH) for module in model.modules()]
    frozen_since = [name for watch in watches if watch is not None for name in watch.learned]
    return list(base_tensors(learning)) or frozen_since
