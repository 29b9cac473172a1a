"""Export a loaded student in one of the formats, into a directory that is complete or missing.

Used by ``movekd export``; ``movekd import`` uses ``new_directory``. Formats: ``hugging_face`` (hf,
encoder), ``onnx`` and ``official.export_checkpoint``. ``model_card`` writes the card.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from movekd.config import read_yaml
from movekd.errors import ConfigError, MovekdError
from movekd.student.checkpoint import ABOUT_FILE, BASE_KEYS, CONFIG_FILE, TrainedStudent
from movekd.student.export.hugging_face import export_encoder, export_hf, write_about
from movekd.student.export.model_card import Format, model_card
from movekd.student.export.onnx import export_onnx
from movekd.student.official.export_checkpoint import write_official
from movekd.student.tensor_files import read_json


def export(
    trained: TrainedStudent,
    kind: Format,
    out: Path,
    *,
    overwrite: bool = False,
    source: Path | None = None,
) -> str:
    """Write an export with its model card; return what was checked, for the user.

    Args:
        trained: the student.
        kind: the format.
        out: the directory to write.
        overwrite: replace an earlier export in ``out``.
        source: the whole run, if the student came from one; it is not deleted either.

    Raises:
        ConfigError: ``out`` holds files, or the student, or the format cannot hold this student.
        WeightsError: the written encoder gives other tokens.
    """
    if trained.student.tokenizer is None and kind not in ("encoder", "onnx"):
        raise ConfigError(
            f"{trained.directory} holds an encoder of stage: distill without a language model; "
            f"--format {kind} writes both. Export it with --format encoder or onnx, or give it to "
            "a stage: pretrain as init_from first."
        )
    bases = trained.run.get("student") or {}
    named = (bases.get(key) for key in BASE_KEYS)
    kept = [trained.directory, *(Path(base) for base in named if base)]
    kept += [] if source is None else [source]
    with new_directory(out, overwrite=overwrite, kept=kept) as directory:
        said = ""
        if kind == "hf":
            export_hf(trained, directory)
        elif kind == "encoder":
            export_encoder(trained, directory)
        elif kind == "onnx":
            difference = export_onnx(trained, directory)
            said = f"onnxruntime agrees with PyTorch to {difference:.1e}"
        else:
            write_official(trained, directory)
        write_about(trained, directory)
        card = model_card(trained, kind, out.resolve().name)
        (directory / "README.md").write_text(card, encoding="utf-8")
    return said


@contextmanager
def new_directory(
    out: Path, *, overwrite: bool = False, kept: Iterable[Path] = ()
) -> Iterator[Path]:
    """Yield a new directory, which becomes ``out`` if no error is raised.

    Args:
        out: the directory to write.
        overwrite: replace an earlier export or import in ``out``; nothing else is deleted.
        kept: directories that are read; ``out`` may not be, hold or lie in any of them.

    Raises:
        ConfigError: ``out`` is a file, or a directory that holds files.
    """
    _require_free(out, overwrite, kept)
    out = out.resolve()
    temporary, old = (out.with_name(f".{out.name}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if out.is_dir():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _require_free(out: Path, overwrite: bool, kept: Iterable[Path]) -> None:
    place = out.resolve()
    for source in kept:
        if not source.exists():
            continue  # a hub id
        there = source.resolve()
        if place.is_relative_to(there) or there.is_relative_to(place):
            raise ConfigError(
                f"--output {out} is, holds or lies in {source}, which is read; expected a "
                "directory apart from it, because what --output held is deleted. Give another "
                "--output."
            )
    if place.is_dir() and not any(place.iterdir()):
        return
    if place.exists() and not overwrite:
        raise ConfigError(
            f"{out} exists already; give --overwrite to replace it, or another --output."
        )
    if place.exists() and not _is_ours(place):
        raise ConfigError(
            f"{out} was not written by `movekd export` or `import` (no {ABOUT_FILE}, no imported "
            "model), and --overwrite deletes nothing else. Give another --output, or delete it "
            "yourself."
        )


def _is_ours(directory: Path) -> bool:
    """Return whether an export or an import wrote a directory: no run, no files of others."""
    try:
        if (directory / ABOUT_FILE).is_file():
            return "format" in read_json(directory / ABOUT_FILE)
        config = directory / "model" / CONFIG_FILE
        is_alone = [path.name for path in directory.iterdir()] == ["model"]  # a run has more
        return is_alone and "imported" in read_yaml(config)
    except (MovekdError, OSError):
        return False
