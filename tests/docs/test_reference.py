"""The generated pages hold every command, every key and every public name."""

import json
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import movekd
from cli_page import cli_page, commands
from config_page import PAGE, config_page, stage_values
from movekd.cache.spec import CacheSpec
from movekd.cli.main import app
from movekd.train.config import load_config
from movekd.train.recipes import RECIPES, mole_defaults
from movekd.train.trained_keys import TRAINED
from movekd.train.training_keys import TrainingKeys, check_training_keys
from reference import ROOMS, pages

ROOT = Path(__file__).parents[2]
RUN = ROOT / "pipelines/llava15_v1.0/pretrain.yaml"
INSIDE = {"files", "cli", "view"}
"""Rooms that users reach only through commands."""


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, str]]:
    """Return key -> column -> cell for all tables of the config page."""
    found: dict[str, dict[str, str]] = {}
    head: list[str] = []
    for line in config_page().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[0].startswith("key"):
            head = cells
        elif cells and cells[0].startswith("`"):
            found[cells[0].strip("`")] = dict(zip(head, cells, strict=True))
    return found


def every_key(content: dict[str, Any], path: str = "") -> set[str]:
    inner = [(f"{path}{key}.", value) for key, value in content.items() if isinstance(value, dict)]
    below = [every_key(value, key) for key, value in inner if key != "training."]
    return {f"{path}{key}" for key in content}.union(*below)


def test_the_config_page_has_every_key(rows: dict[str, dict[str, str]]) -> None:
    resolved = load_config(RUN).model_dump()
    of_training = {key for key in rows if key.startswith("training.")}
    checked = {f"training.{key}" for key in TrainingKeys.__annotations__}
    assert of_training >= checked
    expected = every_key(resolved) | set(CacheSpec.model_fields)
    assert expected <= set(rows) - of_training
    for key in set(rows) - of_training - expected:  # of a section that this run leaves out
        assert value_at(resolved, key.rpartition(".")[0]) in (None, []), key
    for key, row in rows.items():
        assert key in of_training or row["what"], f"{key} has no description"
        assert row["type"], key


def test_the_ranges_of_the_page_are_those_that_are_checked(rows: dict[str, dict[str, str]]) -> None:
    num_found = 0
    for key, row in rows.items():
        for sign, limit in re.findall(r"([<>]=?) (-?[\d.]+)", row["type"]):
            if key.startswith("training."):
                beyond = float(limit) + (1 if "<" in sign else -1)
                with pytest.raises(ValueError, match=key.partition(".")[2]):
                    check_training_keys({key.partition(".")[2]: int(beyond)})
                num_found += 1
    assert num_found > 30
    assert rows["student.mole.lora_alpha"]["type"] == "number > 0, <= 1000000 or null"
    assert rows["student.image_mean"]["type"] == "3 numbers or null"


def test_the_committed_page_is_that_of_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == config_page(), "run `make keys`"


def test_what_a_stage_sets_is_what_a_run_of_it_gets(rows: dict[str, dict[str, str]]) -> None:
    shown = {key for key, row in rows.items() if row.get("finetune")}
    assert shown == set(stage_values())
    assert shown >= {"trained", "student.prompt", "data.group_by_modality_length"}
    for number, stage in enumerate(TRAINED):
        overrides = [f"stage={stage}", "recipe=revised"] + ["data.conversations=[]"] * (
            stage == "distill"
        )
        content = load_config(RUN, overrides).model_dump(mode="json")
        for key in shown:
            cell = stage_values()[key][number].strip("`")
            value = value_at(content, key)
            assert cell == (value if isinstance(value, str) else json.dumps(value)), (stage, key)


def value_at(content: Any, key: str) -> Any:
    """Return the value of a dotted key."""
    for part in key.split("."):
        content = content[part]
    return content


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_values_of_the_recipes_are_those_that_a_run_gets(
    rows: dict[str, dict[str, str]], recipe: str
) -> None:
    shown = {key: row[recipe].strip("`") for key, row in rows.items() if row.get(recipe)}
    assert {key.rpartition(".")[2] for key in shown} == {
        *RECIPES[recipe]["distill"],
        *mole_defaults(recipe, r=32),
    }
    content = load_config(RUN, [f"recipe={recipe}"]).model_dump(mode="json")
    for key, cell in shown.items():
        value = value_at(content, key)
        if cell.endswith(" r"):
            assert value == int(cell.removesuffix(" r")) * content["student"]["mole"]["r"]
        else:
            assert cell == (value if isinstance(value, str) else json.dumps(value)), key


def test_the_cli_page_has_every_command_with_its_options() -> None:
    parts = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", cli_page(), re.DOTALL | re.M))
    groups = {"movekd": app} | {f"movekd {g.name}": g.typer_instance for g in app.registered_groups}
    made = [(path, command) for path in groups for command in groups[path].registered_commands]
    names = {f"{path} {c.name or c.callback.__name__}" for path, c in made}
    assert set(parts) == set(groups) | names
    for path, command in commands():
        for parameter in command.params:
            for option in () if parameter.hidden else parameter.opts:
                shown = option if option.startswith("-") else parameter.metavar or option
                assert re.search(rf"[` ]{re.escape(shown)}[` ,]", parts[path]), (path, option)


def test_defaults_and_examples_are_on_the_cli_page() -> None:
    page = cli_page()
    assert "| `--batch-size <str>` | `32` | Images per forward pass, or auto" in page
    assert "| `--config <path>` | needed |" in page
    assert "| `--output <path>` | `data/` |" in page
    assert "```sh\nmovekd cache ls --cache cache/\n```" in page
    assert "[default" not in page
    assert "[required" not in page


def test_every_room_has_its_page() -> None:
    found = {module.name for module in pkgutil.iter_modules(movekd.__path__) if module.ispkg}
    assert set(ROOMS) == found - INSIDE


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_says_what_it_is(room: str) -> None:
    module = import_module(f"movekd.{room}")
    assert module.__doc__
    for name in module.__all__:
        thing = getattr(module, name)
        assert thing.__doc__, name
        assert not str(thing.__doc__).startswith(f"{name}("), f"{name}: made by dataclass"


def test_the_site_has_a_place_for_every_generated_page() -> None:
    _, _, nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")
    committed = {f"reference/{PAGE.name}"}
    assert set(re.findall(r"reference/\w+\.md", nav)) == set(pages()) | committed
