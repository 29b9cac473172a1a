"""Notice when a library changes under what movekd overrides; docs/library-overrides.md says why."""

import ast
import hashlib
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import mapping
from transformers import Trainer, dynamic_module_utils

import movekd.student
import movekd.train

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "library-overrides.md"
LIBRARIES = ("transformers", "peft", "accelerate", "torch", "zarr", "safetensors")


@dataclass(frozen=True)
class Row:
    """One line of the table; ``file`` is below movekd/, ``test`` below the repository's root."""

    library: str
    name: str
    version: str
    digest: str
    file: str
    why: str
    test: str


def read_table() -> dict[str, Row]:
    """Return the lines of the table, by name."""
    lines = PAGE.read_text(encoding="utf-8").replace("\\_", "_").splitlines()
    cells = (re.split(r"\s*\|\s*", line)[1:-1] for line in lines)
    return {row[1].strip("`"): Row(*row) for row in cells if len(row) == 7 and "`" in row[1]}


TABLE = read_table()


def resolve(name: str) -> Any:
    """Return what a dotted name means."""
    parts = name.split(".")
    module: Any = importlib.import_module(parts[0])
    for at, part in enumerate(parts[1:], 2):
        try:
            module = getattr(module, part)
        except AttributeError:  # a submodule that nothing imported yet
            module = importlib.import_module(".".join(parts[:at]))
    return module


@pytest.mark.parametrize("name", [row for row in TABLE if TABLE[row].digest != "none"])
def test_the_source_is_the_one_that_was_read(name: str) -> None:
    row = TABLE[name]
    source = inspect.getsource(inspect.unwrap(resolve(name)))
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    assert digest == row.digest, (
        f"{name} is not as in {row.library} {row.version}. Read it in "
        f"{importlib.metadata.version(row.library)}, mend movekd/{row.file} if needed, run "
        f"{row.test}, then write the new version and the digest {digest} into {PAGE.name}."
    )


def test_what_has_no_source_is_still_there() -> None:
    for name in (name for name, row in TABLE.items() if row.digest == "none"):
        resolve(name)
    assert torch._C._current_graph_task_id() == -1
    assert hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit")
    for table in ("CONFIG", "TUNER", "PREFIX"):
        assert "LORA" in getattr(mapping, f"PEFT_TYPE_TO_{table}_MAPPING")
    assert Trainer.loss_is_scaled_for_ga is None
    assert dynamic_module_utils.TIME_OUT_REMOTE_CODE > 0


def test_the_table_names_files_that_exist() -> None:
    assert len(TABLE) > 20
    for name, row in TABLE.items():
        assert name.split(".")[0] == row.library
        assert (ROOT / "movekd" / row.file).is_file(), row.file
        assert (ROOT / row.test).is_file(), row.test


def overridden(cls: type) -> set[str]:
    """Return the methods of a library that a class of movekd overrides, by their dotted names."""
    names = set()
    for name, value in vars(cls).items():
        is_special = name.startswith("__") or not callable(getattr(value, "__func__", value))
        theirs = (base for base in cls.__mro__[1:] if name in vars(base))
        base = None if is_special else next(theirs, None)
        if base is not None and base.__module__.split(".")[0] in LIBRARIES:
            names.add(f"{base.__module__}.{base.__qualname__}.{name}")
    return names


def test_every_override_is_on_the_page() -> None:
    classes: set[type] = set()
    for package in (movekd.student, movekd.train):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            module = importlib.import_module(found.name)
            classes |= {c for _, c in inspect.getmembers(module, inspect.isclass)}
    names: set[str] = set()
    for cls in (c for c in classes if c.__module__.startswith("movekd.")):
        is_trainer = any(base.__name__ == "Trainer" for base in cls.__mro__)
        found_names = overridden(cls)
        names |= {n for n in found_names if is_trainer or n.rsplit(".", 1)[1].startswith("_")}
    assert "transformers.trainer.Trainer._run_epoch" in names
    assert "peft.tuners.tuners_utils.BaseTuner._replace_module" in names
    assert names <= TABLE.keys(), f"put {sorted(names - TABLE.keys())} on {PAGE.name}"


def test_every_private_attribute_of_a_library_is_on_the_page() -> None:
    files = sorted((ROOT / "movekd").rglob("*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = {
        n.name
        for n in nodes
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    ours |= {
        n.target.id
        for n in nodes
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    private = [n for n in nodes if isinstance(n, ast.Attribute) and re.match(r"_[^_]", n.attr)]
    set_here = {n.attr for n in private if isinstance(n.ctx, ast.Store)}
    known = {part for name in TABLE for part in name.split(".")} | {
        "_asdict",
        "_exit",
    }  # public: NamedTuple, os
    unknown = {n.attr for n in private} - ours - set_here - known
    assert not unknown, f"put {sorted(unknown)} on {PAGE.name}"
