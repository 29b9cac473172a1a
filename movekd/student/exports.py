"""One export, from a loaded student to a directory that is there whole or not at all.

Used by ``movekd export``. Formats: ``hub.export`` (hf, encoder), ``hub.onnx`` and
``official_files``; the card is ``hub.card``'s.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from movekd.errors import ConfigError
from movekd.student.files import TrainedStudent
from movekd.student.hub.card import Format, model_card
from movekd.student.hub.export import export_encoder, export_hf, write_about
from movekd.student.hub.onnx import export_onnx
from movekd.student.official_files import write_official


def export(trained: TrainedStudent, kind: Format, out: Path, *, overwrite: bool = False) -> str:
    """Write an export with its model card; return what was checked, as a sentence.

    Raises:
        ConfigError: ``out`` holds something, or the format has no place for this student.
        WeightsError: the written encoder computes something else.
    """
    with new_directory(out, overwrite=overwrite) as directory:
        said = ""
        if kind == "hf":
            export_hf(trained, directory)
        elif kind == "encoder":
            export_encoder(trained, directory)
        elif kind == "onnx":
            difference = export_onnx(trained, directory)
            write_about(trained, directory)
            said = f"onnxruntime agrees with PyTorch to {difference:.1e}"
        else:
            write_official(trained, directory)
        card = model_card(trained, kind, out.resolve().name)
        (directory / "README.md").write_text(card, encoding="utf-8")
    return said


@contextmanager
def new_directory(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a directory beside ``out`` that takes its place when all went well.

    Raises:
        ConfigError: ``out`` is a file, or a directory that holds something.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise ConfigError(
            f"{out} exists already; give --overwrite to replace it, or another --out."
        )
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if out.is_dir():
        shutil.rmtree(out)
    temporary.rename(out)
