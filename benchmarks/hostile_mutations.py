"""Change a value of a file as a stranger could, and start the command that reads it.

The command must refuse it in one line, or run: no traceback, no hang, no more memory, no file
outside of its output. Seals of a cache are made to fit again, as a stranger would.
"""

import copy as copying
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from hostile_world import (
    WEIGHTS,
    Outcome,
    World,
    build_words,
    command,
    copy,
    pack_words,
    spec_file,
    train_words,
)

MAX_MORE_S, MAX_MORE_MIB = 2.0, 200.0
"""Time and memory that a refusal may take beyond a valid start."""
MAX_SENTENCE = 2048

Words = list[object]
RAW = "@@{}@@"  # a value that JSON and YAML have no object for; replaced in the text
RAW_TEXTS = (
    "[" * 3000 + "]" * 3000,
    "9" * 5000,
    "-" + "9" * 400,
    "1e999",
    "NaN",
    "-Infinity",
)
TEMPLATES = ("{% if", "{{ 1/0 }}", "{% for x in range(10**9) %}x{% endfor %}", "", "\0")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1.5, 10**40, 2**62, -(2**63), 1e300),
    *("", "abc", "a\0b", "../../../outside", "/etc/passwd", "__class__", "x" * 100_000, "\ud800"),
    *([], {}, [1, 2, 3], {"a": {"b": []}}, [None]),
    *(RAW.format(n) for n in range(len(RAW_TEXTS))),
)


@dataclass(frozen=True)
class Kind:
    """A kind of file and the command that reads it.

    Attributes:
        make: makes a folder that holds such files.
        files: patterns of the files in it.
        words: makes commands from the world, the folder and a folder to write; one is drawn.
        is_sealed: whether checksums of a cache are made to fit after the change.
    """

    make: Callable[[World, Path], object]
    files: tuple[str, ...]
    words: tuple[Callable[[World, Path, Path], Words], ...]
    is_sealed: bool = False


def _spec(world: World, at: Path) -> None:
    at.mkdir(parents=True)
    spec_file(at, "clip")


def _config(world: World, at: Path) -> None:
    at.mkdir(parents=True)
    shutil.copy(world.run / "config.yaml", at / "student.yaml")


def _conversations(world: World, at: Path) -> None:
    at.mkdir(parents=True)
    entries = json.loads((world.source / "small.json").read_text())[:4]
    (at / "small.json").write_text(json.dumps(entries))
    (at / "images").symlink_to(world.source / "images")


def _questions(world: World, at: Path) -> None:
    at.mkdir(parents=True)
    shutil.copy(world.source / "test.json", at / "test.json")


def _ask(model: Path, world: World) -> Words:
    return ["ask", model, sorted((world.source / "images").iterdir())[0], "What is the sum?"]


KINDS = {
    "spec": Kind(
        _spec,
        ("clip.yaml",),
        (
            lambda w, at, out: [
                *("cache", "build", "--teacher", at / "clip.yaml", "--shards", w.small),
                *("--cache", out, "--num-workers", 0, "--device", "cpu"),
            ],
        ),
    ),
    "student.yaml": Kind(
        _config,
        ("student.yaml",),
        (
            lambda w, at, out: ["train", "--config", at / "student.yaml", "--dry-run"],
            lambda w, at, out: ["train", "--config", at / "student.yaml", "--show-samples", 1],
        ),
    ),
    "cache": Kind(
        lambda w, at: copy(w.cache, at),
        ("**/*.json", "*.parquet", "**/*.parquet"),
        (
            lambda w, at, out: ["cache", "ls", at],
            lambda w, at, out: ["cache", "verify", at],
            lambda w, at, out: [
                *("cache", "show", "--cache", at, "--shards", w.small, "--random", 1),
                *("--output", out),
            ],
            lambda w, at, out: [
                str(at) if word == w.cache else word for word in train_words(w.base, out, steps=1)
            ],
            lambda w, at, out: build_words(w.small, at),
        ),
        is_sealed=True,
    ),
    "corpus": Kind(
        lambda w, at: copy(w.small, at),
        ("*.parquet", "*.json", "*.jsonl"),
        (
            lambda w, at, out: ["shards", "ls", at],
            lambda w, at, out: build_words(at, out),
        ),
    ),
    "conversations": Kind(
        _conversations, ("small.json",), (lambda w, at, out: pack_words(at, out, ["small.json"]),)
    ),
    "run": Kind(
        lambda w, at: copy(w.run, at),
        ("*.json", "*.yaml", "model/*.json", "model/*.yaml"),
        (
            lambda w, at, out: ["report", at, "--output", out],
            lambda w, at, out: _ask(at, w),
            lambda w, at, out: train_words(w.base, at, "--resume"),
        ),
    ),
    "checkpoint": Kind(
        lambda w, at: copy(w.run, at),
        ("checkpoint-*/*.json",),
        (lambda w, at, out: train_words(w.base, at, "--resume"),),
    ),
    "export": Kind(
        lambda w, at: copy(w.hf, at),
        ("*.json", "*.jinja"),
        (lambda w, at, out: _ask(at, w),),
    ),
    "released checkpoint": Kind(
        lambda w, at: copy(w.official, at),
        ("*.json", "*.jinja"),
        (
            lambda w, at, out: [
                *("import", at, "--language-model", WEIGHTS / "language_model"),
                *("--vision-tower", WEIGHTS / "clip", "--output", out),
            ],
        ),
    ),
    "questions": Kind(
        _questions,
        ("test.json",),
        (
            lambda w, at, out: [
                *("evaluate", w.run, "--questions", at / "test.json"),
                *("--images", w.source / "images", "--answers", at / "answers.jsonl"),
            ],
        ),
    ),
}

_valid: dict[tuple[str, int], Outcome] = {}


def mutation_trial(world: World, folder: Path, draw: random.Random) -> tuple[str, str, str]:
    """Change one value; return what, the verdict and the details."""
    name = draw.choice(sorted(KINDS))
    kind = KINDS[name]
    number = draw.randrange(len(kind.words))
    at, out = folder / "at", folder / "out"

    def run() -> Outcome:
        words = kind.words[number](world, at, out)
        return command(words, folder / "scratch", allowed=[at, out])

    if (name, number) not in _valid:
        kind.make(world, at)
        _valid[name, number] = run()
        if _valid[name, number].code:
            raise SystemExit(f"{name} {number} unchanged:\n{_valid[name, number].output}")
        shutil.rmtree(folder)
    kind.make(world, at)
    found = {path for pattern in kind.files for path in at.glob(pattern) if path.is_file()}
    path = draw.choice(sorted(found))
    how = mutate(path, draw)
    if kind.is_sealed and path.suffix == ".json":
        reseal(path)
    if kind.is_sealed:
        reseal_listed(at, path)
    words = " ".join(str(word) for word in kind.words[number](world, Path("AT"), Path("OUT"))[:2])
    what = f"{name}: {path.relative_to(at)} {how}, read by {words}"
    done = run()
    problem = _problem(done, _valid[name, number], folder)
    if problem.startswith("took"):  # another process may have had the cores
        shutil.rmtree(out, ignore_errors=True)
        problem = _problem(run(), _valid[name, number], folder)
    return what, "fault" if problem else "clean", problem or done.last_line[:300]


def _problem(done: Outcome, valid: Outcome, folder: Path) -> str:
    """Return what is wrong with an outcome, or an empty string."""
    if done.code not in (0, 1, 2):
        return f"ended with {done.code}: {done.last_line[:500]}"
    if "Traceback (most" in done.output:
        return f"a traceback: {done.last_line[:500]}"
    if outside := [line for line in done.outside if str(folder) not in line or "outside" in line]:
        return f"it wrote {outside[:3]}"
    if done.code == 2:
        lines = [line for line in done.errors.splitlines() if line.strip()]
        if len(lines) != 1 or len(lines[0]) > MAX_SENTENCE:
            sizes = [len(line) for line in lines]
            return f"{len(lines)} lines of {sizes} characters: {done.errors[:400]}"
        if done.seconds > valid.seconds + MAX_MORE_S:
            return f"took {done.seconds:.1f} s to refuse; a valid start takes {valid.seconds:.1f}"
        if done.peak_mib > valid.peak_mib + MAX_MORE_MIB:
            return f"took {done.peak_mib:.0f} MiB to refuse; a valid start {valid.peak_mib:.0f}"
    return ""


def mutate(path: Path, draw: random.Random) -> str:
    """Change one value of a file; return what was done."""
    if path.suffix == ".parquet":
        return _mutate_table(path, draw)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jinja":
        new = draw.choice(TEMPLATES)
        path.write_text(draw.choice([new, text + new]), encoding="utf-8")
        return f"with {new!r}"
    lines = path.suffix == ".jsonl"
    content = (
        [json.loads(line) for line in text.splitlines()]
        if lines
        else yaml.safe_load(text)
        if path.suffix == ".yaml"
        else json.loads(text)
    )
    places = list(_places(content))
    where = draw.choice(places)
    value = draw.choice(VALUES)
    content = copying.deepcopy(content)
    holder, key = content, where[-1]
    for part in where[:-1]:
        holder = holder[part]
    if draw.random() < 0.1:
        del holder[key]
        how = "deleted"
    else:
        holder[key] = value
        how = f"= {_short(value)}"
    if path.suffix == ".yaml":
        try:
            text = yaml.safe_dump(content)
        except yaml.YAMLError:
            text = json.dumps(content)
    else:
        text = "\n".join(map(json.dumps, content)) if lines else json.dumps(content, indent=1)
    for number, raw in enumerate(RAW_TEXTS):
        marked = RAW.format(number)
        text = text.replace(f'"{marked}"', raw).replace(f"'{marked}'", raw).replace(marked, raw)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return f"{'.'.join(map(str, where))} {how}"


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in items:
            yield (*at, key)
            yield from _places(child, (*at, key))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:30]}... ({len(text)})"


def _mutate_table(path: Path, draw: random.Random) -> str:
    table = pq.read_table(path)
    number = draw.randrange(table.num_columns)
    name, kind = table.schema[number].name, table.schema[number].type
    values: list[Any] = table.column(number).to_pylist()
    row = draw.randrange(max(1, len(values)))
    how = draw.choice(["dropped", "null", "other type", "huge", "negative", "text", "repeated"])
    if how == "dropped" or not values:
        pq.write_table(table.drop_columns([name]), path)
        return f"{name} dropped"
    if how == "other type":
        values, kind = [1.5] * len(values), pa.float64()
    elif how == "text":
        values = [str(value) for value in values]
        kind = kind if pa.types.is_string(kind) else pa.string()
    elif how in ("huge", "negative") and isinstance(values[row], int):
        kind = pa.int64()
    values[row] = {"null": None, "text": "../../../outside", "repeated": values[0]}.get(
        how, values[row]
    )
    if pa.types.is_integer(kind):
        values[row] = {"huge": 2**62, "negative": -1}.get(how, values[row])
    pq.write_table(table.set_column(number, name, pa.array(values, kind)), path)
    return f"{name} of row {row}: {how}"


def reseal(path: Path) -> None:
    """Give a sealed JSON file the checksum of its changed content, if it still has one."""
    from movekd.cache.seal import sealed_bytes

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("xxh3_128")
        path.write_bytes(sealed_bytes(content))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return  # it was never sealed, or is no JSON any more


def reseal_listed(cache: Path, changed: Path) -> None:
    """Write the size and checksum of a changed file into the seals that list it."""
    from movekd.cache.seal import entry

    name = changed.relative_to(cache).as_posix()
    new = entry([changed.read_bytes()]).model_dump()
    for seal in cache.rglob("*.json"):
        try:
            content = json.loads(seal.read_text(encoding="utf-8"))
            files = content["files"]
            listed = [key for key in files if name.endswith(key)]
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
            continue
        if listed and seal != changed:
            for key in listed:
                files[key] = new
            seal.write_text(json.dumps(content), encoding="utf-8")
            reseal(seal)
