"""reference/config.md: every key of student.yaml and of a teacher's YAML file.

Made from the pydantic models that check these files: their fields, defaults and descriptions are
what the page says. ``RECIPES`` gives the values in which the two recipes differ.
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

A key that is not listed is refused, with the nearest right one. *Needed* keys have no default.

## student.yaml

One training: `movekd train --config student.yaml`, in which `--set distill.kd_weight=1` overrides a
key. `--dry-run` prints all of them resolved; [training](../training.md) says what they do. Where
the recipes differ, their values stand beside each other, and the key's own default, null, takes
that of `recipe`.
"""

_TEACHER = """## A teacher's YAML file

What `--teacher mine.yaml` names, like those in cache_specs/; [teachers](../teachers.md) goes
through one step by step.
"""

_PLACES = {"mole": "student.mole", "distill": "distill"}
"""Section of ``RECIPES`` -> where its keys are in student.yaml."""

_WORDS = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "`true`, `false`",
    "null": "null",
    "object": "mapping",
}
"""Type of JSON Schema -> what a reader of YAML calls it."""

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
    """Yield the key that a model is under, and it; the same of the models inside it."""
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
    """Return the keys of one model as a table below its heading and its docstring."""
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
    """Return the default as one writes it in YAML."""
    if field.is_required():
        return "*needed*"
    if _inner(field) is not None and field.default is not None:
        return "its defaults"
    return _code(field.get_default(call_default_factory=True))


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model that a key holds, where it is a section."""
    kinds = (field.annotation, *get_args(field.annotation))
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return models[0] if models else None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _code(value: Any) -> str:
    """Return a value as YAML, in backticks."""
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"
