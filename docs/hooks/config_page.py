"""Write docs/reference/config.md: every key of student.yaml and of a teacher's YAML file.

Input: the pydantic models that check these files (fields, ranges, defaults, descriptions),
``RECIPES`` for the values that differ between the two recipes, and the config of each stage, filled
in. `make keys` runs this module; a test compares the page with it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from cli_page import escaped
from movekd.cache.spec import CacheSpec
from movekd.train.config import TrainConfig
from movekd.train.recipes import LORA_SCALE, PLACES, RECIPES
from movekd.train.trained_keys import TRAINED
from movekd.train.training_args import _DEFAULTS
from movekd.train.training_keys import TrainingKeys

PAGE = Path(__file__).parents[1] / "reference" / "config.md"

_HEAD = """<!-- Written by `make keys` from the code: change the descriptions there. -->
# Keys of the YAML files

movekd refuses an unknown key and names the nearest right one. *Needed* keys have no default.

## student.yaml

The config of one training: `movekd train --config student.yaml`. `--set distill.kd_weight=1`
overrides a key, and `--dry-run` prints all resolved keys. [Training](../training.md) explains them.
A default of null takes the value of `recipe`, or of `stage`, where the table has columns for them.
"""

_TRAINING = """### training

Arguments of `transformers.TrainingArguments`, by their own names. movekd checks type and range of
these before anything is loaded. The others, and those of type any, are for transformers to judge.
"""

_TEACHER = """## A teacher's YAML file

The file of `--teacher mine.yaml`, like those in cache_specs/; [teachers](../teachers.md) explains
one step by step.
"""

_MINIMAL = {
    "student": {"vision_tower": "clip"},
    "distill": {"teachers": ["clip"]},
    "data": {"shards": "data"},
}
"""The needed keys, for a look at what a stage fills in."""

_WORDS = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "`true`, `false`",
    "null": "null",
    "object": "mapping",
}
"""Type of JSON Schema -> its name in YAML."""

_COLUMNS: tuple[list[str], list[str]] = ([*RECIPES], [*TRAINED])
"""Heads of the columns for recipes and for stages."""

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
"""Name of a limit in pydantic -> its sign."""


def config_page() -> str:
    """Return the page as Markdown."""
    columns = [recipe_values(), stage_values()]
    keys = [_section(path, model, columns) for path, model in sections(TrainConfig)]
    parts = [_HEAD, *keys, _TRAINING + "\n" + _training_table(), _TEACHER]
    return "\n".join([*parts, _section("", CacheSpec, [])])


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield a model with its key, then the models inside it."""
    yield path, model
    for name, field in model.model_fields.items():
        if (inner := _inner(field)) is not None:
            yield from sections(inner, _join(path, name))


def recipe_values() -> dict[str, list[str]]:
    """Return key -> its values in the recipes, in the order of ``RECIPES``."""
    values: dict[str, list[str]] = {}
    for recipe, parts in RECIPES.items():
        scale = LORA_SCALE.get(recipe)
        by_rank = {} if scale is None else {"lora_alpha": f"{scale} r"}
        for section, defaults in (parts | {"mole": by_rank | parts["mole"]}).items():
            for name, value in defaults.items():
                values.setdefault(".".join((*PLACES[section], name)), []).append(_code(value))
    return values


def stage_values() -> dict[str, list[str]]:
    """Return key -> its values in the stages, in the order of ``TRAINED``, where they differ."""
    filled = [
        TrainConfig.model_validate({"recipe": "revised", "stage": stage} | _MINIMAL).resolved()
        for stage in TRAINED
    ]
    values: dict[str, list[str]] = {}
    for config in filled:
        for key, value in _flat(config.model_dump(mode="json", exclude={"stage"})):
            values.setdefault(key, []).append(_code(value))
    return {key: cells for key, cells in values.items() if len(set(cells)) > 1}


def _flat(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key that is no section, with its path and value."""
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, _join(path, name))
        else:
            yield _join(path, name), value


def _section(path: str, model: type[BaseModel], columns: list[dict[str, list[str]]]) -> str:
    """Return the heading, the docstring and the table of keys of one model.

    Args:
        path: of the model's key; empty for the whole file.
        model: of the keys.
        columns: for recipes and for stages, key -> its values there.
    """
    properties = model.model_json_schema()["properties"]
    keys = [_join(path, name) for name in model.model_fields]
    shown: list[tuple[list[str], dict[str, list[str]]]] = [
        (names, values)
        for names, values in zip(_COLUMNS, columns, strict=False)
        if any(key in values for key in keys)
    ]
    head = ["key", "type", "default", *(name for names, _ in shown for name in names), "what"]
    rows = []
    for key, (name, field) in zip(keys, model.model_fields.items(), strict=True):
        inner = _inner(field)
        more = [cell for names, v in shown for cell in v.get(key, [""] * len(names))]
        what = field.description or (inner.__doc__ if inner else "") or ""
        kind = _with_limits(_kind(properties[name]), field.annotation, field.metadata)
        rows.append([f"`{key}`", kind, _default(field), *more, escaped(what)])
    heading = f"### {path}\n\n{escaped(model.__doc__ or '')}\n\n" if path else ""
    return heading + _table(head, rows)


def _training_table() -> str:
    """Return the table of the keys of `training:` whose ranges movekd checks."""
    properties = TypeAdapter(TrainingKeys).json_schema()["properties"]
    names = [*properties, *(name for name in _DEFAULTS if name not in properties)]
    hints = get_type_hints(TrainingKeys, include_extras=True)
    rows = [
        [
            f"`training.{name}`",
            _with_limits(_kind(properties.get(name, {})), hints.get(name)),
            _code(_DEFAULTS[name]) if name in _DEFAULTS else "transformers'",
        ]
        for name in names
    ]
    return _table(["key of training", "type", "default"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def _kind(schema: Mapping[str, Any]) -> str:
    """Return the type of a key in words, from its JSON Schema."""
    if "$ref" in schema:
        return "section"
    if not schema.keys() & {"anyOf", "enum", "const", "prefixItems", "items", "type"}:
        return "any"
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
    return _WORDS[schema["type"]]


def _with_limits(kind: str, annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return the type in words with the range of its number; JSON Schema lacks most ranges."""
    found = dict(_limits(annotation, metadata))
    limits = [f"{sign} {found[name]:.10g}" for name, sign in _SIGNS.items() if name in found]
    return re.sub(
        r"\b(?:integer|number)\b",
        lambda word: " ".join([word[0], ", ".join(limits)]).strip(),
        kind,
        count=1,
    )


def _limits(annotation: Any, metadata: Sequence[Any]) -> Iterator[tuple[str, float]]:
    """Yield the limits in an annotation, name -> number, the inner ones first."""
    for inner in get_args(annotation):
        yield from _limits(inner, ())
    for item in (*getattr(annotation, "__metadata__", ()), *metadata):
        for limit in item.metadata if isinstance(item, FieldInfo) else [item]:
            yield from ((n, getattr(limit, n)) for n in _SIGNS if hasattr(limit, n))


def _default(field: FieldInfo) -> str:
    """Return the default in YAML's form."""
    if field.is_required():
        return "*needed*"
    if (
        _inner(field) is not None
        and field.default is not None
        and field.default_factory is not list
    ):
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


if __name__ == "__main__":
    PAGE.write_text(config_page(), encoding="utf-8")
