"""The modules of movekd.student import each other in one direction, also inside functions."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import movekd.student

ROOT = Path(str(movekd.student.__file__)).parent


def imports():
    """Return module -> modules of the room that it imports, anywhere in its code."""
    files = {file.relative_to(ROOT.parents[1]).with_suffix(""): file for file in ROOT.rglob("*.py")}
    names = {".".join(path.parts).removesuffix(".__init__"): file for path, file in files.items()}
    graph = {}
    for name, file in names.items():
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        found = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        found |= {str(node.module) for node in froms}
        graph[name] = (found & names.keys()) - {name, "movekd.student"}
    return graph


def test_no_module_imports_itself_by_way_of_others():
    order = list(TopologicalSorter(imports()).static_order())  # raises CycleError with the circle
    assert len(order) > 20


def test_the_export_and_the_official_format_are_no_circle():
    graph = imports()
    into_export = {
        n for n in graph if ".official" in n and any(".student.export" in m for m in graph[n])
    }
    assert into_export == set()
