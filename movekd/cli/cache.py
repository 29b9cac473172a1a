"""`movekd cache`: the group of commands, and `ls`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from movekd.cli.aliases import Command
from movekd.cli.cache_build import build
from movekd.cli.cache_fidelity import fidelity
from movekd.cli.cache_plan import plan
from movekd.cli.cache_recode import recode
from movekd.cli.cache_show import show
from movekd.cli.cache_verify import verify
from movekd.cli.options import Cache, Json, PositionalCache, one_cache
from movekd.cli.output import percent, print_json, print_table, say, size
from movekd.errors import CorruptCacheError

if TYPE_CHECKING:
    from movekd.cache.contents import CacheContents
    from movekd.cache.verify import TeacherStatus

_SHOWN = 10

app = typer.Typer(no_args_is_help=True)
for command in (build, plan, fidelity, recode, show, verify):
    app.command(cls=Command)(command)


@app.command("ls", cls=Command)
def list_teachers(
    cache: Cache = "cache", positional: PositionalCache = None, json: Json = False
) -> None:
    """List the teachers of a cache: rows, completeness, size, codec, error.

    Exits with 1 if sealed files are missing or have another size than their seals say.

    Example: movekd cache ls --cache cache/
    """
    from concurrent.futures import ThreadPoolExecutor

    from movekd.cache.contents import open_contents
    from movekd.cache.inventory import wrong_files
    from movekd.cache.verify import teacher_status

    cache = one_cache(cache, positional)
    opened = open_contents(cache)
    teachers: list[TeacherStatus] = []
    wrong: dict[str, list[str]] = {}
    for name in opened.teachers:
        try:
            sealed = opened.sealed(name)
            with ThreadPoolExecutor(1) as beside:  # the keys are read while Python reads the seals
                beside.submit(opened.catalog.zarr_shards, sealed.layout.rows_per_shard)
                found = wrong_files(sealed)
            sealed.require_images(opened.catalog)
            wrong[name] = [str(file) for file in found]
            teachers.append(teacher_status(sealed, opened.catalog))
        except CorruptCacheError as error:  # the other teachers are listed nevertheless
            wrong[name] = [str(error)]
    if json:
        print_json(
            {
                "geometry": opened.geometry,
                "views": opened.views,
                "images": opened.catalog.num_images,
                "rows": len(opened.catalog.index),
                "teachers": teachers,
                "wrong_files": {name: found for name, found in wrong.items() if found},
            }
        )
    else:
        _print_teachers(opened, teachers, wrong)
    if any(wrong.values()):
        raise typer.Exit(1)


def _print_teachers(
    opened: "CacheContents", teachers: "Sequence[TeacherStatus]", wrong: Mapping[str, Sequence[str]]
) -> None:
    print_table(
        f"{opened.url}: {opened.catalog.num_images:,} images, geometry "
        f"{opened.geometry}, views {opened.views}: {len(opened.catalog.index):,} rows",
        [
            *("teacher", "state", "rows", "grid", "channels", "codec", "size", "error mean", "max"),
            "fingerprint",
        ],
        [
            [
                t.teacher,
                _state(t, wrong[t.teacher]),
                f"{t.rows:,}",
                f"{t.grid}x{t.grid}",
                t.width,
                t.codec if t.compressor == "none" else f"{t.codec} {t.compressor}",
                size(t.size_bytes),
                percent(t.error_mean),
                percent(t.error_max),
                t.fingerprint[:12],
            ]
            for t in teachers
        ],
    )

    for t in teachers:
        if t.recoded_from:
            say(f"{t.teacher}: recoded from {', '.join(t.recoded_from)}; errors are upper bounds")
    for name, found in wrong.items():
        for sentence in found[:_SHOWN]:
            say(f"{name}: {sentence}", err=True)
        if found[_SHOWN:]:
            say(f"{name}: {len(found) - _SHOWN} more files", err=True)
        for t in teachers:
            if found and name == t.teacher:
                command = "recode" if t.recoded_from else "build"
                again = f"run its `movekd cache {command}` again"
                say(f"{name}: {again}, which makes these Zarr shards anew", err=True)


def _state(teacher: "TeacherStatus", wrong: Sequence[str]) -> str:
    state = (
        "complete"
        if teacher.sealed_shards == teacher.total_shards
        else f"{teacher.sealed_shards} of {teacher.total_shards} Zarr shards"
    )
    if wrong:
        files = f"{len(wrong)} file{'s' if wrong[1:] else ''}"
        state = f"{files} MISSING OR WRONG, else {state}"
    state += f", {teacher.skipped} skipped" if teacher.skipped else ""
    return state + (", RANDOM WEIGHTS" if teacher.random_weights else "")
