"""Tests of movekd.cli.shards."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from command import invoke
from corpus_files import zero_image
from movekd.cli.shards import app
from movekd.corpus.index import open_corpus
from movekd.corpus.record import require_as_packed
from movekd.errors import ConfigError, CorpusError
from movekd.extract import BuildOptions, build_cache
from parquet_kit import SCHEMAS, row_of, write_rows


def run(*words):
    return invoke(app, *words)


@pytest.fixture
def source(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        buffer = io.BytesIO()
        Image.new("RGB", (10 + number, 20), (number, 0, 0)).save(buffer, "PNG")
        (images / f"{number}.png").write_bytes(buffer.getvalue())
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Dark."}]
    entries = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(3)]
    text_only = {"id": "t", "conversations": turns[1:]}
    (tmp_path / "one.json").write_text(json.dumps(entries[:2]))
    (tmp_path / "two.json").write_text(json.dumps([entries[2], text_only]))
    return tmp_path


def pack(source, *more):
    files = ("--llava-json", source / "one.json", "--llava-json", source / "two.json")
    return run("pack", *files, "--images", source / "images", "--output", source / "data", *more)


def test_pack_then_ls(source):
    result = pack(source, "--num-workers", 1)
    assert result.exit_code == 0
    assert "3 images" in result.stdout
    assert "4 of 4 conversations kept, 1 of them text only" in result.stdout
    report = json.loads((source / "data" / "report.json").read_text())
    assert report["num_images"] == 3
    result = run("ls", source / "data")
    assert "3 images" in result.stdout
    assert "width 10 to 12, height 20 to 20" in result.stdout
    assert "4 conversations, 1 of them text only" in result.stdout


@pytest.mark.parametrize("file", ["index.parquet", "names.parquet", "conversations.jsonl"])
def test_a_changed_table_reaches_no_cache_and_no_run(source, file, tiny_specs):
    pack(source)
    data = source / "data"
    corpus, options = open_corpus(data), BuildOptions(batch_size=2, num_workers=0)
    raw, random = (data / file).read_bytes(), np.random.default_rng(0)
    for at in random.choice(len(raw), 24, replace=False).tolist():
        damaged = bytearray(raw)
        damaged[at] ^= 1 << int(random.integers(8))
        (data / file).write_bytes(damaged)
        with pytest.raises(CorpusError, match=f"{file} was changed since it was packed"):
            next(build_cache(source / "c", corpus, tiny_specs, geometry="crop", options=options))
        with pytest.raises(CorpusError):  # opening may find it first
            run("ls", data, "--verify")
    (data / file).unlink()
    with pytest.raises(CorpusError, match=f"{file} is missing"):
        require_as_packed(data)
    (data / file).write_bytes(damaged)
    (data / ".movekd-files.json").unlink()
    require_as_packed(data)  # meant


def test_verify_names_every_image_that_is_not_that_of_its_key(source):
    pack(source)
    whole = run("ls", source / "data", "--verify")
    assert whole.exit_code == 0
    assert "0 of 3 images differ from their keys" in whole.stdout
    keys = [zero_image(source / "data", position)["key"] for position in (0, 2)]
    found = run("ls", source / "data", "--verify")
    assert found.exit_code == 1
    assert "2 of 3 images differ from their keys" in found.stdout
    assert all(f"image {key} of " in found.stdout for key in keys)
    listed = run("ls", source / "data", "--verify", "--json")
    assert listed.exit_code == 1
    assert [sentence.split()[1] for sentence in json.loads(listed.stdout)["wrong"]] == keys
    assert run("ls", source / "data").exit_code == 0


def test_json_goes_to_stdout_alone(source):
    counts = json.loads(pack(source, "--json", "--max-shard-mib", 1).stdout)
    assert (counts["num_kept"], counts["missing_files"]) == (4, 0)
    listed = json.loads(run("ls", source / "data", "--json").stdout)
    assert (listed["images"], listed["shards"], listed["names"]) == (3, 1, 3)
    assert (listed["conversations"], listed["text_only"]) == (4, 1)
    assert (listed["width"], listed["height"]) == ([10, 12], [20, 20])
    assert listed["shard_bytes"] > listed["image_bytes"]
    assert len(listed["fingerprint"]) == 64


def test_whatever_is_dropped_is_listed_and_gives_exit_code_1(source):
    (source / "images" / "1.png").unlink()
    result = pack(source)
    assert result.exit_code == 1
    assert "missing files: 1" in result.stdout
    assert "1: 1.png does not exist" in result.stdout
    assert "1 dropped; see" in result.stdout
    report = json.loads((source / "data" / "report.json").read_text())
    assert report["missing_files"] == [["1", "1.png does not exist in the image folder"]]


def test_the_sums_are_printed_and_names_cannot_move_the_cursor(source):
    (source / "images" / "a\x1b[2J.txt").write_text("no image")
    arguments = ("pack", "--images", source / "images", "--output", source / "folder")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "5 of 6 files kept" in result.stdout
    assert r"a\x1b[2J.txt: a\x1b[2J.txt: 8 bytes are no image" in result.stdout
    counts = json.loads(run(*arguments, "--json").stdout)
    assert counts["sums"] == {"files": {"found": 6, "kept": 5, "not_images": 1}}
    assert (counts["num_files_found"], counts["not_images"]) == (6, 1)


def test_a_folder_and_a_webdataset(source):
    result = run("pack", "--images", source / "images", "--output", source / "folder", "--json")
    assert json.loads(result.stdout)["num_images"] == 5
    wds = source / "wds"
    wds.mkdir()
    (source / "folder" / "shard-00000.tar").rename(wds / "mine.tar")
    result = run("pack", "--webdataset", wds)
    assert result.exit_code == 0
    assert json.loads(run("ls", wds, "--json").stdout)["names"] == 10


def test_parquet_files_are_packed_and_their_rows_counted(source, monkeypatch):
    schema = SCHEMAS["FineVision"]
    images = [(path.read_bytes(), None) for path in sorted((source / "images").iterdir())]
    rows = [row_of(schema, "", [image], [("What?", "Dark.")]) for image in images]
    for number, some in enumerate((rows[:3], rows[3:])):
        write_rows(source / "set" / f"{number}.parquet", schema, some)
    monkeypatch.chdir(source)
    result = run("pack", "--parquet", "set/*.parquet", "--output", "data")
    assert result.exit_code == 0
    assert "5 images" in result.stdout
    assert "5 of 5 conversations kept" in result.stdout
    assert "5 of 5 images kept" in result.stdout
    assert "relevance_ratings: nothing reads it; 2 of 2 files have it" in result.stdout
    (source / "one.parquet").write_bytes((source / "set" / "0.parquet").read_bytes())
    write_rows(source / "two.parquet", schema, [row_of(schema, "", [(None, "0.png")], [("", "x")])])
    files = ("--parquet", "one.parquet", "--parquet", "two.parquet")
    result = run("pack", *files, "--output", "other", "--json")
    assert result.exit_code == 1
    counts = json.loads(result.stdout)
    assert (counts["num_kept"], counts["images_without_bytes"]) == (3, 2)
    assert counts["sums"]["entries"] == {"found": 4, "kept": 3, "images_without_bytes": 1}


def test_what_cannot_be_is_said(source):
    for arguments in (
        [],
        ["--parquet", source, "--images", source],
        ["--parquet", source, "--webdataset", source],
        ["--parquet", source, "--llava-json", source / "one.json"],
        ["--llava-json", source / "one.json"],
        ["--images", source, "--webdataset", source],
        ["--webdataset", source, "--llava-json", source / "one.json"],
        ["--webdataset", source, "--output", source / "data"],
    ):
        with pytest.raises(ConfigError, match=r"needs one source; expected --images DIR"):
            run("pack", *arguments)
    with pytest.raises(CorpusError, match="movekd shards pack"):
        run("ls", source)
    pack(source)
    with pytest.raises(CorpusError, match="holds another corpus"):
        run("pack", "--images", source / "images", "--output", source / "data")
    result = run("pack", "--images", source / "images", "--output", source / "data", "--overwrite")
    assert result.exit_code == 0


def test_import_loads_neither_torch_nor_pyarrow():
    script = (
        "import sys, movekd.cli.shards;"
        "heavy = {'torch', 'pyarrow', 'numpy', 'PIL', 'transformers', 'rich.progress'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_packing_loads_no_torch(source):
    script = (
        "import sys; from movekd.cli.shards import app;"
        "app(sys.argv[1:], standalone_mode=False);"
        "sys.exit('torch' in sys.modules)"
    )
    arguments = ["pack", "--images", str(source / "images"), "--output", str(source / "data")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
