"""Tests of movekd.student.export.check: an export that is another model never gets its name."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from exports import export, export_and_check
from movekd.errors import ConfigError, WeightsError
from movekd.student.checkpoint import TrainedStudent, load_student
from movekd.student.config import StudentConfig
from movekd.student.export.check import check_exports
from movekd.student.export.output_folder import new_directory
from movekd.student.vlm import build_vlm
from small_tower import build_tower


def change(path, **keys):
    """Set keys of a JSON file; ``a__b`` is key b of the object a."""
    content = json.loads(path.read_text())
    for name, value in keys.items():
        *parents, last = name.split("__")
        target = content
        for parent in parents:
            target = target[parent]
        target[last] = value
    path.write_text(json.dumps(content))


def reweigh(directory, edit):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def without_experts(directory):
    """As an export of DINOv2 was: its weights hold experts, and its class is the stock one."""
    content = json.loads((directory / "config.json").read_text())
    content.pop("auto_map")
    content |= {"model_type": "dinov2", "architectures": ["Dinov2Model"]}
    (directory / "config.json").write_text(json.dumps(content))


def first_key(tensors, part):
    return next(name for name in sorted(tensors) if part in name)


def nudge(tensors):
    tensors[first_key(tensors, "mole_fc2.lora_B")].view(-1)[0] += 1e-3


def drop(tensors):
    del tensors[first_key(tensors, "mole_router")]


def fill_with_nan(tensors):
    tensors[first_key(tensors, "projector")].fill_(float("nan"))


DAMAGES = {
    ("encoder", "no experts"): (without_experts, "unexpected keys"),
    ("encoder", "a value"): (lambda d: reweigh(d, nudge), "weights have other values"),
    ("encoder", "a tensor"): (lambda d: reweigh(d, drop), "missing keys"),
    ("encoder", "the scale"): (
        lambda d: change(d / "config.json", lora_alpha=2.0),
        "tokens differ",
    ),
    ("encoder", "the gate"): (lambda d: change(d / "config.json", use_gate=False), "tokens differ"),
    ("encoder", "the pixels"): (
        lambda d: change(d / "preprocessor_config.json", image_mean=[0.1, 0.5, 0.5]),
        "pixel_values differ",
    ),
    ("encoder", "half a file"): (
        lambda d: (d / "model.safetensors").write_bytes(
            (d / "model.safetensors").read_bytes()[:5000]
        ),
        "cannot be loaded",
    ),
    ("hf", "the layer"): (
        lambda d: change(d / "config.json", vision_feature_layer=-1),
        "logits differ",
    ),
    ("hf", "the padding"): (
        lambda d: change(d / "tokenizer_config.json", padding_side="right"),
        "pads on the right",
    ),
    ("hf", "the template"): (
        lambda d: (d / "chat_template.jinja").write_text("{{ messages }}"),
        "cannot be loaded|other tokens of a question",
    ),
    ("hf", "NaN"): (lambda d: reweigh(d, fill_with_nan), "weights have other values"),
    ("official", "the scale"): (
        lambda d: change(d / "config.json", moe__moe_encoder_lora_alpha=3),
        "logits differ",
    ),
}


SHUFFLED = {"projector_type": "pixel_shuffle"}


def encoder(kit, folder, tower, mole):
    """An encoder of stage distill."""
    base = folder / f"{tower} base"
    build_tower(tower, 48).save_pretrained(base)
    run = kit.make_encoder_run(folder / f"{tower} run", mole, base)
    return load_student(run, takes_encoder=True)


def llava(kit, folder, tower, mole, **keys):
    """A LLaVA around another tower than CLIP."""
    build_tower(tower, 48).save_pretrained(folder / tower)
    mean = (0.5, 0.5, 0.5)
    config = StudentConfig(
        vision_tower=str(folder / tower),
        language_model=str(kit.WEIGHTS / "language_model"),
        mole=mole,
        image_mean=mean,
        image_std=mean,
        **keys,
    )
    torch.manual_seed(4)
    student = build_vlm(config)
    student.vlm.eval().requires_grad_(False)
    return TrainedStudent(student, "v1", "pad", folder / "run", {})


@pytest.fixture(scope="module")
def exports(kit, tmp_path_factory):
    """Exports of each format and of damaged ones, all checked in one process: name -> result."""
    folder = tmp_path_factory.mktemp("checked")
    v1 = replace(kit.make_run(folder / "v1", kit.OFFICIAL), prompt="v1")
    change(folder / "v1/model/config.yaml", student__prompt="v1")
    sources = {
        "encoder": encoder(kit, folder, "dinov2", kit.REVISED),
        "hf": kit.make_run(folder / "chat", kit.REVISED),
        "official": v1,
    }
    whole = [
        *((name, sources[name], name) for name in sources),
        ("v1", v1, "hf"),
        ("plain", kit.make_run(folder / "plain", kit.OFFICIAL, stage="pretrain"), "hf"),
        ("stage 1", kit.make_run(folder / "stage 1", kit.OFFICIAL, stage="pretrain"), "official"),
        ("bfloat16", kit.make_run(folder / "half", kit.OFFICIAL, dtype="bfloat16"), "hf"),
        ("siglip", llava(kit, folder, "siglip", kit.OFFICIAL), "hf"),
        ("dinov2 llava", llava(kit, folder, "dinov2", kit.REVISED), "hf"),
        ("shuffled", kit.make_run(folder / "shuffled", kit.REVISED, **SHUFFLED), "hf"),
        ("shuffled siglip", llava(kit, folder, "siglip", None, **SHUFFLED), "hf"),
        ("registers", llava(kit, folder, "dinov2 with registers", None), "hf"),
        ("dinov3 llava", llava(kit, folder, "dinov3", kit.REVISED), "hf"),
        ("dinov3", encoder(kit, folder, "dinov3", None), "encoder"),
        ("shuffled dinov3", llava(kit, folder, "dinov3", None, **SHUFFLED), "hf"),
    ]
    jobs = []
    for name, trained, kind in whole:
        export(trained, kind, folder / "out" / name)
        jobs.append((trained, kind, folder / "out" / name))
    for number, ((kind, _), (damage, _)) in enumerate(DAMAGES.items()):
        copy = shutil.copytree(folder / "out" / kind, folder / "damaged" / str(number))
        damage(copy)
        jobs.append((sources[kind], kind, copy))
    (folder / "scratch").mkdir()
    found = check_exports(jobs, folder / "scratch")
    return dict(zip([*(name for name, *_ in whole), *DAMAGES], found, strict=True))


def test_a_whole_export_gives_the_runs_own_outputs(exports):
    names = [name for name in exports if isinstance(name, str)]
    assert len(names) == 15
    assert {name: exports[name] for name in names} == dict.fromkeys(names, 0.0)


@pytest.mark.parametrize("damage", DAMAGES, ids=" of ".join)
def test_another_model_is_found(exports, damage):
    found = exports[damage]
    assert isinstance(found, WeightsError)
    with pytest.raises(WeightsError, match=rf"fresh process, and .*({DAMAGES[damage][1]})"):
        raise found
    assert "\n" not in str(found)
    assert len(str(found)) < 2000


def test_an_export_that_fails_its_check_gets_no_name(kit, tmp_path, monkeypatch, snapshot):
    trained = kit.make_run(tmp_path / "run", kit.OFFICIAL)
    export(trained, "encoder", tmp_path / "out")
    trained.student.vlm.model.vision_tower.config.hidden_act = "relu"  # the export will say so
    before = snapshot(tmp_path)
    with pytest.raises(WeightsError, match="tokens differ by"):
        export_and_check(trained, "encoder", tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path) == before
    with pytest.raises(ConfigError), new_directory(tmp_path / "run", "x"):
        pass
