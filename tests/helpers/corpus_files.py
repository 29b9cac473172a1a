"""Image files and LLaVA entries for tests that pack a corpus."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from movekd.corpus.report import DroppedKind, PackReport


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
