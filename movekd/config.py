"""Read YAML files into frozen pydantic models, with a clear error for each wrong key.

Ranges of values live in the models. ``Integer``, ``Number``, ``Text`` and ``FilePath`` are the
types of their scalars: they refuse what pydantic's accept, such as ``true`` for 1, NaN, or a NUL.
"""

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from movekd.errors import ConfigError, did_you_mean, shorten
from movekd.files.reading import MIB, parse_yaml, read_text

_MAX_PROBLEMS = 6
"""Wrong keys that one error names; it counts the others."""


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


def _passable(value: Any) -> Any:
    """Refuse text that no system call takes."""
    if isinstance(value, str | Path) and not 0 < len(str(value)) <= 4096:
        raise ValueError("expected 1 to 4,096 characters")
    if isinstance(value, str | Path) and "\0" in str(value):
        raise ValueError("expected text without NUL characters")
    return value


Integer = Annotated[int, BeforeValidator(_no_boolean)]
"""A whole number; ``true`` is none."""
Number = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
"""A finite number; ``true`` is none."""
Text = Annotated[str, BeforeValidator(_passable)]
"""A text without NUL, such as a name or a hub id."""
FilePath = Annotated[Path, BeforeValidator(_passable)]
"""A path that the system calls take, whether or not it exists."""


class FrozenModel(BaseModel):
    """Base of every config class: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


ModelT = TypeVar("ModelT", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML or is not a mapping.
    """
    content = parse_yaml(read_text(path, max_bytes=4 * MIB), str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}; expected `key: value` lines.")
    return content


def validate(model: type[ModelT], content: Any, source: str) -> ModelT:
    """Return ``content`` as a ``model``.

    Raises:
        ConfigError: names the wrong keys, each with its path and the nearest right key.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{source}: {problems(model, error)}") from None


def problems(model: type[BaseModel], error: ValidationError) -> str:
    """Return the first errors of a validation as one line, and the number of the others."""
    details = error.errors(include_url=False)
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")  # they explain the others
    found = "; ".join(_problem(model, detail) for detail in details[:_MAX_PROBLEMS])
    num_others = len(details) - _MAX_PROBLEMS
    return found if num_others <= 0 else f"{found}; and {num_others:,} more wrong keys"


def _problem(model: type[BaseModel], detail: Any) -> str:
    """Return one pydantic error as `path: what was found, what to do`."""
    where = [str(part) for part in detail["loc"]]
    if detail["type"] == "extra_forbidden":
        near = did_you_mean(where[-1], _keys_at(model, where[:-1]))
        return f"unknown key '{shorten('.'.join(where), 120)}'.{near}"
    # of a union, pydantic names the choice too, such as `list[function-after[...]]`
    path = shorten(".".join(part for part in where if not part.endswith("]")), 120)
    if detail["type"] == "missing":
        return f"key '{path}' is missing"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "value_error" and isinstance(detail["input"], dict):
        return shorten(f"{path}: {message}".removeprefix(": "), 1000)  # it says which of its keys
    near = ""
    if detail["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        near = did_you_mean(str(detail["input"]), known)
    found = shorten(repr(detail["input"]), 120)
    return f"{path}: {shorten(message, 400)} (found {found}).{near}".removesuffix(".")


def _keys_at(model: type[BaseModel], where: list[str]) -> list[str]:
    """Return the keys that the sub-model at ``where`` knows."""
    for part in where:
        field = model.model_fields.get(part)
        if field is None:
            continue  # a list index or the tag of a union
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        models = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if models:
            model = models[0]
    return list(model.model_fields)
