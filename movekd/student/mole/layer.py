"""Compute one MLP of a vision tower with its LoRA experts and their router.

Input and output are those of the MLP. The router sends every token to one expert, which adds a
low-rank term to both linear layers, here ``fc1`` and ``fc2``:

    p = softmax(W_r x + b_r),   e = argmax p,   g = p_e (use_gate) or 1
    h = act(W_1 x + b_1 + s g (B1_e (A1_e x + a1_e) + c1_e))
    y =     W_2 h + b_2 + s g (B2_e (A2_e h + a2_e) + c2_e)

All experts are computed at once, as one wide low-rank product whose columns are masked with the
one-hot choice. This is exact, needs no gather and no wait for the device. Every expert gets a
gradient in every step (zeros where no token chose it), as distributed training needs.

``model.MoleModel`` puts these layers into a tower; the trainer reads ``routing(model)``.

With ``MoleConfig.teachers``, the first experts belong to teachers. Inside ``restricted(model, t)``
the logits of the other teachers' experts are -inf, so p, e and every gradient are those of a router
over t's expert and the shared ones.

Dimensions: B batch, N tokens with [CLS], X all tokens of a batch, E experts, R rank, K = E R,
J = K + E, D the tower's width, H the MLP's, I features in, O features out.

Source: equations of MoVE-KD (arXiv 2501.01709); the parameters correspond to the released code's
``moe_down`` (here ``mole_fc1``), ``moe_up`` (``mole_fc2``) and ``router``. There an expert's
``lora_B.weight`` is (O, R); here it is stored transposed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from movekd.errors import ConfigError, TrainingError
from movekd.student.export.modeling_movekd import MovekdExperts, mlp_parts
from movekd.student.mole.config import LoraInit, MoleConfig


class Routing(NamedTuple):
    """The choices of one layer's router in its last forward pass, [CLS] included.

    Attributes:
        probabilities_BNE: float32, rows sum to 1, with gradient.
        choice_BNE: float32, one-hot, without gradient.
    """

    probabilities_BNE: Tensor
    choice_BNE: Tensor


class StackedLora(MovekdExperts):
    """The low-rank terms of all experts on one linear layer, stacked, with initial values."""

    def __init__(self, base: nn.Linear, num_experts: int, r: int, init: LoraInit) -> None:
        with base.weight.device:
            super().__init__(num_experts, r, base.in_features, base.out_features)
        self.to(base.weight.dtype)
        for expert in range(num_experts):
            nn.init.kaiming_uniform_(self.lora_A.data[expert], nonlinearity="relu")
            if init == "kaiming":
                nn.init.kaiming_uniform_(self.lora_B.data[expert].T, nonlinearity="relu")


class MoleLayer(nn.Module, BaseTunerLayer):
    """An MLP (``fc1``, activation, ``fc2``) with experts and one router for both linear layers.

    Attributes:
        parts: Names of ``fc1``, the activation and ``fc2`` in the MLP.
        base_layer: The MLP itself, frozen by PEFT.
        routing: ``Routing`` of the last forward pass that trained, or None.
        records_evaluation: Keep the routing of passes that do not train, too.
        teacher: The teacher whose expert may be chosen beside the shared ones; None: all may. Set
            by ``restriction.restricted``.

    Raises:
        ConfigError: the module is another kind of MLP.
    """

    adapter_layer_names = ("mole_fc1", "mole_fc2", "mole_router")
    other_param_names = ("mole_config",)

    base_layer: Any  # an MLP of transformers; the next two are BaseTunerLayer's properties
    active_adapters: list[str]
    disable_adapters: bool

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoleConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parts = _parts(base_layer)
        self.mole_fc1 = nn.ModuleDict()
        self.mole_fc2 = nn.ModuleDict()
        self.mole_router = nn.ModuleDict()
        self.mole_config: dict[str, MoleConfig] = {}
        self.routing: Routing | None = None
        self.records_evaluation = False
        self.teacher: str | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MoleConfig) -> None:
        """Add the experts and the router of one more adapter."""
        fc1, _, fc2 = self._base_parts()
        shape = (config.num_all_experts, config.r, config.init_lora_weights)
        self.mole_fc1[adapter_name] = StackedLora(fc1, *shape)
        self.mole_fc2[adapter_name] = StackedLora(fc2, *shape)
        self.mole_router[adapter_name] = nn.Linear(
            fc1.in_features,
            config.num_all_experts,
            device=fc1.weight.device,
            dtype=fc1.weight.dtype,
        )
        self.mole_config[adapter_name] = config
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one.

        Raises:
            ConfigError: several were given; each has its own router.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ConfigError(
                f"MoLE adapters {', '.join(adapter_names)} were made active together; expected "
                "one, because each routes the tokens in its own way. Call set_adapter with one "
                "name."
            )
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the MLP's output with the active adapter's experts, (..., N, D) -> (..., N, D)."""
        active = [name for name in self.active_adapters if name in self.mole_config]
        if self.disable_adapters or not active:
            self.routing = None
            output: Tensor = self.base_layer(hidden_states)
            return output
        name = active[0]
        config, router = self.mole_config[name], self.mole_router[name]
        fc1, activation, fc2 = self._base_parts()
        assert isinstance(router, nn.Linear)

        leading = hidden_states.shape[:-1]
        tokens_XD = hidden_states.flatten(0, -2)
        base_XH = fc1(tokens_XD)
        inputs_XD = tokens_XD.to(base_XH.dtype)
        dtype = inputs_XD.dtype
        logits_XE = F.linear(inputs_XD, router.weight.to(dtype), router.bias.to(dtype))
        experts = torch.arange(config.num_all_experts, device=logits_XE.device)
        if self.teacher is not None:
            teachers = config.teachers or []
            is_other = (experts < len(teachers)) & (experts != teachers.index(self.teacher))
            logits_XE = logits_XE.masked_fill(is_other, float("-inf"))
        probabilities_XE = logits_XE.softmax(dim=-1, dtype=torch.float32)
        is_chosen = probabilities_XE.argmax(dim=-1, keepdim=True) == experts
        choice_XE = is_chosen.to(probabilities_XE.dtype)
        mask_XE = (choice_XE * probabilities_XE if config.use_gate else choice_XE).to(dtype)
        self._record(probabilities_XE.view(*leading, -1), choice_XE.view(*leading, -1))

        lora_fc1, lora_fc2 = self.mole_fc1[name], self.mole_fc2[name]
        hidden_XH = lora_fc1(self._dropout(inputs_XD, config), base_XH, mask_XE, config.scale)
        hidden_XH = activation(hidden_XH)
        base_XD = fc2(hidden_XH)
        output = lora_fc2(self._dropout(hidden_XH, config), base_XD, mask_XE, config.scale)
        return output.view(hidden_states.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge.

        Raises:
            ConfigError: always.
        """
        raise merge_refusal()

    def unmerge(self) -> None:
        """Refuse to unmerge: experts are never merged.

        Raises:
            ConfigError: always.
        """
        raise merge_refusal()

    def _base_parts(self) -> tuple[Any, Any, Any]:
        first, activation, second = self.parts
        base = self.base_layer
        return getattr(base, first), getattr(base, activation), getattr(base, second)

    def _dropout(self, inputs_XI: Tensor, config: MoleConfig) -> Tensor:
        return F.dropout(inputs_XI, config.lora_dropout, training=self.training)

    def _record(self, probabilities: Tensor, choice: Tensor) -> None:
        """Keep the routing of a pass that trains, or of any pass inside ``recorded_routing``.

        Gradient checkpointing runs the pass again inside backward. That record is unused and would
        hold the recomputed activations until the next step, so the first record stays.
        """
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        is_kept = self.training or torch.is_grad_enabled() or self.records_evaluation
        self.routing = Routing(probabilities, choice) if is_kept else None

    def __getstate__(self) -> dict[str, Any]:
        # copy.deepcopy refuses tensors that carry a gradient graph
        return {**self.__dict__, "routing": None}

    def __repr__(self) -> str:
        return "mole." + super().__repr__()


def routing(model: nn.Module) -> list[Routing]:
    """Return the choices of each MoLE layer's router in the last forward pass, in depth order.

    Raises:
        TrainingError: no forward pass was recorded.
    """
    layers = [module for module in model.modules() if isinstance(module, MoleLayer)]
    records = [layer.routing for layer in layers if layer.routing is not None]
    if not records:
        raise TrainingError(
            f"the model has {len(layers)} MoLE layers and no routing of a forward pass; expected "
            "a forward pass in training mode with a MoLE adapter active. Add the adapter, or run "
            "the model before asking; a pass that does not train belongs into `with "
            "recorded_routing(model):`."
        )
    return records


def clear_routing(model: nn.Module) -> None:
    """Forget the last forward pass, so that its graph can be freed."""
    for module in model.modules():
        if isinstance(module, MoleLayer):
            module.routing = None


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[None]:
    """Keep the routing of every forward pass inside the block, also of those that do not train.

    Outside of the block, evaluation keeps none, because nothing would free it. After

        with recorded_routing(model), torch.no_grad():
            model(pixel_values=pixels)
            records = routing(model)

    ``records[layer].choice_BNE`` says for each token which expert it chose, and
    ``distill.routing_statistics(records)`` how busy each expert was.
    """
    layers = [module for module in model.modules() if isinstance(module, MoleLayer)]
    before = [layer.records_evaluation for layer in layers]
    for layer in layers:
        layer.records_evaluation = True
    try:
        yield
    finally:
        for layer, was_on in zip(layers, before, strict=True):
            layer.records_evaluation = was_on
            if not was_on:
                layer.routing = None


def merge_refusal() -> ConfigError:
    """Return the error for merging experts into their base."""
    return ConfigError(
        "a MoLE adapter was to be merged into its base model; every token chooses its own expert, "
        "so no single weight matrix equals them. Save the adapter with save_pretrained, or drop "
        "it with unload()."
    )


def _parts(mlp: nn.Module) -> tuple[str, str, str]:
    """Return the names of the parts of an MLP that holds only two linear layers and an activation.

    Raises:
        ConfigError: it holds something else.
    """
    parts = mlp_parts(mlp)
    if parts is None or not all(isinstance(getattr(mlp, parts[i]), nn.Linear) for i in (0, 2)):
        children = ", ".join(name for name, _ in mlp.named_children())
        raise ConfigError(
            f"a MoLE was to be put around {type(mlp).__name__} with the parts "
            f"{children or 'none'}; expected fc1, fc2 and activation_fn or activation, or up_proj, "
            "down_proj and act_fn, as in the MLPs of CLIP, SigLIP, DINOv2 and DINOv3. Take another "
            "tower, or name such modules (target_modules of MoleConfig; mlp of the entry in "
            "student/towers.py)."
        )
    return parts
