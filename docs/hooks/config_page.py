"""Write reference/config.md: every key of student.yaml and of a teacher's YAML file.

Input: the pydantic models that check these files (fields, defaults, descriptions), and ``RECIPES``,
which holds the values that differ between the two recipes.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cli_page import escaped
from movekd.cache.spec import CacheSpec
from movekd.train.config import RECIPES, TrainConfig

_HEAD = """# Keys of the YAML files

movekd refuses an unknown key and names the nearest right one. *Needed* keys have no default.

## student.yaml

The config of one training: `movekd train --config student.yaml`. `--set distill.kd_weight=1`
overrides a key, and `--dry-run` prints all resolved keys. [Training](../training.md) explains them.
If the recipes differ, the table shows both values; the default, null, takes the value of `recipe`.
"""

_TEACHER = """## A teacher's YAML file

The file of `--teacher mine.yaml`, like those in cache_specs/; [teachers](../teachers.md) explains
one step by step.
"""

_PLACES = {"mole": "student.mole", "distill": "distill"}
"""Section of ``RECIPES`` -> path of its keys in student.yaml."""

_WORDS = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "`true`, `false`",
    "null": "null",
    "object": "mapping",
}
"""Type of JSON Schema -> its name in YAML."""

_LIMITS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
}


def config_page() -> str:
    """Return the page as Markdown."""
    recipes = recipe_values()
    training = [_section(path, model, recipes) for path, model in sections(TrainConfig)]
    return "\n".join([_HEAD, *training, _TEACHER, _section("", CacheSpec, {})])


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield a model with its key, then the models inside it."""
    yield path, model
    for name, field in model.model_fields.items():
        if (inner := _inner(field)) is not None:
            yield from sections(inner, _join(path, name))


def recipe_values() -> dict[str, list[str]]:
    """Return key -> its values in the recipes, in the order of ``RECIPES``."""
    values: dict[str, list[str]] = {}
    for recipe in RECIPES.values():
        for section, defaults in recipe.items():
            for name, value in defaults.items():
                shown = "`r`" if value is None else _code(value)  # lora_alpha, see RECIPES
                values.setdefault(_join(_PLACES[section], name), []).append(shown)
    return values


def _section(path: str, model: type[BaseModel], recipes: Mapping[str, list[str]]) -> str:
    """Return the heading, the docstring and the table of keys of one model."""
    properties = model.model_json_schema()["properties"]
    has_recipes = any(_join(path, name) in recipes for name in model.model_fields)
    head = ["key", "type", "default", *(RECIPES if has_recipes else ()), "what"]
    rows = [head, ["---"] * len(head)]
    for name, field in model.model_fields.items():
        key, inner = _join(path, name), _inner(field)
        values = recipes.get(key, ["", ""]) if has_recipes else []
        kind = _kind(properties[name])
        what = field.description or (inner.__doc__ if inner else "") or ""
        rows.append([f"`{key}`", kind, _default(field), *values, escaped(what)])
    heading = f"### {path}\n\n{escaped(model.__doc__ or '')}\n\n" if path else ""
    return heading + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _kind(schema: Mapping[str, Any]) -> str:
    """Return the type of a key in words, from its JSON Schema."""
    if "$ref" in schema:
        return "section"
    if "anyOf" in schema:
        return " or ".join(_kind(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(_code(value) for value in schema["enum"])
    if "const" in schema:
        return _code(schema["const"])
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} numbers"
    if "items" in schema:
        return f"list of {_kind(schema['items'])}"
    if schema.get("format") == "path":
        return "path"
    limits = [f"{sign} {schema[name]:g}" for name, sign in _LIMITS.items() if name in schema]
    return " ".join([_WORDS[schema["type"]], ", ".join(limits)]).strip()


def _default(field: FieldInfo) -> str:
    """Return the default in YAML's form."""
    if field.is_required():
        return "*needed*"
    if _inner(field) is not None and field.default is not None:
        return "its defaults"
    return _code(field.get_default(call_default_factory=True))


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a key that is a section, else None."""
    kinds = (field.annotation, *get_args(field.annotation))
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return models[0] if models else None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _code(value: Any) -> str:
    """Return a value as YAML, in backticks."""
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"
