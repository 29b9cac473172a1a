"""Whatever a YAML file of a teacher says: a sentence, or a teacher that runs. Never a traceback."""

import copy

import pytest
import torch
import yaml

from movekd.analysis.plan import output_shape
from movekd.cache.spec import load_spec, shipped_specs
from movekd.errors import MovekdError
from movekd.teachers import load_teacher

VALUES = {
    "negative": -1,
    "zero": 0,
    "huge": 10**40,
    "large": 2**31,
    "fraction": 0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "empty": "",
    "text": "abc",
    "nul": "a\0b",
    "long": "x" * 100_000,
    "nothing": None,
    "true": True,
    "list": [],
    "mapping": {"a": {"b": {"c": {"d": {"e": 1}}}}},
}


def places(value, path=()):
    """Yield the path of every scalar."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))
    else:
        yield path


def changed(content, path, value):
    content = copy.deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return content


def check(path, content) -> str:
    """Return the error of a spec, or an empty string if its teacher runs."""
    path.write_text(yaml.safe_dump(content))
    try:
        spec = load_spec(str(path))
        output_shape(spec)
        teacher = load_teacher(spec)
        output = teacher.forward(torch.zeros(1, 3, spec.image_size, spec.image_size))
    except MovekdError as error:
        return str(error)
    assert output.tokens_BND.shape[0] == 1
    return ""


def problems(tmp_path, shrunken, name, kinds):
    """Return what is wrong with the errors of each changed scalar of a shipped spec."""
    content = shrunken(name).model_dump(mode="json")
    assert check(tmp_path / "mine.yaml", content) == ""
    wrong = []
    for path in places(content):
        for kind in kinds:
            hostile = changed(content, path, VALUES[kind])
            if hostile["weights"] not in ("random", None) and path[-1] != "weights":
                continue
            try:
                said = check(tmp_path / "mine.yaml", hostile)
            except Exception as error:
                wrong.append((path, kind, f"{type(error).__name__}: {str(error)[:300]}"))
                continue
            if len(said) >= 2_000 or "\n" in said:
                wrong.append((path, kind, said[:300]))
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", list(shipped_specs()))
def test_every_scalar_of_a_spec_may_be_anything(tmp_path, shrunken, name) -> None:
    assert problems(tmp_path, shrunken, name, list(VALUES)) == []


@pytest.mark.parametrize(("name", "kinds"), [("clip", ["zero", "huge"]), ("eva02", ["nan", "nul"])])
def test_some_scalars_of_a_spec_may_be_anything(tmp_path, shrunken, name, kinds) -> None:
    assert problems(tmp_path, shrunken, name, kinds) == []
