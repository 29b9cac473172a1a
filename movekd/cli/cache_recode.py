"""`movekd cache recode`: make a smaller cache out of a larger one, without the teachers."""

from typing import Annotated

import typer

from movekd.cache.codecs import codec_names
from movekd.cli.options import (
    Cache,
    Device,
    Json,
    PositionalCache,
    build_options,
    check_one_of,
    finite,
    one_cache,
)
from movekd.cli.output import percent, print_json, print_table, progress_bar, say, size
from movekd.errors import ConfigError


def recode(
    to: Annotated[
        str,
        typer.Option(
            "--to", help=f"Codec: {', '.join(codec_names())}, or another rank of lowrank."
        ),
    ],
    output: Annotated[
        str, typer.Option(help="Cache to make or to continue: a folder, or s3://bucket/prefix.")
    ],
    cache: Cache = "cache",
    positional: PositionalCache = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option("--teacher", help="Teacher to recode. Repeat for several. Default: all."),
    ] = None,
    cls_attention_heads: Annotated[
        str | None,
        typer.Option(
            help="mean: store the mean over heads of the [CLS] attention. Default: what the cache "
            "has."
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            max=1e6,
            callback=finite,
            help="Stop if a token's error may exceed this. Default: never.",
        ),
    ] = None,
    max_energy_error: Annotated[
        float | None,
        typer.Option(
            max=1,
            callback=finite,
            help="Stop if the energy error of a Zarr shard may exceed this. Default: never.",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="First compare every sealed byte of --output, and make again what differs. "
            "Default: only existence and size.",
        ),
    ] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Make a smaller cache out of a larger one, in another codec and without the teachers.

    Interrupt it at any time: the same command resumes. Rows, index, channel statistics, [CLS] and
    attention stay as they are. The errors that it seals are upper bounds: the error of the source
    and that of the recoding together.

    Example: movekd cache recode --cache cache/ --to int8 --output small/
    """
    from movekd.extract.recode import recode_cache

    if cls_attention_heads is not None:
        check_one_of("--cls-attention-heads", cls_attention_heads, ("mean", "all"))
    for option, limit in (("--max-error", max_error), ("--max-energy-error", max_energy_error)):
        if limit is not None and limit <= 0:
            raise ConfigError(f"{option} is {limit}; expected a number above 0.")
    with progress_bar() as progress:
        summaries = list(
            recode_cache(
                one_cache(cache, positional),
                output,
                to,
                teachers=teacher or [],
                cls_attention_heads=cls_attention_heads,
                max_error=max_error,
                max_energy_error=max_energy_error,
                is_verifying=verify,
                device=build_options(device, "float32", 1, 0).device,
                tell=lambda sentence: say(sentence, err=True),
                progress=progress,
            )
        )
    if json:
        print_json(summaries)
        return
    print_table(
        f"{output}: recoded to {to}; errors are upper bounds",
        ["teacher", "from", "rows", "size", "of before", "error mean", "max", "energy", "seconds"],
        [
            [
                s.status.teacher,
                s.status.recoded_from[-1],
                f"{s.rows_recoded:,}",
                size(s.status.size_bytes),
                percent(s.row_bytes / s.source_row_bytes),
                percent(s.status.error_mean),
                percent(s.status.error_max),
                percent(s.status.error_energy),
                f"{s.seconds:.1f}",
            ]
            for s in summaries
        ],
    )
