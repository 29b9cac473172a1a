"""An arm's experts move the student's tokens before the first step as far as docs/study.md says.

`minus_zero_init` puts Kaiming init at the revised scale of 1; the official recipe has it at 1/16.
"""

from pathlib import Path

import pytest
import torch

import demo
import pretrain
import scenes
from movekd.student.vlm import build_vlm, image_features
from movekd.train.config import load_config
from study.plan import REVISED, SEEDS, find_arm

PAGE = (Path(__file__).parents[3] / "docs/study.md").read_text(encoding="utf-8")


@torch.no_grad()
def start_tokens(arm: str, seed: int) -> torch.Tensor:
    """Patch tokens (B, N, D) of an untrained student of world 0 over validation scenes."""
    torch.manual_seed(seed)
    config = load_config(demo.HERE / "pretrain.yaml", [REVISED, *find_arm(arm).keys])
    student = build_vlm(config.student)
    student.vlm.eval()
    batch, _ = next(scenes.draw_part("val", 64, 0, 0))
    return image_features(student.vlm, pretrain.pixels(batch.images_BHW))[1]


def movement(arm: str) -> float:
    """Length of the change over length of the token; mean over tokens and seeds."""
    clip_BND = start_tokens("none_full", 0)
    moved = [
        ((start_tokens(arm, seed) - clip_BND).norm(dim=-1) / clip_BND.norm(dim=-1)).mean().item()
        for seed in SEEDS
    ]
    return sum(moved) / len(moved)


@pytest.mark.parametrize(
    ("arm", "said", "expected"),
    [("minus_zero_init", "111% of their length", 1.11), ("official_mole", "by 12.5%", 0.125)],
)
def test_kaiming_init_at_scale_1_is_not_the_official_one(arm, said, expected):
    assert said in PAGE.replace("\n  ", " ")
    assert movement(arm) == pytest.approx(expected, rel=0.02)
    assert movement("revised_mole") == 0
