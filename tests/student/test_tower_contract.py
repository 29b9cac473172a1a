"""One contract for all vision towers: docs/student.md promises it, and its table is made from the
same cases.

A tower learns in a run of `movekd train`, with and without experts, at its own image size and at
another. The run that was interrupted and resumed is the uninterrupted one. Each export, loaded in a
fresh process by stock transformers or onnxruntime, computes what the run does.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import scenes
import tower_cases
from exports import export
from movekd.cache.spec import load_spec
from movekd.corpus.index import open_corpus
from movekd.corpus.pack import pack_llava
from movekd.errors import ConfigError
from movekd.extract.options import BuildOptions
from movekd.extract.run import build_cache
from movekd.student import register_auto_classes
from movekd.student.checkpoint import load_student
from movekd.student.config import MoleKeys, StudentConfig
from movekd.student.export.check import check_exports, tolerance_of
from movekd.student.official.export_checkpoint import write_official
from movekd.student.official.state_dict import require_official
from movekd.student.parameters import mole_layers
from movekd.student.towers import num_prefix_tokens, tower_type
from movekd.student.vlm import build_encoder, build_vlm, image_features, image_token_counter
from movekd.train.config import load_config
from movekd.train.run import train
from tower_cases import CASES, IMAGE_SIZE, NO_TOWERS, OTHER_SIZE

DIGITS = Path(scenes.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "student.md"
SAVING = ("training.save_strategy=steps", "training.save_steps=1", "training.save_total_limit=null")
EXPERTS = ("student.mole.r=2", "student.mole.lora_dropout=0.2")
ROWS = {case.title: case for case in CASES}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few questions about scenes, and the features of one teacher, on a grid of 6 x 6."""
    folder = tmp_path_factory.mktemp("corpus")
    scenes.write_corpus(folder, num_pretrain=1, num_finetune=8, num_val=1, num_test=1, seed=3)
    pack_llava([folder / "finetune.json"], folder / "images", folder / "data", num_workers=1)
    spec = load_spec(str(DIGITS / "teachers/clip.yaml"))
    options = BuildOptions(num_workers=0)
    data = open_corpus(folder / "data")
    list(build_cache(folder / "cache", data, [spec], geometry="crop", options=options))
    return folder


def config_of(corpus, tower, *overrides):
    """Return a finetune of 2 steps: the tower, its experts, the projector and the rest learn."""
    return load_config(
        DIGITS / "finetune.yaml",
        [
            f"student.vision_tower={tower}",
            "student.image_mean=[0.5, 0.5, 0.5]",
            "student.image_std=[0.5, 0.5, 0.5]",
            f"data.shards={corpus / 'data'}",
            f"data.conversations=[{corpus / 'finetune.json'}]",
            "distill.teachers=[clip]",
            "training.per_device_train_batch_size=2",
            "training.max_steps=2",
            "training.report_to=none",
            "training.use_cpu=true",
            *overrides,
        ],
    )


def interrupt(what, done, total):
    if done == 2:
        raise KeyboardInterrupt


def train_in_two_parts(config, corpus, output):
    """Train a run to its end, and again with an interruption; return the folder of both runs."""
    train(config, output / "whole", corpus / "cache")
    with pytest.raises(KeyboardInterrupt):
        train(config, output / "parts", corpus / "cache", progress=interrupt)
    train(config, output / "parts", corpus / "cache", resume=True)
    files = sorted((output / "whole/model").glob("*.safetensors"))
    assert {"vision_tower.safetensors", "mm_projector.safetensors"} <= {p.name for p in files}
    for file in files:
        whole, parts = load_file(file), load_file(output / "parts/model" / file.name)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole), file.name
    return output / "whole"


def assert_the_read_blocks_learned(config, trained):
    """Every weight up to the hidden state that is read has moved, and the experts with it."""
    before = dict(build_vlm(config.student).vlm.model.vision_tower.named_parameters())
    tower = trained.student.vlm.model.vision_tower
    blocks = tower_type(tower.config).blocks
    read = (f"{blocks}.0.", f"{blocks}.1.", "embeddings.")
    still = {
        name
        for name, parameter in tower.named_parameters()
        if name.startswith(read) and torch.equal(parameter, before[name])
    }
    # keys get one number for all tokens, which softmax leaves out; nothing is masked
    still = {name for name in still if not re.search(r"k_proj\.bias|mask_token|\.mole_", name)}
    assert not still
    moved = [n for n, p in tower.named_parameters() if not torch.equal(p, before[n])]
    assert any(".mole_fc1." in n for n in moved) == (config.student.mole is not None)


def logits_of(student):
    """Return the logits of a question about an image of noise."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, student.image_size, student.image_size, generator=generator)
    image = student.tokenizer.convert_tokens_to_ids("<image>")
    ids = torch.tensor([[1] + [image] * student.num_image_tokens + [7, 30]])
    with torch.no_grad():
        return student.vlm(input_ids=ids, pixel_values=pixels).logits


def assert_exports(trained, out, case, jobs):
    """Write every format; add what the fresh process has to load to ``jobs``."""
    has_experts = bool(mole_layers(trained.student.vlm))
    for kind, is_stock in (("hf", case.stock_llava), ("encoder", True), ("onnx", None)):
        export(trained, kind, out / kind)
        jobs.append((trained, kind, out / kind))
        if is_stock is not None:
            keys = json.loads((out / kind / "config.json").read_text())
            assert ("auto_map" in keys) == (has_experts or not is_stock)
            assert keys.get("vision_config", keys)["image_size"] == trained.student.image_size
    again = load_student(out / "hf")
    assert torch.equal(logits_of(again.student), logits_of(trained.student))


MATRIX = [(case.title, name) for case in CASES for name in case.checkpoints]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the ONNX exporter's own packages
@pytest.mark.parametrize(("title", "checkpoint"), MATRIX)
def test_a_tower_does_what_the_table_says(corpus, tmp_path, title, checkpoint):
    case = ROWS[title]
    case.checkpoints[checkpoint](tmp_path / "tower")
    ways = {"plain": ("student.mole=null",)}
    other = f"student.image_size={OTHER_SIZE}"
    if case.no_experts is None:
        ways |= {"experts": EXPERTS, "smaller": (*EXPERTS, other)}
    else:
        ways["smaller"] = (*ways["plain"], other)
    jobs = []
    for way, overrides in ways.items():
        config = config_of(corpus, tmp_path / "tower", *SAVING, *overrides)
        run = train_in_two_parts(config, corpus, tmp_path / way)
        trained = load_student(run)
        size = OTHER_SIZE if way == "smaller" else IMAGE_SIZE
        assert trained.student.image_size == size
        assert trained.student.num_image_tokens == (size // 8) ** 2
        assert_the_read_blocks_learned(config, trained)
        assert_exports(trained, tmp_path / way / "out", case, jobs)
    (tmp_path / "scratch").mkdir()
    found = check_exports(jobs, tmp_path / "scratch")
    for (trained, kind, _), difference in zip(jobs, found, strict=True):
        assert isinstance(difference, float), f"{kind}: {difference}"
        assert difference <= (tolerance_of(trained, kind) if kind == "onnx" else 0.0)


def test_a_tower_with_registers_learns_at_another_size_and_is_its_export(corpus, tmp_path):
    """The short part: DINOv3 is the tower that differs most from CLIP."""
    case = ROWS["DINOv3 (ViT)"]
    case.checkpoints["DINOv3ViTModel"](tmp_path / "tower")
    size = f"student.image_size={OTHER_SIZE}"
    config = config_of(corpus, tmp_path / "tower", *SAVING, *EXPERTS, size)
    assert image_token_counter(config.student)([9, 90], [9, 60]).tolist() == [16, 16]
    trained = load_student(train_in_two_parts(config, corpus, tmp_path))
    assert_the_read_blocks_learned(config, trained)
    for kind in ("hf", "encoder"):
        export(trained, kind, tmp_path / "out" / kind)
    again = load_student(tmp_path / "out/hf").student
    assert torch.equal(logits_of(again), logits_of(trained.student))
    register_auto_classes()
    encoder = AutoModel.from_pretrained(tmp_path / "out/encoder").eval()
    pixels = torch.randn(2, 3, OTHER_SIZE, OTHER_SIZE)
    with torch.no_grad():
        expected = image_features(trained.student.vlm, pixels)[1]
        found = encoder(pixels, output_hidden_states=True).hidden_states[-2][:, 5:]
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_a_stage_starts_from_another_image_size(corpus, tmp_path):
    """Experts and projector know no positions; a trained table of positions has its size."""
    ROWS["CLIP"].checkpoints["CLIPModel"](tmp_path / "tower")
    first = config_of(corpus, tmp_path / "tower", *EXPERTS, "trained=[mole, projector]")
    train(first, tmp_path / "first", corpus / "cache")
    begin = f"init_from={tmp_path / 'first'}"
    size = f"student.image_size={OTHER_SIZE}"
    second = config_of(corpus, tmp_path / "tower", *EXPERTS, begin, size)
    train(second, tmp_path / "second", corpus / "cache")
    assert load_student(tmp_path / "second").student.image_size == OTHER_SIZE
    begin = f"init_from={tmp_path / 'second'}"
    third = config_of(corpus, tmp_path / "tower", *EXPERTS, begin, size, "training.learning_rate=0")
    train(third, tmp_path / "third", corpus / "cache")
    for name in ("mole_encoder", "vision_tower", "mm_projector"):
        files = [tmp_path / run / f"model/{name}.safetensors" for run in ("second", "third")]
        left, right = map(load_file, files)
        assert all(torch.equal(left[key], right[key]) for key in left)
    wrong = config_of(corpus, tmp_path / "tower", *EXPERTS, begin)
    with pytest.raises(ConfigError, match=r"trained its vision tower at 32 pixels.*image_size: 32"):
        train(wrong, tmp_path / "wrong", corpus / "cache")


def student_config(folder, mole=None):
    mean = (0.5, 0.5, 0.5)
    return StudentConfig(
        vision_tower=str(folder),
        language_model=str(DIGITS / "weights/language_model"),
        mole=mole,
        image_mean=mean,
        image_std=mean,
    )


@pytest.mark.parametrize("title", NO_TOWERS)
def test_a_tower_that_cannot_be_a_student_is_refused_with_the_reason(tmp_path, title):
    _, kind, config = NO_TOWERS[title]
    config().save_pretrained(tmp_path)  # no weights: it is refused before they are read
    reason = tower_cases.REFUSED[kind]
    for build in (build_encoder, build_vlm, image_token_counter):
        with pytest.raises(ConfigError, match=rf"is a '{kind}': {re.escape(reason)}"):
            build(student_config(tmp_path))


@pytest.mark.parametrize("title", [case.title for case in CASES if case.no_experts])
def test_experts_in_gated_mlps_are_refused_with_the_reason(tmp_path, title):
    (write,) = ROWS[title].checkpoints.values()
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # it is refused before weights are read
    with pytest.raises(ConfigError, match=r"has gated MLPs \(use_.*Set student\.mole: null"):
        build_encoder(student_config(tmp_path, MoleKeys(r=2)))


@pytest.mark.parametrize("title", [case.title for case in CASES if not case.no_experts])
def test_only_clip_has_an_official_form(tmp_path, kit, title):
    write, *_ = ROWS[title].checkpoints.values()
    write(tmp_path)
    vlm = build_vlm(student_config(tmp_path, kit.OFFICIAL)).vlm
    if ROWS[title].is_clip:
        require_official(vlm)
        return
    with pytest.raises(ConfigError, match="the released code knows only 'clip_vision_model'"):
        require_official(vlm)


def test_the_page_has_the_table_of_these_cases():
    assert tower_cases.table() in PAGE.read_text(encoding="utf-8")


def test_tokens_before_the_patches_are_those_of_the_table(tmp_path):
    for number, case in enumerate(CASES):
        write, *_ = case.checkpoints.values()
        write(tmp_path / str(number))
        tower = build_encoder(student_config(tmp_path / str(number))).vision_tower
        expected = {"none": 0, "[CLS]": 1, "[CLS], registers": 5}[case.before]
        assert num_prefix_tokens(tower.config) == expected
        assert (tower_type(tower.config).rotary is not None) == (case.image_size == "rotary")


def test_the_official_form_is_of_the_towers_own_size(kit, tmp_path):
    trained = kit.make_run(tmp_path / "own", kit.OFFICIAL, image_size=IMAGE_SIZE)
    assert "config.json" in write_official(trained, tmp_path / "official")
    trained = kit.make_run(tmp_path / "other", kit.OFFICIAL, image_size=OTHER_SIZE)
    with pytest.raises(ConfigError, match=r"looks at 32 pixels.*for the 48 pixels of the base"):
        write_official(trained, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
