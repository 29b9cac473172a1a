"""Put ``MoleLayer`` around the MLPs of a vision tower: the PEFT tuner ``MoleModel``.

PEFT builds it for a ``MoleConfig`` (``get_peft_model``, ``PeftModel.from_pretrained``,
``inject_adapter_in_model``, ``model.load_adapter``).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn

from movekd.errors import ConfigError
from movekd.student.mole.config import MoleConfig
from movekd.student.mole.layer import MoleLayer, merge_refusal
from movekd.student.towers import TOWERS

TensorT = TypeVar("TensorT", bound=Tensor)


class MoleModel(BaseTuner):
    """Mixture of LoRA Experts on a vision tower of transformers."""

    prefix = "mole_"
    tuner_layer_cls = MoleLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {
        name: [tower.mlp] for name, tower in TOWERS.items()
    }

    @staticmethod
    def _check_target_module_exists(peft_config: MoleConfig, key: str) -> Any:
        """Match as PEFT does, but only in numbered blocks where names are plain.

        SigLIP's pooling head has an ``mlp`` too, which no hidden state passes through.
        """
        is_number = [part.isdigit() for part in key.split(".")]
        if isinstance(peft_config.target_modules, str):
            return check_target_module_exists(peft_config, key)
        if not any(is_number):
            return False
        if is_number[1]:
            key = f"tower.{key}"  # PEFT finds the index of a block only behind two names
        return check_target_module_exists(peft_config, key)

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
        """Swap the two. PEFT's method expects a ``weight``, which MLPs do not have.

        PEFT's also moves devices; ``MoleLayer`` creates its parameters on the device of its base.
        """
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse an adapter for each sample; PEFT passes ``adapter_names`` only to this method.

        Raises:
            ConfigError: ``adapter_names`` was given.
        """
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                f"adapter_names={list(kwargs['adapter_names'])} was given to a forward pass; a "
                "MoLE routes a whole batch by one adapter and would have used "
                f"'{', '.join(self.active_adapters)}' for every sample. Call set_adapter, and run "
                "the samples of each adapter in separate batches."
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise merge_refusal()

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return an adapter's tensors, for PEFT and transformers to save.

        Raises:
            ConfigError: base weights are trainable, and would be lost without a word.
        """
        if learned := list(trainable_base(model)):
            raise ConfigError(
                f"a MoLE adapter was to be saved without its base, but {len(learned)} weights of "
                f"the base are trainable ({', '.join(learned[:2])}); expected a frozen base, "
                "because the adapter's files do not hold them. Save the tower whole, with "
                "movekd.student.save_tower(model, directory)."
            )
        tensors: dict[str, Any] = super()._get_adapter_state_dict(model, *args, **kwargs)
        return tensors


def base_tensors(tensors: Mapping[str, TensorT]) -> dict[str, TensorT]:
    """Return the tensors of a tower that belong to its base, under the base's names."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in tensors.items()
        if ".mole_" not in name and ".modules_to_save." not in name
    }


def trainable_base(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base weights that are trainable."""
    return base_tensors({n: p for n, p in model.named_parameters() if p.requires_grad})
