"""Export a loaded student in one of the formats, into a directory that is complete or missing.

Used by ``movekd export``. Formats: ``hugging_face`` (hf, encoder), ``onnx`` and
``official.export_checkpoint``. ``model_card`` writes the card, ``check`` compares the export with
the student, ``output_folder`` gives it its name.
"""

from pathlib import Path
from typing import Literal

from movekd.errors import ConfigError
from movekd.student.checkpoint import BASE_KEYS, TrainedStudent, load_student
from movekd.student.export.check import check_export, tolerance_of
from movekd.student.export.hugging_face import export_encoder, export_hf, write_about
from movekd.student.export.model_card import Format, model_card
from movekd.student.export.onnx import export_onnx
from movekd.student.export.output_folder import new_directory
from movekd.student.language_loading import is_in_4bit
from movekd.student.language_lora import has_adapter
from movekd.student.official.export_checkpoint import write_official

_IN_4BIT = (
    ". The run held the language model in 4 bit; the export, and the student that it was compared "
    "with, have the original weights instead, so answers may differ"
)


def export(
    trained: TrainedStudent,
    kind: Format,
    out: Path,
    *,
    overwrite: bool = False,
    force: bool = False,
    check: bool = True,
    source: Path | None = None,
    lora: Literal["merged", "adapter"] = "merged",
) -> str:
    """Write an export with its model card; return what was checked, for the user.

    A language model with an adapter, or in 4 bit, is loaded once more, as ``lora`` says.

    Args:
        trained: the student.
        kind: the format.
        out: the directory to write.
        overwrite: replace an earlier export in ``out``.
        force: replace it also if it has no record of its files, or holds files of others.
        check: load the export again in a fresh process and compare it with the student.
        source: the whole run, if the student came from one; it is not deleted either.
        lora: merged puts an adapter of the language model into the weights of its base; adapter
            writes it beside them, for PEFT (format hf).

    Raises:
        ConfigError: ``out`` holds files, or the student, the format cannot hold this student, or
            the disk is full.
        WeightsError: the export, loaded again, is another model; nothing is kept.
    """
    if trained.student.tokenizer is None and kind not in ("encoder", "onnx"):
        raise ConfigError(
            f"{trained.directory} holds an encoder of stage: distill without a language model; "
            f"--format {kind} writes both. Export it with --format encoder or onnx, or give it to "
            "a stage: pretrain as init_from first."
        )
    vlm = trained.student.vlm
    if lora == "adapter" and not (kind == "hf" and has_adapter(vlm)):
        raise ConfigError(
            f"--lora adapter was given for --format {kind} of {trained.directory}; expected "
            "--format hf, and a run with student.language_model_lora. Leave --lora out."
        )
    merges = lora == "merged" and has_adapter(vlm)
    if kind in ("hf", "official") and (merges or is_in_4bit(vlm)):
        trained = load_student(trained.directory, language_lora=lora)
    bases = trained.run.get("student") or {}
    note = _IN_4BIT if bases.get("load_in_4bit") and kind in ("hf", "official") else ""
    named = (bases.get(key) for key in BASE_KEYS)
    kept = [trained.directory, *(Path(base) for base in named if base)]
    kept += [] if source is None else [source]
    with new_directory(
        out, "movekd export", overwrite=overwrite, force=force, kept=kept
    ) as directory:
        if kind == "hf":
            export_hf(trained, directory)
        elif kind == "encoder":
            export_encoder(trained, directory)
        elif kind == "onnx":
            export_onnx(trained, directory)
        else:
            write_official(trained, directory)
        write_about(trained, directory)
        card = model_card(trained, kind, out.resolve().name)
        (directory / "README.md").write_text(card, encoding="utf-8")
        if not check:
            return f"not compared with the run (--no-check){note}"
        difference = check_export(trained, kind, directory, directory.parent / "scratch")
        reader = {"onnx": "onnxruntime", "official": "movekd import"}.get(kind, "transformers")
        return (
            f"{reader} agrees with the run in a fresh process: outputs differ by {difference:.1e} "
            f"(at most {tolerance_of(trained, kind):.0e} is allowed){note}"
        )
