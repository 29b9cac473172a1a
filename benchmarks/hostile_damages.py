"""Damage a file, and see whether the commands that read it say so.

A damage is found if a command says so in a line, or mends it. It is harmless if all results are
those of the undamaged file. Everything else is a fault: a traceback, a hang, or silence.
"""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hostile_world import Outcome, World, build_words, command, copy, digest, train_words

Words = list[object]


@dataclass(frozen=True)
class Reader:
    """A command that reads the damaged folder.

    Attributes:
        words: makes the command, from the world, the folder and a folder to write.
        results: makes the part of the written folder that is compared; None: what it prints.
    """

    words: Callable[[World, Path, Path], Words]
    results: Callable[[Path, Path], dict[str, str]] | None = None


def _weights(_: Path, out: Path) -> dict[str, str]:
    found = digest(out / "model")
    return {name: value for name, value in found.items() if name.endswith(".safetensors")}


def _train(world: World, out: Path, data: Path, cache: Path, *more: str) -> Words:
    words = train_words(world.base, out, *more, steps=2)
    words = [str(w).replace(f"data.shards={world.small}", f"data.shards={data}") for w in words]
    return [str(cache) if word == str(world.cache) else word for word in words]


CORPUS = (
    Reader(lambda w, at, out: build_words(at, out), lambda _, out: digest(out)),
    Reader(lambda w, at, out: _train(w, out, at, w.cache), _weights),
)
CACHE = (
    Reader(lambda w, at, out: _train(w, out, w.small, at, "--verify-cache"), _weights),
    Reader(lambda w, at, out: build_words(w.small, at, "--verify"), lambda at, _: digest(at)),
)
CHECKPOINT = (
    Reader(lambda w, at, out: train_words(w.base, at, "--resume"), lambda at, _: _weights(at, at)),
)
MODEL = (
    Reader(
        lambda w, at, out: ["export", at, "--format", "encoder", "--output", out],
        lambda _, out: digest(out),
    ),
)


@dataclass(frozen=True)
class Target:
    """What is damaged: a copy of a part of the world, and who reads it."""

    make: Callable[[World, Path], object]
    readers: tuple[Reader, ...]
    files: Callable[[Path], list[Path]] = lambda at: [p for p in at.rglob("*") if p.is_file()]


def _killed_run(world: World, at: Path) -> None:
    """Make a run as a kill after its last checkpoint leaves it."""
    copy(world.run, at)
    shutil.rmtree(at / "model")
    (at / "log.json").unlink()


def _in_checkpoints(at: Path) -> list[Path]:
    return [path for path in at.glob("checkpoint-*/**/*") if path.is_file()]


TARGETS = {
    "corpus": Target(lambda w, at: copy(w.small, at), CORPUS),
    "cache": Target(lambda w, at: copy(w.cache, at), CACHE),
    "checkpoint": Target(_killed_run, CHECKPOINT, _in_checkpoints),
    "model": Target(lambda w, at: copy(w.run / "model", at), MODEL),
}


def _swap(path: Path, draw: random.Random) -> bool:
    others = [p for p in path.parent.iterdir() if p.suffix == path.suffix and p != path]
    others = [p for p in others if p.is_file() and p.read_bytes() != path.read_bytes()]
    if not others:
        return False
    other = draw.choice(sorted(others))
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)
    return True


def _flip(path: Path, draw: random.Random) -> bool:
    content = bytearray(path.read_bytes())
    if not content:
        return False
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return True


def _cut(path: Path, draw: random.Random) -> bool:
    size = path.stat().st_size
    os.truncate(path, draw.randrange(size) if size else 0)
    return size > 0


def _replace(make: Callable[[Path], object]) -> Callable[[Path, random.Random], bool]:
    def damage(path: Path, draw: random.Random) -> bool:
        path.unlink()
        make(path)
        return True

    return damage


DAMAGES: dict[str, Callable[[Path, random.Random], bool]] = {
    "deleted": _replace(lambda path: None),
    "emptied": _replace(lambda path: path.touch()),
    "cut": _cut,
    "with a flipped bit": _flip,
    "with another flipped bit": _flip,
    "longer by a byte": lambda path, draw: bool(path.write_bytes(path.read_bytes() + b"\0")),
    "swapped with its neighbour": _swap,
    "replaced by a FIFO": _replace(os.mkfifo),
    "replaced by a folder": _replace(lambda path: path.mkdir()),
    "replaced by a link to /dev/zero": _replace(lambda path: path.symlink_to("/dev/zero")),
}

_expected: dict[tuple[str, int], tuple[dict[str, str], str]] = {}


def damage_trial(world: World, folder: Path, draw: random.Random) -> tuple[str, str, str]:
    """Damage one file; return what, the verdict and the details."""
    name = draw.choice(sorted(TARGETS))
    target = TARGETS[name]
    number = draw.randrange(len(target.readers))
    reader = target.readers[number]
    at, out = folder / "at", folder / "out"
    if (name, number) not in _expected:
        target.make(world, at)
        done = _read(world, reader, at, out, folder)
        if done.code:
            raise SystemExit(f"{name} undamaged: {done.code}\n{done.output}")
        _expected[name, number] = _result(reader, at, out, done)
        shutil.rmtree(folder)
    target.make(world, at)
    path = draw.choice(sorted(target.files(at)))
    how = draw.choice(sorted(DAMAGES))
    words = " ".join(str(word) for word in reader.words(world, Path("AT"), Path("OUT"))[:3])
    what = f"{name}: {path.relative_to(at)} {how}, read by {words}"
    if not DAMAGES[how](path, draw):
        return what, "harmless", "nothing to damage"
    done = _read(world, reader, at, out, folder)
    if done.code not in (0, 1, 2) or "Traceback (most" in done.output:
        return what, "fault", f"ended with {done.code}: {done.last_line[:500]}"
    if done.code:
        is_said = "movekd: " in done.errors or done.code == 1
        return what, "found" if is_said else "fault", done.last_line[:500]
    result = _result(reader, at, out, done)
    same = result[0] == _expected[name, number][0]
    is_named = any(mark in done.errors for mark in (path.name, "damaged", "is gone", "again"))
    if same:
        return what, "found" if is_named else "harmless", done.last_line[:500]
    changed = {n for n in result[0] if result[0].get(n) != _expected[name, number][0].get(n)}
    return (
        what,
        "found" if is_named else "silent",
        f"{sorted(changed)[:4]} differ; {done.output[-300:]}",
    )


def _read(world: World, reader: Reader, at: Path, out: Path, folder: Path) -> Outcome:
    return command(reader.words(world, at, out), folder / "scratch", allowed=[at, out])


def _result(reader: Reader, at: Path, out: Path, done: Outcome) -> tuple[dict[str, str], str]:
    return (reader.results(at, out) if reader.results else {}), done.output
