import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, Dinov2Config, DINOv3ViTConfig, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.dinov2.modeling_dinov2 import Dinov2MLP, Dinov2SwiGLUFFN
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTMLP
from transformers.models.siglip.modeling_siglip import SiglipMLP

from movekd.distill import balance_loss, routing_statistics
from movekd.errors import ConfigError, TrainingError
from movekd.student.mole import (
    MoleConfig,
    MoleLayer,
    clear_routing,
    recorded_routing,
    routing,
)

B, N, D, HIDDEN, E, R = 2, 7, 12, 20, 3, 2
OFFICIAL = {"use_gate": False, "lora_alpha": 1.0, "init_lora_weights": "kaiming"}
REVISED = {"use_gate": True, "init_lora_weights": "zero"}


def _mlp() -> CLIPMLP:
    return CLIPMLP(CLIPVisionConfig(hidden_size=D, intermediate_size=HIDDEN))


def _layer(recipe: dict[str, object], seed: int = 0, dropout: float = 0.0) -> MoleLayer:
    """A layer with every parameter away from zero."""
    torch.manual_seed(seed)
    config = MoleConfig(num_experts=E, r=R, lora_dropout=dropout, **recipe)
    layer = MoleLayer(_mlp(), "default", config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def _inputs(seed: int = 1) -> torch.Tensor:
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed))


def _reference(layer: MoleLayer, inputs: torch.Tensor) -> torch.Tensor:
    """The equations, one token and one expert at a time."""
    config, mlp = layer.mole_config["default"], layer.base_layer
    router = layer.mole_router["default"]
    rows = []
    for x in inputs.flatten(0, 1):
        p = torch.softmax(router.weight @ x + router.bias, 0)
        e = max(range(E), key=lambda i: float(p[i].detach()))
        factor = config.lora_alpha / config.r * (p[e] if config.use_gate else 1)

        def expert(lora: nn.Module, x: torch.Tensor, e: int = e) -> torch.Tensor:
            low = lora.lora_A[e] @ x + lora.lora_A_bias[e]
            return lora.lora_B[e].T @ low + lora.lora_B_bias[e]

        h = mlp.fc1.weight @ x + mlp.fc1.bias + factor * expert(layer.mole_fc1["default"], x)
        h = mlp.activation_fn(h)
        y = mlp.fc2.weight @ h + mlp.fc2.bias + factor * expert(layer.mole_fc2["default"], h)
        rows.append(y)
    return torch.stack(rows).view(inputs.shape)


def _gradients(output: torch.Tensor, layer: MoleLayer) -> dict[str, torch.Tensor]:
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(
        output.square().sum(), parameters, allow_unused=True, materialize_grads=True
    )
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("recipe", [OFFICIAL, REVISED], ids=["official", "revised"])
def test_forward_and_gradients_equal_the_equations_written_with_loops(
    recipe: dict[str, object],
) -> None:
    layer, inputs = _layer(recipe), _inputs()
    found, expected = layer(inputs), _reference(layer, inputs)
    chosen = routing(layer)[0].choice_BNE.sum((0, 1))
    assert (chosen > 0).sum() > 1  # more than one expert is at work
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    found_gradients, gradients = _gradients(found, layer), _gradients(expected, layer)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp_min(1)
        torch.testing.assert_close(
            found_gradients[name] / scale, gradient / scale, atol=1e-6, rtol=1e-6, msg=name
        )


class ReleasedMlp(nn.Module):
    """An MLP with the released code's modules, names and recipe; experts one after the other."""

    def __init__(self, width: int, hidden: int, r: int) -> None:
        super().__init__()

        def experts(fan_in: int, fan_out: int) -> nn.ModuleList:
            pairs = [(nn.Linear(fan_in, r), nn.Linear(r, fan_out)) for _ in range(E)]
            return nn.ModuleList(nn.ModuleDict({"lora_A": a, "lora_B": b}) for a, b in pairs)

        self.original_module = CLIPMLP(
            CLIPVisionConfig(hidden_size=width, intermediate_size=hidden, num_attention_heads=4)
        )
        self.moe_down, self.moe_up = experts(width, hidden), experts(hidden, width)
        self.router = nn.Linear(width, E)
        self.scale = 1 / r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.router(x).softmax(-1).argmax(-1)
        hidden = self._add(self.moe_down, x, self.original_module.fc1(x), chosen)
        hidden = hidden * torch.sigmoid(1.702 * hidden)  # CLIP's quick_gelu
        return self._add(self.moe_up, hidden, self.original_module.fc2(hidden), chosen)

    def _add(
        self, experts: nn.ModuleList, x: torch.Tensor, base: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        for number, expert in enumerate(experts):
            of_expert = expert["lora_B"](expert["lora_A"](x)) * self.scale
            base = torch.where((chosen == number).unsqueeze(-1), base + of_expert, base)
        return base


def test_official_equals_the_released_modules_at_a_real_rank() -> None:
    torch.manual_seed(0)
    released, inputs = ReleasedMlp(64, 256, r=32), torch.randn(2, 50, 64)
    layer = MoleLayer(released.original_module, "default", MoleConfig(lora_dropout=0, **OFFICIAL))
    layer.mole_router["default"].load_state_dict(released.router.state_dict())
    for lora, experts in (
        (layer.mole_fc1["default"], released.moe_down),
        (layer.mole_fc2["default"], released.moe_up),
    ):
        for number, expert in enumerate(experts):
            nn.init.kaiming_uniform_(expert["lora_B"].weight, nonlinearity="relu")
            lora.lora_A.data[number] = expert["lora_A"].weight
            lora.lora_A_bias.data[number] = expert["lora_A"].bias
            lora.lora_B.data[number] = expert["lora_B"].weight.T
            lora.lora_B_bias.data[number] = expert["lora_B"].bias
    expected = released(inputs)
    assert (layer(inputs) - released.original_module(inputs)).abs().max() > 0.01
    torch.testing.assert_close(layer(inputs), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("use_gate", [True, False])
def test_task_loss_reaches_the_router_only_through_the_gate(use_gate: bool) -> None:
    layer = _layer({"use_gate": use_gate})
    layer(_inputs()).square().sum().backward()
    gradient = layer.mole_router["default"].weight.grad
    assert (gradient is not None and gradient.abs().sum() > 0) == use_gate
    # every expert has a gradient, also one that no token chose: distributed training counts on it
    experts = [*layer.mole_fc1.parameters(), *layer.mole_fc2.parameters()]
    assert all(parameter.grad is not None for parameter in experts)


def test_balance_loss_reaches_the_router_without_the_gate() -> None:
    layer = _layer(OFFICIAL)
    layer(_inputs())
    balance_loss(routing(layer), "sample").backward()
    assert layer.mole_router["default"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(N, D), (1, D), (2, 3, N, D)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer, inputs = _layer(REVISED), torch.randn(*shape)
    torch.testing.assert_close(
        layer(inputs), _reference(layer, inputs.view(1, -1, D)).view(shape), atol=1e-5, rtol=1e-5
    )


def test_initial_values_are_those_of_the_recipes() -> None:
    torch.manual_seed(0)
    inputs, mlp = _inputs(), _mlp()
    zero = MoleLayer(mlp, "default", MoleConfig(num_experts=E, r=R, **REVISED))
    assert torch.equal(zero.eval()(inputs), mlp(inputs))
    kaiming = MoleLayer(mlp, "default", MoleConfig(num_experts=E, r=R, **OFFICIAL))
    assert (kaiming.eval()(inputs) - mlp(inputs)).abs().max() > 1e-3
    for lora, fan_in in ((kaiming.mole_fc1["default"], D), (kaiming.mole_fc2["default"], HIDDEN)):
        assert lora.lora_A.abs().max() <= (6 / fan_in) ** 0.5
        assert lora.lora_A.abs().max() > 0.8 * (6 / fan_in) ** 0.5
        assert lora.lora_B.abs().max() <= (6 / R) ** 0.5
        assert lora.lora_B.abs().max() > 0.8 * (6 / R) ** 0.5
        assert (lora.lora_A_bias == 0).all()
        assert (lora.lora_B_bias == 0).all()


def test_routing_is_that_of_the_last_training_pass_and_can_be_forgotten() -> None:
    layer = _layer(REVISED)
    with pytest.raises(TrainingError, match=r"1 MoLE layers and no routing.*run the model before"):
        routing(layer)
    layer(_inputs(5))
    layer(_inputs())
    (record,) = routing(layer)
    router = layer.mole_router["default"]
    expected = (_inputs() @ router.weight.T + router.bias).softmax(-1)
    torch.testing.assert_close(record.probabilities_BNE, expected)
    assert record.probabilities_BNE.dtype == torch.float32
    assert record.probabilities_BNE.requires_grad
    assert not record.choice_BNE.requires_grad
    assert torch.equal(record.choice_BNE.argmax(-1), expected.argmax(-1))
    assert torch.equal(record.choice_BNE.sum(-1), torch.ones(B, N))

    copied = copy.deepcopy(layer)  # a graph cannot be copied: it stays behind
    assert copied.routing is None
    clear_routing(layer)
    assert layer.routing is None
    layer(_inputs())
    with torch.no_grad():
        layer.eval()(_inputs())
    assert layer.routing is None


def test_the_routing_of_an_evaluation_pass_is_kept_where_asked_for() -> None:
    layer, inputs = _layer(REVISED).eval(), _inputs()
    with recorded_routing(layer):
        with torch.no_grad(), recorded_routing(layer):
            layer(inputs)
        with torch.no_grad():
            layer(inputs)
        (record,) = routing(layer)
        statistics = routing_statistics(routing(layer))
    router = layer.mole_router["default"]
    chosen = (inputs @ router.weight.T + router.bias).argmax(-1)
    assert torch.equal(record.choice_BNE.argmax(-1), chosen)
    counts = torch.bincount(chosen.flatten(), minlength=E)
    torch.testing.assert_close(statistics.share_LE[0], counts / counts.sum())
    assert layer.routing is None
    with torch.no_grad():
        layer(inputs)
    with pytest.raises(TrainingError, match="does not train belongs into `with recorded_routing"):
        routing(layer)


@pytest.mark.parametrize("recipe", [OFFICIAL, REVISED], ids=["official", "revised"])
def test_checkpointing_changes_no_gradient_and_keeps_the_first_record(
    recipe: dict[str, object],
) -> None:
    def step(is_checkpointed: bool) -> dict[str, torch.Tensor]:
        layer = _layer(recipe, dropout=0.3)
        torch.manual_seed(3)
        inputs = _inputs().requires_grad_()
        output = (
            checkpoint(layer, inputs, use_reentrant=False) if is_checkpointed else layer(inputs)
        )
        record = layer.routing
        loss = output.square().mean() + balance_loss(routing(layer), "batch")
        loss.backward()
        assert layer.routing is record
        return {"inputs": inputs.grad, **{n: p.grad for n, p in layer.named_parameters()}}

    plain, checkpointed = step(False), step(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_dropout_acts_on_the_experts_alone_and_only_in_training() -> None:
    layer = _layer(REVISED, dropout=0.5)
    torch.testing.assert_close(layer.eval()(_inputs()), _reference(layer, _inputs()))
    assert (layer.train()(_inputs()) - layer(_inputs())).abs().max() > 1e-3
    for lora in (layer.mole_fc1["default"], layer.mole_fc2["default"]):
        nn.init.zeros_(lora.lora_A)
    assert torch.equal(layer(_inputs()), layer(_inputs()))


def test_half_precision_towers_and_autocast() -> None:
    layer, inputs = _layer(REVISED), _inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(inputs)
    assert output.dtype == torch.bfloat16
    assert layer.routing.probabilities_BNE.dtype == torch.float32
    output.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
    # tokens whose choice is clear agree with float32 to half precision
    expected = layer(inputs)
    top = layer.routing.probabilities_BNE.topk(2).values
    clear = top[..., 0] - top[..., 1] > 0.1
    assert clear.sum() > 3
    error = (output.float() - expected)[clear].norm() / expected[clear].norm()
    assert error < 0.03

    layer.base_layer.bfloat16()  # PEFT keeps the experts in float32 then
    assert layer(inputs.bfloat16()).dtype == torch.bfloat16


def test_compile_without_graph_breaks_gives_the_same_loss_and_gradients() -> None:
    layer, inputs = _layer(REVISED), _inputs()

    def loss(function: nn.Module) -> torch.Tensor:
        return function(inputs).square().mean() + balance_loss(routing(layer), "batch")

    expected = loss(layer)
    expected_gradients = torch.autograd.grad(expected, list(layer.parameters()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = loss(compiled)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, list(layer.parameters()))
    for one, two in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.slow
def test_inductor_gives_the_same_output() -> None:
    layer, inputs = _layer(REVISED), _inputs()
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(inputs), layer(inputs))
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs), layer(inputs))


@pytest.mark.parametrize(
    "mlp",
    [
        _mlp(),
        SiglipMLP(SiglipVisionConfig(hidden_size=D, intermediate_size=HIDDEN)),
        Dinov2MLP(Dinov2Config(hidden_size=D, mlp_ratio=2)),
        DINOv3ViTMLP(DINOv3ViTConfig(hidden_size=D, intermediate_size=HIDDEN)),
    ],
    ids=["clip", "siglip", "dinov2", "dinov3"],
)
def test_the_mlps_of_the_towers_are_taken(mlp: nn.Module) -> None:
    layer = MoleLayer(mlp, "default", MoleConfig(num_experts=E, r=R)).eval()
    assert torch.equal(layer(_inputs()), mlp(_inputs()))
    assert f"base_layer.{layer.parts[0]}.weight" in dict(layer.named_parameters())
    assert layer.parts[0] in ("fc1", "up_proj")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Dinov2SwiGLUFFN(Dinov2Config(hidden_size=D, mlp_ratio=2)), r"Dinov2SwiGLUFFN.*gate_proj"),
        (nn.Linear(3, 4), r"Linear with the parts none; expected fc1, fc2"),
        (
            nn.ModuleDict(
                {"fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2), "norm": nn.LayerNorm(2)}
            ),
            r"fc1, fc2, norm; expected fc1, fc2 and activation_fn",
        ),
    ],
)
def test_other_modules_are_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoleLayer(module, "default", MoleConfig())


def test_merging_is_refused_with_the_reason() -> None:
    for refuse in (_layer(REVISED).merge, _layer(REVISED).unmerge):
        with pytest.raises(ConfigError, match=r"every token chooses its own expert.*unload\(\)"):
            refuse()
