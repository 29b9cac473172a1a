"""Tests of movekd.student.checkpoint.load_export: the export is loaded, none of its code runs."""

import contextlib
import json

import pytest

from exports import export
from movekd.errors import WeightsError
from movekd.student.checkpoint import load_student

CODE = "open({mark!r}, 'w').close()\nfrom transformers import CLIPVisionModel as Theirs\n"


@pytest.fixture
def exported(kit, tmp_path, monkeypatch):
    """An export with a file of code that leaves a mark; standard input is not to be read."""
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("standard input was read"))
    export(kit.make_run(tmp_path / "run", kit.OFFICIAL), "hf", tmp_path / "out")
    (tmp_path / "out/theirs.py").write_text(CODE.format(mark=str(tmp_path / "was_run")))
    return tmp_path / "out"


def change(path, **keys):
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_code_of_a_tokenizer_is_not_run(exported, tmp_path):
    auto_map = {"AutoTokenizer": [None, "theirs.Theirs"]}
    change(exported / "tokenizer_config.json", tokenizer_class="Theirs", auto_map=auto_map)
    with contextlib.suppress(WeightsError):  # some transformers take a stock class for a LLaVA's
        load_student(exported)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("part", ["vision", "text"])
def test_code_of_a_part_is_not_run(exported, tmp_path, part):
    # blip_*_model: a type that has a config, and no model unless the code is one
    keys = {
        "model_type": f"blip_{part}_model",
        "auto_map": {"AutoModel": f"{exported}--theirs.Theirs"},
    }
    change(exported / "config.json", **{f"{part}_config": keys})
    with pytest.raises(WeightsError, match=r"out' brings its own Python code"):
        load_student(exported)
    assert not (tmp_path / "was_run").exists()


def test_another_llava_is_no_export(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(WeightsError, match=r"no movekd\.json.*--format hf"):
        load_student(tmp_path)
