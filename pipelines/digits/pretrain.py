"""Train the four teachers and the language model of the embedded corpus: the files of ``weights/``.

Input: new scenes of training handwriting and their ground truth, from ``scenes.py``. Output: a
folder per model with float16 ``model.safetensors`` and ``config.json`` (and the tokenizer of the
language model), ``training.json`` with the accuracies, and ``SHA256SUMS``. The files are committed,
so that the demo need not train them; ``movekd demo --retrain`` calls :func:`pretrain`.

    python pipelines/digits/pretrain.py --output weights [--only NAME] [--seed 0]

The four teachers are of the method's four kinds: ``clip``, a contrastive ViT, from which the
student starts; ``eva``, a ViT that names the digit of each patch; ``convnext``, a convolutional
network that does the same; ``sam``, a convolutional network that finds strokes and their edges.
Each is a stock class of transformers or timm in a small configuration; its head is dropped.
``weights/training.json`` has times and accuracies.

Dimensions: B scenes, C channels or cells, H and W pixels, N tokens, D width, G grid side.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from drawing import SIZE
from language import answer_accuracy, cell_masks, train_language_model
from scenes import (
    EMPTY,
    NUM_CLASSES,
    SPLIT_SEED,
    Scenes,
    Split,
    compose,
    draw_digits,
    grid_labels,
)

MEAN, STD = 0.26, 0.165  # of the scenes' pixels; the same in all three channels
MODELS = ("clip", "eva", "convnext", "sam", "language_model")
PREPROCESSOR = {  # preprocessor_config.json of transformers
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIZE},
    "crop_size": {"height": SIZE, "width": SIZE},
    "image_mean": [MEAN] * 3,
    "image_std": [STD] * 3,
}
LANGUAGE_STEPS = 3000
NUM_TRAIN, NUM_VAL = 16384, 1024  # scenes
EVA_ARCHITECTURE = "eva02_tiny_patch14_224"
EVA_ARGS = {
    "img_size": 48,
    "patch_size": 6,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 0,
}


def pixels(images_BHW: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """Return grey images as a teacher's input, float32 (B, 3, H, W)."""
    pixels_B1HW = (torch.from_numpy(images_BHW).float()[:, None] / 255 - MEAN) / STD
    return pixels_B1HW.expand(-1, 3, -1, -1)


def build_clip() -> Any:
    """Return an untrained CLIP vision model, 36 patches of 8 pixels.

    The initialisation shortens the plateau of a small ViT on small data: positions start as 2-D
    sines, and weights are larger than CLIP's 0.02, which suits a width of 1024.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=8,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embedding" not in name:
                nn.init.xavier_uniform_(weight)
        nn.init.normal_(model.embeddings.patch_embedding.weight, std=0.03)
        axis_G = torch.arange(6)
        frequency = 30 ** -(torch.arange(24) / 24)
        places = [axis_G.repeat_interleave(6), axis_G.repeat(6)]
        waves = [f(place[:, None] * frequency) for place in places for f in (torch.sin, torch.cos)]
        model.embeddings.position_embedding.weight[1:] = 0.5 * torch.cat(waves, 1)
    return model


def build_eva() -> Any:
    """Return an untrained EVA-02 of timm, 64 patches of 6 pixels."""
    import timm

    return timm.create_model(EVA_ARCHITECTURE, pretrained=False, **EVA_ARGS)


def build_convnext() -> Any:
    """Return an untrained ConvNeXt of transformers, 6x6 tokens."""
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(
        ConvNextConfig(
            num_stages=2, depths=[2, 4], hidden_sizes=[48, 96], layer_scale_init_value=0.5
        )
    )


def build_sam() -> Any:
    """Return an untrained ResNet of transformers, 12x12 tokens."""
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(
        ResNetConfig(embedding_size=48, hidden_sizes=[48], depths=[3], layer_type="basic")
    )


def tokens(tower: Any, pixels_BCHW: Tensor) -> Tensor:
    """Return a tower's output as patch tokens, (B, N, D) row by row."""
    if hasattr(tower, "forward_features"):  # timm
        output: Tensor = tower.forward_features(pixels_BCHW)
        return output[:, tower.num_prefix_tokens :]
    output = tower(pixel_values=pixels_BCHW).last_hidden_state
    return output.flatten(2).mT if output.ndim == 4 else output[:, 1:]


class Contrastive(nn.Module):
    """CLIP's loss against captions; the accuracy is that of retrieval within the batch.

    The text encoder sums an embedding for each phrase of a caption ("a 7 at the top left").
    """

    def __init__(self, width: int = 96, shared: int = 64) -> None:
        super().__init__()
        self.phrases = nn.Embedding(41, shared, padding_idx=40)
        self.text = nn.Sequential(nn.LayerNorm(shared), nn.Linear(shared, shared))
        self.image = nn.Linear(width, shared, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, tower: Any, batch: Scenes) -> tuple[Tensor, float]:
        """Return the loss and the accuracy of a batch."""
        digits_BC = torch.from_numpy(batch.digits_BC)
        phrases_BC = torch.where(digits_BC == EMPTY, 40, digits_BC + 10 * torch.arange(4))
        text_BD = F.normalize(self.text(self.phrases(phrases_BC).sum(1)), dim=-1)
        image_BD = tower(pixel_values=pixels(batch.images_BHW)).pooler_output
        image_BD = F.normalize(self.image(image_BD), dim=-1)
        logits_BB = self.log_scale.exp() * image_BD @ text_BD.T
        target_B = torch.arange(len(batch))
        loss = F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)
        return loss / 2, _share(logits_BB.argmax(1) == target_B)


class PatchDigits(nn.Module):
    """Classify the digit that covers each token; the accuracy is over covered tokens."""

    def __init__(self, side: int, width: int = 96) -> None:
        super().__init__()
        self.side = side
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, tower: Any, batch: Scenes) -> tuple[Tensor, float]:
        """Return the loss and the accuracy of a batch."""
        logits_BNC = self.head(tokens(tower, pixels(batch.images_BHW)))
        labels_BN = torch.from_numpy(grid_labels(batch, self.side)).flatten(1)
        loss = F.cross_entropy(logits_BNC.flatten(0, 1), labels_BN.flatten())
        is_digit_BN = labels_BN < NUM_CLASSES - 1
        return loss, _share((logits_BNC.argmax(-1) == labels_BN)[is_digit_BN])


def stroke_labels(batch: Scenes, side: int) -> Tensor:
    """Return for each pixel of a token whether a stroke or its edge is there, (B, N, pixels)."""
    ink_B1HW = torch.from_numpy(batch.ink_BHW)[:, None]
    stroke_B1HW = (ink_B1HW > 0.35).float()
    edge_B1HW = F.max_pool2d(stroke_B1HW, 3, 1, 1) - stroke_B1HW
    target_BCHW = torch.cat([stroke_B1HW, edge_B1HW], 1)
    return F.unfold(target_BCHW, SIZE // side, stride=SIZE // side).mT


class Strokes(nn.Module):
    """Classify each pixel of a token as on a stroke, and as on the edge of a stroke.

    The accuracy is the intersection over union of both maps together.
    """

    def __init__(self, side: int = 12, width: int = 48) -> None:
        super().__init__()
        self.side = side
        self.head = nn.Linear(width, 2 * (SIZE // side) ** 2)

    def forward(self, tower: Any, batch: Scenes) -> tuple[Tensor, float]:
        """Return the loss and the accuracy of a batch."""
        target_BCN = stroke_labels(batch, self.side).mT
        logits_BCN = self.head(tokens(tower, pixels(batch.images_BHW))).mT
        loss = F.binary_cross_entropy_with_logits(logits_BCN, target_BCN)
        said, true = logits_BCN > 0, target_BCN > 0
        return loss, (said & true).sum().item() / (said | true).sum().item()


def _share(is_right: Tensor) -> float:
    return is_right.float().mean().item()


@dataclass(frozen=True)
class Recipe:
    """How a teacher is trained, and what its ``accuracy`` measures."""

    build: Callable[[], Any]
    objective: Callable[[], nn.Module]
    steps: int
    batch_size: int
    lr: float
    measure: str


RECIPES = {
    "clip": Recipe(
        build_clip, Contrastive, 600, 128, 1.5e-3, "captions found among 256 by their image"
    ),
    "eva": Recipe(
        build_eva, lambda: PatchDigits(8), 700, 64, 1.5e-3, "patches on a digit named rightly"
    ),
    "convnext": Recipe(
        build_convnext, lambda: PatchDigits(6), 600, 64, 3e-3, "patches on a digit named rightly"
    ),
    "sam": Recipe(build_sam, Strokes, 300, 64, 3e-3, "intersection over union of strokes, edges"),
}


def draw_scenes(num_scenes: int, split: Split, seed: int, split_seed: int = SPLIT_SEED) -> Scenes:
    """Return scenes of uniform digits in the handwriting of ``split``."""
    rng = np.random.default_rng([seed, 50])
    digits_BC = draw_digits(num_scenes, rng)
    parts = [
        compose(digits_BC[i : i + 256], split, rng, split_seed) for i in range(0, num_scenes, 256)
    ]
    joined = {f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Scenes)}
    return Scenes(**joined)


def take(scenes: Scenes, rows: Any) -> Scenes:
    """Return the scenes at ``rows``."""
    return Scenes(**{f.name: getattr(scenes, f.name)[rows] for f in fields(Scenes)})


def train_teacher(
    name: str, recipe: Recipe, train: Scenes, val: Scenes, seed: int
) -> tuple[Any, float]:
    """Train a teacher and print its progress; return it with its accuracy on ``val``."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 60])
    tower, objective = recipe.build().train(), recipe.objective()
    parameters = [*tower.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(parameters, recipe.lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, recipe.steps, pct_start=0.1
    )
    for step in range(1, recipe.steps + 1):
        loss, accuracy = objective(
            tower, take(train, rng.integers(0, len(train), recipe.batch_size))
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"{name} step {step}: loss {loss.item():.3f}, accuracy {accuracy:.3f}", flush=True
            )
    tower.eval()
    with torch.no_grad():
        parts = [objective(tower, take(val, slice(i, i + 256)))[1] for i in range(0, len(val), 256)]
    return tower, sum(parts) / len(parts)


def save_teacher(tower: Any, directory: Path) -> None:
    """Write a teacher in float16, in the format of its library."""
    tower.half()
    if hasattr(tower, "save_pretrained"):
        tower.save_pretrained(directory)
        _write_json(directory / "preprocessor_config.json", PREPROCESSOR)
        return
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in tower.state_dict().items()}
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    config = {"architecture": EVA_ARCHITECTURE, "model_args": EVA_ARGS}
    _write_json(directory / "config.json", config)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def train_language(val: Scenes, seed: int, steps: int) -> tuple[Any, Any, dict[str, float]]:
    """Train the language model; return it with its tokenizer and accuracy."""
    rng = np.random.default_rng(seed)
    masks_M33 = cell_masks(compose(draw_digits(2048, rng), "train", rng))
    model, tokenizer = train_language_model(masks_M33, steps, seed)
    accuracy = answer_accuracy(model.eval(), tokenizer, cell_masks(val), 256, seed)
    return model, tokenizer, accuracy


def pretrain(
    out: Path,
    only: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    split_seed: int = SPLIT_SEED,
) -> None:
    """Train all models, or only one, and write their files and ``SHA256SUMS`` below ``out``.

    ``steps`` replaces the number of steps of each model; only tests use it. Teachers see the
    training handwriting of ``split_seed``, the language model that of the default.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    train = draw_scenes(NUM_TRAIN, "train", seed, split_seed)
    val = draw_scenes(NUM_VAL, "val", seed, split_seed)
    for name in [only] if only else MODELS:
        started = time.monotonic()
        if name == "language_model":
            num_steps = steps or LANGUAGE_STEPS
            model, tokenizer, accuracy = train_language(val, seed, num_steps)
            model.half().save_pretrained(out / name)
            tokenizer.save_pretrained(out / name)
            result = {"measure": "answers given true grids", **accuracy}
        else:
            recipe = replace(RECIPES[name], steps=steps or RECIPES[name].steps)
            num_steps = recipe.steps
            model, score = train_teacher(name, recipe, train, val, seed)
            save_teacher(model, out / name)
            result = {"measure": recipe.measure, "accuracy": score}
        record_training(
            out,
            name,
            {
                "date": time.strftime("%Y-%m-%d"),
                "seed": seed,
                "steps": num_steps,
                "parameters": sum(p.numel() for p in model.parameters()),
                "seconds": round(time.monotonic() - started),
                "threads": torch.get_num_threads(),
                **{k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()},
            },
        )


def record_training(out: Path, name: str, result: dict[str, Any]) -> None:
    """Add a model's result to ``training.json``, print it, and update ``SHA256SUMS``."""
    path = out / "training.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results[name] = result
    _write_json(path, dict(sorted(results.items())))
    print(f"{name}: {result}", flush=True)
    files = sorted(file for file in out.glob("*/*") if file.is_file())
    sums = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(out)}" for f in files]
    (out / "SHA256SUMS").write_text("\n".join(sums) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the teachers and the language model.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pretrain(args.output, args.only, args.seed)


if __name__ == "__main__":
    main()
