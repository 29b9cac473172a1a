"""No value of student.yaml ends in a traceback, or in a run that means nothing.

Every scalar of every shipped config is replaced by values that no author meant. Either one line
says so, or the value is in the range of its key, and then it survives what a run does with it.
"""

import contextlib
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments
from transformers.activations import ACT2FN

from movekd.errors import ConfigError, MovekdError
from movekd.resources import resource_dir
from movekd.student.config import StudentConfig
from movekd.train import training_keys
from movekd.train.config import TrainConfig, load_config
from movekd.train.training_args import training_arguments

CONFIGS = sorted(
    path
    for stage in ("distill", "pretrain", "finetune")
    for path in resource_dir("pipelines").glob(f"*/{stage}.yaml")
)
DIGITS = ">5,000 digits<"
STRANGE: list[Any] = [
    *("", "abc", "a\0b", "x" * 5000, DIGITS, None, True, [], {}, [1], ["a", "a"], {"a": {"b": 1}}),
    *(0, -1, 1, 1.5, 10**9, 10**40, -(10**40), 1e30, 1e-300),
    *(math.nan, math.inf, -math.inf, -0.0, "0x1" + "f" * 5000, "!!int abc", "2026-13-45"),
]


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in nested mappings and lists, but the whole."""
    items = content.items() if isinstance(content, dict) else ()
    items = enumerate(content) if isinstance(content, list) else items
    below = [(*path, key) for key, _ in items]
    return below + [p for at in below for p in places(content[at[-1]], at)]


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of nested mappings and lists with one value replaced."""
    if not path:
        return value
    if isinstance(content, list):
        return [replaced(v, path[1:], value) if i == path[0] else v for i, v in enumerate(content)]
    return {k: replaced(v, path[1:], value) if k == path[0] else v for k, v in content.items()}


def contents() -> dict[str, dict[str, Any]]:
    """Return the shipped configs, and one with every key."""
    found = {f"{p.parent.name}/{p.stem}": yaml.safe_load(p.read_text()) for p in CONFIGS}
    full = load_config(resource_dir("pipelines") / "digits" / "pretrain.yaml").model_dump(
        mode="json"
    )
    # stands for a run's own config.yaml; every key of the trainer that a run can read
    defaults = {
        name: field.default
        for name, field in TrainingArguments.__dataclass_fields__.items()
        if isinstance(field.default, str | bool | int | float | None) and "hub" not in name
    }
    ours = (*training_keys._OURS, "do_eval")
    full["training"] = {k: v for k, v in defaults.items() if k not in ours} | {"use_cpu": True}
    full["student"] |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    full["student"]["mole"]["layers_to_transform"] = [0, 1]
    optional = ["student.language_model_lora={}", "learning_rates={mole: 1.0e-3, heads: 1.0e-4}"]
    optional += ["data.val_size=0.1", "training.eval_steps=5", "student.image_size=48"]
    optional += ["data.probe_images=photos", "student.mole.experts=per_teacher"]
    tuned = load_config(resource_dir("pipelines") / "digits" / "finetune.yaml", optional)
    source = "{shards: a, cache: b, conversations: [c], eval_conversations: [d], weight: 2}"
    several = [f"data.sources=[{source}]", "data.shards=null", "data.conversations=[]"]
    several.append("training.eval_steps=5")
    mixed = load_config(resource_dir("pipelines") / "digits" / "pretrain.yaml", several)
    return found | {
        "every key": full,
        "every optional section": tuned.model_dump(mode="json"),
        "several corpora": mixed.model_dump(mode="json"),
    }


def keys_of(schema: dict[str, Any], part: dict[str, Any]) -> set[tuple[Any, ...]]:
    """Return the path of every key in a part of a JSON schema."""
    if "$ref" in part:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]]
    found = set()
    for key, inner in part.get("properties", {}).items():
        found |= {(key, *below) for below in keys_of(schema, inner)} | {(key,)}
    if "$ref" in part.get("items", {}):
        found |= {(0, *below) for below in keys_of(schema, part["items"])}
    return found.union(*(keys_of(schema, option) for option in part.get("anyOf", ())))


CONTENTS = contents()
MUTATIONS = [(name, path) for name, content in CONTENTS.items() for path in places(content)]


def load(folder: Path, content: Any) -> TrainConfig:
    """Write a config and load it as `movekd train --dry-run` does."""
    text = yaml.safe_dump(content)
    for written in (f"'{DIGITS}'", DIGITS):
        text = text.replace(written, "7" * 5000)
    (folder / "student.yaml").write_text(text.replace("'!!int abc'", "!!int abc"))
    return load_config(folder / "student.yaml")


def check(folder: Path, name: str, path: tuple[Any, ...], value: Any) -> TrainConfig | None:
    """Return the config with one value replaced, or None if one line refuses it."""
    refusal = ""
    config = None
    try:
        config = load(folder, replaced(CONTENTS[name], path, value))
        assert load_config_text(folder, config.to_yaml()) == config
        training_arguments(config, folder / "run")
    except MovekdError as error:
        refusal = str(error)
    assert len(refusal) < 1500
    assert refusal.isprintable()
    return None if refusal else config


def load_config_text(folder: Path, text: str) -> TrainConfig:
    """Return the config that a run's config.yaml describes."""
    (folder / "config.yaml").write_text(text)
    return load_config(folder / "config.yaml")


@given(st.sampled_from(MUTATIONS), st.sampled_from(STRANGE))
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@example(("every key", ("student", "mole", "r")), 10**9)
@example(("every key", ("distill", "kd_weight")), 1e30)
@example(("every key", ("student", "projector_hidden_act")), "abc")
@example(("every key", ("data", "shards")), "a\0b")
@example(("several corpora", ("data", "sources", 0, "weight")), 1e30)
@example(("several corpora", ("data", "sources", 0, "cache")), "a\0b")
@example(("several corpora", ("data", "sources")), {"a": {"b": 1}})
def test_a_strange_value_is_refused_in_a_line_or_in_range(tmp_path_factory, where, value):
    check(tmp_path_factory.mktemp("config"), *where, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTENTS)
def test_every_strange_value_at_every_place(tmp_path, name):
    tried = [(path, value) for path in places(CONTENTS[name]) for value in STRANGE][::3]
    accepted = [at for at in tried if check(tmp_path, name, *at) is not None]
    assert 0 < len(accepted) < len(tried) / 2
    keys = {path for path, _ in tried}
    huge = {path for path, value in accepted if _is_huge_or_nan(value)}
    assert huge <= {path for path in keys if path[0] == "training"}  # of keys that no run reads


def _is_huge_or_nan(value: Any) -> bool:
    return isinstance(value, float | int) and not abs(value) < 1e15


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("every key", "pretrain"),
        ("every optional section", "finetune"),
        ("several corpora", "pretrain"),
    ],
)
def test_the_config_with_every_key_is_accepted(tmp_path, name, stage):
    assert check(tmp_path, name, ("stage",), stage) is not None


def test_no_key_of_the_schema_is_missing_here():
    schema = TrainConfig.model_json_schema()
    tried = {path for content in CONTENTS.values() for path in places(content)}
    assert keys_of(schema, schema) <= tried


NONSENSE = [
    *("trained=[]", "distill.kd_weight=1e30", "distill.kd_weight=.nan", "student.mole.r=true"),
    *("student.mole.r=1000000000", "student.mole.lora_alpha=.inf", "student.mole.lora_alpha=0"),
    *("student.projector_hidden_act=abc", "student.vision_feature_layer=0", "data.shards=''"),
    *("student.image_mean=[123.7, 116.3, 103.5]", 'student.language_model="a\\0b"'),
    *("data.model_max_length=0", "data.model_max_length=1.5", "init_from=''"),
    *("training.num_train_epochs=.nan", "training.num_train_epochs=0", "training.max_steps=0"),
    *("training.max_steps=-2", "training.learning_rate=.nan", "training.learning_rate=-1"),
    *("training.learning_rate=.inf", "training.per_device_train_batch_size=0"),
    *("training.per_device_train_batch_size=1.5", "training.gradient_accumulation_steps=0"),
    *("training.seed=-1", f"training.seed={2**32}", "training.data_seed=-1", "training.bf16=5"),
    *("training.run_name=[.nan]", "training.adam_beta1=1", "training.save_steps=0"),
    *("training.warmup_steps=-1", "training.save_total_limit=0", "training.seed=2026-13-45"),
]


@pytest.mark.parametrize("override", NONSENSE)
def test_nonsense_is_refused_by_its_key(override):
    key = override.partition("=")[0].removeprefix("training.")
    key = "student.image_mean" if "mean" in key else key
    with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
        load_config(
            CONFIGS[0], [override, "student.image_std=[58.4, 57.1, 57.4]"][: 1 + ("mean" in key)]
        )


def test_a_thousand_wrong_keys_are_one_short_line(tmp_path):
    content = CONTENTS["every key"] | {f"wrong key {number}\x1b[31m": 1 for number in range(1000)}
    with pytest.raises(ConfigError, match="and 994 more wrong keys") as caught:
        load(tmp_path, content)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "override",
    ["a" + ".b" * 5000 + "=1", "training.x=" + "[" * 3000 + "]" * 3000, "a=" + "7" * 5000],
)
def test_an_override_has_the_limits_of_a_file(override):
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS[0], [override])
    assert len(str(caught.value)) < 1000


def test_every_activation_that_is_allowed_exists():
    field = StudentConfig.model_fields["projector_hidden_act"]
    assert set(field.annotation.__args__) <= set(ACT2FN)


@pytest.mark.slow
def test_what_is_allowed_builds_the_small_model(digits, tmp_path):
    for path, value in [*itertools.product(places(CONTENTS["every key"]), STRANGE)][::2]:
        if path[0] not in ("student", "distill", "trained", "data", "recipe", "stage"):
            continue
        config = check(tmp_path, "every key", path, value)
        if config is None:
            continue
        shards = config.data.model_copy(update={"shards": digits.data})
        with contextlib.suppress(MovekdError):
            digits.parts(config.model_copy(update={"data": shards}))
