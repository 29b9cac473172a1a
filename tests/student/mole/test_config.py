import json
from pathlib import Path

import pytest
from peft import PeftConfig

from movekd.errors import ConfigError
from movekd.student import MoleConfig


def test_alpha_follows_the_rank_by_default() -> None:
    assert MoleConfig(r=8).scale == 1.0
    assert MoleConfig(r=32, lora_alpha=1.0).scale == 1 / 32


def test_a_saved_config_comes_back_equal_through_peft(tmp_path: Path) -> None:
    config = MoleConfig(num_experts=2, r=4, use_gate=False, layers_to_transform=[0, 1])
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)) == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOLE"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_experts": 0}, r"num_experts: .*greater than or equal to 1 \(found 0\)"),
        ({"r": 0}, r"MoleConfig: r: .*greater than or equal to 1 \(found 0\)"),
        ({"lora_alpha": 0.0}, r"lora_alpha: .*greater than 0 \(found 0\.0\)"),
        ({"lora_alpha": float("nan")}, r"lora_alpha: .*finite number \(found nan\)"),
        ({"lora_dropout": 1.0}, r"lora_dropout: .*less than 1 \(found 1\.0\)"),
        ({"r": "8a"}, r"MoleConfig: r: .*valid integer.*\(found '8a'\)"),
        ({"init_lora_weights": "zeros"}, r"'kaiming' or 'zero' \(found 'zeros'\).*'zero'\?"),
        ({"teachers": []}, r"teachers: .*at least 1 item"),
        ({"teachers": ["sam", "sam"]}, r"a teacher is named twice in teachers"),
        ({"layers_to_transform": []}, r"=\[\]; expected the index of at least one block"),
        (
            {"target_modules": ".*mlp", "layers_to_transform": [0]},
            r"PEFT would ignore the former.*as a list",
        ),
    ],
)
def test_values_that_cannot_be_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoleConfig(**wrong)
