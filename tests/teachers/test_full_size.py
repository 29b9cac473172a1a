"""Every shipped teacher at full size, with random weights, on one square of a photograph.

Minutes and gigabytes each: one at a time, every one in a process of its own, so that the peak of
its memory is its own too.
"""

import json
import subprocess
import sys

import pytest
import torch

from movekd.cache.spec import shipped_specs

OUTPUTS = {
    "clip": ([576, 1024], [1024], [16, 576]),
    "convnext": ([1024, 3072], None, None),
    "dinov2": ([1369, 1024], [1024], [16, 1369]),
    "dinov3": ([1024, 1024], [1024], [16, 1024]),
    "eva02": ([4096, 1024], None, None),
    "eva02_clip": ([576, 1024], [1024], [16, 576]),
    "pix2struct": ([1024, 1536], None, None),
    "radio": ([1024, 1024], [1024], [16, 1024]),
    "sam": ([4096, 256], None, None),
    "siglip2": ([729, 1152], [1152], [16, 729]),
}
"""Shipped spec -> shapes of tokens, [CLS] and attention, an image."""

MAX_RSS_GIB = 6

FORWARD = """
import io, json, resource, sys

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from movekd.extract.image_loader import image_transform
from movekd.cache.spec import load_spec
from movekd.teachers import load_teacher

torch.set_num_threads(int(sys.argv[2]))
teacher = load_teacher(load_spec(sys.argv[1]).with_changes(weights="random"))
png = io.BytesIO()
Image.fromarray(load_sample_images().images[0][:400, 100:500]).save(png, "PNG")
pixels = image_transform(teacher.spec, "crop")(png.getvalue())
output = teacher(torch.from_numpy(pixels)[None])
found = {
    name: None if tensor is None else {
        "shape": list(tensor.shape[1:]),
        "dtype": str(tensor.dtype),
        "is_finite": bool(tensor.isfinite().all()),
        "std": float(tensor.std()),
        "mass": float(tensor.sum(-1).max()),
    }
    for name, tensor in vars(output).items()
}
found["rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(shipped_specs()))
def test_full_size_runs_on_a_photograph(name: str) -> None:
    command = [sys.executable, "-c", FORWARD, name, str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    shapes = dict(zip(("tokens_BND", "cls_BD", "cls_attention_BHN"), OUTPUTS[name], strict=True))
    for part, shape in shapes.items():
        assert (found[part] is None) == (shape is None), part
        if shape is not None:
            assert found[part]["shape"] == shape
            assert found[part]["dtype"] == "torch.float32"
            assert found[part]["is_finite"]
            assert found[part]["std"] > 0
    if shapes["cls_attention_BHN"] is not None:
        assert found["cls_attention_BHN"]["mass"] <= 1 + 1e-5
    print(f"{name}: {found['rss_gib']:.2f} GiB")  # pytest -s shows it
    assert found["rss_gib"] < MAX_RSS_GIB
