"""Laws of the house: imports point one way, and shards need no torch."""

import ast
import subprocess
import sys

import pytest

from support.processes import ROOT

# A room may import itself and what stands right of it; rooms in one pair of braces do not import each other.
LAW = "launch -> {training, export} -> report -> evaluation -> {model, run, data} -> {config, distributed} -> shards"
FLOORS = [floor.strip(" {}").split(", ") for floor in LAW.split("->")]
ROOMS = {room: number for number, floor in enumerate(FLOORS) for room in floor}
FILES = [
    path
    for package in ("shards", "harness", "launch")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.relative_to(ROOT).parts != ("harness", "__init__.py")
]


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module, given as ("harness", "run", "lock") or ("shards", "plan")."""
    return parts[1] if parts[0] == "harness" else parts[0]


def imported(path) -> set[tuple[str, ...]]:
    """Modules of ours that a file imports, anywhere in it, as ("shards", "plan")."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {tuple(name.split(".")) for name in names if name.split(".")[0] in ("shards", "harness", "launch")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.relative_to(ROOT).parts))
def test_imports_point_one_way(path):
    own = room_of(path.relative_to(ROOT).with_suffix("").parts)
    for name in imported(path):
        other = room_of(name)
        assert other == own or ROOMS[other] > ROOMS[own], f"{path} imports {'.'.join(name)}: {LAW}"


def test_inside_a_room_there_is_no_circle():
    modules = {path.relative_to(ROOT).with_suffix("").parts: imported(path) for path in FILES}
    arrows = {
        name: {other for other in modules if any(found[: len(other)] == other for found in targets)} - {name}
        for name, targets in modules.items()
    }
    while arrows:  # take away what imports nothing that is left
        free = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        assert free, f"a circle among {sorted('.'.join(name) for name in arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


def test_shards_do_not_import_torch_at_start():
    code = "import shards.cli, shards.pack, shards.sources, shards.reader, shards.plan, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("module", "slow"),
    [("shards.cli", {"numpy", "pandas", "PIL", "torch"}), ("shards.split", {"pandas", "PIL", "torch"})],
)
def test_the_command_line_of_shards_and_its_help_start_without_slow_imports(module, slow):
    code = f"import {module}, sys; print(sorted({slow} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"
