import numpy as np
import pytest
import tensorstore
import torch
import zarr

from builds import build
from movekd.cache import layout
from movekd.cache.codecs import ArrayLayout
from movekd.cache.contents import read_calibration
from movekd.cache.layout import shard_file
from movekd.cache.reader import open_cache
from movekd.cache.seal import read_sealed, write_sealed
from movekd.cache.shard_file import shard_buffers, zarr_compressors
from movekd.cache.spec import DEFAULT_STD_FLOOR
from movekd.cache.storage import open_storage
from movekd.cache.verify import verify
from movekd.errors import CacheError

ARRAYS = [
    ArrayLayout("tokens", (4, 6), "int8", ("row", "token", "channel"), 0),
    ArrayLayout("token_scale", (4, 1), "float16", ("row", "token", "group")),
    ArrayLayout("cls", (6,), "float16", ("row", "channel")),
    ArrayLayout("cls_attention", (2, 4), "float16", ("row", "head", "token")),
]
ROWS_PER_SHARD = 8


def random_rows(array: ArrayLayout, num_rows: int) -> np.ndarray:
    """Rows of bytes, one all zeros and one all fill value."""
    rows = np.random.default_rng(num_rows).standard_normal((num_rows, *array.row_shape)) * 50
    rows = rows.astype(array.dtype)
    rows[num_rows // 2] = 0
    rows[num_rows // 3] = array.fill_value
    return rows


def zarr_array(folder, array: ArrayLayout, num_rows: int, compressor: str):
    group = zarr.create_group(folder)
    return group.create_array(
        array.name,
        shape=(num_rows, *array.row_shape),
        dtype=array.dtype,
        chunks=(1, *array.row_shape),
        shards=(ROWS_PER_SHARD, *array.row_shape),
        compressors=zarr_compressors(compressor, array),
        fill_value=array.fill_value,
        dimension_names=array.dimension_names,
        config={"write_empty_chunks": True},
    )


def write(folder, array: ArrayLayout, rows: np.ndarray, compressor: str) -> None:
    for shard in range(-(-len(rows) // ROWS_PER_SHARD)):
        part = rows[shard * ROWS_PER_SHARD :][:ROWS_PER_SHARD]
        path = folder / shard_file(array, shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(shard_buffers(part, array, ROWS_PER_SHARD, compressor)))


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: array.name)
@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 16, 19])
def test_shard_files_are_the_ones_that_zarr_writes(tmp_path, array, num_rows, snapshot) -> None:
    rows = random_rows(array, num_rows)
    zarr_array(tmp_path / "theirs", array, num_rows, "none")[:] = rows
    zarr_array(tmp_path / "ours", array, num_rows, "none")
    write(tmp_path / "ours", array, rows, "none")
    ours, theirs = snapshot(tmp_path / "ours"), snapshot(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    last = num_rows // ROWS_PER_SHARD
    for name in ours:
        if num_rows % ROWS_PER_SHARD and name == shard_file(array, last):
            continue  # zarr fills a partial shard up with rows beyond the array
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("compressor", ["none", "zstd", "blosc"])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: array.name)
@pytest.mark.parametrize("num_rows", [1, 8, 13])
def test_zarr_and_tensorstore_read_what_was_written(tmp_path, array, num_rows, compressor) -> None:
    rows = random_rows(array, num_rows)
    opened = zarr_array(tmp_path, array, num_rows + 9, compressor)
    write(tmp_path, array, rows, compressor)
    np.testing.assert_array_equal(opened[:num_rows], rows)
    store = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path / array.name}/"}}
    ).result()
    np.testing.assert_array_equal(store[:num_rows].read().result(), rows)
    unwritten = np.full((9, *array.row_shape), array.fill_value, array.dtype)
    np.testing.assert_array_equal(opened[num_rows:], unwritten)
    np.testing.assert_array_equal(store[num_rows:].read().result(), unwritten)


def test_a_teachers_group_holds_what_outsiders_need(cache_dir, tiny_specs) -> None:
    for spec in tiny_specs:
        group = zarr.open_group(cache_dir / layout.group_name(spec.name), mode="r")
        attributes = group.attrs["movekd"]
        assert attributes["format_version"] == 1
        settled = spec.with_changes(std_floor=DEFAULT_STD_FLOOR, cls_attention_heads="mean")
        assert attributes["spec_fingerprint"] == settled.fingerprint
        assert len(attributes["weights_sha256"]) == 64
        decide_bytes = {"movekd", "torch", "torchvision", "pillow", "numcodecs", "zarr"}
        assert decide_bytes <= attributes["versions"].keys()
        names = {"tokens", "channel_mean", "channel_std"}
        if spec.codec == "int8":
            names |= {"token_scale", "cls", "cls_attention"}
        assert set(group.array_keys()) == names
        for name in names:
            dimensions = group[name].metadata.dimension_names
            assert len(dimensions) == group[name].ndim
            assert dimensions[0] == ("channel" if name.startswith("channel_") else "row")


def test_a_group_that_records_fewer_versions_is_read_and_finished(
    tmp_path, corpus_dir, tiny_specs, cache_dir, monkeypatch
) -> None:
    """As caches of earlier movekd are."""
    with monkeypatch.context() as patch:
        patch.setattr("movekd.cache.writer.PACKAGES", ("movekd", "torch"))
        build(tmp_path, corpus_dir, tiny_specs[:1])
    (tmp_path / layout.seal_name("clip", 0)).unlink()
    build(tmp_path, corpus_dir, tiny_specs[:1])
    assert list(verify(tmp_path)) == []
    expected = open_cache(cache_dir)["clip"].read([0, 23]).tokens_BND
    assert torch.equal(open_cache(tmp_path)["clip"].read([0, 23]).tokens_BND, expected)


def test_seals_hold_no_time_and_name_the_calibration(cache_dir) -> None:
    storage = open_storage(cache_dir)
    calibration = read_calibration(storage, "clip")
    seal = read_sealed(storage, layout.seal_name("clip", 0))
    assert set(seal) == {"rows", "keys_xxh3_128", "files", "skipped", "error", "calibration"}
    assert seal["calibration"] == calibration.hash
    assert seal["rows"] == [0, 24]
    assert seal["error"]["num_tokens"] == 24 * 16
    assert 0 < seal["error"]["mean"] <= seal["error"]["max"] < 0.02


def test_a_calibration_of_another_version_is_a_sentence(tmp_path) -> None:
    storage = open_storage(tmp_path)
    assert read_calibration(storage, "clip") is None
    write_sealed(storage, layout.calibration_name("clip"), {"colour": 1})
    with pytest.raises(
        CacheError,
        match=r"unknown key 'colour'.*another version of movekd.*--overwrite the teacher",
    ):
        read_calibration(storage, "clip")
