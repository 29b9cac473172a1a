"""Tests of docs/cache-format.md: its rules, written down from its text, hold for a real cache.

The cache has a compressed teacher, an image that could not be read, images that were added later,
and Zarr shards that lie in the gap before them.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
import zarr

import heavy_tails
from builds import build
from corpus_files import make_unreadable
from movekd.cache.reader import open_cache
from movekd.corpus.pack import pack_folder

PAGE = Path(__file__).parents[2] / "docs" / "cache-format.md"
ROWS_PER_SHARD, ALIGNMENT = 8, 32


@pytest.fixture(scope="module")
def cache(tmp_path_factory, crops, tiny_specs) -> Iterator[Path]:
    """Rows 0 to 12 and 32 to 42; row 3 is skipped; Zarr shards 2 and 3 have no row."""
    clip, conv = tiny_specs
    specs = [clip, conv, clip.with_changes(name="packed", compressor="zstd")]
    folder = tmp_path_factory.mktemp("format")
    images = folder / "images"
    images.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("movekd.cache.layout.MAX_SHARD_ROWS", ROWS_PER_SHARD)
        patch.setattr("movekd.cache.catalog.MAX_SHARD_ROWS", ALIGNMENT)
        for count in (13, 24):
            for number, crop in enumerate(crops[:count]):
                crop.save(images / f"{number:02d}.png")
            pack_folder(images, folder / "data", num_workers=1, overwrite=True, force=True)
            make_unreadable(folder / "data", 3)
            build(folder / "cache", folder / "data", specs)
        yield folder / "cache"


def xxh3(data: bytes) -> str:
    return xxhash.xxh3_128(data, seed=0).digest().hex()  # big-endian: the canonical form


def one_line(text: str) -> str:
    """Return what the checksum of a JSON file covers, made from its text as the page says."""
    text = text[: text.rindex(",")] + "}"
    return re.sub(r"\n *", "", re.sub(r",\n *", ", ", text))


def read_sealed(path: Path) -> dict:
    text = path.read_text()
    content = json.loads(text)
    assert content.pop("xxh3_128") == xxh3(one_line(text).encode())
    assert one_line(text) == json.dumps(content, sort_keys=True)
    return content


def require_files(folder: Path, files: dict) -> None:
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert entry == {"size_bytes": len(content), "xxh3_128": xxh3(content)}


def test_the_rules_for_cache_json_and_the_tables_hold(cache):
    content = read_sealed(cache / "cache.json")
    require_files(cache, content["files"])
    assert content["blocks"] == [[0, 13], [32, 11]]
    keys = pq.read_table(cache / "index.parquet")["key"].to_pylist()
    link = hashlib.sha256(b"movekd corpus").digest()
    assert (
        content["corpus_fingerprint"] == hashlib.sha256(link + "\n".join(keys).encode()).hexdigest()
    )


@pytest.mark.parametrize("teacher", ["clip", "conv", "packed"])
def test_the_rules_for_seals_and_shard_files_hold(cache, teacher):
    group, seals = cache / f"{teacher}.zarr", cache / f"{teacher}.seals"
    calibration = read_sealed(seals / "calibration.json")
    metadata = read_sealed(seals / "metadata.json")
    require_files(group, metadata["files"])
    require_files(seals, read_sealed(seals / "skipped.json")["files"])
    statistics = [
        (group / name / "c" / "0").read_bytes() for name in ("channel_mean", "channel_std")
    ]
    assert calibration["channel_stats_xxh3_128"] == xxh3(b"".join(statistics))
    attributes = json.loads((group / "zarr.json").read_text())["attributes"]["movekd"]
    left_out = ("description", "max_error", "max_energy_error")
    spec = {k: v for k, v in attributes["spec"].items() if k not in left_out}
    fingerprint = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
    assert fingerprint == attributes["spec_fingerprint"] == calibration["spec_fingerprint"]
    index = pq.read_table(cache / "index.parquet").to_pylist()
    num_rows = index[-1]["row"] + 1
    assert metadata["num_rows"] == num_rows == 43
    known = set(metadata["files"])
    for shard in range(-(-num_rows // ROWS_PER_SHARD)):
        seal = read_sealed(seals / f"{shard:05d}.json")
        first = shard * ROWS_PER_SHARD
        listed = [r for r in index if first <= r["row"] < first + ROWS_PER_SHARD]
        assert seal["rows"] == [first, listed[-1]["row"] + 1 if listed else first]
        assert seal["keys_xxh3_128"] == xxh3("".join(f"{r['key']}\n" for r in listed).encode())
        assert seal["calibration"] == xxh3(repr(sorted(calibration.items())).encode())
        count = (len(listed) - len(seal["skipped"])) * calibration["num_tokens"]
        assert seal["error"]["num_tokens"] == count
        require_files(group, seal["files"])
        known |= set(seal["files"])
        for name in seal["files"]:
            require_contiguous_chunks(group, name, len(listed))
    assert known == {
        path.relative_to(group).as_posix() for path in group.rglob("*") if path.is_file()
    }


def require_contiguous_chunks(group: Path, name: str, num_rows: int) -> None:
    raw = (group / name).read_bytes()
    start = len(raw) - 16 * ROWS_PER_SHARD - 4
    index = np.frombuffer(raw[start:-4], "<u8").reshape(-1, 2)
    assert (index[num_rows:] == 2**64 - 1).all()
    ends = np.cumsum(index[:num_rows, 1])
    assert index[:num_rows, 0].tolist() == (ends - index[:num_rows, 1]).tolist()
    assert start == (ends[-1] if num_rows else 0)
    if group.name != "packed.zarr":
        assert len(set(index[:num_rows, 1].tolist())) <= 1


def test_rows_without_features_read_as_the_table_says(cache):
    """Row 3 is skipped; 14 shares a Zarr shard with rows; 20 lies in one that has none."""
    for row in (3, 14, 20):
        clip = zarr.open_group(cache / "clip.zarr", mode="r")
        assert (clip["tokens"][row] == 0).all()
        for name in ("token_scale", "cls", "cls_attention"):
            assert np.isnan(clip[name][row]).all()
        assert np.isnan(zarr.open_group(cache / "conv.zarr", mode="r")["tokens"][row]).all()


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_first_lines_of_the_page_read_what_movekd_reads(cache, monkeypatch, capsys):
    code = python_blocks()
    monkeypatch.chdir(cache.parent)
    names: dict = {}
    exec(code[0], names)
    assert capsys.readouterr().out == "(16, 144)\n"
    expected = open_cache(cache)["clip"].read([5]).tokens_BND[0].numpy()
    np.testing.assert_allclose(names["tokens"], expected, rtol=0, atol=1e-6)  # torch rounds once


@pytest.mark.parametrize(
    ("name", "codec"),
    [("small", "int4"), ("tiny", "lloyd4"), ("tiny", "lloyd3"), ("tiny", "lloyd2")],
)
def test_the_lines_for_a_codec_decode_what_movekd_decodes(
    name, codec, tmp_path, corpus_dir, monkeypatch
):
    """Some tokens of this teacher have an outlier, others have none."""
    (code,) = [block for block in python_blocks() if f"cache/{name}.zarr" in block]
    spec = heavy_tails.spec(
        name=name, codec=codec, model_args={"rate": 0.01}, calibration_images=12
    )
    build(tmp_path / "cache", corpus_dir, [spec])
    targets = open_cache(tmp_path / "cache")[name].read([5])
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    expected = targets.standardised_BND[0].numpy()
    np.testing.assert_allclose(names["z"], expected, rtol=0, atol=1e-6 if name == "tiny" else 0)
    if name == "tiny":
        scales = targets.stored["token_scale"][0]
        plain = (scales[:, 1] == 0).numpy()
        assert 0 < plain.sum() < len(plain)
        rotated = targets.rotated_BND[0].numpy()
        assert np.array_equal(names["y"][plain], rotated[plain])  # to the bit


def test_the_lines_of_the_page_decode_lowrank(tmp_path, corpus_dir, tiny_specs):
    """In the sizes where bits fill their bytes, and where they do not."""
    specs = [
        tiny_specs[0].with_changes(name=f"rank{rank}", codec=f"lowrank{rank}", cls_attention=False)
        for rank in (5, 16)
    ]
    build(tmp_path, corpus_dir, specs)
    (lines,) = re.findall(r"^```python\n(def decode_lowrank.*?)^```", PAGE.read_text(), re.M | re.S)
    page = {"np": np}
    exec(lines, page)
    for spec in specs:
        group = zarr.open_group(tmp_path / f"{spec.name}.zarr", mode="r")
        expected = open_cache(tmp_path)[spec.name].read([2, 0]).tokens_BND
        decoded = np.stack([page["decode_lowrank"](group, row) for row in (2, 0)])
        np.testing.assert_allclose(decoded, expected, rtol=1e-5, atol=1e-5)
