"""`movekd cache`: the group of commands, and `ls`."""

from typing import TYPE_CHECKING

import typer

from movekd.cli.aliases import Command
from movekd.cli.cache_build import build
from movekd.cli.cache_fidelity import fidelity
from movekd.cli.cache_plan import plan
from movekd.cli.cache_show import show
from movekd.cli.cache_verify import verify
from movekd.cli.options import Cache, Json, PositionalCache, one_cache
from movekd.cli.output import percent, print_json, print_table, size

if TYPE_CHECKING:
    from movekd.cache.verify import TeacherStatus

app = typer.Typer(no_args_is_help=True)
for command in (build, plan, fidelity, show, verify):
    app.command(cls=Command)(command)


@app.command("ls", cls=Command)
def list_teachers(
    cache: Cache = "cache", positional: PositionalCache = None, json: Json = False
) -> None:
    """List the teachers of a cache: rows, completeness, size, codec, error.

    Example: movekd cache ls --cache cache/
    """
    from movekd.cache.contents import open_contents
    from movekd.cache.verify import status

    cache = one_cache(cache, positional)
    opened = open_contents(cache)
    teachers = status(opened)
    if json:
        print_json(
            {
                "geometry": opened.geometry,
                "views": opened.views,
                "images": opened.catalog.num_images,
                "rows": len(opened.catalog.index),
                "teachers": teachers,
            }
        )
        return
    print_table(
        f"{cache}: {opened.catalog.num_images:,} images, geometry "
        f"{opened.geometry}, views {opened.views}: {len(opened.catalog.index):,} rows",
        [
            *("teacher", "state", "rows", "grid", "channels", "codec", "size", "error mean", "max"),
            "fingerprint",
        ],
        [
            [
                t.teacher,
                _state(t),
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


def _state(teacher: "TeacherStatus") -> str:
    state = (
        "complete"
        if teacher.sealed_shards == teacher.total_shards
        else f"{teacher.sealed_shards} of {teacher.total_shards} Zarr shards"
    )
    state += f", {teacher.skipped} skipped" if teacher.skipped else ""
    return state + (", RANDOM WEIGHTS" if teacher.random_weights else "")
