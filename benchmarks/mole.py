"""`make bench-mole`: what the experts cost, in time and in figures that can be counted.

One MLP of CLIP ViT-L (1024-4096) with three experts of rank 32, on the 577 tokens of each of a few
images: forward and backward as in stage 1, the base frozen, dropout 0, weights random. Held
against the plain MLP, and against a loop over the experts, each on the tokens that chose it. On a
CPU in float32; on a GPU in bfloat16, eager and compiled.

    python benchmarks/mole.py [--images 4] [--pairs 20]

Dimensions: X tokens, D width, H hidden, E experts, R rank.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPMLP

from movekd.student.mole import MoleConfig, MoleLayer
from movekd.student.mole.layer import StackedLora
from report import Figure, interleaved_ratio, write_figures

VIT_L = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    attn_implementation="eager",  # its products are counted on any device
)
NUM_TOKENS = 577
STEPS_A_RUN = {"cpu": 1, "cuda": 20}
"""A GPU's step is too short for a clock that starts and stops with a wait for the device."""


class ExpertLoop(nn.Module):
    """The same layer with experts in a list: each takes the tokens that chose it, one by one.

    Args:
        layer: where to copy the weights from.
    """

    def __init__(self, layer: MoleLayer) -> None:
        super().__init__()
        self.base, self.config = layer.base_layer, layer.mole_config["default"]
        self.router = copy.deepcopy(layer.mole_router["default"])
        self.moe_down = _expert_list(layer.mole_fc1["default"])
        self.moe_up = _expert_list(layer.mole_fc2["default"])

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Return the MLP's output, (B, N, D) -> (B, N, D)."""
        tokens_XD = tokens_BND.flatten(0, 1)
        probabilities_XE = self.router(tokens_XD).softmax(-1, dtype=torch.float32)
        choice_X = probabilities_XE.argmax(-1)
        rows = [torch.where(choice_X == expert)[0] for expert in range(len(self.moe_down))]
        gates = [probabilities_XE[rows[e], e].unsqueeze(1) for e in range(len(rows))]
        hidden_XH = self._add(self.moe_down, tokens_XD, self.base.fc1(tokens_XD), rows, gates)
        hidden_XH = self.base.activation_fn(hidden_XH)
        output_XD = self._add(self.moe_up, hidden_XH, self.base.fc2(hidden_XH), rows, gates)
        return output_XD.view_as(tokens_BND)

    def _add(
        self,
        experts: nn.ModuleList,
        inputs_XI: Tensor,
        base_XO: Tensor,
        rows: list[Tensor],
        gates: list[Tensor],
    ) -> Tensor:
        for expert, row, gate in zip(experts, rows, gates, strict=True):
            low = expert(inputs_XI[row]) * (self.config.scale * gate).to(base_XO.dtype)
            base_XO.index_add_(0, row, low)
        return base_XO


def main() -> None:
    """Measure, print a table, write results/mole.json."""
    parser = argparse.ArgumentParser(description="Benchmarks of the experts.")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=20)
    arguments = parser.parse_args()
    figures = counted_figures()
    if torch.cuda.is_available():
        figures += timed_figures("cuda", torch.bfloat16, arguments.images, arguments.pairs, 1.5)
        figures += timed_figures(
            "cuda", torch.bfloat16, arguments.images, arguments.pairs, 1.3, is_compiled=True
        )
    else:
        figures += timed_figures("cpu", torch.float32, arguments.images, arguments.pairs, 1.3)
    write_figures("mole", figures, is_complete=arguments.images == 4 and arguments.pairs == 20)


def timed_figures(
    device: str,
    dtype: torch.dtype,
    images: int,
    pairs: int,
    at_most: float,
    is_compiled: bool = False,
) -> list[Figure]:
    """Time training steps of the layer, the plain MLP and the loop by turns."""
    torch.manual_seed(0)
    plain = CLIPMLP(VIT_L).to(device, dtype)
    plain.requires_grad_(False)
    layer = _mole(plain, dropout=0.0)
    dropping = _mole(plain, dropout=0.05)
    dropping.load_state_dict(layer.state_dict())
    loop = ExpertLoop(layer)
    shape = (images, NUM_TOKENS, VIT_L.hidden_size)
    tokens_BND = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    gradient_BND = torch.randn(shape, device=device, dtype=dtype)

    def step_of(module: nn.Module, fullgraph: bool = True) -> Callable[[], None]:
        forward = torch.compile(module, fullgraph=fullgraph) if is_compiled else module

        def step() -> None:
            for _ in range(STEPS_A_RUN[device]):
                module.zero_grad()
                tokens_BND.grad = None
                forward(tokens_BND).backward(gradient_BND)
            if device == "cuda":
                torch.cuda.synchronize()

        for _ in range(3):
            step()
        return step

    difference = _difference(layer, loop, tokens_BND)
    steps = {"mole": step_of(layer), "plain": step_of(plain), "mole_dropout": step_of(dropping)}
    steps["loop"] = step_of(loop, fullgraph=False)  # the number of an expert's tokens is data
    where = f"{device}, {str(dtype).removeprefix('torch.')}, {images} images, forward and backward"
    suffix = "_compiled" if is_compiled else ""
    targets = {("mole", "plain"): at_most}
    if device == "cuda":
        targets["mole", "loop"] = 1.0
    figures = [
        Figure(
            f"mole_minus_loop{suffix}",
            difference,
            "largest difference of their outputs over the largest output",
            at_most=1e-6 if dtype == torch.float32 else None,
        )
    ]
    for measured, against in (
        ("mole", "plain"),
        ("mole", "loop"),
        ("mole_dropout", "plain"),
    ):
        ratio, low, high = interleaved_ratio(steps[measured], steps[against], pairs)
        figures.append(
            Figure(
                f"{measured}_over_{against}{suffix}",
                ratio,
                f"time over time; {where}; median of {pairs} pairs",
                (low, high),
                at_most=targets.get((measured, against)),
            )
        )
    if device == "cpu":  # what a busy neighbour hardly changes
        pair = _cpu_seconds(steps["mole"]), _cpu_seconds(steps["plain"])
        ratio, low, high = interleaved_ratio(*pair, pairs)
        what = f"the same in CPU seconds; median of {pairs} pairs"
        figures.append(Figure("mole_over_plain_cpu_seconds", ratio, what, (low, high)))
        figures.append(_products_figure(images * NUM_TOKENS, pairs))
    return figures


def _products_figure(num_tokens: int, pairs: int) -> Figure:
    """Time the matrix products of a step and nothing else: the floor of ``mole_over_plain``.

    What is above it are passes over memory: masks, sums of gradients, a copy of the base's output.
    """
    plain, mole = (_products(num_tokens, has_experts) for has_experts in (False, True))
    flops = [sum(2 * a.numel() * b.shape[1] for a, b, _ in each) for each in (plain, mole)]

    def run_of(products: list[tuple[Tensor, Tensor, Tensor]]) -> Callable[[], None]:
        def run() -> None:
            for a, b, out in products:
                torch.mm(a, b, out=out)

        run()
        return run

    timed = _cpu_seconds(run_of(mole)), _cpu_seconds(run_of(plain))
    ratio, low, high = interleaved_ratio(*timed, pairs)
    return Figure(
        "mole_products_over_plain_cpu_seconds",
        ratio,
        f"only the matrix products of both, CPU seconds (FLOPs: {flops[1] / flops[0]:.3f}); "
        f"median of {pairs} pairs",
        (low, high),
    )


def _products(num_tokens: int, has_experts: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the factors and the place of each product of a step, forward and backward."""
    config = MoleConfig()
    experts, rank = config.num_experts, config.num_experts * config.r
    found = []

    def add(rows: int, inner: int, columns: int) -> None:
        found.append(
            (torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns))
        )

    width, hidden = VIT_L.hidden_size, VIT_L.intermediate_size
    for fan_in, fan_out in ((width, hidden), (hidden, width)):
        add(num_tokens, fan_in, fan_out)
        add(num_tokens, fan_out, fan_in)  # gradient of the input; the base is frozen
        if has_experts:
            wide = rank + experts
            add(num_tokens, fan_in, rank)
            add(num_tokens, wide, fan_out)
            add(num_tokens, fan_out, wide)  # gradients: of the masked product, of B, input, A
            add(wide, num_tokens, fan_out)
            add(num_tokens, rank, fan_in)
            add(rank, num_tokens, fan_in)
    if has_experts:  # the router and its two gradients
        add(num_tokens, width, experts)
        add(num_tokens, experts, width)
        add(experts, num_tokens, width)
    return found


def counted_figures() -> list[Figure]:
    """Count parameters and FLOPs of a forward pass of the whole tower, where nothing is computed.

    A product and a sum are two FLOPs. Blocks: all 24, as in the official recipe.
    """
    pixels = torch.empty(1, 3, VIT_L.image_size, VIT_L.image_size, device="meta")
    with torch.device("meta"):
        tower = CLIPVisionModel(VIT_L).eval()
        base_parameters, base_flops = _size(tower), _flops(tower, pixels)
        student = get_peft_model(tower, MoleConfig(init_lora_weights="kaiming")).eval()
    extra_parameters = _size(student) - base_parameters
    extra_flops = _flops(student, pixels) - base_flops
    parameters, flops = _formula(MoleConfig())
    return [
        Figure("base_parameters_m", base_parameters / 1e6, "of CLIP ViT-L/336, millions"),
        Figure(
            "extra_parameters_m", extra_parameters / 1e6, "experts and routers of all 24 blocks"
        ),
        Figure("extra_parameters_share", extra_parameters / base_parameters, "of the base's"),
        Figure(
            "extra_parameters_over_formula",
            extra_parameters / parameters,
            "counted over 24 (E (R (D + H) + R + H) + E (R (D + H) + R + D) + E (D + 1))",
            at_least=1,
        ),
        Figure("base_gflops", base_flops / 1e9, "forward pass of one image"),
        Figure("extra_gflops", extra_flops / 1e9, "what the experts add to it"),
        Figure("extra_flops_share", extra_flops / base_flops, "of the base's"),
        Figure(
            "extra_flops_over_formula",
            extra_flops / flops,
            "counted over 24 x 577 x 2 (2 E R (D + H) + E (D + H) + E D)",
            at_least=1,
        ),
    ]


def _formula(config: MoleConfig) -> tuple[int, int]:
    """Return extra parameters and extra FLOPs an image, from the equations."""
    experts, rank = config.num_experts, config.r
    width, hidden = VIT_L.hidden_size, VIT_L.intermediate_size
    both = rank * (width + hidden)  # weights of one LoRA pair
    parameters = experts * (2 * both + 2 * rank + hidden + width) + experts * (width + 1)
    # All experts are computed for every token; their second biases are rows of the product.
    products = 2 * experts * both + experts * (hidden + width) + experts * width
    layers: int = VIT_L.num_hidden_layers
    return layers * parameters, layers * NUM_TOKENS * 2 * products


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _flops(model: nn.Module, pixels: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=pixels)
    return int(counter.get_total_flops())


def _mole(mlp: nn.Module, dropout: float) -> MoleLayer:
    config = MoleConfig(lora_dropout=dropout, init_lora_weights="kaiming")
    return MoleLayer(mlp, "default", config).train()


def _expert_list(lora: nn.Module) -> nn.ModuleList:
    """Return an expert's two linear layers, for each expert of a stack."""
    assert isinstance(lora, StackedLora)
    experts = nn.ModuleList()
    for A_RI, a_R, B_RO, b_O in zip(
        lora.lora_A, lora.lora_A_bias, lora.lora_B, lora.lora_B_bias, strict=True
    ):
        (rank, fan_in), fan_out = A_RI.shape, B_RO.shape[1]
        first, second = nn.Linear(fan_in, rank), nn.Linear(rank, fan_out)
        first.load_state_dict({"weight": A_RI, "bias": a_R})
        second.load_state_dict({"weight": B_RO.T, "bias": b_O})
        experts.append(nn.Sequential(first, second).to(A_RI.device, A_RI.dtype))
    return experts


def _cpu_seconds(step: Callable[[], None]) -> Callable[[], float]:
    def run() -> float:
        started = time.process_time()
        step()
        return time.process_time() - started

    return run


def _difference(layer: nn.Module, loop: nn.Module, tokens_BND: Tensor) -> float:
    with torch.no_grad():
        one, two = layer(tokens_BND).float(), loop(tokens_BND).float()
    return float((one - two).abs().max() / one.abs().max())


if __name__ == "__main__":
    main()
