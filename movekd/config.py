"""Read YAML files into frozen pydantic models, with a clear error for each wrong key."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from movekd.errors import ConfigError, did_you_mean, shorten
from movekd.files.reading import MIB, parse_yaml, read_text


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


def validate(model: type[ModelT], content: dict[str, Any], source: str) -> ModelT:
    """Return ``content`` as a ``model``.

    Raises:
        ConfigError: one line for each wrong key, with the key's path and the nearest right one.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(_problem(model, detail) for detail in error.errors())
        raise ConfigError(f"{source}: {problems}") from None


def _problem(model: type[BaseModel], detail: Any) -> str:
    """Return one pydantic error as `path: what was found, what to do`."""
    where = [str(part) for part in detail["loc"]]
    path = ".".join(where)
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{path}'.{did_you_mean(where[-1], _keys_at(model, where[:-1]))}"
    if detail["type"] == "missing":
        return f"key '{path}' is missing"
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"{path}: {message} (found {shorten(repr(detail['input']))})" if path else message


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
