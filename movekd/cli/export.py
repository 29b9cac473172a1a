"""`movekd export` and `movekd import`: write and read models in other formats."""

from pathlib import Path
from typing import Annotated

import typer

from movekd.cli.options import Json, Run, check_one_of
from movekd.cli.output import print_json, quiet_libraries, say, size

FORMATS = ("hf", "encoder", "onnx", "official")
LORA = ("merged", "adapter")
Overwrite = Annotated[
    bool, typer.Option(help="Replace an earlier export or import in --output, if unchanged.")
]
Force = Annotated[
    bool,
    typer.Option(help="With --overwrite: delete also files there that movekd did not write."),
]


def export(
    model: Run,
    format: Annotated[
        str,
        typer.Option(
            help="hf: the whole model, for transformers. encoder: its vision encoder, for "
            "AutoModel. onnx: the encoder, for onnxruntime. official: files of the released code."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    overwrite: Overwrite = False,
    force: Force = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Load the export again in a fresh process and compare it with the run. Needs the "
            "memory of the model twice; for --format official also its disk space.",
        ),
    ] = True,
    lora: Annotated[
        str,
        typer.Option(
            help="Of a language model with LoRA. merged: into its weights. adapter: beside them, "
            "for PEFT; only --format hf."
        ),
    ] = "merged",
    json: Json = False,
) -> None:
    """Write a trained student in the format of another library, with a model card.

    Examples:

    movekd export runs/finetune --format hf --output my-model

    movekd export runs/finetune --format official --output released
    """
    check_one_of("--format", format, FORMATS)
    check_one_of("--lora", lora, LORA)
    from movekd.student.checkpoint import load_student
    from movekd.student.export.formats import export as write
    from movekd.student.export.model_card import random_parts

    quiet_libraries()
    trained = load_student(model, takes_encoder=True, language_lora=lora)  # type: ignore[arg-type]
    said = write(
        trained,
        format,  # type: ignore[arg-type]  # one of FORMATS
        output,
        overwrite=overwrite,
        force=force,
        check=check,
        source=model,
        lora=lora,  # type: ignore[arg-type]  # one of LORA
    )
    paths = sorted(path for path in output.rglob("*") if path.is_file())
    files = {path.relative_to(output).as_posix(): path.stat().st_size for path in paths}
    random = random_parts(trained.student.vlm)
    if json:
        print_json(
            {"format": format, "out": output, "files": files, "random": random, "check": said}
        )
        return
    for name, num_bytes in files.items():
        say(f"{output / name}  {size(num_bytes)}")
    say(said)
    if random:
        say(f"random weights ({', '.join(random)}): the card says so", err=True)


def import_(
    source: Annotated[
        Path,
        typer.Argument(help="A released checkpoint, or the folder of its stage 1 (three files)."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; the model goes to OUTPUT/model.")],
    vision_tower: Annotated[
        str | None,
        typer.Option(help="Hub id or directory of the CLIP. Default: that of config.json."),
    ] = None,
    language_model: Annotated[
        str | None, typer.Option(help="Hub id or directory; needed for the files of stage 1.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Hub id or directory of a fast tokenizer, if SOURCE has none."),
    ] = None,
    overwrite: Overwrite = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Convert files of the released code to a model for `ask`, `evaluate` and `export`.

    `export --format official` writes back the same names, shapes and values. The command executes
    nothing in the files.

    Examples:

    movekd import MoVE-KD-7b-v1.1 --output models/7b

    movekd import pretrain-files --language-model lmsys/vicuna-7b-v1.5 --output models/stage-1
    """
    from movekd.student.export.output_folder import new_directory
    from movekd.student.official.import_checkpoint import import_official

    quiet_libraries()
    named = {
        "vision_tower": vision_tower,
        "language_model": language_model,
        "tokenizer": tokenizer,
    }
    kept = [source, *(Path(value) for value in named.values() if value is not None)]
    with new_directory(
        output, "movekd import", overwrite=overwrite, force=force, kept=kept
    ) as directory:
        found = import_official(source, directory, **named)
    if json:
        facts = {"out": output, "stage": int(found.stage), "tensors": found.num_tensors}
        print_json(facts | {"dtype": found.dtype, "adapters": list(found.adapters)})
        return
    adapters = f", adapters of {', '.join(found.adapters)}" if found.adapters else ""
    say(
        f"stage {found.stage}: {found.num_tensors} tensors, {found.dtype}{adapters}; model in "
        f"{output / 'model'}"
    )
