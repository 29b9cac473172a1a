"""MoleModel: the PEFT tuner that puts ``MoleLayer`` around the MLPs of a vision tower.

PEFT builds it for a ``MoleConfig`` (``get_peft_model``, ``PeftModel.from_pretrained``,
``inject_adapter_in_model``, ``model.load_adapter``); nobody else needs to.
"""

from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn

from movekd.student.mole.config import MoleConfig
from movekd.student.mole.layer import MoleLayer, merge_refusal


class MoleModel(BaseTuner):
    """Mixture of LoRA Experts on a vision tower of transformers."""

    prefix = "mole_"
    tuner_layer_cls = MoleLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {
        name: ["mlp"] for name in ("clip_vision_model", "siglip_vision_model", "dinov2")
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
