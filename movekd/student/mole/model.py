"""MoleModel: the PEFT tuner that puts ``MoleLayer`` around the MLPs of a vision tower.

PEFT builds it for a ``MoleConfig`` (``get_peft_model``, ``PeftModel.from_pretrained``,
``inject_adapter_in_model``, ``model.load_adapter``); nobody else needs to.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

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


def _learned_base_weights(model: nn.Module) -> list[str]:
    """Return the names of base weights that learn, or did: an MLP's, where it was frozen since."""
    parameters = dict(model.named_parameters())
    learning = {name: p for name, p in parameters.items() if p.requires_grad}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoleLayer)}
    frozen_since = [f"{name}.fc1.weight" for name, m in layers.items() if m.has_trained_base]
    return list(base_tensors(learning)) or frozen_since
