"""Small files of strangers are read within limits, and every fault is one short sentence."""

import os
import resource
from pathlib import Path

import pytest

from movekd.errors import CacheError, ConfigError, printable, shorten
from movekd.files.reading import MAX_DEPTH, parse_json, parse_yaml, read_bytes, read_json

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
BAD_YAML = {
    "a date that does not exist": "description: 2026-13-45",
    "an integer that is none": "a: !!int abc",
    "too many digits": f"a: {'9' * 5000}",
    "too many hexadecimal digits": f"a: 0x{'f' * 5000}",
    "deep brackets": "a: " + "[" * 3000 + "]" * 3000,
    "deep blocks": "\n".join(" " * n + "a:" for n in range(3000)),
    "an alias bomb": BOMB,
    "an alias inside itself": "a: &a [*a]",
    "an unknown alias": "a: *b",
    "an object of Python": "a: !!python/object/apply:os.system [true]",
    "an unclosed bracket": "a: [",
    "a NUL": "a: \0",
    "a base-60 number": "a: !!int 1:x",
    "a mapping as a key": "? {a: 1}\n: 2",
    "a binary that is none": "a: !!binary 'ä'",
    "a float that is none": "a: !!float x",
}


@pytest.mark.parametrize("text", BAD_YAML.values(), ids=BAD_YAML)
def test_bad_yaml_is_one_short_sentence(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "a.yaml")
    assert "a.yaml" in str(error.value)
    assert "expected" in str(error.value)
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


def test_yaml_with_aliases_and_depth_below_the_limits_is_read() -> None:
    text = "a: &a {b: 1}\nc: [*a, *a]\nd: " + "[" * (MAX_DEPTH - 3) + "]" * (MAX_DEPTH - 3)
    assert parse_yaml(text, "a.yaml")["c"] == [{"b": 1}, {"b": 1}]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[" * 3000 + b"]" * 3000,
        b"[" * 70 + b"]" * 70,
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"9" * 5000,
        b"\xff\xfe",
        b'{"a": ' * 100_000,
    ],
)
def test_bad_json_is_one_short_sentence(raw: bytes) -> None:
    with pytest.raises(CacheError, match=r"zarr\.json is no JSON that can be read.*Build it") as e:
        parse_json(raw, "zarr.json", error=CacheError, remedy="Build it again.")
    assert len(str(e.value)) < 600
    assert "\n" not in str(e.value)


def test_a_log_may_hold_nan() -> None:
    assert parse_json(b'{"loss": NaN}', "log.json", allow_nan=True)["loss"] != 0


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # opening one waits for a writer
    (tmp_path / "zero").symlink_to("/dev/zero")  # reading it has no end
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "zero", "folder", "none", "a\0b", "x" * 5000):
        with pytest.raises(ConfigError, match="expected"):
            read_bytes(tmp_path / name, max_bytes=100)


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match="more than 16,777,216 bytes"):
        read_json(tmp_path / "large")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    (tmp_path / "small").write_bytes(b"[1]")
    assert read_json(tmp_path / "small") == [1]


def test_printable_text_moves_no_cursor() -> None:
    assert printable("a\x1b[2Jb\nc\udcff") == "a\\x1b[2Jb c\\udcff"
    assert printable("Zürich 猫") == "Zürich 猫"
    long = shorten("x" * 10_000)
    assert len(long) < 260
    assert "9800 characters" in long
