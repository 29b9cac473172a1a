"""A cache that a stranger wrote: any value of any file, with right checksums, is an error or data.

Each case changes one thing of a whole cache and makes its checksums again, as anybody can. Then
everything that reads a cache looks at it: a sentence, or the same features as before. All cases run
in a child process that may use 200 MiB more than it had, and 20 s per case.
"""

import json
import os
import re
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash

from builds import build
from movekd.cache.contents import open_contents
from movekd.cache.reader import open_cache
from movekd.cache.seal import entry
from movekd.cache.sealed_shards import Verify
from movekd.cache.verify import status, verify
from movekd.errors import MovekdError

MIB = 2**20
DEPTH = 3000
RAW_VALUES = {
    "null": "null",
    "true": "true",
    "text": '"x"',
    "class": '"__class__"',
    "path": '"../../victim/a"',
    "escape": r'"\u001b[2J\ud800"',
    "negative": "-1",
    "half": "1.5",
    "big": str(2**62),
    "huge": "1" + "0" * 30,
    "infinite": "1e999",
    "nan": "NaN",
    "digits": "9" * 5000,
    "list": "[]",
    "mapping": '{"abc": 1}',
    "deep": "[" * DEPTH + "]" * DEPTH,
}
MARK = "@@ here @@"
Change = tuple[str, Callable[[Path], None]]


def leaves(value, path=()) -> Iterator[tuple]:
    """Yield the path of every value in a JSON file, containers included."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))


def changed(content, path, raw: str) -> tuple[str, str]:
    """Return the JSON text with one value replaced: in one line, and as files have it."""
    copy = json.loads(json.dumps(content))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = MARK
    texts = (json.dumps(copy, sort_keys=True), json.dumps(copy, indent=1, sort_keys=True))
    return tuple(text.replace(json.dumps(MARK), raw) for text in texts)


def write_sealed_text(path: Path, line: str, pretty: str) -> None:
    """Write a sealed file with the right checksum of itself."""
    own = xxhash.xxh3_128_hexdigest(line.encode())
    path.write_text(pretty[: pretty.rindex("}")].rstrip() + f',\n "xxh3_128": "{own}"\n}}\n')


def reseal(seal: Path, name: str, file: Path) -> None:
    """Let a seal list a file as it is now."""
    content = json.loads(seal.read_text())
    del content["xxh3_128"]
    content["files"][name] = entry([file.read_bytes()]).model_dump()
    line, pretty = (json.dumps(content, sort_keys=True, indent=indent) for indent in (None, 1))
    write_sealed_text(seal, line, pretty)


def json_changes(cache: Path) -> Iterator[Change]:
    """Every value of every JSON file against every raw value, checksums made again."""
    for file in sorted(cache.rglob("*.json")):
        name = file.relative_to(cache).as_posix()
        content = json.loads(file.read_text())
        content.pop("xxh3_128", None)
        for path in leaves(content):
            for kind, raw in RAW_VALUES.items():

                def write(cache, name=name, content=content, path=path, raw=raw) -> None:
                    line, pretty = changed(content, path, raw)
                    if not name.endswith("zarr.json"):
                        return write_sealed_text(cache / name, line, pretty)
                    (cache / name).write_text(pretty)
                    group, _, inner = name.partition("/")
                    seal = cache / group.replace(".zarr", ".seals") / "metadata.json"
                    return reseal(seal, inner, cache / name)

                yield f"{name} {'.'.join(map(str, path))} {kind}", write


def put(column: pa.ChunkedArray, value) -> pa.Array:
    return pa.array([value, *column.to_pylist()[1:]], column.type)


COLUMNS = {
    "missing": None,
    "null": lambda column: put(column, None),
    "text": lambda column: column.cast(pa.string()),
    "binary": lambda column: column.cast(pa.string()).cast(pa.binary()),
    "large": lambda column: column.cast(pa.string()).cast(pa.large_string()),
    "negative": lambda column: put(column, -1),
    "10^10": lambda column: put(column, 10**10),
    "2^62": lambda column: put(column, 2**62),
    "last 2^62": lambda column: pa.array([*column.to_pylist()[:-1], 2**62], column.type),
    "last 10^10": lambda column: pa.array([*column.to_pylist()[:-1], 10**10], column.type),
    "path": lambda column: put(column, "../../victim/a"),
    "absolute": lambda column: put(column, "/victim/a"),
    "upper": lambda column: put(column, "A" * 64),
    "long": lambda column: put(column, "a" * MIB),
}


def table_changes(cache: Path) -> Iterator[Change]:
    """Every column of the two tables, cache.json made again."""
    for name in ("index.parquet", "names.parquet"):
        table = pq.read_table(cache / name)
        for place, column in enumerate(table.schema.names):
            for kind, change in COLUMNS.items():
                try:
                    if change is None:
                        new = table.remove_column(place)
                    else:
                        new = table.set_column(place, column, change(table[column]))
                except (pa.ArrowException, TypeError, OverflowError):
                    continue  # a path is no number

                def write(cache, name=name, new=new) -> None:
                    pq.write_table(new, cache / name)
                    reseal(cache / "cache.json", name, cache / name)

                yield f"{name} {column} {kind}", write


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "FIFO": replaced_by(os.mkfifo),
    "folder": replaced_by(Path.mkdir),
    "link out": replaced_by(lambda path: path.symlink_to("/etc/hostname")),
    "link to a device": replaced_by(lambda path: path.symlink_to("/dev/zero")),
    "link to itself": replaced_by(lambda path: path.symlink_to(path)),
}


def file_changes(cache: Path) -> Iterator[Change]:
    """Every file damaged in every way."""
    for file in sorted(path for path in cache.rglob("*") if path.is_file()):
        name = file.relative_to(cache).as_posix()
        for kind, damage in DAMAGES.items():
            yield f"{name} {kind}", lambda cache, name=name, damage=damage: damage(cache / name)


def index_changes(cache: Path) -> Iterator[Change]:
    """Indexes of Zarr shards that lead out of their file, seals made again."""
    from movekd.cache.shard_file import ABSENT

    for file in sorted((cache / "clip.zarr" / "tokens" / "c").rglob("0")):
        if not file.is_file():
            continue
        inner = file.relative_to(cache / "clip.zarr").as_posix()
        for offset in (2**64 - 512, 2**64 - 2304, 2**63, 2**62, 2304 * 10**6, ABSENT, 1):
            for size in (2304, 2**64 - 1, 10**18, 0):

                def write(cache, file=inner, offset=offset, size=size) -> None:
                    import google_crc32c

                    path = cache / "clip.zarr" / file
                    data = path.read_bytes()
                    index = np.frombuffer(data[-16388:-4], "<u8").copy()
                    index[:2] = offset, size
                    raw = index.tobytes()
                    crc = google_crc32c.value(raw).to_bytes(4, "little")
                    path.write_bytes(data[:-16388] + raw + crc)
                    reseal(cache / "clip.seals" / "00000.json", file, path)

                yield f"{inner} index {offset} {size}", write


def features(cache) -> dict[str, dict[str, np.ndarray]]:
    """Read and decode all rows; teacher -> array -> values. A teacher may be an error."""
    found = {}
    for name in cache.teachers:
        try:
            targets = cache[name].read(range(24))
            stored = {array: values.numpy() for array, values in targets.stored.items()}
            found[name] = stored | {"decoded": targets.tokens_BND.numpy()}
        except MovekdError as error:
            require_sentence(str(error))
    return found


def require_sentence(text: str) -> None:
    assert 20 < len(text.encode()) < 2048, text[:3000]
    assert text.isprintable(), repr(text)


def look(cache: Path, expected: dict[str, dict[str, np.ndarray]], how: Verify = "size") -> None:
    """Look at a cache in every way; assert on what comes back."""
    for read in (open_cache, open_contents, lambda cache: list(verify(cache))):
        try:
            opened = read(cache) if read is not open_cache else open_cache(cache, how)
        except MovekdError as error:
            require_sentence(str(error))
            continue
        if read is open_cache:
            for teacher, arrays in features(opened).items():
                assert arrays.keys() == expected[teacher].keys()
                for name, values in arrays.items():
                    np.testing.assert_array_equal(values, expected[teacher][name])
            try:
                assert all(re.fullmatch("[0-9a-f]{64}", key) for key in opened.keys.to_pylist())
            except MovekdError as error:
                require_sentence(str(error))
        elif read is open_contents:
            try:
                status(opened)
            except MovekdError as error:
                require_sentence(str(error))
        else:
            for problem in opened:
                require_sentence(problem)


def data_bytes() -> int:
    """Return the private memory of this process that it may write to."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def faults_of(cache: Path, copy: Path, changes: list[Change]) -> str:
    """Run changes in a child process; return what went wrong with the first bad one."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        torch.set_num_threads(1)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        code = 1
        try:
            expected = features(open_cache(cache))
            look(cache, expected)  # threads and imports count as what it had
            limit = data_bytes() + 200 * MIB
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            for name, change in changes:
                shutil.copytree(cache, copy)
                change(copy)
                os.write(writing, f"{name}\n".encode())
                signal.alarm(20)
                look(copy, expected, "checksum" if name.endswith("flipped") else "size")
                signal.alarm(0)
                shutil.rmtree(copy)
            code = 0
        except BaseException:
            os.write(writing, traceback.format_exc()[-3000:].encode(errors="replace"))
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as lines:
        said = lines.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    names = {name for name, _ in changes}
    last = [line for line in said.splitlines() if line in names][-1:]
    return "" if code == 0 else f"exit {code} after {last}: {said[-3000:]}"


def sample(changes: Iterator[Change], count: int, seed: int) -> list[Change]:
    found = list(changes)
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[number] for number in chosen]


EVERY = (json_changes, table_changes, file_changes, index_changes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("compressor", "count", "seed"),
    [
        ("none", 12, 0),
        pytest.param("none", 150, 1, marks=pytest.mark.slow),
        pytest.param("zstd", 60, 2, marks=pytest.mark.slow),
    ],
)
def test_any_change_is_a_sentence_or_the_same_features(
    cache_dir, corpus_dir, tiny_specs, tmp_path, snapshot, compressor, count, seed
) -> None:
    if compressor != "none":
        cache_dir = tmp_path / "packed"
        build(cache_dir, corpus_dir, [s.with_changes(compressor=compressor) for s in tiny_specs])
    victim = tmp_path / "victim"
    victim.mkdir()
    changes = [each for kind in EVERY for each in sample(kind(cache_dir), count, seed)]
    before = snapshot(cache_dir)
    assert faults_of(cache_dir, tmp_path / "place" / "copy", changes) == ""
    assert list(victim.iterdir()) == []
    assert snapshot(cache_dir) == before
