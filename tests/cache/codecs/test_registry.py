"""A codec from outside the package: the real build, reader and commands use it by its name."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import zarr
from typer.testing import CliRunner

from builds import build
from movekd.analysis.disk_benchmark import DiskRates
from movekd.analysis.fidelity import measure_fidelity
from movekd.analysis.plan import plan_cache
from movekd.cache import codecs
from movekd.cache.codecs import ArrayLayout, Codec, codec, codec_names, register_codec
from movekd.cache.reader import open_cache
from movekd.cache.verify import status, verify
from movekd.cli.cache_show import show
from movekd.corpus.index import open_corpus
from movekd.errors import ConfigError
from movekd.extract.options import BuildOptions


class Int4(Codec):
    """Two values per byte, with a float16 minimum and step per token."""

    name = "test4"
    decoding = "channel_mean + channel_std * (token_low + token_step * nibble)"

    def arrays(self, num_tokens, width):
        packed, one = (num_tokens, -(-width // 2)), (num_tokens, 1)
        return (
            ArrayLayout("tokens", packed, "uint8", ("row", "token", "byte"), 0),
            ArrayLayout("token_low", one, "float16", ("row", "token", "one")),
            ArrayLayout("token_step", one, "float16", ("row", "token", "one")),
        )

    def encode(self, tokens_BND, stats):
        values = stats.standardise(tokens_BND)
        low = values.amin(-1, keepdim=True).half()
        step = ((values.amax(-1, keepdim=True) - low) / 15).half()
        codes = ((values - low) / step.float()).round().clamp(0, 15).to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
        packed = codes[..., ::2] | (codes[..., 1::2] << 4)
        return {"tokens": packed, "token_low": low, "token_step": step}

    def decode_standardised(self, stored, stats):
        packed = stored["tokens"]
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        codes = codes[..., : len(stats.mean_D)].float()
        return stored["token_low"].float() + stored["token_step"].float() * codes


@pytest.fixture
def int4(monkeypatch):
    """The codec, registered for one test."""
    monkeypatch.setattr(codecs, "_CODECS", dict(codecs._CODECS))
    register_codec(Int4())


def test_a_registered_codec_goes_through_the_whole_program(
    int4, tmp_path, corpus_dir, tiny_specs, cache_dir
) -> None:
    spec = tiny_specs[0].with_changes(codec="test4")
    build(tmp_path / "cache", corpus_dir, [spec])
    cache = open_cache(tmp_path / "cache")
    assert list(verify(tmp_path / "cache")) == []
    (found,) = status(cache)
    assert (found.codec, found.width, found.grid) == ("test4", 144, 4)
    assert 0.01 < found.error_mean < found.error_max < 0.2  # coarse, and no worse than 4 bits are

    targets = cache["clip"].read([3, 0, 3])
    assert targets.stored["tokens"].shape == (3, 16, 72)
    exact = open_cache(cache_dir)["clip"].read([3, 0, 3]).standardised_BND
    error = (targets.standardised_BND - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 0.2
    group = zarr.open_group(tmp_path / "cache" / "clip.zarr", mode="r")
    assert group.attrs["movekd"]["decoding"] == Int4.decoding
    np.testing.assert_array_equal(group["tokens"][3], targets.stored["tokens"][0])
    assert np.isnan(group["token_step"].fill_value)

    options = BuildOptions(batch_size=5, num_workers=0)
    planned = plan_cache(
        [spec],
        open_corpus(corpus_dir),
        tmp_path / "other",
        options=options,
        assumed_rates={"clip": 1.0},
        assumed_disk=DiskRates(None, 1e12, "assumed"),
    )
    (chosen,) = [part for part in planned.teachers if part.is_spec]
    assert (chosen.codec, chosen.row_bytes) == ("test4", cache["clip"].layout.row_bytes)
    report = measure_fidelity(
        spec,
        open_corpus(corpus_dir),
        geometry="crop",
        options=options,
        num_images=4,
        student_grid=4,
        student_width=32,
    )
    assert {way.codec for way in report.ways} == set(codec_names()) >= {"int8", "test4"}

    app = typer.Typer()
    app.command()(show)
    arguments = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, [*arguments, "--random", "1"])
    assert shown.exit_code == 0, shown.output
    assert list((tmp_path / "out").iterdir())


def test_the_codec_of_the_docs_registers(monkeypatch) -> None:
    monkeypatch.setattr(codecs, "_CODECS", dict(codecs._CODECS))
    page = Path(__file__).parents[3] / "docs" / "howto" / "codec.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    exec(code, {})
    assert codec("half").arrays(4, 8) == codec("float16").arrays(4, 8)


def test_a_name_that_is_taken_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(Int4, "name", "int8")
    with pytest.raises(ConfigError, match=r"'int8' exists already \(Int8\).*another name"):
        register_codec(Int4())
    register_codec(codec("int8"))


def test_an_unknown_codec_names_the_nearest(tiny_specs) -> None:
    with pytest.raises(ConfigError, match=r"no codec 'int9'\. Did you mean 'int8'\?"):
        codec("int9")
    known = ", ".join(codec_names())
    with pytest.raises(ConfigError, match=rf"codec: expected one of {known}.*found 'int9'"):
        tiny_specs[0].with_changes(codec="int9")
