import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from movekd.cache.catalog import open_catalog, update_catalog
from movekd.cache.seal import read_sealed, write_sealed
from movekd.cache.storage import open_storage
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.errors import CacheError, CorruptCacheError


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, crops):
    """Corpora of the first 10, 13 and 20 images, and one of the last 10."""
    made = {}
    for name, chosen in (("a", range(10)), ("ab", range(13)), ("abc", range(20))):
        images = tmp_path_factory.mktemp("images")
        for number in chosen:
            crops[number].save(images / f"{number:02d}.png")
        made[name] = images
    other = tmp_path_factory.mktemp("images")
    for number in range(30, 40):
        crops[number].save(other / f"{number}.png")
    made["other"] = other
    out = tmp_path_factory.mktemp("corpora")
    for name, images in made.items():
        pack_folder(images, out / name, num_workers=1)
    return {name: open_corpus(out / name) for name in made}


def test_appended_images_start_at_the_next_zarr_shard(tmp_path, corpora) -> None:
    first = update_catalog(open_storage(tmp_path), corpora["a"], "crop")
    assert first.rows.tolist() == list(range(10))
    for name, starts in (("ab", [1024]), ("abc", [1024, 2048])):
        catalog = update_catalog(open_storage(tmp_path), corpora[name], "crop")
        expected = [*range(10), *range(1024, 1027)] + [*range(2048, 2055)] * (len(starts) - 1)
        assert catalog.rows.tolist() == expected
        reopened = open_catalog(open_storage(tmp_path))
        assert reopened.index.equals(catalog.index)
        assert reopened.names.equals(catalog.names)
        assert reopened.num_rows == expected[-1] + 1
        assert reopened.index["key"].to_pylist() == corpora[name].index["key"].to_pylist()


def test_the_same_corpus_again_changes_nothing(tmp_path, corpora, snapshot) -> None:
    update_catalog(open_storage(tmp_path), corpora["a"], "pad")
    before = snapshot(tmp_path)
    update_catalog(open_storage(tmp_path), corpora["a"], "pad")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("files", [("index.parquet",), ("index.parquet", "names.parquet")])
def test_an_interrupted_append_is_finished_or_undone(tmp_path, corpora, snapshot, files) -> None:
    update_catalog(open_storage(tmp_path / "new"), corpora["a"], "crop")
    update_catalog(open_storage(tmp_path / "new"), corpora["ab"], "crop")
    update_catalog(open_storage(tmp_path / "old"), corpora["a"], "crop")
    expected_old, expected_new = snapshot(tmp_path / "old"), snapshot(tmp_path / "new")
    for name, expected in (("ab", expected_new), ("a", expected_old)):
        update_catalog(open_storage(tmp_path / name), corpora["a"], "crop")
        for file in files:
            (tmp_path / name / file).write_bytes(expected_new[file])
        with pytest.raises(CorruptCacheError, match="run it again"):
            open_catalog(open_storage(tmp_path / name))
        update_catalog(open_storage(tmp_path / name), corpora[name], "crop")
        assert snapshot(tmp_path / name) == expected


def test_another_geometry_or_corpus_is_refused(tmp_path, corpora, snapshot) -> None:
    update_catalog(open_storage(tmp_path), corpora["ab"], "crop")
    before = snapshot(tmp_path)
    with pytest.raises(
        CacheError, match=r"geometry 'crop', the build asks for 'pad'.*--resize-mode"
    ):
        update_catalog(open_storage(tmp_path), corpora["ab"], "pad")
    for name in ("other", "a"):
        with pytest.raises(CacheError, match=r"13 images of another corpus .*\(10 images\)"):
            update_catalog(open_storage(tmp_path), corpora[name], "crop")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("key", "value"), [("format_version", 2), ("geometry", "swirl")])
def test_what_cannot_be_read_is_named(tmp_path, corpora, key, value) -> None:
    update_catalog(open_storage(tmp_path), corpora["a"], "crop")
    storage = open_storage(tmp_path)
    write_sealed(storage, "cache.json", read_sealed(storage, "cache.json") | {key: value})
    with pytest.raises(CacheError, match=f"format {value}|geometry: .*found '{value}'"):
        open_catalog(open_storage(tmp_path))


def test_no_cache_and_damaged_tables_are_sentences(tmp_path, corpora) -> None:
    with pytest.raises(CacheError, match="holds no cache"):
        open_catalog(open_storage(tmp_path))
    update_catalog(open_storage(tmp_path), corpora["a"], "crop")
    path = tmp_path / "names.parquet"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(CorruptCacheError, match=r"another checksum.*run it again"):
        open_catalog(open_storage(tmp_path))
    path.write_bytes(whole[:-1])
    with pytest.raises(CorruptCacheError, match=rf"has {len(whole) - 1} bytes"):
        open_catalog(open_storage(tmp_path))
    path.unlink()
    with pytest.raises(CorruptCacheError, match="has no bytes"):
        open_catalog(open_storage(tmp_path))
    assert np.array_equal(
        update_catalog(open_storage(tmp_path), corpora["a"], "crop").rows, np.arange(10)
    )


def test_the_same_images_in_other_tars_are_found_where_they_are_now(tmp_path, corpora) -> None:
    storage = open_storage(tmp_path / "cache")
    update_catalog(storage, corpora["ab"], "crop")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(len(corpora["ab"])):
        (images / f"{number:02d}.png").write_bytes(corpora["ab"].read_image(number))
    pack_folder(images, tmp_path / "packed", num_workers=1, max_shard_bytes=4000)
    moved = open_corpus(tmp_path / "packed")
    assert moved.index["shard"].to_pylist() != corpora["ab"].index["shard"].to_pylist()
    update_catalog(storage, moved, "crop")
    held = open_catalog(storage).index
    for column in ("shard", "offset"):
        assert held[column].to_pylist() == moved.index[column].to_pylist()


VIEWS = [3, 5, 4, 4, 3, 3, 5, 5, 3]
"""How many views the images of ``view_corpora`` have."""


def test_views_stand_image_by_image(tmp_path, view_corpora) -> None:
    small, large = (open_corpus(data) for data in view_corpora)
    storage = open_storage(tmp_path)
    for corpus, blocks in ((small, [[0, 7]]), (large, [[0, 7], [1024, 2]])):
        update_catalog(storage, corpus, "stretch", "anyres")
        catalog = open_catalog(storage)
        counts = VIEWS[: len(corpus)]
        assert catalog.views.tolist() == [view for count in counts for view in range(count)]
        assert catalog.images.tolist() == [i for i, n in enumerate(counts) for _ in range(n)]
        assert (catalog.views.dtype, catalog.images.dtype) == (np.int16, np.int64)
        assert catalog.rows.tolist() == [*range(27), *range(1024, 1032)][: sum(counts)]
        keys = corpus.index["key"].to_pylist()
        assert catalog.index["key"].to_pylist() == [keys[image] for image in catalog.images]
        record = read_sealed(storage, "cache.json")
        assert (record["views"], record["blocks"]) == ("anyres", blocks)
        assert (catalog.view_set, catalog.num_images) == ("anyres", len(corpus))


def test_a_second_append_starts_after_every_view(tmp_path, view_corpora, small_shards) -> None:
    small, large = view_corpora
    corpus = open_corpus(large)
    parts = []
    for count in (6, 7, 9):  # 22 rows, then 5, then 8
        part = tmp_path / f"{count}"
        shutil.copytree(small if count < 8 else large, part)
        pq.write_table(corpus.index.slice(0, count), part / "index.parquet")
        parts.append(open_corpus(part))
    for part in parts:
        catalog = update_catalog(open_storage(tmp_path / "cache"), part, "stretch", "anyres")
    assert catalog.rows.tolist() == [*range(22), *range(24, 29), *range(32, 40)]
    assert read_sealed(open_storage(tmp_path / "cache"), "cache.json")["blocks"] == [
        [0, 6], [24, 1], [32, 2]
    ]  # fmt: skip


def test_the_checksum_of_keys_tells_views_apart(tmp_path, view_corpora) -> None:
    corpus = open_corpus(view_corpora[0])
    keys = corpus.index["key"].to_pylist()
    base = update_catalog(open_storage(tmp_path / "base"), corpus, "stretch")
    assert next(base.keys_checksums([(1, 3)])) == xxhash.xxh3_128_hexdigest(
        f"{keys[1]}\n{keys[2]}\n".encode()
    )
    anyres = update_catalog(open_storage(tmp_path / "anyres"), corpus, "stretch", "anyres")
    said = f"{keys[0]} 2\n{keys[1]} 0\n{keys[1]} 1\n"
    assert next(anyres.keys_checksums([(2, 5)])) == xxhash.xxh3_128_hexdigest(said.encode())
    assert next(anyres.keys_checksums([(3, 4)])) != next(anyres.keys_checksums([(4, 5)]))


@pytest.mark.parametrize(("held", "asked"), [("base", "anyres"), ("anyres", "base")])
def test_other_views_are_refused(tmp_path, view_corpora, snapshot, held, asked) -> None:
    corpus = open_corpus(view_corpora[0])
    update_catalog(open_storage(tmp_path), corpus, "stretch", held)
    before = snapshot(tmp_path)
    with pytest.raises(CacheError, match=f"views '{held}', .* '{asked}'.*--tiles {held}, or ano"):
        update_catalog(open_storage(tmp_path), corpus, "crop", asked)
    assert snapshot(tmp_path) == before
    update_catalog(open_storage(tmp_path), corpus, "stretch", held)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("number", [0, 1])
def test_sizes_that_changed_cannot_move_rows(tmp_path, view_corpora, snapshot, number) -> None:
    storage = open_storage(tmp_path / "c")
    update_catalog(storage, open_corpus(view_corpora[0]), "crop", "anyres")
    before = snapshot(tmp_path / "c")
    shutil.copytree(view_corpora[number], tmp_path / "data")
    index = open_corpus(view_corpora[number]).index.read()
    widths = pa.array([40, *[340] * (len(index) - 1)], pa.int32())
    column = index.schema.get_field_index("width")
    pq.write_table(index.set_column(column, "width", widths), tmp_path / "data" / "index.parquet")
    with pytest.raises(CacheError, match=r"other views than the sizes in .*Restore that file"):
        update_catalog(
            open_storage(tmp_path / "c"), open_corpus(tmp_path / "data"), "crop", "anyres"
        )
    assert snapshot(tmp_path / "c") == before


def test_rows_are_read_out_of_the_table_once(tmp_path, corpora) -> None:
    """A resume asks for them once a Zarr shard, of which there can be a hundred thousand."""
    update_catalog(open_storage(tmp_path), corpora["ab"], "crop")
    catalog = open_catalog(open_storage(tmp_path))
    assert catalog.rows is catalog.rows
