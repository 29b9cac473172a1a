import shutil
import sys

import numpy as np
import pytest
from safetensors.torch import save_file

from movekd.analysis.verify_features import verify_features
from movekd.cache import layout
from movekd.cache.reader import open_cache
from movekd.cache.seal import entry, read_sealed, write_sealed
from movekd.cache.storage import LocalStorage
from movekd.cache.verify import verify
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_folder
from movekd.errors import CacheError, ConfigError
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache
from movekd.teachers import load_teacher

OPTIONS = BuildOptions(batch_size=4, num_workers=0)


def problems(cache, data, num_rows=24, **more):
    return list(verify_features(cache, open_corpus(data), num_rows, options=OPTIONS, **more))


@pytest.fixture
def copied(tmp_path, cache_dir):
    """A copy of the cache to do harm to."""
    shutil.copytree(cache_dir, tmp_path / "cache")
    return tmp_path / "cache"


def alter_and_reseal(cache, teacher, array, change) -> None:
    """Change an array's stored rows by ``change(rows)`` and seal the file again."""
    storage = LocalStorage(cache)
    opened = open_cache(cache)[teacher].layout.arrays[array]
    file = f"{layout.group_name(teacher)}/{layout.shard_file(opened, 0)}"
    raw = bytearray(storage.read(file))
    rows = np.frombuffer(raw, opened.dtype, 24 * int(np.prod(opened.row_shape)))
    change(rows.reshape(24, *opened.row_shape))
    storage.write(file, [raw])
    seal = read_sealed(storage, layout.seal_name(teacher, 0))
    seal["files"][layout.shard_file(opened, 0)] = entry([raw]).model_dump()
    write_sealed(storage, layout.seal_name(teacher, 0), seal)
    assert list(verify(cache)) == []


def swap_5_and_6(rows) -> None:
    rows[[5, 6]] = rows[[6, 5]]


def test_a_whole_cache_passes_in_any_batch(cache_dir, corpus_dir) -> None:
    for batch_size in (1, 7, 24):
        options = BuildOptions(batch_size=batch_size, num_workers=0)
        assert list(verify_features(cache_dir, open_corpus(corpus_dir), 24, options=options)) == []


@pytest.mark.parametrize(
    ("teacher", "array", "what"),
    [
        ("clip", "tokens", "tokens"),
        ("clip", "token_scale", "tokens"),
        ("clip", "cls", "[CLS]"),
        ("clip", "cls_attention", "attention"),
        ("conv", "tokens", "tokens"),
    ],
)
def test_rows_swapped_and_sealed_again_are_found(copied, corpus_dir, teacher, array, what) -> None:
    alter_and_reseal(copied, teacher, array, swap_5_and_6)
    found = problems(copied, corpus_dir)
    assert len(found) == 2
    for row, sentence in zip((5, 6), found, strict=True):
        key = open_cache(copied).keys[row].as_py()
        assert f"row {row} of '{teacher}' (key {key[:16]}...): differs" in sentence
        assert f"output: {what} by " in sentence
        assert f"delete {copied}/{teacher}.seals/00000.json and build again" in sentence


def test_one_altered_token_is_found(copied, corpus_dir) -> None:
    def alter(rows) -> None:
        rows[3, 1] = -rows[3, 1]

    alter_and_reseal(copied, "clip", "tokens", alter)
    (found,) = problems(copied, corpus_dir)
    assert "row 3 of 'clip'" in found
    assert problems(copied, corpus_dir, teachers=["conv"]) == []


def test_a_row_without_numbers_is_found(copied, corpus_dir) -> None:
    def alter(rows) -> None:
        rows[3] = np.nan

    alter_and_reseal(copied, "conv", "tokens", alter)
    (found,) = problems(copied, corpus_dir)
    assert "row 3 of 'conv'" in found
    assert "tokens by nan%" in found


def test_the_draw_is_of_the_seed_and_of_built_rows(
    tmp_path, tiny_specs, small_shards, damaged_corpus, monkeypatch
) -> None:
    """Neither of skipped rows nor of Zarr shards that are missing."""
    data, damaged = damaged_corpus
    cache = tmp_path / "cache"
    for _ in build_cache(
        cache, open_corpus(data), tiny_specs[:1], geometry="crop", options=OPTIONS
    ):
        pass
    (cache / layout.seal_name("clip", 2)).unlink()
    read = []
    corpus = open_corpus(data)
    monkeypatch.setattr(
        type(corpus), "read_image", lambda self, row: (read.append(row), b"none")[1]
    )
    assert len(problems(cache, data)) == 15
    assert read == [row for row in range(16) if row != damaged]
    draws = []
    for seed in (0, 0, 1):
        read.clear()
        problems(cache, data, num_rows=5, seed=seed)
        assert len(set(read)) == 5
        draws.append(list(read))
    assert draws[0] == draws[1] != draws[2]


def test_a_changed_image_is_found(copied, changed_corpus) -> None:
    data, damaged = changed_corpus
    found = problems(copied, data)
    assert len(found) == 2
    for teacher, sentence in zip(("clip", "conv"), found, strict=True):
        assert f"row {damaged} of '{teacher}'" in sentence
        assert "the shard is damaged or was replaced" in sentence


def test_an_image_that_is_not_there_is_found(tmp_path, copied, crops) -> None:
    (tmp_path / "images").mkdir()
    crops[30].save(tmp_path / "images" / "other.png")
    pack_folder(tmp_path / "images", tmp_path / "data", num_workers=1)
    found = problems(copied, tmp_path / "data", num_rows=3)
    assert len(found) == 6
    assert all("holds no such image; give the --shards" in sentence for sentence in found)


def test_given_weights_are_checked(tmp_path, corpus_dir, tiny_specs) -> None:
    """A cache does not say where its weights lay; those that are given must be those."""
    paths = []
    for seed in (0, 1):
        module = load_teacher(tiny_specs[0].with_changes(seed=seed)).module
        paths.append(str(tmp_path / f"{seed}.safetensors"))
        save_file({name: t.clone() for name, t in module.state_dict().items()}, paths[-1])
    spec, cache = tiny_specs[0].with_changes(weights=paths[0]), tmp_path / "cache"
    for _ in build_cache(cache, open_corpus(corpus_dir), [spec], geometry="crop", options=OPTIONS):
        pass
    assert open_cache(cache)["clip"].spec.weights == "given"
    assert problems(cache, corpus_dir, weights={"clip": paths[0]}) == []
    (other,) = problems(cache, corpus_dir, weights={"clip": paths[1]})
    assert "the weights of 'clip' have SHA-256" in other
    assert "Nothing of this teacher was compared" in other
    (missing,) = problems(cache, corpus_dir, weights={"clip": str(tmp_path / "none")})
    assert f"'clip' in {cache} was not recomputed: " in missing


def test_other_random_weights_are_named(copied, corpus_dir, monkeypatch) -> None:
    monkeypatch.setattr(
        sys.modules["movekd.analysis.verify_features"],  # the package exports its function's name
        "load_teacher",
        lambda spec, *where: load_teacher(spec.with_changes(seed=9), *where),
    )
    found = problems(copied, corpus_dir)
    assert [sentence.split(" have ")[0] for sentence in found] == [
        "the weights of 'clip'",
        "the weights of 'conv'",
    ]


def test_what_cannot_be_asked_is_refused(tmp_path, cache_dir, corpus_dir) -> None:
    with pytest.raises(ConfigError, match=r"no teacher 'clap'. Did you mean 'clip'\?"):
        problems(cache_dir, corpus_dir, teachers=["clap"])
    with pytest.raises(ConfigError, match=r"no teacher 'sam'.* holds: clip, conv"):
        problems(cache_dir, corpus_dir, weights={"sam": "hub"})
    with pytest.raises(CacheError, match="holds no cache"):
        problems(tmp_path / "none", corpus_dir)
