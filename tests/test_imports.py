"""Which module may import which: arrows run down, and nowhere in a circle, wherever in a file an import stands."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"varcompress": ROOT / "varcompress"} | {
    f"varcompress.{name}": ROOT / name for name in ("cli", "kernels", "recipes")
}
# From the bottom to the top. A module imports from layers below its own, and from its own without a circle.
LAYERS = (
    {"errors", "progress"},
    {"kernels"},
    {"schedule", "sampling", "hardware", "files", "fingerprint", "images", "metrics", "distributed"},
    {"models"},
    {"cost"},
    {"memory", "results"},
    {"checkpoint", "report", "hub", "drawing", "data"},
    {"loading", "profiling", "evaluation"},
    {"publish"},
    {"training"},
    {"reporting"},
    {"demo", "tokenizing", "depth"},
    {"recipes"},
    {"cli"},
)
ALONE = ("varcompress.schedule", "varcompress.sampling")  # import errors of ours and nothing else


def modules() -> dict[str, Path]:
    """Name of every module of the package -> its file; a package's __init__ has the package's name."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    # the root only says where names are found, and every import of ours passes it
    return {name: file for name, file in found.items() if name not in ("varcompress", "varcompress.__main__")}


def imports(file: Path, known: set[str]) -> set[str]:
    """The modules of ours that a file names in an import: at its top, in a function, or for a type checker."""
    named = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: write imports in full"
            named |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return named & known


MODULES = modules()
GRAPH = {name: imports(file, set(MODULES)) for name, file in MODULES.items()}


def layer(module: str) -> int:
    room = module.split(".")[1]
    (number,) = (number for number, rooms in enumerate(LAYERS) if room in rooms)
    return number


def test_every_room_has_a_layer():
    assert {module.split(".")[1] for module in MODULES} == set().union(*LAYERS)


def test_there_is_no_circle():
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names it


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_run_down(module):
    against = {other for other in GRAPH[module] if layer(other) > layer(module)}
    assert not against


@pytest.mark.parametrize("module", [*ALONE, *(name for name in sorted(MODULES) if ".kernels" in name)])
def test_the_bottom_stands_alone(module):
    own = module.rpartition(".")[0] if ".kernels." in module else module
    assert {other for other in GRAPH[module] if not other.startswith(own)} <= {"varcompress.errors"}
