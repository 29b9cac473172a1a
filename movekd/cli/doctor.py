"""`movekd doctor`: check packages, devices, disk and weights of this machine."""

from dataclasses import asdict
from typing import Annotated

import typer

from movekd.cli.options import Cache, Json
from movekd.cli.output import print_json, print_table, say, size


def doctor(
    cache: Cache = "cache",
    no_disk: Annotated[
        bool, typer.Option("--no-disk", help="Do not measure the disk (2 seconds, 256 MiB).")
    ] = False,
    json: Json = False,
) -> None:
    """Check this machine: package versions, devices, disk rates, downloaded teacher weights.

    Exit code 1 if a package is missing or does not fit.

    Example: movekd doctor --cache /data/cache
    """
    from movekd.cache.storage import open_storage
    from movekd.teachers.checkpoints import quiet
    from movekd.view.doctor import examine

    with quiet():
        found = examine(open_storage(cache), is_disk_measured=not no_disk)
    if json:
        print_json(asdict(found) | {"problems": found.problems})
    else:
        print_table(
            f"Python {found.python}, {found.system}",
            ["package", "installed", "needed", "extra", ""],
            [
                [p.name, p.version or "-", p.needs, p.extra, "" if p.is_fit else "does not fit"]
                for p in found.packages
            ],
        )
        print_table(
            "devices",
            ["device", "model", "memory", "bfloat16"],
            [
                [d.name, d.what, size(d.memory_bytes), "yes" if d.bfloat16 else "no"]
                for d in found.devices
            ],
        )
        rates = (found.disk.write_bytes_per_s, found.disk.read_bytes_per_s)
        print_table(
            f"disk of {found.cache}",
            ["free", "writes per second", "random reads per second"],
            [[size(found.free_bytes), *map(size, rates)]],
        )
        if found.disk.reason:
            say(f"not measured: {found.disk.reason}")
        print_table(
            "weights of the shipped teachers",
            ["teacher", "here", "hub repository"],
            [[t.teacher, "yes" if t.path else "no", t.repo or "-"] for t in found.teachers],
        )
        if not all(t.path for t in found.teachers):
            say(
                "The first build that needs missing weights downloads them. Without a network:",
                "`hf download REPOSITORY --local-dir DIRECTORY` elsewhere, then "
                "`movekd cache build --teacher NAME --weights DIRECTORY`.",
                "Some repositories ask you to accept a licence on their page (dinov3's does).",
            )
        for problem in found.problems:
            say(problem)
    if found.problems:
        raise typer.Exit(1)
