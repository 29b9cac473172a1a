"""Image files and LLaVA entries for tests that pack a corpus, and damage to a packed one."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from movekd.corpus.pack import pack_llava
from movekd.corpus.report import DroppedKind, PackReport
from movekd.files.ownership import OWNERSHIP_FILE


def picture(
    seed: int, size: tuple[int, int] = (12, 9), format: str = "PNG", **options: Any
) -> bytes:
    """Return an image file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def entry(
    identity: str, image: Any = None, question: str = "<image>\nWhat?", **more: Any
) -> dict[str, Any]:
    """Return a LLaVA entry of one question and its answer."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "This."}]
    return {
        "id": identity,
        **({} if image is None else {"image": image}),
        "conversations": turns,
        **more,
    }


def zero_image(data: Path, position: int) -> dict[str, Any]:
    """Overwrite an image of a corpus with zeros; return its row of the index."""
    image: dict[str, Any] = pq.read_table(data / "index.parquet").slice(position, 1).to_pylist()[0]
    with (data / image["shard"]).open("r+b") as shard:
        shard.seek(image["offset"])
        shard.write(bytes(image["size"]))
    return image


def make_unreadable(data: Path, position: int) -> str:
    """Make an image of a corpus one that cannot be decoded; return its key.

    The key is that of its bytes: so does an image look that another version of Pillow has read.
    """
    image = zero_image(data, position)
    key = hashlib.sha256(bytes(image["size"])).hexdigest()
    for file in ("index.parquet", "names.parquet"):
        table = pq.read_table(data / file)
        keys = [key if old == image["key"] else old for old in table["key"].to_pylist()]
        place = table.schema.get_field_index("key")
        pq.write_table(table.set_column(place, "key", pa.array(keys)), data / file)
    (data / OWNERSHIP_FILE).unlink(missing_ok=True)  # the tables are no longer those of the pack
    return key


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar of files, in the order given; names may be repeated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def check_sums(report: PackReport, out: Path) -> dict[str, Any]:
    """Do the sums of a report with nothing but its file; return what the file holds.

    For each unit: found = kept + reasons. For each reason: as many ids as the units have together.
    """
    report.write(out / "report.json")
    written: dict[str, Any] = json.loads((out / "report.json").read_text())
    reasons: Counter[str] = Counter()
    for unit, sums in written["sums"].items():
        counts = dict(sums)
        assert written[f"num_{unit}_found"] == counts.pop("found") == sum(counts.values())
        counts.pop("kept", None)
        reasons.update(counts)
    for reason, count in reasons.items():
        assert len(written[reason]) == count, reason
    assert report.num_dropped == sum(
        count for reason, count in reasons.items() if reason in get_args(DroppedKind)
    )
    return written


def pack(source: Path, out: str = "data", **options: Any) -> PackReport:
    """Pack what the fixture ``source`` wrote."""
    options = {"num_workers": 1, **options}
    return pack_llava([source / "llava.json"], source / "images", source / out, **options)
