"""Tests of official_files and official_import: a released checkpoint in, and out bit for bit."""

import io
import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from exports import export
from movekd.corpus.conversations import Conversation
from movekd.errors import ConfigError, WeightsError
from movekd.evaluate.generate import generate_answers
from movekd.student.adapters import StudentHead, TeacherAdapter
from movekd.student.checkpoint import ADAPTERS_FILE, load_student, save_adapters, save_parts
from movekd.student.config import MoleKeys
from movekd.student.official.export_checkpoint import write_official
from movekd.student.official.import_checkpoint import import_official
from movekd.student.official.schema import STAGE_1_FILES
from movekd.student.official.state_dict import official_state_dict
from movekd.student.tensor_files import open_checkpoint, read_bin, write_shards
from movekd.student.vlm import image_features

TOWER = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture
def source(kit, tmp_path):
    return kit.write_released(tmp_path)


def same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def there_and_back(source, folder):
    import_official(source, folder / "imported")
    write_official(load_student(folder / "imported"), folder / "back")
    return open_checkpoint(folder / "back")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("teachers", [("eva", "convnext"), ("eva", "convnext", "sam"), ()])
def test_a_checkpoint_comes_back_bit_for_bit(kit, source, tmp_path, dtype, teachers):
    state = kit.released_state(teachers, dtype)
    save_file(state, source / "model.safetensors")
    same(there_and_back(source, tmp_path), state)
    for path in source.iterdir():
        if path.suffix == ".json":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path


def test_an_import_names_the_layout_that_its_sam_adapter_knows(kit, source, tmp_path):
    for teachers, expected in ((("eva", "sam"), "released"), (("eva",), None)):
        save_file(kit.released_state(teachers), source / "model.safetensors")
        out = tmp_path / teachers[-1]
        import_official(source, out)
        run = yaml.safe_load((out / "model/config.yaml").read_text())
        assert run["distill"].get("sam_layout") == expected
        load_student(out)


def test_a_run_that_was_fed_otherwise_than_llava_is_imported_so(kit, tmp_path):
    mole = MoleKeys(
        r=4, lora_alpha=1, use_gate=False, init_lora_weights="kaiming", layers_to_transform="all"
    )
    trained = kit.make_run(tmp_path / "run", mole)
    assert trained.prompt == "chat_template"
    export(trained, "official", tmp_path / "out")
    tower = trained.run["student"]["vision_tower"]
    import_official(tmp_path / "out", tmp_path / "back", vision_tower=tower)
    back = load_student(tmp_path / "back")
    assert (back.prompt, back.geometry) == (trained.prompt, trained.geometry)
    assert back.student.image_mean == trained.student.image_mean
    assert back.student.image_std == trained.student.image_std


def test_mixed_dtypes_and_old_buffers_come_back_too(kit, source, tmp_path):
    state = kit.released_state()
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    state = {n: t.to(dtypes[i % 3]) for i, (n, t) in enumerate(sorted(state.items()))}
    state[f"{TOWER}embeddings.position_ids"] = torch.arange(5).view(1, 5)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(3)
    save_file(state, source / "model.safetensors")
    same(there_and_back(source, tmp_path), state)


def test_shards_of_either_kind_are_read(kit, source, tmp_path):
    state = kit.released_state()
    write_shards(source, state, shard_bytes=8000)
    assert len(list(source.glob("*.safetensors"))) > 2
    same(there_and_back(source, tmp_path / "safetensors"), state)
    for path in source.glob("model*"):
        path.unlink()
    names = sorted(state)
    halves = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, held in halves.items():
        torch.save({n: state[n] for n in held}, source / file)
    index = {"weight_map": {n: file for file, held in halves.items() for n in held}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    same(there_and_back(source, tmp_path / "bin"), state)


def test_an_imported_model_is_the_checkpoint(kit, source, tmp_path):
    state = kit.released_state(dtype=torch.float32)
    save_file(state, source / "model.safetensors")
    found = import_official(source, tmp_path / "imported")
    assert (found.stage, found.num_tensors, found.dtype) == ("2", len(state), "float32")
    assert found.adapters == ("convnext", "eva02")
    trained = load_student(tmp_path / "imported")
    assert (trained.prompt, trained.geometry) == ("v1", "pad")
    student = trained.student
    assert student.image_mean == pytest.approx((0.5, 0.4, 0.3))
    official = official_state_dict(student.vlm)
    image_id = student.tokenizer.convert_tokens_to_ids("<image>")
    assert image_id == 66
    for name, tensor in state.items():
        if "_adapter_" in name:
            continue
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert official[name].shape[0] == 67
            assert not official[name][66].any()
        assert torch.equal(official[name][: len(tensor)], tensor), name
    assert student.vlm.generation_config.suppress_tokens == [66]
    adapters = load_file(tmp_path / "imported/model" / ADAPTERS_FILE)
    assert torch.equal(adapters["eva02.channels.weight"], state["eva_adapter_1.weight"])
    # the folder can move
    (tmp_path / "imported").rename(tmp_path / "elsewhere")
    kit.assert_same_weights(load_student(tmp_path / "elsewhere").student.vlm, student.vlm)
    pixels = torch.randn(1, 3, 16, 16)
    assert image_features(student.vlm, pixels)[1].shape == (1, 4, 16)


def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(kit, source, tmp_path):
    state = kit.released_state()
    router = f"{TOWER}encoder.layers.1.mlp.router.weight"
    cases = {
        rf"1 missing \({router}\)": {n: t for n, t in state.items() if n != router},
        r"unexpected \(.*shared_down": state
        | {f"{TOWER}encoder.layers.0.mlp.shared_down.lora_A.weight": torch.zeros(2)},
        r"router\.weight is \[4, 16\], expected \[3, 16\]": state | {router: torch.zeros(4, 16)},
        r"missing \(eva_adapter_2\.bias\)": {
            n: t for n, t in state.items() if n != "eva_adapter_2.bias"
        },
        r"eva_adapter_2\.bias is \[5\], expected \[4\]": state
        | {"eva_adapter_2.bias": torch.zeros(5)},
    }
    for message, content in cases.items():
        save_file(content, source / "model.safetensors")
        with pytest.raises(WeightsError, match=message):
            import_official(source, tmp_path / "imported")
        assert not (tmp_path / "imported").exists()


def test_a_config_that_movekd_does_not_compute_is_refused(kit, source, tmp_path):
    keys = kit.released_keys(tmp_path / "tower")
    dense = {"moe": keys["moe"] | {"moe_encoder_dense": True}}
    for change, message in (
        ({"model_type": "llava_llama"}, r"model_type 'llava_llama'; expected 'move_llava_llama'"),
        (dense, r"moe\.moe_encoder_dense True; expected False"),
        ({"moe": None}, r"moe\.moe_encoder None; expected True"),
        ({"mm_projector_type": "linear"}, r"mm_projector_type 'linear'; expected 'mlp2x_gelu'"),
        ({"image_aspect_ratio": "anyres"}, r"image_aspect_ratio 'anyres'; expected 'pad'"),
    ):
        (source / "config.json").write_text(json.dumps(keys | change))
        with pytest.raises(ConfigError, match=message):
            import_official(source, tmp_path / "imported")
    (source / "config.json").write_text(
        json.dumps(keys | {"mm_vision_tower": str(tmp_path / "nowhere")})
    )
    save_file(kit.released_state(), source / "model.safetensors")
    with pytest.raises(WeightsError, match=r"nowhere' cannot be loaded"):
        import_official(source, tmp_path / "imported")
    import_official(source, tmp_path / "imported", vision_tower=str(tmp_path / "tower"))
    with pytest.raises(WeightsError, match=r"holds neither a config\.json nor"):
        import_official(tmp_path, tmp_path / "x")


def test_a_checkpoint_without_a_readable_tokenizer_is_refused(kit, source, tmp_path):
    save_file(kit.released_state(), source / "model.safetensors")
    (source / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(WeightsError, match=r"holds no tokenizer.*takes --tokenizer"):
        import_official(source, tmp_path / "imported")
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(WeightsError, match=r"tokenizer\.model is no SentencePiece model"):
        import_official(source, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()
    language_model = str(kit.WEIGHTS / "language_model")
    import_official(source, tmp_path / "imported", tokenizer=language_model)
    write_official(load_student(tmp_path / "imported"), tmp_path / "back")
    same(open_checkpoint(tmp_path / "back"), kit.released_state())
    assert (tmp_path / "back/tokenizer.model").read_bytes() == b"sentencepiece"


def test_quantised_weights_are_refused(kit, source, tmp_path):
    state = kit.released_state()
    state["lm_head.weight"] = torch.zeros(66, 24, dtype=torch.uint8)
    save_file(state, source / "model.safetensors")
    with pytest.raises(WeightsError, match=r"weights of torch\.uint8.*Quantised"):
        import_official(source, tmp_path / "imported")


def test_a_run_of_stage_1_gives_three_files_and_takes_them(kit, tmp_path):
    trained = kit.make_run(tmp_path / "run", kit.OFFICIAL, "pretrain")
    adapters = torch.nn.ModuleDict({"eva02": TeacherAdapter(24, 16, 96, 36)})
    save_adapters(tmp_path / "run/model", adapters)
    names = write_official(load_student(tmp_path / "run"), tmp_path / "out")
    assert set(STAGE_1_FILES.values()) <= set(names)
    assert not [name for name in names if name.endswith(".safetensors")]
    mole = read_bin(tmp_path / "out/mole_encoder.bin")
    assert len(mole) == 6 * (3 * 8 + 2)
    assert all(w in n for n in mole for w in ["encoder.layers."])
    assert set(read_bin(tmp_path / "out/mm_projector.bin")) == {
        f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert set(read_bin(tmp_path / "out/encoder_adapter.bin")) == {
        f"eva_adapter_{part}.{kind}" for part in (1, 2) for kind in ("weight", "bias")
    }

    with pytest.raises(ConfigError, match="--language-model"):
        import_official(tmp_path / "out", tmp_path / "in")
    language_model = str(kit.WEIGHTS / "language_model")
    bases = {"vision_tower": str(kit.WEIGHTS / "clip"), "language_model": language_model}
    found = import_official(tmp_path / "out", tmp_path / "in", **bases)
    assert (found.stage, found.adapters) == ("1", ("eva02",))
    again = load_student(tmp_path / "in")
    assert again.prompt == "plain"
    kit.assert_same_weights(again.student.vlm, trained.student.vlm)
    same(load_file(tmp_path / "in/model" / ADAPTERS_FILE), dict(adapters.state_dict()))
    (tmp_path / "out/config.json").unlink()  # the release may come without one
    import_official(
        tmp_path / "out",
        tmp_path / "bare",
        **bases,
    )
    kit.assert_same_weights(load_student(tmp_path / "bare").student.vlm, trained.student.vlm)


def test_a_finetuned_run_is_written_whole_and_taken(kit, tmp_path):
    trained = kit.make_run(tmp_path / "run", kit.OFFICIAL)
    names = write_official(load_student(tmp_path / "run"), tmp_path / "out")
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith(".bin")]
    same(open_checkpoint(tmp_path / "out"), official_state_dict(trained.student.vlm))
    with pytest.raises(WeightsError, match=r"names the vision tower 'clip'.*with --vision-tower"):
        import_official(tmp_path / "out", tmp_path / "in")
    import_official(tmp_path / "out", tmp_path / "in", vision_tower=str(kit.WEIGHTS / "clip"))
    kit.assert_same_weights(load_student(tmp_path / "in").student.vlm, trained.student.vlm)
    keys = json.loads((tmp_path / "out/config.json").read_text())
    assert keys["moe"] == {
        "moe_encoder": True,
        "moe_encoder_dense": False,
        "moe_encoder_lora_rank": 4,
        "moe_encoder_lora_alpha": 1,
        "moe_encoder_num_experts": 3,
    }
    assert (keys["mm_vision_tower"], keys["_name_or_path"]) == ("clip", "language_model")
    for path in (tmp_path / "out").iterdir():
        assert path.suffix == ".safetensors" or str(kit.WEIGHTS) not in path.read_text(), path
    assert (keys["model_type"], keys["vocab_size"], keys["rope_theta"]) == (
        "move_llava_llama",
        66,
        10000.0,
    )


def test_experts_that_went_on_from_an_import_are_written_with_their_base(kit, source, tmp_path):
    keys = kit.released_keys(tmp_path / "tower") | {"_name_or_path": "lmsys/vicuna-7b-v1.5"}
    (source / "config.json").write_text(json.dumps(keys))
    save_file(kit.released_state(dtype=torch.float32), source / "model.safetensors")
    import_official(source, tmp_path / "in")
    imported = load_student(tmp_path / "in")
    run = yaml.safe_load((tmp_path / "in/model/config.yaml").read_text())
    base = tmp_path / "in/model/base"
    del run["imported"]  # as `train` writes one
    run["student"] |= {name: str(base / name) for name in ("vision_tower", "language_model")}
    with torch.no_grad():
        for name, parameter in imported.student.vlm.named_parameters():
            if ".mole_" in name:
                parameter.add_(1)
    save_parts(tmp_path / "run/model", imported.student.vlm, ["mole", "projector"])
    (tmp_path / "run/model/config.yaml").write_text(json.dumps(run))
    names = write_official(load_student(tmp_path / "run"), tmp_path / "out")
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith(".bin")]
    expected = official_state_dict(imported.student.vlm)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected[name] = expected[name][:66]
    same(open_checkpoint(tmp_path / "out"), expected)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["_name_or_path"] == "lmsys/vicuna-7b-v1.5"  # as the checkpoint said
    assert written["mm_vision_tower"] == "tower"
    tokenizer = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert tokenizer == json.loads((source / "tokenizer.json").read_text())
    export(load_student(tmp_path / "run"), "hf", tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text()
    assert "imported from | released" in card
    assert "language model started from | lmsys/vicuna-7b-v1.5" in card
    assert str(tmp_path) not in card + (tmp_path / "hf/movekd.json").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_imported_model_answers_in_the_dtype_of_its_checkpoint(kit, source, tmp_path, dtype):
    save_file(kit.released_state(dtype=dtype), source / "model.safetensors")
    import_official(source, tmp_path / "imported")
    trained = load_student(tmp_path / "imported")
    assert trained.student.vlm.dtype == dtype
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), (90, 60, 30)).save(buffer, "PNG")
    turns = (("human", "<image>\nWhat is the sum?"),)
    (answer,) = generate_answers(
        trained.student,
        [Conversation("c", ("image",), turns)],
        lambda _: buffer.getvalue(),
        prompt=trained.prompt,
        geometry=trained.geometry,
        max_new_tokens=5,
    )
    assert isinstance(answer, str)


def test_a_malicious_file_of_stage_1_is_refused(kit, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_run"), "w"))

    source = tmp_path / "files"
    source.mkdir()
    torch.save({"model.mm_projector.0.bias": Malicious()}, source / "mole_encoder.bin")
    with pytest.raises(WeightsError, match="nothing in it was run"):
        import_official(source, tmp_path / "in", language_model=str(kit.WEIGHTS / "language_model"))
    assert not (tmp_path / "was_run").exists()
    assert not (tmp_path / "in").exists()


def test_an_export_is_no_source_of_official_files(kit, tmp_path):
    export(kit.make_run(tmp_path / "run", kit.OFFICIAL), "hf", tmp_path / "hf")
    with pytest.raises(ConfigError, match="is an export already"):
        write_official(load_student(tmp_path / "hf"), tmp_path / "out")


def test_heads_of_the_revised_recipe_are_left_out(kit, tmp_path):
    kit.make_run(tmp_path / "run", kit.OFFICIAL)
    save_adapters(tmp_path / "run/model", torch.nn.ModuleDict({"sam": StudentHead(8, 4)}))
    write_official(load_student(tmp_path / "run"), tmp_path / "out")
    assert not [name for name in open_checkpoint(tmp_path / "out") if "adapter" in name]


def test_an_official_directory_says_how_it_is_imported(source):
    with pytest.raises(WeightsError, match=r"Make one of it: movekd import"):
        load_student(source)
