"""What `cached_vs_live` trains: photographs, a student and teachers with random weights, caches."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mole import VIT_L
from movekd.cache.spec import CacheSpec, load_spec
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_llava
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache
from movekd.resources import resource_dir
from photographs import write_jpegs

GRID = 24  # the student's
TOKENIZER = resource_dir("pipelines") / "digits" / "weights" / "language_model"


@dataclass(frozen=True)
class Size:
    """What is measured."""

    teachers: tuple[str, ...]
    language_width: int
    language_hidden: int
    images: int
    batch_size: int
    pairs: int
    live_pairs: int
    codecs: tuple[str, ...]


SMALL = Size(("clip", "eva02_clip"), 1024, 2816, 4, 1, 11, 3, ("int8", "float16"))
REAL = Size(("clip", "eva02", "sam", "convnext"), 4096, 11008, 2, 1, 5, 2, ("int8",))
BATCH_ON_GPU = 8


def prepare(folder: Path, size: Size) -> None:
    """Write photographs, models with random weights, and a cache for each codec."""
    count = num_images(size)
    write_jpegs(folder / "images", count)
    entries = [
        {
            "id": str(number),
            "image": f"{number:05d}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": "top left three bottom right four"},
            ],
        }
        for number in range(count)
    ]
    (folder / "captions.json").write_text(json.dumps(entries))
    pack_llava([folder / "captions.json"], folder / "images", folder / "data")
    corpus = open_corpus(folder / "data")
    options = build_options(size)
    for codec in size.codecs:
        started = time.perf_counter()
        specs = specs_of(size, codec)
        list(build_cache(folder / codec, corpus, specs, geometry="crop", options=options))
        print(f"cache in {codec}: {time.perf_counter() - started:.0f} s", flush=True)
    torch.manual_seed(0)
    CLIPVisionModel(VIT_L).save_pretrained(folder / "tower")
    language = LlamaConfig(
        vocab_size=32000,
        hidden_size=size.language_width,
        intermediate_size=size.language_hidden,
        num_hidden_layers=2,
        num_attention_heads=size.language_width // 128,
    )
    LlamaForCausalLM(language).save_pretrained(folder / "language_model")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "language_model")
    config = {
        "recipe": "revised",
        "stage": "pretrain",
        "student": {
            "vision_tower": "tower",
            "language_model": "language_model",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        "distill": {"teachers": list(size.teachers)},
        "data": {"shards": "data"},
    }
    (folder / "student.yaml").write_text(yaml.safe_dump(config))


def specs_of(size: Size, codec: str) -> list[CacheSpec]:
    """Return the shipped specs of the teachers, with random weights, on the student's grid."""
    return [
        load_spec(name).with_changes(
            weights="random", calibration_images=num_images(size), codec=codec, grid=GRID
        )
        for name in size.teachers
    ]


def build_options(size: Size) -> BuildOptions:
    """Return where teachers run: as a build, and in the loop."""
    has_gpu = torch.cuda.is_available()
    return BuildOptions(
        device="cuda" if has_gpu else "cpu",
        dtype=torch.bfloat16 if has_gpu else torch.float32,
        batch_size=batch_size(size),
        num_workers=0,
    )


def batch_size(size: Size) -> int:
    """Return how many images a step has."""
    return BATCH_ON_GPU if torch.cuda.is_available() else size.batch_size


def num_images(size: Size) -> int:
    """Return how many photographs the caches hold."""
    return 2 * BATCH_ON_GPU if torch.cuda.is_available() else size.images
