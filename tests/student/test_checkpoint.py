"""Tests of movekd.student.checkpoint: parts out and back in, and files that do not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import scenes
from movekd.errors import ConfigError, WeightsError
from movekd.files.ownership import OWNERSHIP_FILE, write_owned
from movekd.student.adapters import StudentHead
from movekd.student.checkpoint import (
    ADAPTERS_FILE,
    PART_FILES,
    load_adapters,
    load_exact,
    load_parts,
    load_student,
    part_of,
    save_adapters,
    save_parts,
)
from movekd.student.config import MoleKeys, StudentConfig
from movekd.student.vlm import build_vlm

WEIGHTS = Path(scenes.__file__).parent / "weights"
CONFIG = StudentConfig(
    vision_tower=str(WEIGHTS / "clip"),
    language_model=str(WEIGHTS / "language_model"),
    mole=MoleKeys(r=4, init_lora_weights="kaiming", use_gate=True, lora_alpha=4.0),
)


@pytest.fixture(scope="module")
def trained():
    """A model of which every parameter differs from its base."""
    torch.manual_seed(1)
    vlm = build_vlm(CONFIG).vlm
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.add_(0.01)
    return vlm


@pytest.mark.parametrize("parts", [["mole", "projector"], list(PART_FILES)])
def test_saved_parts_come_back_and_others_stay(trained, tmp_path, parts):
    save_parts(tmp_path, trained, parts)
    assert {p.name for p in tmp_path.iterdir()} == {PART_FILES[part] for part in parts}
    torch.manual_seed(2)
    vlm = build_vlm(CONFIG).vlm
    before = {name: parameter.clone() for name, parameter in vlm.named_parameters()}
    assert load_parts(tmp_path, vlm) == parts
    expected = dict(trained.named_parameters())
    for name, parameter in vlm.named_parameters():
        source = expected if part_of(name) in parts else before
        assert torch.equal(parameter, source[name]), name


def test_every_parameter_is_in_one_part(trained):
    parts = {part_of(name) for name, _ in trained.named_parameters()}
    assert parts == PART_FILES.keys()
    assert part_of("lm_head.weight") == "language_model"


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", ["above", "inside"])
@pytest.mark.parametrize("damage", [Path.unlink, _flip], ids=["deleted", "flipped"])
def test_weights_that_are_not_those_recorded_are_refused(trained, tmp_path, place, damage):
    """A part that is gone would count as its untrained base, without a word."""
    model = tmp_path / "run" / "model"
    save_parts(model, trained, ["mole", "projector"])
    (model / "notes.txt").write_text("mine")
    owner = model if place == "inside" else model.parent
    names = [p.relative_to(owner).as_posix() for p in sorted(model.iterdir())]
    write_owned(owner, names, "movekd train")
    vlm = build_vlm(CONFIG).vlm
    (model / "notes.txt").unlink()  # not what a model is made of
    assert load_parts(model, vlm) == ["mole", "projector"]
    if place == "inside":  # as a hub's cache holds it
        (model.parent / "blobs").mkdir()
        for number, path in enumerate(sorted(model.iterdir())):
            path.symlink_to(path.rename(model.parent / "blobs" / str(number)))
        assert load_parts(model, vlm) == ["mole", "projector"]
    damage(model / PART_FILES["mole"])
    with pytest.raises(WeightsError, match=r"mole_encoder\.safetensors is (missing|of other)"):
        load_parts(model, vlm)
    (owner / OWNERSHIP_FILE).write_text("{}")
    with pytest.raises(WeightsError, match="damaged"):
        load_parts(model, vlm)
    (owner / OWNERSHIP_FILE).unlink()  # as the message says
    assert "projector" in load_parts(model, vlm)


def test_adapters_come_back(tmp_path):
    heads = torch.nn.ModuleDict({"clip": StudentHead(8, 4)})
    save_adapters(tmp_path, heads)
    fresh = torch.nn.ModuleDict({"clip": StudentHead(8, 4)})
    load_adapters(tmp_path, fresh)
    for left, right in zip(heads.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(left, right)
    load_adapters(tmp_path, torch.nn.ModuleDict())  # a run without teachers has none to load
    other = torch.nn.ModuleDict({"sam": StudentHead(8, 4)})
    with pytest.raises(WeightsError, match=r"6 missing \(sam.*6 unexpected \(clip.*config\.yaml"):
        load_adapters(tmp_path, other)


def test_no_adapters_write_no_file(tmp_path):
    save_adapters(tmp_path, torch.nn.ModuleDict())
    assert not (tmp_path / ADAPTERS_FILE).exists()


def test_a_damaged_file_is_a_sentence(trained, tmp_path):
    save_parts(tmp_path, trained, ["projector"])
    path = tmp_path / PART_FILES["projector"]
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\xff" * 64, content[:4]):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"mm_projector\.safetensors cannot be read: "):
            load_parts(tmp_path, trained)


def test_what_does_not_fit_is_named_and_nothing_is_copied(trained, tmp_path):
    save_parts(tmp_path, trained, ["projector"])
    path = tmp_path / PART_FILES["projector"]
    tensors = load_file(path)
    first, *others = sorted(tensors)
    cases = {
        r"1 missing": {name: tensors[name] for name in others},
        r"1 unexpected \(extra\)": tensors | {"extra": torch.zeros(1)},
        r"1 of another shape": tensors | {first: torch.zeros(3, 5)},
    }
    parameters = {n: p for n, p in trained.named_parameters() if part_of(n) == "projector"}
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    for message, content in cases.items():
        save_file({name: tensor + 1 for name, tensor in content.items()}, path)
        with pytest.raises(WeightsError, match=rf"does not fit the model: {message}"):
            load_exact(path, parameters)
    assert all(torch.equal(parameters[name], before[name]) for name in before)


def test_a_folder_without_parts_is_refused(trained, tmp_path):
    with pytest.raises(WeightsError, match=r"holds none of mole_encoder\.safetensors"):
        load_parts(tmp_path, trained)


def test_a_student_comes_back_with_prompt_and_geometry(trained, tmp_path):
    model = tmp_path / "model"
    save_parts(model, trained, list(PART_FILES))
    student = CONFIG.model_copy(update={"prompt": "v1"}).model_dump_json()
    (model / "config.yaml").write_text(f"student: {student}\ndata: {{geometry: pad}}\n")
    for folder in (tmp_path, model):
        found = load_student(folder)
        assert (found.prompt, found.geometry) == ("v1", "pad")
        assert not found.student.vlm.training
        assert not any(p.requires_grad for p in found.student.vlm.parameters())
        expected = dict(trained.named_parameters())
        for name, parameter in found.student.vlm.named_parameters():
            assert torch.equal(parameter, expected[name]), name


def test_a_run_that_did_not_end_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"holds no finished run .*`movekd train` that ended"):
        load_student(tmp_path)


def test_an_edited_config_is_refused(tmp_path):
    student = CONFIG.model_dump_json()
    (tmp_path / "config.yaml").write_text(f"student: {student}\ndata: {{geometry: round}}\n")
    with pytest.raises(WeightsError, match=r"lacks data\.geometry or student\.prompt"):
        load_student(tmp_path)
    (tmp_path / "config.yaml").write_text("student: {vision_towr: x}\n")
    with pytest.raises(ConfigError, match=r"Did you mean 'vision_tower'"):
        load_student(tmp_path)
