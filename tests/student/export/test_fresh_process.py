"""An export in a fresh process: without movekd, and with it as the docs say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exports import export
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


WITHOUT_MOVEKD = """
import sys
sys.modules["movekd"] = None
import torch
torch.set_num_threads(1)
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
whole, encoder, given = sys.argv[1:]
given = torch.load(given, weights_only=True)
try:
    AutoModelForImageTextToText.from_pretrained(whole, trust_remote_code=False)
except ValueError as error:
    print("refused", str(error)[:30])
model = AutoModelForImageTextToText.from_pretrained(whole, trust_remote_code=True).eval()
alone = AutoModel.from_pretrained(encoder, trust_remote_code=True).eval()
AutoProcessor.from_pretrained(whole)
with torch.no_grad():
    logits = model(**given["inputs"]).logits
    tokens = alone(given["inputs"]["pixel_values"], output_hidden_states=True).hidden_states[-2]
torch.testing.assert_close(logits, given["logits"], rtol=1e-5, atol=1e-5)
torch.testing.assert_close(tokens[:, 1:], given["tokens"], rtol=1e-5, atol=1e-5)
assert not [name for name in sys.modules if name.startswith("movekd.")]
print("equal")
"""


def test_an_export_runs_where_movekd_is_not_installed(official, tmp_path, pixels, text_and_image):
    export(official, "hf", tmp_path / "whole")
    export(official, "encoder", tmp_path / "encoder")
    given = text_and_image(official.student)
    with torch.no_grad():
        logits = official.student.vlm(**given).logits
        tokens = image_features(official.student.vlm, pixels)[1]
    content = {"inputs": given, "logits": logits, "tokens": tokens.clone()}
    torch.save(content, tmp_path / "given.pt")
    printed = python(
        WITHOUT_MOVEKD, tmp_path, tmp_path / "whole", tmp_path / "encoder", tmp_path / "given.pt"
    )
    assert printed.splitlines()[-1] == "equal"
    assert "refused" in printed  # without the user's word, nothing runs


PAGE = Path(__file__).parents[3] / "docs" / "compatibility.md"


def code_of(text):
    """Return the blocks of Python in a page."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("kind", ["hf", "encoder"])
def test_the_card_loads_the_export_with_movekd_installed(official, tmp_path, kind):
    export(official, kind, tmp_path / "my-model")
    with_movekd = code_of((tmp_path / "my-model/README.md").read_text())[0]
    assert "register_auto_classes()" in with_movekd
    before = "from PIL import Image\nimage = Image.new('RGB', (60, 40))\n"
    after = (
        "loaded = encoder if 'encoder' in vars() else model.model.vision_tower\n"
        "import transformers\n"
        "transformers.AutoConfig.from_pretrained('my-model', trust_remote_code=False)\n"
        "print(type(loaded).__module__)"
    )
    printed = python(before + with_movekd + after, tmp_path)
    assert printed.strip() == "movekd.student.export.modeling_movekd"


def test_the_page_loads_the_export_with_movekd_installed_and_without(official, tmp_path):
    export(official, "hf", tmp_path / "OUT")
    section = PAGE.read_text().split("## Hugging Face")[1].split("\n## ")[0]
    with_movekd, without = code_of(section)
    tower = "print(type(model.model.vision_tower).__module__)"
    printed = python(with_movekd + tower, tmp_path)
    assert printed.strip() == "movekd.student.export.modeling_movekd"
    hidden = "import sys\nsys.modules['movekd'] = None\n"
    printed = python(hidden + without + tower, tmp_path)
    assert printed.strip().startswith("transformers_modules.OUT")


def test_importing_movekd_changes_nothing_in_transformers(tmp_path):
    program = (
        "import sys, movekd\n"
        "assert not [name for name in sys.modules if name.startswith('movekd.')]\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "print('movekd_clip_vision' in CONFIG_MAPPING, type(sys.meta_path[0]).__name__)"
    )
    expected = python("import sys; print(False, type(sys.meta_path[0]).__name__)", tmp_path)
    assert python(program, tmp_path) == expected
