"""Tests of movekd.student.model_files: a stranger's folder works, or is refused in one sentence."""

import io
import json
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from exports import export
from movekd.corpus.conversations import Conversation
from movekd.errors import ConfigError, WeightsError
from movekd.evaluate.generate import generate_answers
from movekd.files.ownership import OWNERSHIP_FILE
from movekd.student.checkpoint import load_student
from movekd.student.config import StudentConfig
from movekd.student.official.import_checkpoint import import_official
from movekd.student.tokenization import tokenize_question
from movekd.student.tokenizer import load_tokenizer
from movekd.student.vlm import build_vlm

VALUES = [
    *(None, True, -1, 0, 2**40, 10**40, 1e308, float("nan"), float("-inf"), "", "abc", "a\0b"),
    *([], {}, [[]], {"a": 1}, "../../etc/passwd", "x" * 100_000),
]


def deep(depth):
    return "[" * depth + "]" * depth


def places(value, path=()):
    """Return the path of every scalar, and of every list and object, in a JSON value."""
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(children)[:40]:  # a vocabulary is of one kind
        is_leaf = not isinstance(child, dict | list)
        found += [(*path, key)] if is_leaf else places(child, (*path, key))
    return found


def mutated(content, path, value):
    """Return JSON with another value at a path."""
    again = json.loads(json.dumps(content))
    target = again
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return json.dumps(again)


def answer(trained):
    """Ask a question: the whole model runs."""
    conversation = Conversation("c", ("i",), (("human", "<image>\nWhat is it?"),))
    student = trained.student
    ids = tokenize_question(
        conversation,
        student.tokenizer,
        prompt=trained.prompt,
        num_image_tokens=student.num_image_tokens,
    )
    pixels = torch.zeros(1, 3, student.image_size, student.image_size, dtype=student.vlm.dtype)
    with torch.inference_mode():
        return student.vlm(input_ids=torch.tensor([ids]), pixel_values=pixels).logits


def ask(trained):
    """Generate an answer, as `ask` does."""
    picture, question = io.BytesIO(), (("human", "<image>\nWhat is it?"),)
    Image.new("RGB", (9, 7), "red").save(picture, "PNG")
    given = {"prompt": trained.prompt, "geometry": trained.geometry, "max_new_tokens": 2}
    asked = [Conversation("c", ("i",), question)]
    return list(generate_answers(trained.student, asked, lambda _: picture.getvalue(), **given))


def works_or_refuses(load):
    """Return whether it works; a refusal is one short line."""
    try:
        load()
    except (ConfigError, WeightsError) as error:
        text = str(error)
    else:
        return True
    assert text.isprintable(), text  # so it is one line, too
    assert len(text.encode()) < 2000, text
    return False


@pytest.fixture(scope="module")
def exported(kit, tmp_path_factory):
    """An export with an index of its weights, and all files that a tokenizer may have."""
    folder = tmp_path_factory.mktemp("exported")
    export(kit.make_run(folder / "run", kit.OFFICIAL), "hf", folder / "hf")
    names = load_student(folder / "hf").student.vlm.state_dict()
    part = "model-00001-of-00001.safetensors"
    (folder / "hf/model.safetensors").rename(folder / "hf" / part)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, part)}
    (folder / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "hf" / OWNERSHIP_FILE).unlink()  # what is changed on purpose is not as recorded
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    (folder / "hf/special_tokens_map.json").write_text(json.dumps(tokens))
    return folder / "hf"


JSON_FILES = (
    *("config.json", "generation_config.json", "movekd.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "model.safetensors.index.json"),
)


def cases(folder, name):
    """Yield every mutation of a JSON file as text."""
    text = (folder / name).read_text()
    content = json.loads(text)
    yield from ("", "{", "null", "[1]", text[: len(text) // 2], deep(3000), "\udcff", "9" * 5000)
    for path in places(content):
        for value in VALUES:
            yield mutated(content, path, value)


def try_all(folder, name, texts):
    """Load and ask with each text as the file; return how many of them worked."""
    path = folder / name
    original = path.read_bytes()
    before = sorted(os.listdir(folder.parent))
    num_working = 0
    for text in texts:
        path.unlink()  # may be a link to the original
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        num_working += works_or_refuses(lambda: ask(load_student(folder)))
    path.write_bytes(original)
    assert sorted(os.listdir(folder.parent)) == before
    assert works_or_refuses(lambda: ask(load_student(folder)))
    return num_working


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "hf")


@pytest.fixture
def bounded():
    """At most two GiB more of address space than now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_mutated_file_is_refused_or_works(copied, bounded, name):
    texts = list(cases(copied, name))
    try_all(copied, name, random.Random(name).sample(texts, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", JSON_FILES)
def test_every_mutated_file_is_refused_or_works(copied, bounded, name):
    texts = list(cases(copied, name))
    try_all(copied, name, random.Random(1).sample(texts, min(600, len(texts))))


@pytest.mark.parametrize("count", [4, pytest.param(600, marks=pytest.mark.slow)])
def test_any_key_of_a_generation_config_is_refused_or_works(copied, bounded, count):
    """Also keys that no export of ours has: a stranger may add them."""
    path = copied / "generation_config.json"
    keys = GenerationConfig().to_dict() | json.loads(path.read_text())
    every = [json.dumps(keys | {key: value}) for key in keys for value in VALUES]
    try_all(copied, path.name, random.Random(count).sample(every, min(count, len(every))))


def linked(path, target):
    target.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "config.json", "special_tokens_map.json"]
)
def test_a_link_out_of_the_folder_is_refused_and_never_copied(copied, tmp_path, name):
    if not (copied / name).exists():
        (copied / name).write_text("{}")
    linked(copied / name, tmp_path / "secret")
    with pytest.raises(WeightsError, match=rf"{name} is a link out of its folder"):
        load_tokenizer(copied)
    with pytest.raises(WeightsError, match=rf"{name} is a link out of its folder"):
        export(load_student(copied), "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_links_of_a_hub_cache_are_followed_and_no_others(exported, tmp_path):
    model = tmp_path / "models--org--name"
    snapshot = shutil.copytree(exported, model / "snapshots/0123")
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(model / "blobs" / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    answer(load_student(snapshot))
    other = tmp_path / "models--org--other/blobs"
    shutil.copytree(model / "blobs", other)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../../models--org--other/blobs/0")
    with pytest.raises(WeightsError, match=r"tokenizer\.json is a link out of its folder"):
        load_student(snapshot)


@pytest.mark.parametrize("what", ["a FIFO", "a folder", "a broken link", "too large"])
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer.model"])
def test_what_is_no_file_of_a_model_neither_hangs_nor_fills_the_memory(copied, what, name):
    path = copied / name
    path.unlink(missing_ok=True)
    if what == "a FIFO":
        os.mkfifo(path)
    elif what == "a folder":
        path.mkdir()
    elif what == "a broken link":
        path.symlink_to("gone")
    else:
        with path.open("wb") as file:
            file.truncate(2**40)  # sparse
    is_ignored = what == "a folder" and name == "tokenizer.model"
    assert works_or_refuses(lambda: answer(load_student(copied))) == is_ignored


@pytest.mark.parametrize(
    "template",
    ["{% for %}", "{{ 1 / 0 }}", "{{ messages[9]['x']['y'] }}", "{{ ''.__class__.__mro__ }}", "{{"],
)
def test_a_template_that_fails_is_one_sentence(copied, template):
    (copied / "chat_template.jinja").write_text(template)
    trained = load_student(copied)
    assert trained.prompt == "chat_template"
    reason = "SecurityError" if "__class__" in template else "[A-Z]"  # Jinja's sandbox
    with pytest.raises(ConfigError, match=rf"chat template fails: {reason}"):
        answer(trained)


def test_missing_weights_are_never_random_numbers(kit, exported, tmp_path):
    """A base or an export that lacks a weight is refused; transformers would only warn."""
    for name in ("clip", "language_model"):
        base = shutil.copytree(kit.WEIGHTS / name, tmp_path / name)
        tensors = load_file(base / "model.safetensors")
        del tensors[next(n for n in sorted(tensors) if "layers.1." in n)]
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        keys = {"vision_tower": kit.WEIGHTS / "clip", "language_model": kit.WEIGHTS / name}
        keys["vision_tower" if name == "clip" else name] = base
        config = StudentConfig(mole=None, **{key: str(path) for key, path in keys.items()})
        with pytest.raises(WeightsError, match=rf"{name}' lacks 1 of its weights \(.*layers\.1\."):
            build_vlm(config)


@pytest.mark.slow
def test_a_released_checkpoint_with_any_mutated_config_is_refused_or_imported(kit, tmp_path):
    source = kit.write_released(tmp_path)
    save_file(kit.released_state(), source / "model.safetensors")
    _try_imports(source, tmp_path / "in", random.Random(3), 300)


def test_a_released_checkpoint_with_a_mutated_config_is_refused_or_imported(kit, tmp_path):
    source = kit.write_released(tmp_path)
    save_file(kit.released_state(), source / "model.safetensors")
    _try_imports(source, tmp_path / "in", random.Random(0), 8)


def _try_imports(source, out, chance, number):
    texts = list(cases(source, "config.json"))

    def import_and_ask():
        import_official(source, out)
        answer(load_student(out))

    long = [
        mutated(json.loads((source / "config.json").read_text()), (key,), "x" * 100_000)
        for key in ("mm_vision_tower", "model_type")
    ]
    for text in [*long, *chance.sample(texts, min(number, len(texts)))]:
        (source / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        works_or_refuses(import_and_ask)
        shutil.rmtree(out, ignore_errors=True)
