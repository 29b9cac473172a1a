"""Image files and LLaVA entries of every kind, to be packed."""

import json

import pytest
from PIL import ExifTags, Image

from corpus_files import entry, picture


@pytest.fixture
def source(tmp_path):
    """Six image files, two of them equal, and an entry for every kind of problem."""
    images = tmp_path / "images"
    (images / "coco").mkdir(parents=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    files = {
        "coco/1.png": picture(1),
        "coco/2.jpg": picture(2, format="JPEG", exif=exif),
        "coco/3.png": picture(3, format="WEBP"),  # the extension lies
        "coco/copy.png": picture(1),
        "4.gif": picture(4, format="GIF"),
        "unused.png": picture(5),
        "broken.jpg": picture(6, (90, 90), format="JPEG")[:-900],
        "words.png": b"no picture",
    }
    for name, data in files.items():
        (images / name).write_bytes(data)
    (tmp_path / "secret.png").write_bytes(picture(7))
    llava = [
        entry("a", "coco/1.png"),
        entry("b", "coco/2.jpg", question_type="which"),
        entry("b", "coco/copy.png"),
        entry("c", "coco/3.png", question="What, without a placeholder?"),
        entry("d", ["coco/1.png", "4.gif"], question="<image> or <image>?"),
        entry("e", ["coco/1.png", "4.gif"], question="<image> or what?"),
        entry("f", question="No image at all."),
        entry("g", "coco/1.png", question="<image> and <image>"),
        entry("h", question="<image>"),
        entry("i", "coco/none.png"),
        entry("j", ["coco/1.png", "broken.jpg"], question="<image><image>"),
        entry("k", "words.png"),
        entry("l", "../secret.png"),
        entry("m", str(tmp_path / "secret.png")),
        entry("n", "coco/../coco/1.png"),
        entry("o", "coco"),
        entry("p", "coco/1.png/x"),
        entry("q", "nul\0.png"),
        {**entry("r", "coco/1.png"), "conversations": [{"from": "gpt", "value": "Hm."}]},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(llava))
    return tmp_path
