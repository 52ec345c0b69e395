"""Nothing imports upward and nothing in a circle, modules that are named by a string included.

What depends on what is read with grimp; the floors are the contract in pyproject.toml, which `lint-imports` checks too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.resources import files
from pathlib import Path

import grimp
import pytest
from importlinter.api import read_configuration

ROOT = Path(str(files("spear_lightning")))
Graph = dict[str, set[str]]


def named_by_strings(modules: set[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a module and another one that a string in it names, whole or as the beginning of a dotted name."""
    for path in ROOT.rglob("*.py"):
        module = ".".join(("spear_lightning", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                parts = node.value.split(".")
                names = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
                found = next((name for name in names if name in modules), None)
                if found is not None and found != module:
                    yield module, found


@pytest.fixture(scope="module")
def graph() -> Graph:
    """The modules that each module imports, or names by a string."""
    read = grimp.build_graph("spear_lightning")
    imports = {module: set(read.find_modules_directly_imported_by(module)) for module in read.modules}
    for module, other in named_by_strings(set(imports)):
        imports[module].add(other)
    return imports


def floors() -> dict[str, int]:
    """The number of each package's floor, the top one 0."""
    contracts = read_configuration(str(ROOT.parent / "pyproject.toml"))["contracts_options"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return {str(layer): number for number, layer in enumerate(layers)}


def upward(graph: Graph) -> list[tuple[str, str]]:
    floor = floors()
    pairs = [(module, other) for module, others in graph.items() for other in others]
    within = [(m.split("."), o.split(".")) for m, o in pairs if m.count(".") and o.count(".")]
    return [(".".join(m), ".".join(o)) for m, o in within if m[1] != o[1] and floor[o[1]] <= floor[m[1]]]


def test_every_package_is_on_a_floor_and_no_module_lies_beside_them() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == floors().keys()
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_nothing_imports_upward(graph: Graph) -> None:
    assert upward(graph) == []


def test_nothing_imports_in_a_circle(graph: Graph) -> None:
    # A package's own __init__ gathers its modules for users; inside the package nothing imports from it.
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_an_upward_import_and_a_circle_would_be_seen(graph: Graph) -> None:
    wrong = {**graph, "spear_lightning.utils.atomic": {"spear_lightning.cli.main"}}
    assert upward(wrong) == [("spear_lightning.utils.atomic", "spear_lightning.cli.main")]
    with pytest.raises(CycleError):
        TopologicalSorter(wrong).prepare()


def test_modules_that_strings_name_are_counted(graph: Graph) -> None:
    assert "spear_lightning.cli.plan" in graph["spear_lightning.cli.main"], "a command, imported when it is called"
    assert "spear_lightning.policy" in graph["spear_lightning.policy.loading"], "where the embedded policy lies"
