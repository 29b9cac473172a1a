"""The small files of a run are data: an odd value is one sentence, or allowed."""

import json
import os
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.errors import MovekdError
from movekd.student.checkpoint import load_export, load_student, read_run_config
from movekd.train.fingerprints import require_unchanged_inputs
from movekd.train.init_from import check_same_base
from movekd.train.run_dir import RunStart, plan_start, write_run_files

INPUTS = {"corpus": "c" * 64, "conversations": ["a" * 64], "global_batch_size": 4}
ODD = [
    3,
    "x",
    "",
    None,
    True,
    [],
    [{}],
    {},
    {"a": {"b": 1}},
    -1,
    0.5,
    10**40,
    float("nan"),
    "\x1b[31m",
]
TEXTS = {"@digits@": "9" * 5000, "@deep@": "[" * 3000 + "]" * 3000}
FILES = ("config.yaml", "inputs.json", "launches.json")


def places(content, at=()):
    """Yield the path of every value in a content."""
    yield at
    inner = content.items() if isinstance(content, dict) else ()
    inner = enumerate(content) if isinstance(content, list) else inner
    for key, value in inner:
        yield from places(value, (*at, key))


def mutated(content, place, value):
    """Return a content with another value at a place."""
    if not place:
        return value
    copy = content.copy()
    copy[place[0]] = mutated(copy[place[0]], place[1:], value)
    return copy


def as_text(content, kind):
    """Return a content as YAML or JSON; placeholders become what no writer makes."""
    text = json.dumps(content) if kind.endswith("json") else yaml.safe_dump(content)
    for name, long in TEXTS.items():
        text = text.replace(f'"{name}"', long).replace(f"'{name}'", long)
    return text


def outcome(action):
    """Return what an action returns, or the error that it raises: one line of at most 2 kB."""
    try:
        return action()
    except MovekdError as error:
        text = str(error)
        is_short = "\n" not in text and "\x1b" not in text and len(text.encode()) < 2000
        return error if is_short else AssertionError(text)


@pytest.fixture(scope="module")
def begun(digits, tmp_path_factory):
    """A run of which only the files that describe it lie there."""
    folder = tmp_path_factory.mktemp("begun")
    config = digits.config()
    write_run_files(folder, config, INPUTS, ["host:/tmp/launch"])
    (folder / "model").mkdir()
    return folder, config


def start(folder, config):
    """Begin a resume as `train` does, before it reads data."""
    found = plan_start(config, folder, ["host:/tmp/launch"], resume=True, overwrite=False)
    require_unchanged_inputs(folder, INPUTS)
    return found


def check_start(begun, name, draw):
    folder, config = begun
    path = folder / name
    raw = path.read_text()
    content = yaml.safe_load(raw)
    place = draw(st.sampled_from(list(places(content))))
    value = draw(st.sampled_from([*ODD, *TEXTS]))
    path.write_text(as_text(mutated(content, place, value), name))
    found = outcome(lambda: start(folder, config))
    path.write_text(raw)
    same = [RunStart(None, samples, False) for samples in (4, None)]  # another batch of a process
    assert found in same or isinstance(found, MovekdError)


def check_model(begun, draw):
    folder, config = begun
    content = yaml.safe_load((folder / "config.yaml").read_text())
    place = draw(st.sampled_from(list(places(content))))
    value = draw(st.sampled_from([*ODD, *TEXTS]))
    path = folder / "model/config.yaml"
    path.write_text(as_text(mutated(content, place, value), "config.yaml"))
    later = config.model_copy(update={"init_from": folder})
    for read in (read_run_config, lambda path: check_same_base(later, path.parent)):
        assert not isinstance(outcome(lambda read=read: read(path)), AssertionError)


FAST = settings(max_examples=5, deadline=None, derandomize=True)
BROAD = settings(max_examples=400, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", FILES)
@FAST
@given(data=st.data())
def test_an_odd_value_is_one_sentence_or_the_same_start(begun, name, data):
    check_start(begun, name, data.draw)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@BROAD
@given(data=st.data())
def test_many_odd_values_are_one_sentence_or_the_same_start(begun, name, data):
    check_start(begun, name, data.draw)


@FAST
@given(data=st.data())
def test_an_odd_config_of_a_model_is_one_sentence(begun, data):
    check_model(begun, data.draw)


@pytest.mark.slow
@BROAD
@given(data=st.data())
def test_many_odd_configs_of_a_model_are_one_sentence(begun, data):
    check_model(begun, data.draw)


@pytest.mark.parametrize("text", ["data: 3", "student: [1]", "student: {mole: 7}", "- 1", ""])
def test_a_model_with_an_odd_config_is_named(begun, text):
    folder, _ = begun
    (folder / "model/config.yaml").write_text(text)
    found = outcome(lambda: load_student(folder))
    assert isinstance(found, MovekdError)
    assert re.search(r"config\.yaml.*expected", str(found))


@pytest.mark.parametrize("name", [*FILES, "checkpoint-1/trainer_state.json", ".movekd-files.json"])
def test_a_fifo_does_not_hang(begun, name):
    folder, config = begun
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    raw = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    found = outcome(lambda: start(folder, config))
    path.unlink()
    if raw is not None:
        path.write_bytes(raw)
    assert isinstance(found, MovekdError) or name == ".movekd-files.json"  # a resume needs none


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt", "v9"),
        ("geometry", []),
        ("image_mean", [0.5]),
        ("image_std", [0.5, 0, float("inf")]),
        ("run", 3),
    ],
)
def test_an_export_with_odd_facts_is_named(tmp_path, key, value):
    about = {"prompt": "v1", "geometry": "crop", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "movekd.json").write_text(json.dumps(about | {key: value}))
    found = outcome(lambda: load_export(tmp_path))
    assert isinstance(found, MovekdError)
    assert f"movekd.json has {key}" in str(found)
