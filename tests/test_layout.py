"""Laws of the house: imports point one way, and the file tree is the README's."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["shards", "harness", "launch"]  # each may import those before it
ORDER = {
    "shards": "catalogue split image index pack plan store audit sheet demo __main__",
    "harness": "limits config hardware watch world signals loader augment model optim metrics calibration progress checkpoint copies lock "
    "run_folder log checks pictures judge evaluate epoch train plots report board",
}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) if path.name != "__init__.py"]


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it, as `shards.plan`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_imports_only_what_stands_before_it(path):
    package = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        other, _, module = name.partition(".")
        assert PACKAGES.index(other) <= PACKAGES.index(package), f"{path} imports {name}"
        order = ORDER.get(package, "").split()
        module = module.split(".")[0]
        if other == package and module in order:
            assert order.index(module) < order.index(path.stem), f"{path} imports {name}, which stands after it"


def test_every_file_has_its_place_in_the_order():
    for package, order in ORDER.items():
        assert {path.stem for path in FILES if path.parent.name == package} <= set(order.split())


def test_shards_do_not_import_torch_at_start():
    code = "import shards.__main__, shards.store, shards.plan, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
