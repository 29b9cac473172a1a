"""A corpus from Parquet trains as the same corpus from LLaVA's JSON."""

import json

import pytest

from movekd.corpus.index import open_corpus
from movekd.corpus.parquet import pack_parquet
from parquet_kit import SCHEMAS, write_rows

FILES = ("pretrain", "finetune")


@pytest.mark.slow
def test_a_step_on_parquet_is_that_on_json(digits, tmp_path):
    schema = SCHEMAS["LLaVA-OneVision-Data"]
    many = schema.set(1, schema.field("image").with_name("images"))
    many = many.set(1, many.field(1).with_type(SCHEMAS["FineVision"].field("images").type))
    paths = []
    for name in FILES:
        rows = json.loads((digits.source / f"{name}.json").read_text())
        for row in rows:
            names = row.pop("image", [])
            names = names if isinstance(names, list) else [names]
            data = [(digits.source / "images" / each).read_bytes() for each in names]
            cells = zip(data, names, strict=True)
            row["images"] = [{"bytes": image, "path": path} for image, path in cells]
        paths.append(str(write_rows(tmp_path / f"{name}.parquet", many, rows)))
    report = pack_parquet(paths, tmp_path / "data", num_workers=1)
    assert report.num_dropped == 0
    packed, plain = open_corpus(tmp_path / "data"), open_corpus(digits.data)
    assert packed.fingerprint() == plain.fingerprint()
    assert packed.names.equals(plain.names)
    jsons = ",".join(str(digits.source / f"{name}.json") for name in FILES)
    logged = [
        digits.logged(digits.train(tmp_path / run, "finetune", "training.max_steps=2", *keys))
        for run, keys in (
            ("json", [f"data.conversations=[{jsons}]"]),
            ("parquet", [f"data.shards={tmp_path / 'data'}", "data.conversations=[]"]),
        )
    ]
    assert logged[0] == logged[1]
    assert len(logged[0]) == 2
