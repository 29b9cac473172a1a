"""Kill commands, or fill their disk; run them again; compare with an undisturbed one.

A killed command is run once more as its message says (``train`` with --resume). Its output must be
that of the undisturbed command, byte for byte, and nothing that it read may have changed.
"""

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hostile_world import (
    WEIGHTS,
    Outcome,
    World,
    build_words,
    command,
    copy,
    digest,
    pack_words,
    train_words,
)

Words = list[object]


@dataclass(frozen=True)
class Case:
    """A command that writes a folder.

    Attributes:
        words: makes the command, from the world and the folder that it writes.
        start: makes what lies in the folder before; None: it does not exist.
        more: words for the second call.
        compared: part of the folder that is compared.
    """

    words: Callable[[World, Path], Words]
    start: Callable[[World, Path], object] | None = None
    more: tuple[str, ...] = ()
    compared: str = "."


def _export(format: str) -> Case:
    return Case(lambda w, out: ["export", w.run, "--format", format, "--output", out])


CASES = {
    "pack": Case(lambda w, out: pack_words(w.source, out, ["large.json"])),
    "pack --overwrite": Case(
        lambda w, out: [*pack_words(w.source, out, ["large.json"]), "--overwrite"],
        lambda w, out: copy(w.small, out),
    ),
    "pack a folder": Case(
        lambda w, out: ["shards", "pack", "--images", w.source / "images", "--output", out]
    ),
    "pack --webdataset": Case(
        lambda w, out: ["shards", "pack", "--webdataset", out], lambda w, out: copy(w.tars, out)
    ),
    "build": Case(lambda w, out: build_words(w.small, out)),
    "append": Case(lambda w, out: build_words(w.large, out), lambda w, out: copy(w.cache, out)),
    "build --overwrite": Case(
        lambda w, out: build_words(w.small, out, "--overwrite"), lambda w, out: copy(w.cache, out)
    ),
    "train": Case(lambda w, out: train_words(w.base, out), more=("--resume",), compared="model"),
    "train --overwrite": Case(
        lambda w, out: train_words(w.base, out, "--overwrite"),
        lambda w, out: copy(w.run, out),
        compared="model",
    ),
    "export hf": _export("hf"),
    "export encoder": _export("encoder"),
    "import": Case(
        lambda w, out: [
            *("import", w.official, "--language-model", WEIGHTS / "language_model"),
            *("--vision-tower", WEIGHTS / "clip", "--output", out),
        ]
    ),
}


@dataclass(frozen=True)
class Reference:
    """What the undisturbed command does: its outcome, its files and their bytes."""

    outcome: Outcome
    files: dict[str, str]
    size_bytes: int


_references: dict[str, Reference] = {}


def reference(world: World, name: str, folder: Path) -> Reference:
    """Return what an undisturbed command does; it runs once."""
    if name not in _references:
        case, out = CASES[name], _output(folder)
        if case.start is not None:
            case.start(world, out)
        done = command(case.words(world, out), folder / "scratch", allowed=[out.parent])
        if done.code != 0:
            raise SystemExit(f"{name} failed undisturbed ({done.code}):\n{done.output}")
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        _references[name] = Reference(done, digest(out / case.compared), size)
        shutil.rmtree(folder)
    return _references[name]


def kill_trial(world: World, folder: Path, draw: random.Random) -> tuple[str, str, str]:
    """Kill a command at a file operation or an instant; return what, the verdict, the details."""
    name = draw.choice(sorted(CASES))
    case, expected = CASES[name], reference(world, name, folder)
    out = _output(folder)
    if case.start is not None:
        case.start(world, out)
    at, after = 0, None
    if draw.random() < 0.5:
        at = draw.randint(1, expected.outcome.num_operations)
        where = f"at file operation {at}"
    else:
        after = draw.uniform(0, expected.outcome.seconds)
        where = f"after {after:.3f} s"
    killed = command(
        case.words(world, out),
        folder / "scratch",
        allowed=[out.parent],
        kill_at=at,
        kill_after_s=after,
    )
    what = f"{name} killed {where}"
    if killed.code not in (-9, 0):
        return what, "fault", f"it ended with {killed.code}: {killed.last_line}"
    return what, *_again(world, case, expected, out, folder)


def disk_trial(world: World, folder: Path, draw: random.Random) -> tuple[str, str, str]:
    """Give a command a disk that is too small, then a larger one; return as ``kill_trial``."""
    name = draw.choice(sorted(CASES))
    case, expected = CASES[name], reference(world, name, folder)
    disk = folder / "disk"
    disk.mkdir(parents=True)
    out = disk / "out"
    kib = draw.randint(4, max(8, expected.size_bytes // 1024))
    what = f"{name} on a disk of {kib} KiB"
    _mount(disk, 65_536)
    try:
        if case.start is not None:
            case.start(world, out)
        free = os.statvfs(disk)
        kib += (free.f_blocks - free.f_bfree) * free.f_frsize // 1024
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)
        full = command(case.words(world, out), folder / "scratch", allowed=[out.parent])
        if full.code not in (0, 1, 2) or "Traceback" in full.output:
            return what, "fault", f"it ended with {full.code}: {full.last_line[:500]}"
        if full.code == 2 and len(full.errors.strip().splitlines()) > 3:
            return what, "fault", f"it printed {full.errors[:500]}"
        _mount(disk, 65_536, "remount,")
        return what, *_again(world, case, expected, out, folder)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _output(folder: Path) -> Path:
    """Return the folder that a command writes, in a folder that holds nothing else."""
    out = folder / "written" / "out"
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def can_mount(folder: Path) -> bool:
    """Return whether this process may mount a small disk."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
    )
    if done.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)
    return done.returncode == 0


def _mount(folder: Path, kib: int, how: str = "") -> None:
    kind = [] if how else ["-t", "tmpfs"]
    source = [] if how else ["tmpfs"]
    subprocess.run(["mount", *kind, "-o", f"{how}size={kib}k", *source, str(folder)], check=True)


def _again(
    world: World,
    case: Case,
    expected: Reference,
    out: Path,
    folder: Path,
) -> tuple[str, str]:
    """Run the command again; return the verdict and the details."""
    words = [word for word in case.words(world, out) if not (case.more and word == "--overwrite")]
    tried = [[*words, *case.more], words] if case.more else [words]
    for attempt in tried:  # a run that had not begun cannot be resumed
        done = command(attempt, folder / "scratch", allowed=[out.parent])
        if done.code == 0:
            break
    found = digest(out / case.compared)
    if done.code != 0 and found != expected.files:  # an export that is whole is refused
        return "fault", f"run again, it ended with {done.code}: {done.last_line[:500]}"
    if found != expected.files:
        names = sorted(n for n in found | expected.files if found.get(n) != expected.files.get(n))
        return "silent", f"run again, {', '.join(names[:5])} differ"
    left = [p.name for p in out.rglob("*") if p.name.endswith((".tmp", ".part", ".lock"))]
    left += [path.name for path in out.parent.iterdir() if path != out]
    return ("fault", f"it left {', '.join(left[:5])}") if left else ("held", "")
