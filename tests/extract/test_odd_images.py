"""Whatever a corpus holds: shown as a viewer would, or listed with a reason."""

import io
import tarfile

import numpy as np
from PIL import Image

from movekd.cache.reader import open_cache
from movekd.corpus.index import open_corpus
from movekd.corpus.webdataset import index_webdataset
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache


def picture(mode: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A gradient in any of Pillow's modes."""
    ramp = np.arange(size[0] * size[1]).reshape(size[1], size[0]) % 251
    image = Image.fromarray(np.stack([ramp, ramp // 2, 255 - ramp], -1).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((ramp * 257).astype(np.uint16))
    return image.convert(mode)


def odd_images() -> dict[str, tuple[bytes, bool]]:
    """Files that corpora hold, name -> (bytes, whether a viewer shows them)."""

    def saved(image, format, **options):
        out = io.BytesIO()
        image.save(out, format, **options)
        return out.getvalue()

    rotated = Image.Exif()
    rotated[0x0112] = 6
    jpeg = saved(picture("RGB", (64, 64)), "JPEG")
    frames = [picture("P"), picture("L")]
    return {
        "cmyk.jpg": (saved(picture("CMYK"), "JPEG"), True),
        "16bit.png": (saved(picture("I;16"), "PNG"), True),
        "animated.gif": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), True),
        "exif.jpg": (saved(picture("RGB"), "JPEG", exif=rotated), True),
        "palette.png": (saved(picture("P"), "PNG"), True),
        "alpha.png": (saved(picture("RGBA"), "PNG"), True),
        "pixel.png": (saved(picture("RGB", (1, 1)), "PNG"), True),
        "été 猫.png": (saved(picture("L"), "PNG"), True),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], False),
        "empty.jpg": (b"", False),
        "text.png": (b"no image", False),
        "bomb.png": (saved(Image.new("1", (20_000, 20_000)), "PNG"), False),
        "strip.png": (saved(picture("RGB", (900, 2)), "PNG"), False),
    }


def test_odd_images_are_shown_or_listed_and_the_build_goes_on(tmp_path, tiny_specs) -> None:
    """In tars with an empty one, a truncated one, keys that lead outside, and keys twice."""
    wds, images = tmp_path / "wds", odd_images()
    wds.mkdir()
    with tarfile.open(wds / "a.tar", "w") as tar:
        for name, (data, _) in [*images.items(), ("../../evil.png", images["pixel.png"]),
                                ("alpha.png", images["palette.png"])]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (wds / "empty.tar").write_bytes(b"")
    (wds / "truncated.tar").write_bytes((wds / "a.tar").read_bytes()[:700])
    report = index_webdataset(wds, num_workers=1)
    shown = sorted(name for name, (_, is_shown) in images.items() if is_shown)
    unreadable = {name for name, (_, is_shown) in images.items() if not is_shown}
    assert {name.rpartition(":")[2].rpartition("/")[2] for name, _ in report.unreadable_images} == (
        unreadable
    )
    corpus = open_corpus(wds)
    assert len(corpus) == len(shown)
    victim = int(corpus.rows(["palette"])[0])
    place = corpus.index.slice(victim, 1).to_pylist()[0]
    with (wds / place["shard"]).open("r+b") as tar:  # damaged after it was packed
        tar.seek(place["offset"])
        tar.write(bytes(place["size"]))
    options = BuildOptions(batch_size=4, num_workers=0)
    (summary,) = build_cache(
        tmp_path / "cache", corpus, tiny_specs[:1], geometry="crop", options=options
    )
    assert summary.status.images == len(shown)
    assert list(summary.skipped) == [place["key"]]
    targets = open_cache(tmp_path / "cache")["clip"].read(range(len(shown)))
    finite = targets.tokens_BND.isfinite().all(-1).all(-1)
    assert [row for row, is_finite in enumerate(finite.tolist()) if not is_finite] == [victim]
    assert not list(tmp_path.parent.glob("evil*"))
