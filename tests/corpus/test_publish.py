"""Tests of movekd.corpus.publish: what a pack may delete, and what a killed one leaves."""

import io
import os
import resource
import shutil
import tarfile
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus_files import picture
from kills import kill_at
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.corpus.parquet import pack_parquet
from movekd.corpus.webdataset import index_webdataset
from movekd.errors import ConfigError, CorpusError
from parquet_kit import SCHEMAS, row_of, write_rows

RECORD = ".movekd-files.json"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two folders of images, a Parquet file, and a tar of images that somebody else made."""
    made = tmp_path_factory.mktemp("images")
    for folder, seeds in (("one", (1, 2, 3)), ("two", (3, 4))):
        (made / folder).mkdir()
        for seed in seeds:
            (made / folder / f"{seed}.png").write_bytes(picture(seed))
    with tarfile.open(made / "theirs.tar", "w") as tar:
        for seed in (5, 6):
            info = tarfile.TarInfo(f"{seed}.png")
            info.size = len(picture(seed))
            tar.addfile(info, io.BytesIO(picture(seed)))
    schema = SCHEMAS["FineVision"]
    rows = [row_of(schema, "", [(picture(seed), None)], [("What?", "This.")]) for seed in (7, 8)]
    write_rows(made / "rows.parquet", schema, rows)
    return made


def pack(images, which, out, **options):
    """One image per shard."""
    return pack_folder(images / which, out, max_shard_bytes=1, num_workers=1, **options)


def test_a_second_pack_into_a_folder_is_refused(images, tmp_path, snapshot):
    refused = []

    def at_once(done, total):
        with pytest.raises(CorpusError, match=rf"another pack .*pid {os.getpid()} on") as caught:
            pack(images, "two", tmp_path / "data", overwrite=True)
        refused.append(caught.value)

    pack(images, "one", tmp_path / "data", progress=at_once)
    assert len(refused) == 3
    pack(images, "one", tmp_path / "alone")
    assert snapshot(tmp_path / "data") == snapshot(tmp_path / "alone")


def without_record(images, out):
    """As packs before the record left it."""
    pack(images, "one", out)
    (out / RECORD).unlink()


CASES = {
    "new": (lambda images, out: None, lambda images, out: pack(images, "one", out)),
    "again": (
        lambda images, out: pack(images, "one", out),
        lambda images, out: pack(images, "one", out),
    ),
    "other": (
        lambda images, out: pack(images, "one", out),
        lambda images, out: pack(images, "two", out, overwrite=True),
    ),
    "again, without record": (
        without_record,
        lambda images, out: pack(images, "one", out),
    ),
    "other, without record": (
        without_record,
        lambda images, out: pack(images, "two", out, overwrite=True, force=True),
    ),
    "parquet": (
        lambda images, out: pack(images, "one", out),
        lambda images, out: pack_parquet(
            [str(images / "rows.parquet")],
            out,
            max_shard_bytes=1,
            num_workers=1,
            overwrite=True,
        ),
    ),
    "tars": (
        lambda images, out: shutil.copy(images / "theirs.tar", out),
        lambda images, out: index_webdataset(out, num_workers=1),
    ),
}


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_file_and_run_again_equals_undisturbed(
    images, tmp_path, snapshot, case, stride
):
    """And what lay in the folder is there after the kill, too."""
    prepare, action = CASES[case]
    out = tmp_path / "built"

    def begin():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        prepare(images, out)
        (out / "notes.txt").write_text("precious")

    begin()
    action(images, out)
    expected = snapshot(out)
    kept = {name: expected[name] for name in ("notes.txt", "theirs.tar") if name in expected}
    event, killed = 1, True
    while killed:
        begin()
        killed = kill_at(event, lambda: action(images, out), "built")
        assert kept.items() <= snapshot(out).items()
        action(images, out)
        assert snapshot(out) == expected, event
        event += stride
    assert event > 21


def test_a_full_disk_leaves_everything_as_it_was(images, tmp_path, snapshot):
    out = tmp_path / "data"
    for limit in (0, 100, 700, 1300, 20_000):
        assert is_refused_beyond(limit, lambda: pack(images, "one", out)) == (limit < 20_000)
        assert out.exists() == (limit == 20_000)
    before = snapshot(out)
    for limit in (100, 1300):
        assert is_refused_beyond(limit, lambda: pack(images, "two", out, overwrite=True))
        assert snapshot(out) == before
        assert not (out / ".packing").exists()
    assert len(open_corpus(out)) == 3


def is_refused_beyond(limit, action) -> bool:
    """Run ``action`` in a child whose files may have ``limit`` bytes; return whether it refused."""
    child = os.fork()
    if child == 0:
        code = 2
        with suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                action()
                code = 0
            except CorpusError as error:
                code = 1 if "cannot be written (File too large)" in str(error) else 3
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1)
    return code == 1


NAMES = (
    "shard-00000.tar", "shard-00001.tar", "shard-9.tar", "index.parquet", "names.parquet",
    "conversations.jsonl", "report.json", "a.tar", "notes.txt", ".packing/notes.txt",
)  # fmt: skip
ACTIONS = {
    "one": lambda images, out: pack(images, "one", out),
    "two": lambda images, out: pack(images, "two", out),
    "one instead": lambda images, out: pack(images, "one", out, overwrite=True),
    "two instead": lambda images, out: pack(images, "two", out, overwrite=True),
    "tars": lambda images, out: index_webdataset(out, num_workers=1),
    "tars instead": lambda images, out: index_webdataset(out, num_workers=1, overwrite=True),
    "forget": lambda images, out: (out / RECORD).unlink(missing_ok=True),
    "killed": lambda images, out: (out / ".packing").mkdir(exist_ok=True),
}
step = st.one_of(st.sampled_from(sorted(ACTIONS)), st.tuples(st.sampled_from(NAMES)))


@pytest.mark.parametrize("examples", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_no_pack_deletes_or_changes_what_somebody_else_wrote(images, tmp_path_factory, examples):
    """Whatever lies in the folder, or is put there between packs, under any name of ours."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(step, min_size=2, max_size=6), st.booleans())
    def check(steps, is_tar):
        content = (images / "theirs.tar").read_bytes() if is_tar else b"precious"
        out, theirs = tmp_path_factory.mktemp("out"), set()
        for each in steps:
            if isinstance(each, str):
                with suppress(CorpusError, ConfigError):
                    ACTIONS[each](images, out)
            else:
                (path,) = each
                (out / path).parent.mkdir(exist_ok=True)
                (out / path).write_bytes(content)
                theirs.add(path)
            assert {path: (out / path).read_bytes() for path in theirs} == dict.fromkeys(
                theirs, content
            )

    check()


def test_what_is_in_the_way_is_named_and_replaced_by_force(images, tmp_path, snapshot):
    out = tmp_path / "data"
    pack(images, "one", tmp_path / "whole")
    pack(images, "two", out)
    (out / "shard-00000.tar").write_bytes(b"changed")
    (out / "shard-00002.tar").write_bytes(b"of others")
    match = r"shard-00000\.tar \(of another size\) \(1 in all\).*--overwrite --force"
    with pytest.raises(CorpusError, match=match):
        pack(images, "one", out, overwrite=True)
    pack(images, "two", tmp_path / "two")
    shutil.copy(tmp_path / "two" / "shard-00000.tar", out)
    with pytest.raises(CorpusError, match=r"shard-00002\.tar \(not of movekd\)"):
        pack(images, "one", out, overwrite=True)
    pack(images, "one", out, overwrite=True, force=True)
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_a_corpus_without_a_record_is_replaced_only_by_force(images, tmp_path, snapshot):
    out = tmp_path / "data"
    without_record(images, out)
    (out / "a.tar").write_bytes(b"precious")
    before = snapshot(out)
    with pytest.raises(CorpusError, match=r"without \.movekd-files\.json.*--overwrite --force"):
        pack(images, "two", out, overwrite=True)
    assert snapshot(out) == before
    assert len(open_corpus(out)) == 3
    pack(images, "two", out, overwrite=True, force=True)
    pack(images, "two", tmp_path / "whole")
    assert snapshot(out) == {**snapshot(tmp_path / "whole"), "a.tar": b"precious"}


def test_what_no_pack_writes_is_not_deleted_from_a_leftover(images, tmp_path, snapshot):
    (tmp_path / ".packing").mkdir()
    (tmp_path / ".packing" / "notes.txt").write_text("precious")
    with pytest.raises(CorpusError, match=r"\.packing/notes\.txt is nothing .*Move it away"):
        pack(images, "one", tmp_path)
    assert snapshot(tmp_path) == {".packing/notes.txt": b"precious"}
