"""Networks of the user's own: what they may return, and what is said when something is wrong."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from movekd.analysis.plan import output_shape
from movekd.cache.spec import CacheSpec
from movekd.errors import ConfigError, WeightsError
from movekd.teachers import load_teacher

MODULE = """
import torch
from torch import nn
from movekd.teachers import TeacherOutput

not_a_function = 3

class Patches(nn.Module):
    def __init__(self, width=8, form="tokens", dtype="float32"):
        super().__init__()
        self.form = form
        self.embed = nn.Conv2d(3, width, 8, stride=8, dtype=getattr(torch, dtype))

    def forward(self, pixels_BCHW):
        map_BDRR = self.embed(pixels_BCHW)
        tokens_BND = map_BDRR.flatten(2).transpose(1, 2)
        row_BHN = tokens_BND.mean(-1).softmax(-1)[:, None].repeat(1, 2, 1)
        return {
            "tokens": tokens_BND,
            "map": map_BDRR,
            "all": TeacherOutput(tokens_BND, tokens_BND.mean(1), row_BHN),
            "nothing": None,
            "no tokens": TeacherOutput(None),
            "flat": tokens_BND.flatten(1),
            "one image": tokens_BND[:1],
            "strip": map_BDRR[:, :, :1],
            "three tokens": tokens_BND[:, :3],
            "short row": TeacherOutput(tokens_BND, tokens_BND.mean(1), row_BHN[..., :2]),
            "no cls": TeacherOutput(tokens_BND),
        }[self.form]

def encoder(**model_args):
    return Patches(**model_args)

def trained(**model_args):
    module = Patches(**model_args)
    nn.init.constant_(module.embed.weight, 0.25)
    return module

def returns_a_string():
    return "weights.pth"

def returns_a_module_without_weights():
    return nn.Identity()

def raises():
    raise KeyError("depth")
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CacheSpec:
    """A spec of a network in a package ``mine`` that can be imported for one test."""
    (tmp_path / "lib" / "mine").mkdir(parents=True)
    (tmp_path / "lib" / "mine" / "__init__.py").touch()
    (tmp_path / "lib" / "mine" / "vit.py").write_text(MODULE)
    (tmp_path / "lib" / "mine" / "broken.py").write_text("1 / 0\n")
    (tmp_path / "lib" / "mine" / "needs.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        monkeypatch.delitem(sys.modules, name)
    return CacheSpec(
        name="mine",
        provider="python",
        factory="mine.vit:encoder",
        weights="random",
        image_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        layer="last",
    )


PIXELS_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("form", ["tokens", "map", "all"])
def test_what_forward_may_return(spec: CacheSpec, form: str) -> None:
    teacher = load_teacher(spec.with_changes(model_args={"form": form}))
    output = teacher(PIXELS_BCHW)
    with torch.inference_mode():
        expected = teacher.module.embed(PIXELS_BCHW).flatten(2).transpose(1, 2)
    assert torch.equal(output.tokens_BND, expected)
    assert output.cls_BD is output.cls_attention_BHN is None  # not asked for
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_cls_and_attention_come_from_forward(spec: CacheSpec) -> None:
    asked = spec.with_changes(model_args={"form": "all"}, cls=True, cls_attention=True)
    output = load_teacher(asked)(PIXELS_BCHW)
    assert output.cls_BD is not None
    assert output.cls_attention_BHN is not None
    assert output.cls_BD.shape == (2, 8)
    assert output.cls_attention_BHN.shape == (2, 2, 16)
    one = load_teacher(asked.with_changes(cls=False))(PIXELS_BCHW)
    assert one.cls_BD is None
    assert one.cls_attention_BHN is not None


def test_random_weights_are_of_the_seed_and_factory_s_of_the_factory(spec: CacheSpec) -> None:
    hashes = [load_teacher(spec.with_changes(seed=seed)).weights_sha256 for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    own = spec.with_changes(factory="mine.vit:trained", weights="factory")
    assert (load_teacher(own).module.embed.weight == 0.25).all()
    assert own.fingerprint != own.with_changes(weights="random").fingerprint


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", "directory"])
def test_weights_are_loaded_into_the_network(spec: CacheSpec, suffix: str, tmp_path: Path) -> None:
    teacher = load_teacher(spec.with_changes(seed=1))
    state = {name: tensor.clone() for name, tensor in teacher.module.state_dict().items()}
    path = tmp_path / f"weights{suffix.replace('directory', '.safetensors')}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    given = spec.with_changes(weights=str(tmp_path if suffix == "directory" else path))
    assert load_teacher(given).weights_sha256 == teacher.weights_sha256
    with pytest.raises(WeightsError, match=r"does not fit the architecture: .*embed\.weight"):
        load_teacher(given.with_changes(model_args={"width": 4}))


def test_half_precision_of_a_factory_becomes_float32(spec: CacheSpec) -> None:
    teacher = load_teacher(spec.with_changes(model_args={"dtype": "float16"}))
    assert next(teacher.parameters()).dtype == torch.float32
    half = load_teacher(spec, dtype=torch.bfloat16)(PIXELS_BCHW)
    assert half.tokens_BND.dtype == torch.float32


def test_shape_is_known_without_work(spec: CacheSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("movekd.analysis.plan.load_teacher", None)
    assert tuple(output_shape(spec.with_changes(weights="factory")))[:2] == (16, 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"weights": "hub"},
            r"the hub has no weights of your own network.*`factory` .* `random` for a trial",
        ),
        ({"factory": "mines.vit:encoder"}, r"finds no module mines\. .*PYTHONPATH to the folder"),
        ({"factory": "mine.vitt:encoder"}, r"no module mine\.vitt\. Did you mean 'mine\.vit'\?"),
        ({"factory": "mine.vit.small:encoder"}, r"finds no module mine\.vit\.small\."),
        ({"factory": "mine.vit:encodr"}, r"mine\.vit has no encodr\. Did you mean 'encoder'\?"),
        ({"factory": "mine.vit:not_a_function"}, r"not_a_function in mine\.vit is a int; expected"),
        ({"factory": "mine.broken:encoder"}, r"importing mine\.broken fails: ZeroDivisionError"),
        ({"factory": "mine.needs:encoder"}, r"importing mine\.needs fails: ModuleNotFoundError: "),
        ({"factory": "mine.vit:raises"}, r"raises fails with model_args \{\} of 'mine': KeyError"),
        ({"model_args": {"widht": 4}}, r"fails with model_args .*TypeError: .*'widht'"),
        ({"factory": "mine.vit:returns_a_string"}, r"returned a str; expected a torch\.nn\.Module"),
        (
            {"factory": "mine.vit:returns_a_module_without_weights"},
            r"returned a Identity without parameters; expected",
        ),
        ({"layer": -1}, r"has no blocks to count. Set layer to last"),
        ({"layer": "neck"}, r"Set layer: last"),
    ],
)
def test_what_cannot_be_loaded_is_a_sentence(
    spec: CacheSpec, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_teacher(spec.with_changes(**changes))


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("nothing", r"network returned a NoneType; expected patch tokens \(B, N, D\)"),
        ("no tokens", r"returned a TeacherOutput; expected patch tokens"),
        ("flat", r"returned \(2, 128\) for 2 images; expected"),
        ("one image", r"returned \(1, 16, 8\) for 2 images; expected"),
        ("strip", r"returned \(2, 8, 1, 4\) for 2 images; expected .* a square map"),
        ("three tokens", r"gives 3 tokens per image, which are no square grid"),
        ("tokens", r"asks for cls; .* gave none\. Return .*TeacherOutput with cls_BD .*cls: false"),
        ("no cls", r"asks for cls; forward of mine\.vit:encoder's network gave none"),
        ("short row", r"asks for cls_attention; .* gave \(2, 2, 2\)\. .*cls_attention: false"),
        ("unknown", r"fails on pixels \(2, 3, 32, 32\): KeyError: 'unknown'\. Correct its forward"),
    ],
)
def test_what_forward_may_not_return_is_a_sentence(spec: CacheSpec, form: str, said: str) -> None:
    asks = form in ("tokens", "no cls", "short row")
    wrong = spec.with_changes(model_args={"form": form}, cls=asks, cls_attention=asks)
    with pytest.raises(ConfigError, match=said):
        load_teacher(wrong)(PIXELS_BCHW)


def test_a_file_beside_the_yaml_is_not_importable(spec: CacheSpec, tmp_path: Path) -> None:
    """Only what Python can import by itself: no folder of the spec's is added."""
    (tmp_path / "beside.py").write_text("raise SystemExit('it ran')")
    before = list(sys.path)
    with pytest.raises(ConfigError, match="no module beside"):
        load_teacher(spec.with_changes(factory="beside:encoder", weights=str(tmp_path)))
    assert sys.path == before
