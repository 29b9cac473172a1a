"""Fixtures for all tests: a small corpus of real images, and a cache of two tiny teachers.

``corpus_dir``, ``tiny_specs`` and ``cache_dir`` are built once and shared. Never write into them;
copy them (``shutil.copytree``).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from corpus_files import make_unreadable, zero_image
from movekd.cache.spec import CacheSpec, load_spec
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder, pack_llava
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache

pytest_plugins = ["list_tests"]

torch.set_num_threads(1)

NUM_IMAGES = 24

SHRUNKEN: dict[str, dict[str, Any]] = {
    "clip": {
        "image_size": 56,
        "model_args": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
    },
    "eva02": {
        "image_size": 64,
        "model_args": {
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 4,
            "global_blocks": [2],
            "base_grid": 4,
            "pretrain_grid": 3,
        },
    },
    "eva02_clip": {
        "image_size": 56,
        "model_args": {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 4},
    },
    "convnext": {
        "image_size": 64,
        "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 24]},
    },
    "sam": {
        "image_size": 64,
        "model_args": {
            "model_type": "sam_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "global_attn_indexes": [1],
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "output_channels": 16,
            "initializer_range": 0.02,
        },
    },
    "pix2struct": {
        "image_size": 64,
        "model_args": {
            "model_type": "pix2struct_vision_model",
            "hidden_size": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_embed_hidden_size": 12,
            "seq_len": 64,
        },
    },
    "siglip2": {
        "image_size": 56,
        "model_args": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
    },
    "dinov2": {
        "image_size": 56,
        "model_args": {
            "model_type": "dinov2_with_registers",
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_register_tokens": 4,
            "image_size": 56,
            "patch_size": 14,
        },
    },
    "dinov3": {
        "image_size": 64,
        "model_args": {
            "model_type": "dinov3_vit",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_register_tokens": 4,
            "patch_size": 16,
        },
    },
    "radio": {
        "image_size": 64,
        "model_args": {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 4},
    },
}
"""Shipped spec -> the keys that make it small."""


@pytest.fixture(scope="session")
def crops() -> list[Image.Image]:
    """40 crops of two photographs, 24 to 47 pixels wide and high."""
    generator = np.random.default_rng(0)
    crops = []
    for number in range(40):
        photo = load_sample_images().images[number % 2]
        width, height = generator.integers(24, 48, 2)
        top = generator.integers(0, photo.shape[0] - height)
        left = generator.integers(0, photo.shape[1] - width)
        crops.append(Image.fromarray(photo[top : top + height, left : left + width]))
    return crops


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory, crops: list[Image.Image]) -> Path:
    """24 images ``photos/NN.png`` packed with two conversations each, and a text-only one."""
    source = tmp_path_factory.mktemp("source")
    (source / "photos").mkdir()
    entries = []
    for number, crop in enumerate(crops[:NUM_IMAGES]):
        name = f"photos/{number:02d}.png"
        crop.save(source / name)
        for question in ("How wide is this image?", "What is its width in pixels?"):
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": f"It is {crop.width} pixels wide."},
            ]
            entries.append({"id": f"{len(entries)}", "image": name, "conversations": turns})
    turns = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]
    entries.append({"id": "text", "conversations": turns})
    (source / "llava.json").write_text(json.dumps(entries))
    out = tmp_path_factory.mktemp("corpus") / "data"
    pack_llava([source / "llava.json"], source, out, num_workers=1)
    return out


@pytest.fixture(scope="session")
def tiny_specs() -> list[CacheSpec]:
    """Two teachers with random weights: a CLIP tower in int8, a ConvNeXt in float16."""
    clip = {
        "name": "clip",
        "provider": "transformers",
        "model": "tiny-clip",
        "model_args": {
            "model_type": "clip_vision_model",
            "hidden_size": 144,  # two groups of channels, the second one smaller
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
        "image_size": 16,
        "layer": -2,
        "cls": True,
        "cls_attention": True,
        "codec": "int8",
    }
    conv = {
        "name": "conv",
        "provider": "timm",
        "model": "convnext_atto",
        "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 24]},
        "image_size": 32,
        "layer": "last",
        "grid": 2,
        "codec": "float16",
    }
    shared = {
        "weights": "random",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "calibration_images": 12,
    }
    return [CacheSpec.model_validate(spec | shared) for spec in (clip, conv)]


@pytest.fixture(scope="session")
def cache_dir(
    tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, tiny_specs: list[CacheSpec]
) -> Path:
    """A complete cache of ``tiny_specs`` over ``corpus_dir``, geometry crop."""
    out = tmp_path_factory.mktemp("built") / "cache"
    options = BuildOptions(batch_size=5, num_workers=0)
    for _ in build_cache(
        out, open_corpus(corpus_dir), tiny_specs, geometry="crop", options=options
    ):
        pass
    return out


@pytest.fixture
def damaged_corpus(tmp_path: Path, corpus_dir: Path) -> tuple[Path, int]:
    """Return a copy of the corpus in which an image cannot be decoded, and its position."""
    shutil.copytree(corpus_dir, tmp_path / "damaged")
    make_unreadable(tmp_path / "damaged", 11)
    return tmp_path / "damaged", 11


@pytest.fixture
def changed_corpus(tmp_path: Path, corpus_dir: Path) -> tuple[Path, int]:
    """Return a copy of the corpus with other bytes in place of an image, and its position."""
    shutil.copytree(corpus_dir, tmp_path / "changed")
    zero_image(tmp_path / "changed", 11)
    return tmp_path / "changed", 11


@pytest.fixture(scope="session")
def view_corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a corpus of seven images with 3, 5, 4, 4, 3, 3 and 5 views, and one with two more.

    The names are ``0.png`` to ``8.png``.
    """
    photo = Image.fromarray(load_sample_images().images[0])
    sizes = [(40, 30), (700, 690), (1100, 350), (350, 1100), (30, 45), (680, 340), (640, 427)]
    sizes += [(500, 500), (47, 24)]
    corpora = []
    for count in (7, 9):
        images = tmp_path_factory.mktemp("images")
        for number, size in enumerate(sizes[:count]):
            photo.resize(size).rotate(40 * number).save(images / f"{number}.png")
        out = tmp_path_factory.mktemp("views") / "data"
        pack_folder(images, out, num_workers=1)
        corpora.append(out)
    return corpora[0], corpora[1]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> int:
    """Set eight rows per Zarr shard instead of 1,024, so that the small corpus has several."""
    monkeypatch.setattr("movekd.cache.layout.MAX_SHARD_ROWS", 8)
    monkeypatch.setattr("movekd.cache.catalog.MAX_SHARD_ROWS", 8)
    return 8


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """Every file under a folder, path -> bytes: equal snapshots are equal folders."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    return read


@pytest.fixture(scope="session")
def shrunken() -> Callable[..., CacheSpec]:
    """A shipped spec by name, shrunken, with random weights unless keywords say otherwise."""

    def shrink(name: str, **changes: Any) -> CacheSpec:
        content = load_spec(name).model_dump()
        changed = {**content, "weights": "random", **SHRUNKEN[name], **changes}
        return CacheSpec.model_validate(changed)

    return shrink
