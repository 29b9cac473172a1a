"""Tests of movekd.cache.reader: every row is what stock zarr reads, and what is no row is refused.

Damaged stores are in test_reader_damage.py. Legend: B batch, N tokens, D channels.
"""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from movekd.cache.reader import TeacherCache, open_cache
from movekd.errors import CacheError, ConfigError, UnknownKeyError
from stored_rows import assert_equal

row_lists = st.lists(st.integers(0, 23), max_size=40)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row_lists, st.sampled_from(["none", "zstd", "blosc"]), st.booleans())
def test_any_rows_in_any_order_are_what_zarr_reads(stores, arrays, rows, name, is_given) -> None:
    store: TeacherCache = stores[name]
    out = store.empty(len(rows)) if is_given else None
    targets = store.read(np.array(rows, np.int64), out=out)
    assert_equal(targets.stored, arrays, rows)
    assert len(targets) == len(rows)
    assert out is None or targets.stored is out


def test_targets_decode_to_what_the_attributes_say(stores, arrays) -> None:
    targets = stores["none"].read([5, 0, 9])
    rows = {name: array[[5, 0, 9]].astype(np.float32) for name, array in arrays.items()}
    group = zarr.open_group(stores["none"].storage.local_dir / "clip.zarr", mode="r")
    scale_BND = np.repeat(rows["token_scale"], 128, axis=-1)[..., :144]
    standardised_BND = scale_BND * rows["tokens"]
    np.testing.assert_array_equal(targets.standardised_BND.numpy(), standardised_BND)
    tokens_BND = group["channel_mean"][:] + group["channel_std"][:] * standardised_BND
    np.testing.assert_allclose(targets.tokens_BND.numpy(), tokens_BND, rtol=1e-6, atol=1e-6)
    std_D = group["channel_std"][:]
    scaled_BND = (targets.tokens_BND.numpy() - group["channel_mean"][:]) / np.sqrt(
        np.mean(std_D**2)
    )
    np.testing.assert_allclose(targets.scaled_BND.numpy(), scaled_BND, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(targets.cls_BD.numpy(), rows["cls"])
    np.testing.assert_array_equal(targets.cls_attention_BHN.numpy(), rows["cls_attention"])
    assert torch.equal(targets.to("cpu").tokens_BND, targets.tokens_BND)
    assert (targets.cls_attention_BHN.sum(-1) <= 1.001).all()


def test_a_teacher_without_cls_has_none(cache_dir) -> None:
    targets = open_cache(cache_dir)["conv"].read([1])
    assert targets.cls_BD is None
    assert targets.cls_attention_BHN is None
    assert targets.tokens_BND.dtype == torch.float32


def test_out_of_another_shape_is_refused(stores) -> None:
    with pytest.raises(CacheError, match=r"int8 of \(3, 16, 144\).*expected .*\(2, 16, 144\)"):
        stores["none"].read([0, 1], out=stores["none"].empty(3))
    other = stores["none"].empty(2)
    other["tokens"] = other["tokens"].float()
    with pytest.raises(CacheError, match=r"out\['tokens'\] is torch.float32 .*expected torch.int8"):
        stores["none"].read([0, 1], out=other)
    del other["tokens"]
    with pytest.raises(CacheError, match=r"out\['tokens'\] is missing"):
        stores["none"].read([0, 1], out=other)


@pytest.mark.parametrize("rows", [[[0, 1]], [0.5], ["0"], 3, [True]])
def test_rows_that_are_no_list_of_numbers_are_refused(stores, rows) -> None:
    with pytest.raises(CacheError, match="expected integers in one dimension"):
        stores["none"].read(rows)


def test_no_rows_and_rows_of_any_integer_type_are_read(stores, arrays) -> None:
    assert len(stores["none"].read([])) == 0
    for kind in (np.uint8, np.int16, np.uint64):
        rows = np.array([3, 1], kind)
        assert_equal(stores["none"].read(rows).stored, arrays, [3, 1])


@pytest.mark.parametrize("row", [-1, 24, 10**6])
def test_rows_out_of_range_are_refused(stores, row) -> None:
    with pytest.raises(CacheError, match=rf"row {row} is outside of .*: 0\.\.23"):
        stores["none"].read([0, row])


@pytest.mark.parametrize("compressor", ["none", "zstd"])
def test_threads_share_a_store(stores, arrays, compressor) -> None:
    store = pickle.loads(pickle.dumps(stores[compressor]))  # noqa: S301
    orders = [np.random.default_rng(seed).permutation(24) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        for rows, targets in zip(orders, pool.map(store.read, orders), strict=True):
            assert_equal(targets.stored, arrays, rows)


class Stored(Dataset):
    """Row -> its stored arrays."""

    def __init__(self, store: TeacherCache) -> None:
        self.store = store

    def __len__(self) -> int:
        return 24

    def __getitems__(self, rows: list[int]):
        return {name: array.numpy() for name, array in self.store.read(rows).stored.items()}


def as_it_is(batch):
    return batch


@pytest.mark.parametrize("compressor", ["none", "zstd"])
def test_forked_workers_read_the_same(stores, arrays, compressor) -> None:
    stores[compressor].read([3])  # the parent has maps and stores open that a child must not use
    loader = DataLoader(
        Stored(stores[compressor]),
        batch_size=6,
        num_workers=2,
        collate_fn=as_it_is,
        multiprocessing_context="fork",
    )
    batches = list(loader)
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.concatenate([b[name] for b in batches]), array)


def test_a_pickled_store_opens_elsewhere(stores, arrays, tmp_path) -> None:
    """What a spawned worker gets."""
    store = stores["none"]
    store.read([0])
    (tmp_path / "store").write_bytes(pickle.dumps(store))
    code = (
        "import sys, pickle, pathlib, numpy; folder = pathlib.Path(sys.argv[1]); "
        "store = pickle.loads((folder / 'store').read_bytes()); "
        "numpy.save(folder / 'tokens', store.read([20, 3, 3]).stored['tokens'].numpy())"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "tokens.npy"), arrays["tokens"][[20, 3, 3]])


def test_rows_of_names_and_keys(cache_dir) -> None:
    cache = open_cache(cache_dir)
    assert cache.teachers == tuple(cache) == ("clip", "conv")
    keys = cache.keys.to_pylist()
    names = [f"photos/{number:02d}.png" for number in (7, 0, 7)]
    rows = cache.rows(names)
    assert rows[0] == rows[2] != rows[1]
    assert cache.rows([keys[row] for row in rows]).tolist() == rows.tolist()
    assert cache.rows(keys).tolist() == list(range(24))
    assert cache.rows([]).tolist() == []
    assert cache.find_rows(["nothing", keys[3]]).tolist() == [-1, 3]
    for error in (UnknownKeyError, KeyError):
        with pytest.raises(error, match=r"no image named 'nothing' \(1 of 2 unknown\)"):
            cache.rows(["nothing", keys[3]])
    for view in (1, -1, 10**30):
        with pytest.raises(UnknownKeyError, match="holds no view"):
            cache.rows([keys[0]], view=view)


def test_an_unknown_teacher_names_the_nearest(cache_dir) -> None:
    with pytest.raises(CacheError, match=r"no teacher 'clap'\. Did you mean 'clip'\?.*clip, conv"):
        open_cache(cache_dir)["clap"]


STOCK = """
import sys, numpy
sys.modules["movekd"] = None                      # importing it raises
import zarr, tensorstore
out, path = sys.argv[1:]
group = zarr.open_group(path, mode="r")
tokens, scale = group["tokens"], group["token_scale"]
assert tokens.metadata.dimension_names == ("row", "token", "channel"), tokens.metadata
assert scale.metadata.dimension_names == ("row", "token", "group")
def stored(name):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/{name}/"}}
    return tensorstore.open(spec).result()[:].read().result()
for name in group.array_keys():
    numpy.testing.assert_array_equal(stored(name), group[name][:])
per_channel = numpy.repeat(scale[:].astype("f4"), 128, axis=-1)[..., : tokens.shape[-1]]
mean, std = group["channel_mean"][:], group["channel_std"][:]
numpy.save(out, mean + std * per_channel * tokens[:])
"""


def test_stock_libraries_open_a_store_without_movekd_and_without_a_warning(
    stores, cache_dir, tmp_path
) -> None:
    full = open_cache(cache_dir)["clip"]
    cases = [full, stores["none"], stores["zstd"], stores["blosc"]]
    for number, store in enumerate(cases):
        path, out = store.storage.local_dir / "clip.zarr", tmp_path / f"{number}.npy"
        command = [sys.executable, "-W", "error", "-I", "-c", STOCK, str(out), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        expected = store.read(range(24)).tokens_BND.numpy()
        np.testing.assert_allclose(np.load(out), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([1.0], requires_grad=True),
        torch.tensor([1.0], dtype=torch.bfloat16),
        torch.zeros(2, dtype=torch.bool),
        [[1], [2, 3]],
        None,
        "12",
        {1, 2},
        [10**30],
        [None],
        np.array([1 + 0j]),
    ],
)
def test_rows_of_any_other_kind_are_a_sentence(stores, rows) -> None:
    with pytest.raises(CacheError, match=r"rows are .*; expected integers in one dimension"):
        stores["none"].read(rows)


def test_rows_beyond_int64_do_not_wrap_around(stores) -> None:
    with pytest.raises(CacheError, match=rf"row {2**64 - 1} is outside of"):
        stores["none"].read(np.array([2**64 - 1], np.uint64))


@pytest.mark.parametrize("names", [None, "photos/00.png", [3], [["a"], ["b"]], 7, [b"\xff"]])
def test_names_that_are_no_list_of_text_are_a_sentence(cache_dir, names) -> None:
    cache = open_cache(cache_dir)
    for look_up in (cache.rows, cache.find_rows):
        with pytest.raises(CacheError, match=r"the names are .*; expected a list of names or keys"):
            look_up(names)
    for view in (None, "0", 1.5, [0]):
        with pytest.raises(CacheError, match=r"view is .*; expected an integer"):
            cache.rows(["photos/00.png"], view=view)


@pytest.mark.parametrize("url", [None, 3, b"cache", ["cache"]])
def test_a_cache_that_is_no_name_is_a_sentence(url) -> None:
    with pytest.raises(ConfigError, match=r"the cache is .*; expected a folder or a URL"):
        open_cache(url)


def test_another_way_to_verify_is_a_sentence(cache_dir) -> None:
    with pytest.raises(ConfigError, match="verify is 'all'; expected 'size' or 'checksum'"):
        open_cache(cache_dir, verify="all")
