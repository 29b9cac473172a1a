"""`import movekd` makes transformers know the exported tower, whatever is imported first."""

import os
import subprocess
import sys

import pytest

LOOK_UP = """
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
config = CONFIG_MAPPING["movekd_clip_vision"]()
from transformers import AutoModel
print(AutoModel._model_mapping[type(config)].__module__, len(CONFIG_MAPPING.values()) > 100)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import movekd",
        "import movekd\nfrom transformers import CLIPVisionConfig",
        "import movekd\nfrom transformers import LlavaConfig",
        "import movekd\nfrom peft import inject_adapter_in_model",
        "import movekd\nimport transformers.modeling_layers",
        "import transformers.models.clip.modeling_clip\nimport movekd",
        "from transformers import AutoConfig\nimport movekd",
        "import movekd.student.export.modeling_movekd",
        "import movekd.student",
    ],
)
def test_the_tower_is_known_in_any_order(imports):
    done = subprocess.run(
        [sys.executable, "-c", imports + LOOK_UP],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["movekd.student.export.modeling_movekd", "True"]
