"""An export in a fresh process: without movekd, and with it as the docs say.

A start of transformers takes seconds, so that one process looks at several exports.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from exports import export
from movekd.corpus.conversations import Conversation
from movekd.evaluate.generate import generate_answers
from movekd.student.tokenization import tokenize_question
from movekd.student.vlm import image_features


def python(program, folder, *arguments):
    """Run a program in a fresh interpreter without a network."""
    environment = os.environ | {
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PAGE = Path(__file__).parents[3] / "docs" / "compatibility.md"


def code_of(text):
    """Return the blocks of Python in a page."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def page_code():
    """Return the blocks about an export of format hf: with movekd, without, and a question."""
    return code_of(PAGE.read_text().split("## Hugging Face")[1].split("\n## ")[0])


TURNS = (("human", "<image>\nWhat is it?"), ("gpt", "A bus."), ("human", "And that there?"))
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
    {"role": "user", "content": "And that there?"},
]
QUESTIONS = [MESSAGES[:1], MESSAGES]  # of different lengths, for a batch


@pytest.fixture(scope="module")
def folder(kit, tmp_path_factory, official):
    """Exports of both prompts and an encoder, and what their runs give."""
    folder = tmp_path_factory.mktemp("fresh")
    export(official, "encoder", folder / "encoder")
    photo = Image.fromarray(load_sample_images().images[0]).resize((90, 60))
    photo.save(folder / "image.jpg")
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    asked = [Conversation("c", ("image",), TURNS[:n]) for n in (1, 3)]
    content = {}
    for prompt in ("v1", "chat_template"):
        run = replace(official, prompt=prompt)
        export(run, "hf", folder / prompt)
        tokenizer = run.student.tokenizer
        ids = [tokenize_question(c, tokenizer, prompt=prompt, num_image_tokens=36) for c in asked]
        answers = generate_answers(
            run.student,
            asked,
            lambda _: (folder / "image.jpg").read_bytes(),
            prompt=prompt,
            geometry=run.geometry,
            max_new_tokens=5,
        )
        content[prompt] = {"ids": ids, "answers": list(answers)}
    (folder / "expected.json").write_text(json.dumps(content))
    image = official.student.tokenizer.convert_tokens_to_ids("<image>")
    given = {"input_ids": torch.tensor([[1] + [image] * 36 + [7, 30]] * 2), "pixel_values": pixels}
    with torch.no_grad():
        logits = official.student.vlm(**given).logits
        tokens = image_features(official.student.vlm, pixels)[1].clone()
    torch.save({"inputs": given, "logits": logits, "tokens": tokens}, folder / "given.pt")
    (folder / "questions.json").write_text(json.dumps(QUESTIONS))
    (folder / "OUT").symlink_to(folder / "v1")
    return folder


WITHOUT_MOVEKD = """
import json, sys
sys.modules["movekd"] = None
import torch
torch.set_num_threads(1)
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

given = torch.load("given.pt", weights_only=True)
try:
    AutoModelForImageTextToText.from_pretrained("v1", trust_remote_code=False)
except (KeyError, ValueError):  # transformers before 5.20 gives the first
    print("refused")
encoder = AutoModel.from_pretrained("encoder", trust_remote_code=True).eval()
with torch.no_grad():
    tokens = encoder(given["inputs"]["pixel_values"], output_hidden_states=True).hidden_states[-2]
torch.testing.assert_close(tokens[:, 1:], given["tokens"], rtol=1e-5, atol=1e-5)

image = Image.open("image.jpg")
questions = json.load(open("questions.json"))
for prompt, expected in json.load(open("expected.json")).items():
    model = AutoModelForImageTextToText.from_pretrained(prompt, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(**given["inputs"]).logits
    torch.testing.assert_close(logits, given["logits"], rtol=1e-5, atol=1e-5)
    assert not model.config.tie_word_embeddings and not model.config.text_config.tie_word_embeddings
    processor = AutoProcessor.from_pretrained(prompt, backend="pil")
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id

    def ask(questions):
        for messages in questions:
            messages[0]["content"][0] = {"type": "image", "image": image}
        batch = processor.apply_chat_template(
            questions, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", processor_kwargs={"padding": True},
        )
        texts = [processor.apply_chat_template(q, add_generation_prompt=True) for q in questions]
        again = processor(
            text=texts, images=[image] * len(texts), padding=True, return_tensors="pt"
        )
        assert torch.equal(again["input_ids"], batch["input_ids"])
        ids = model.generate(**batch, do_sample=False, max_new_tokens=5)
        new = ids[:, batch["input_ids"].shape[1]:]
        answers = processor.batch_decode(new, skip_special_tokens=True)
        lengths = batch["attention_mask"].sum(1).tolist()
        rows = [row[-n:].tolist() for row, n in zip(batch["input_ids"], lengths)]
        return rows, [answer.strip() for answer in answers]

    rows, answers = ask(questions)
    assert rows == expected["ids"]
    assert answers == expected["answers"], (answers, expected["answers"])
    assert [ask([question])[1][0] for question in questions] == answers
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    said = pipe(text=questions, do_sample=False, max_new_tokens=5, return_full_text=False)
    assert [one[0]["generated_text"].strip() for one in said] == answers
    by_name = pipeline("image-text-to-text", model=prompt, trust_remote_code=True)
    assert by_name(text=questions[0], max_new_tokens=5)[0]["generated_text"]
assert not [name for name in sys.modules if name.startswith("movekd.")]
print("equal")
"""
OF_PAGE = "exec(open('page.py').read())\nprint(type(model.model.vision_tower).__module__)"


def test_an_export_runs_where_movekd_is_not_installed(folder):
    _, loading, asking = page_code()
    (folder / "page.py").write_text(loading + asking)
    lines = python(WITHOUT_MOVEKD + OF_PAGE, folder).splitlines()
    assert "equal" in lines
    assert lines[0].startswith("refused")  # without the user's word, nothing runs
    assert lines[-1].startswith("transformers_modules.OUT")


WITH_MOVEKD = """
import json
import transformers
from PIL import Image
image = Image.new("RGB", (60, 40))
for name, code in json.load(open("code.json")):
    found = {"image": image}
    exec(code, found)
    loaded = found["encoder"] if "encoder" in found else found["model"].model.vision_tower
    transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    print(type(loaded).__module__, found.get("answer"))
"""


def test_card_and_page_load_the_export_with_movekd_installed(folder):
    codes = [["OUT", page_code()[0]]]
    for name in ("encoder", "v1"):
        blocks = code_of((folder / name / "README.md").read_text())
        assert "register_auto_classes()" in blocks[0]
        codes.append([name, blocks[0] + (blocks[-1] if name == "v1" else "")])
    (folder / "code.json").write_text(json.dumps(codes))
    lines = python(WITH_MOVEKD, folder).splitlines()
    modules, answers = zip(*(line.split(" ", 1) for line in lines), strict=True)
    assert set(modules) == {"movekd.student.export.modeling_movekd"}
    assert answers[2] != "None"


def test_importing_movekd_changes_nothing_in_transformers(tmp_path):
    program = (
        "import sys, movekd\n"
        "assert not [name for name in sys.modules if name.startswith('movekd.')]\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "print('movekd_clip_vision' in CONFIG_MAPPING, type(sys.meta_path[0]).__name__)"
    )
    expected = python("import sys; print(False, type(sys.meta_path[0]).__name__)", tmp_path)
    assert python(program, tmp_path) == expected
