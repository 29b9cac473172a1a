"""The files of benchmarks are a stranger's: an odd value gives a score or one sentence."""

import copy
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llava_eval
from movekd.errors import ConfigError
from movekd.evaluate.benchmarks.registry import BENCHMARKS

ODD = [
    *(None, True, "", "abc", "a\0b", "../../etc/passwd", "/etc/passwd", "x" * 5000, "9" * 5000),
    *(-1, 0, 10**40, -(10**400), 1e308, math.nan, [], [[1]], {}, {"a": 1}, "\ud800", "\x1b[2J"),
]


def parse(text):
    """Return the values of a JSON, JSONL or TSV file."""
    try:
        return json.loads(text)
    except ValueError:
        lines = text.splitlines()
    return [json.loads(x) if x.startswith("{") else x.split("\t") for x in lines]


def write(path, content):
    if path.suffix == ".jsonl" or path.name.startswith("coco_pope"):
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
    elif path.suffix in (".tsv", ".txt"):
        lines = ("\t".join(map(str, x)) if isinstance(x, list) else str(x) for x in content)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="replace")
    else:
        path.write_text(json.dumps(content))


def places(value, at=()):
    """Yield the path of each value inside a value."""
    if at:
        yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


def read_and_score(name, options):
    """Return the report of a benchmark, or the sentence that refuses its files."""
    benchmark = BENCHMARKS[name]
    truth = options.get("annotations") or options[{"mme": "images"}.get(name, "questions")]
    try:
        questions = benchmark.load(Path(options["questions"]))
        return benchmark.score(questions, ["yes"] * len(questions), Path(truth))
    except ConfigError as error:
        return str(error)


@pytest.fixture(scope="module")
def files(tmp_path_factory, crops):
    folder = tmp_path_factory.mktemp("benchmarks")
    options = llava_eval.write_benchmarks(folder, crops)
    texts = [p for p in folder.rglob("*") if p.suffix in (".json", ".jsonl", ".tsv", ".txt")]
    content = {path: path.read_text() for path in sorted(texts)}
    return options, content


def check(files, name, path, at, new):
    """Change one value of one file; require a report or one sentence."""
    options, content = files
    changed = copy.deepcopy(parse(content[path]))
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = new
    try:
        write(path, changed)
        said = read_and_score(name, options[name])
    finally:
        path.write_text(content[path])
    if isinstance(said, str):
        assert len(said) < 2000, (path, at, new)
        assert said.isprintable(), (path, at, new)
    else:
        assert math.isfinite(said.value)


def cases(files):
    options, content = files
    for path, text in content.items():
        owner = next(n for n in options if path.is_relative_to(_folder(options[n])))
        for at in places(parse(text)):
            yield owner, path, at


def _folder(options):
    return Path(options["questions"]).parent


@settings(max_examples=60, derandomize=True, deadline=None)
@given(data=st.data())
def test_an_odd_value_is_a_score_or_a_sentence(files, data):
    case = data.draw(st.sampled_from(list(cases(files))))
    check(files, *case, data.draw(st.sampled_from(ODD)))


@pytest.mark.slow
@pytest.mark.parametrize("new", ODD, ids=lambda value: repr(value)[:20])
def test_every_place_with_each_odd_value(files, new):
    for case in cases(files):
        check(files, *case, new)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 3000, b"9" * 5000, b"null", b"[7]\n", b"\0"]
)
def test_a_damaged_file_is_a_sentence(files, content):
    options, texts = files
    for name, path, _ in {(n, p, ()) for n, p, _ in cases(files)}:
        path.write_bytes(content)
        said = read_and_score(name, options[name])
        path.write_text(texts[path])
        assert not isinstance(said, str) or (len(said) < 2000 and said.isprintable())


def test_special_files_do_not_wait(files):
    options, texts = files
    for name, path, _ in {(n, p, ()) for n, p, _ in cases(files)}:
        path.unlink()
        os.mkfifo(path)
        said = read_and_score(name, options[name])
        path.unlink()
        path.write_text(texts[path])
        assert not isinstance(said, str) or "no regular file" in said
