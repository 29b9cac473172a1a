"""`cache show` on a cache that a stranger wrote: nothing leaves the folder of --output."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from movekd.cache.seal import entry, write_sealed
from movekd.cache.storage import open_storage
from movekd.cli.cache_show import show
from movekd.errors import CacheError

app = typer.Typer()
app.command("show")(show)
app.command("other")(lambda: None)


@pytest.mark.parametrize("key", ["../../victim/a", "/tmp/victim/a", "A" * 64, "", "a" * 63 + "\n"])
def test_a_key_that_is_a_path_is_refused_before_a_sheet_is_written(
    cache_dir, tmp_path, snapshot, key
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache)
    for name in ("index.parquet", "names.parquet"):
        table = pq.read_table(cache / name)
        place = table.schema.get_field_index("key")
        keys = [key, *table["key"].to_pylist()[1:]]
        table = table.set_column(place, "key", pa.array(keys, pa.string()))
        pq.write_table(table, cache / name)
    record = json.loads((cache / "cache.json").read_text())
    del record["xxh3_128"]
    for name in record["files"]:
        record["files"][name] = entry([(cache / name).read_bytes()]).model_dump()
    write_sealed(open_storage(cache), "cache.json", record)
    before = snapshot(tmp_path)
    done = CliRunner().invoke(
        app, ["show", "--cache", str(cache), "--random", "24", "--output", str(tmp_path / "sheets")]
    )
    assert isinstance(done.exception, CacheError)
    assert "keys that are no SHA-256 in lower-case hex" in str(done.exception)
    assert snapshot(tmp_path) == before
