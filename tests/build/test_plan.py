import pytest

from movekd.build.plan import plan_cache
from movekd.build.run import BuildOptions
from movekd.cache.check import status
from movekd.cache.reader import open_cache
from movekd.corpus.index import open_corpus

OPTIONS = BuildOptions(batch_size=4, num_workers=0)


@pytest.fixture(autouse=True)
def _measure_briefly(monkeypatch) -> None:
    monkeypatch.setattr("movekd.build.plan._MIN_SECONDS", 0.0)


def test_the_plan_is_what_the_build_writes(tmp_path, corpus_dir, cache_dir, tiny_specs) -> None:
    plan = plan_cache(
        tiny_specs, open_corpus(corpus_dir), tmp_path / "not" / "there", options=OPTIONS
    )
    assert plan.num_images == 24
    assert plan.free_bytes > 0
    built = open_cache(cache_dir)
    chosen = {part.teacher: part for part in plan.teachers if part.is_spec}
    for found in status(built):
        planned = chosen[found.teacher]
        assert planned.row_bytes == built[found.teacher].layout.row_bytes
        assert (planned.grid, planned.width, planned.codec) == (
            found.grid, found.width, found.codec,
        )  # fmt: skip
        index_bytes = (16 * 1024 + 4) * len(built[found.teacher].layout.arrays)
        assert planned.total_bytes == found.size_bytes - index_bytes
    assert plan.total_bytes == sum(part.total_bytes for part in chosen.values())
    assert plan.random_weights == ""
    assert not (tmp_path / "not").exists()


def test_every_grid_and_codec_is_offered_once(tmp_path, corpus_dir, tiny_specs) -> None:
    plan = plan_cache(
        tiny_specs,
        open_corpus(corpus_dir),
        tmp_path,
        options=OPTIONS,
        num_images=1000,
        student_grid=4,
    )
    found = [(part.teacher, part.grid, part.codec) for part in plan.teachers]
    conv = [("conv", grid, codec) for grid in (1, 4, 2) for codec in ("float16", "int8")]
    assert found == [("clip", 4, "float16"), ("clip", 4, "int8"), *conv]
    assert all(part.total_bytes == 1000 * part.row_bytes for part in plan.teachers)


def test_weights_out_of_reach_are_replaced_and_named(tmp_path, corpus_dir, tiny_specs) -> None:
    spec = tiny_specs[0].with_changes(weights=str(tmp_path / "none.safetensors"))
    plan = plan_cache([spec], open_corpus(corpus_dir), tmp_path, options=OPTIONS)
    assert plan.random_weights == "clip"
