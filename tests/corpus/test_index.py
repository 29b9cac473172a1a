"""Tests of movekd.corpus.index."""

import hashlib
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movekd.corpus.index import INDEX_SCHEMA, NAMES_SCHEMA, Corpus, open_corpus
from movekd.corpus.parquet_table import ParquetTable, write_parquet
from movekd.errors import CorpusError, UnknownKeyError

CONTENTS = [bytes([n]) * (10 + n) for n in range(20)]
KEYS = [hashlib.sha256(data).hexdigest() for data in CONTENTS]


def tables(num_rows=20):
    """Rows alternate between two tars; every image has two names."""
    position = {"a.tar": 0, "sub/b.tar": 0}
    rows, names = [], []
    for n in range(num_rows):
        shard = ("a.tar", "sub/b.tar")[n % 2]
        rows.append((KEYS[n], shard, position[shard], len(CONTENTS[n]), n + 1, 2 * n + 1))
        position[shard] += len(CONTENTS[n])
        names += [(f"{n}.jpg", KEYS[n]), (f"copy/{n}.jpg", KEYS[n])]
    columns = zip(INDEX_SCHEMA, zip(*rows, strict=True), strict=True)
    index = pa.table([pa.array(c, f.type) for f, c in columns], schema=INDEX_SCHEMA)
    columns = zip(NAMES_SCHEMA, zip(*names, strict=True), strict=True)
    return index, pa.table([pa.array(c, f.type) for f, c in columns], schema=NAMES_SCHEMA)


def write_table(path, table):
    write_parquet(path, [table], table.schema)


def corpus_of(data_dir, index, names, **how):
    """A corpus whose tables lie in memory."""
    stored = []
    for table in (index, names):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **how)
        stored.append(ParquetTable(pa.BufferReader(sink.getvalue()), CorpusError))
    return Corpus(data_dir, *stored)


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.tar").write_bytes(b"".join(CONTENTS[::2]))
    (tmp_path / "sub" / "b.tar").write_bytes(b"".join(CONTENTS[1::2]))
    index, names = tables()
    write_table(tmp_path / "index.parquet", index)
    write_table(tmp_path / "names.parquet", names)
    return tmp_path


def test_a_row_gives_the_bytes_of_its_key(data_dir):
    corpus = open_corpus(str(data_dir))
    assert len(corpus) == 20
    assert [corpus.read_image(row) for row in range(20)] == CONTENTS
    assert corpus.shards == ["a.tar", "sub/b.tar"]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_bytes_are_those_of_their_key_or_an_error_that_names_it(tmp_path_factory, data):
    """However images of one size are mixed up, copied over each other, flipped or shifted."""
    size, count = 20, 12
    images = [bytes([n]) * size for n in range(count)]
    keys = [hashlib.sha256(image).hexdigest() for image in images]
    columns = [keys, ["a.tar"] * count, [size * n for n in range(count)], *([[size] * count] * 3)]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, INDEX_SCHEMA, strict=True)]
    folder = tmp_path_factory.mktemp("mixed")
    corpus = corpus_of(folder, pa.table(arrays, schema=INDEX_SCHEMA), NAMES_SCHEMA.empty_table(),
                       row_group_size=5)  # fmt: skip
    content = data.draw(
        st.one_of(
            st.permutations(images).map(b"".join),
            st.lists(st.sampled_from(images), min_size=count, max_size=count).map(b"".join),
            st.integers(0, size * count * 8 - 1).map(lambda bit: flipped(b"".join(images), bit)),
            st.integers(1, size).map(lambda by: bytes(by) + b"".join(images)[:-by]),
        )
    )
    (folder / "a.tar").write_bytes(content)
    for row in range(count):
        if content[size * row : size * (row + 1)] == images[row]:
            assert corpus.read_image(row) == images[row]
        else:
            with pytest.raises(CorpusError, match=rf"image {keys[row]} of .* a\.tar have SHA-256"):
                corpus.read_image(row)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_names_and_keys_give_rows_in_the_order_asked(data_dir):
    corpus = open_corpus(data_dir)
    asked = ["3.jpg", KEYS[7], "copy/3.jpg", "0.jpg", "3.jpg"]
    for form in (asked, tuple(asked), pa.array(asked)):
        rows = corpus.rows(form)
        assert rows.dtype == "int64"
        assert rows.tolist() == [3, 7, 3, 0, 3]
    assert corpus.rows([]).tolist() == []


def test_tables_of_many_row_groups_are_searched_whole(data_dir):
    index, names = tables()
    corpus = corpus_of(data_dir, index, names, row_group_size=3)
    assert corpus.rows([f"copy/{n}.jpg" for n in range(20)]).tolist() == list(range(20))
    assert [corpus.read_image(row) for row in range(20)] == CONTENTS
    assert corpus.fingerprint() == open_corpus(data_dir).fingerprint()


def test_of_equal_names_the_first_counts(data_dir):
    index, names = tables()
    again = pa.table({"name": ["3.jpg"], "key": [KEYS[9]]})
    corpus = corpus_of(data_dir, index, pa.concat_tables([names, again]))
    assert corpus.rows(["3.jpg"]) == [3]


def test_unknown_names_are_counted_and_the_first_three_named(data_dir):
    corpus = open_corpus(data_dir)
    with pytest.raises(
        UnknownKeyError, match=r"no image named 'x', 'y', 'z' \.\.\. \(4 of 6 unknown\).*Pack"
    ):
        corpus.rows(["x", "1.jpg", "y", "x", "z", "w"])
    with pytest.raises(KeyError, match=r"named 'x' \(1 of 1"):
        corpus.rows(["x"])


def test_reading_works_in_threads_and_in_other_processes(data_dir):
    corpus = open_corpus(data_dir)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(corpus.read_image, list(range(20)) * 5)) == CONTENTS * 5
    (data_dir / "corpus.bin").write_bytes(pickle.dumps(corpus))
    script = (
        "import os, pickle, sys\n"
        "corpus = pickle.load(open(sys.argv[1], 'rb'))\n"
        "corpus.read_image(0)\n"  # so that a file is open when it forks
        "child = os.fork()\n"
        "status = os.waitpid(child, 0)[1] if child else 0\n"
        "print([corpus.read_image(row).hex() for row in range(len(corpus))])\n"
        "sys.exit(status)\n"
    )
    command = [sys.executable, "-c", script, str(data_dir / "corpus.bin")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str([data.hex() for data in CONTENTS])] * 2


def test_open_files_are_bounded_and_closed(data_dir, monkeypatch):
    monkeypatch.setattr("movekd.corpus.index._MAX_OPEN_FILES", 1)
    corpus = open_corpus(data_dir)
    assert [corpus.read_image(row) for row in range(20)] == CONTENTS
    (file,) = corpus._files.values()
    os.fstat(file)
    del corpus
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 2999))
def test_the_fingerprint_of_a_prefix_survives_an_append(data_dir_big, num_old, num_new, changed):
    whole, none = data_dir_big, NAMES_SCHEMA.empty_table()
    num_old, num_new = sorted((num_old, num_new))
    old = corpus_of(whole.data_dir, whole.index.slice(0, num_old), none, row_group_size=700)
    new = corpus_of(whole.data_dir, whole.index.slice(0, num_new), none)
    assert new.fingerprint(num_old) == old.fingerprint()
    if num_old != num_new:
        assert new.fingerprint() != old.fingerprint()
    if changed < num_old:
        keys = whole.index["key"].to_pylist()
        keys[changed] = "0" * 64
        other = whole.index.read().set_column(0, "key", pa.array(keys))
        other = corpus_of(whole.data_dir, other, none)
        assert other.fingerprint(num_old) != old.fingerprint()


@pytest.fixture(scope="module")
def data_dir_big(tmp_path_factory):
    keys = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(3000)]
    columns = [keys, ["a.tar"] * 3000, *([range(1, 3001)] * 4)]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, INDEX_SCHEMA, strict=True)]
    index = pa.table(arrays, schema=INDEX_SCHEMA)
    return corpus_of(tmp_path_factory.mktemp("big"), index, NAMES_SCHEMA.empty_table())


def test_the_same_table_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_table(tmp_path / name, tables()[0])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert pq.read_table(tmp_path / "one").equals(tables()[0])


def test_conversations_are_found_if_they_are_there(data_dir):
    assert open_corpus(data_dir).conversations_path is None
    (data_dir / "conversations.jsonl").write_text("")
    assert open_corpus(data_dir).conversations_path == data_dir / "conversations.jsonl"


def test_damaged_corpora_are_refused(data_dir, tmp_path_factory):
    with pytest.raises(CorpusError, match=r"holds no index\.parquet.*movekd shards pack"):
        open_corpus(tmp_path_factory.mktemp("empty"))
    corpus = open_corpus(data_dir)
    tar = data_dir / "a.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-1])
    with pytest.raises(CorpusError, match=rf"ends after {len(data) - 1} bytes; .* {len(data)}"):
        open_corpus(data_dir)
    with pytest.raises(CorpusError, match=r"a\.tar ends after"):
        corpus.read_image(18)
    tar.unlink()
    with pytest.raises(CorpusError, match=r"a\.tar is missing.*Restore"):
        open_corpus(data_dir)
    with pytest.raises(CorpusError, match=r"a\.tar cannot be read .*Restore"):
        corpus_of(data_dir, *tables()).read_image(0)
    tar.write_bytes(data)
    (data_dir / "names.parquet").unlink()
    with pytest.raises(CorpusError, match=r"names\.parquet cannot be read"):
        open_corpus(data_dir)
    write_table(data_dir / "names.parquet", pa.table({"name": ["a"]}))
    with pytest.raises(CorpusError, match=r"names\.parquet cannot be read.*columns name, key"):
        open_corpus(data_dir)
    write_table(data_dir / "names.parquet", pa.table({"name": ["a"], "key": [1]}))
    with pytest.raises(CorpusError, match=r"names\.parquet holds name string, key int64; expected"):
        open_corpus(data_dir)
    (data_dir / "index.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(CorpusError, match=r"index\.parquet cannot be read"):
        open_corpus(data_dir)


def with_column(table, name, values, kind=None):
    place = table.schema.get_field_index(name)
    column = pa.array([*values, *table[name].to_pylist()[len(values) :]], kind)
    return table.set_column(place, name, column)


SHARDS = ["/etc/passwd", "../a.tar", "sub/../../a.tar", "", ".", "a\0.tar", "x" * 5000, "\x1b[2J/a"]
NUMBERS = [-1, -(2**63), 2**63 - 1, 2**62]
STRANGE_INDEX = [
    *(("shard", [name]) for name in SHARDS),
    *((name, [value]) for name in ("offset", "size") for value in NUMBERS),
    *((name, [value]) for name in ("width", "height") for value in (0, -1, 2**31 - 1)),
    *(("key", [key]) for key in ("", "../../victim", KEYS[0].upper(), KEYS[0] + "0", "\x1b[2J")),
    *((name, [None]) for name in INDEX_SCHEMA.names),
]


@pytest.mark.parametrize(("name", "values"), STRANGE_INDEX)
def test_a_value_out_of_range_is_one_sentence(data_dir, name, values):
    index, _ = tables()
    kind = INDEX_SCHEMA.field(name).type
    write_table(data_dir / "index.parquet", with_column(index, name, values, kind))
    with pytest.raises(OneSentence):
        read_all(data_dir)


@pytest.mark.parametrize("name", INDEX_SCHEMA.names)
def test_a_column_of_another_type_or_without_is_refused(data_dir, name):
    index, _ = tables()
    kind = pa.float64() if INDEX_SCHEMA.field(name).type != pa.string() else pa.binary()
    for changed in (
        index.drop_columns([name]),
        with_column(index, name, [], kind) if kind == pa.float64() else
        index.set_column(index.schema.get_field_index(name), name, index[name].cast(kind)),
    ):  # fmt: skip
        write_table(data_dir / "index.parquet", changed)
        with pytest.raises(CorpusError, match=rf"index\.parquet .*{name}"):
            open_corpus(data_dir)


def test_more_rows_than_a_file_can_hold_are_refused_before_they_are_read(data_dir):
    """Equal values take no room in the file, and 20 bytes each in memory."""
    count = 500_000
    same = [KEYS[0], "a.tar", 0, 10, 1, 1]
    columns = [pa.repeat(pa.scalar(v, f.type), count) for v, f in zip(same, INDEX_SCHEMA)]  # noqa: B905
    pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), data_dir / "index.parquet")
    size = (data_dir / "index.parquet").stat().st_size
    assert size < count
    with pytest.raises(CorpusError, match=rf"announces {count:,} rows in {size:,} bytes"):
        open_corpus(data_dir)


class OneSentence(CorpusError):
    """An error as a user may see it."""


def read_all(data_dir):
    """Use everything of a corpus; compare each image with its key."""
    try:
        corpus = open_corpus(data_dir)
        corpus.fingerprint()
        for row in range(len(corpus)):
            assert hashlib.sha256(corpus.read_image(row)).hexdigest() == corpus.key(row)
        corpus.rows(corpus.names["name"].to_pylist())
    except CorpusError as error:
        kind = OneSentence if len(str(error)) < 2000 and str(error).isprintable() else TypeError
        raise kind(str(error)) from None


FILES = ["index.parquet", "names.parquet", "conversations.jsonl", "a.tar"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop"])
def test_only_regular_files_are_read(data_dir, file, kind):
    (data_dir / file).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(data_dir / file)
    elif kind == "folder":
        (data_dir / file).mkdir()
    else:
        (data_dir / file).symlink_to("/dev/zero" if kind == "device" else data_dir / file)
    with pytest.raises(CorpusError, match=rf"{file}.* (regular file|symbolic links)"):
        open_corpus(data_dir).conversations_path  # noqa: B018


def test_a_shard_that_became_a_fifo_does_not_hang(data_dir):
    corpus = open_corpus(data_dir)
    (data_dir / "a.tar").unlink()
    os.mkfifo(data_dir / "a.tar")
    with pytest.raises(CorpusError, match=r"a\.tar (cannot be read|ends after)"):
        corpus.read_image(0)


@pytest.mark.parametrize("examples", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_tables_are_errors_or_give_the_images_of_their_keys(data_dir, examples):
    """Any byte of the Parquet files may be any other one."""
    whole = {name: (data_dir / name).read_bytes() for name in FILES[:2]}

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(
        st.sampled_from(FILES[:2]),
        st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    )
    def check(name, changes):
        content = bytearray(whole[name])
        for place, value in changes:
            content[int(place * len(content))] = value
        (data_dir / name).write_bytes(bytes(content))
        with suppress(UnknownKeyError, OneSentence):
            read_all(data_dir)
        (data_dir / name).write_bytes(whole[name])

    check()
