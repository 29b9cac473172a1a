"""Tests of movekd.student.export.onnx: the written encoder gives the tokens that LLaVA reads."""

import pytest
import torch

from exports import export
from movekd.errors import ConfigError
from movekd.student.checkpoint import load_student
from movekd.student.export.load_again import load_onnx
from movekd.student.export.onnx import encoder_tokens, tokens_in_float32
from movekd.student.vlm import image_features
from small_tower import TOWERS, build_tower


@pytest.mark.filterwarnings("ignore")  # those of the exporter's own packages
@pytest.mark.parametrize(
    ("name", "mole"),
    [
        ("siglip", None),
        ("dinov2", "REVISED"),
        ("dinov3", "REVISED"),
        pytest.param("dinov2 with registers", None, marks=pytest.mark.slow),
        pytest.param("siglip", "OFFICIAL", marks=pytest.mark.slow),
        pytest.param("dinov2", None, marks=pytest.mark.slow),
        pytest.param("dinov2 with registers", "REVISED", marks=pytest.mark.slow),
        pytest.param("dinov3", None, marks=pytest.mark.slow),
    ],
)
def test_other_towers_are_onnx_too(kit, tmp_path, pixels, name, mole):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    num_prefix = TOWERS[name][3]
    build_tower(name, 48).save_pretrained(tmp_path / "tower")
    run = kit.make_encoder_run(tmp_path / "run", mole and getattr(kit, mole), tmp_path / "tower")
    trained = load_student(run, takes_encoder=True)
    export(trained, "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out/encoder.onnx"))
    tokens, *cls = session.run(None, {"pixel_values": pixels.numpy()})
    assert len(cls) == min(num_prefix, 1)
    with torch.no_grad():
        expected = image_features(trained.student.vlm, pixels)[1]
    torch.testing.assert_close(torch.from_numpy(tokens), expected, rtol=1e-4, atol=1e-4)
    export(trained, "encoder", tmp_path / "encoder")
    card = (tmp_path / "encoder/README.md").read_text()
    assert f"hidden_states[-2][:, {num_prefix}:]" in card
    titles = {"siglip": "SigLIP", "dinov2": "DINOv2", "dinov3": "DINOv3"}
    kind = titles.get(name, "DINOv2 with registers")
    assert f"it is a {kind} with{' 3 LoRA' if mole else 'out'} experts" in card


def test_the_written_encoder_ends_at_the_hidden_state_that_is_read(trained, pixels):
    encoder = encoder_tokens(trained)
    assert len(encoder.blocks) == 5
    with torch.no_grad():
        tokens_BND, cls_BD = encoder(pixels)
        output, expected_BND = image_features(trained.student.vlm, pixels)
    torch.testing.assert_close(tokens_BND, expected_BND, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cls_BD, output.hidden_states[-2][:, 0], rtol=1e-5, atol=1e-5)


def test_the_encoder_is_one_graph_with_a_free_batch(official, pixels):
    encoder = encoder_tokens(official)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(encoder, (pixels,), dynamic_shapes={"pixel_values": batch})
    again = torch.randn(5, 3, 48, 48)
    torch.testing.assert_close(program.module()(again), encoder(again), rtol=1e-4, atol=1e-5)


def test_onnx_without_its_packages_says_what_to_install(official, tmp_path, monkeypatch):
    monkeypatch.setattr("movekd.student.export.onnx.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs onnx, .*pip install 'movekd\[onnx\]'"):
        export(official, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")  # those of the exporter's own packages
def test_onnxruntime_computes_the_same_tokens(trained, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export(trained, "onnx", tmp_path / "out")
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(5))
    found, _ = load_onnx({"directory": str(tmp_path / "out")}, {"pixel_values": pixels})
    with torch.no_grad():
        tokens, cls = tokens_in_float32(trained, pixels)
    for name, expected in (("tokens", tokens), ("cls", cls)):
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[f"{name}_first"], expected[:1], rtol=1e-4, atol=1e-4)
