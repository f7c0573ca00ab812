"""Imports run up one list: a file may import only from those listed before it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fxrep"

ORDER = (
    "errors",
    "frozen",
    "trees",
    "kernel",
    "evaluation",
    "equal",
    "affine",
    "composition",
    "parts",
    "form",
    "shapes",
    "rows",
    "snapshot",
    "refolding",
    "readers",
    "copying",
    "wrappers",
    "proxies",
    "kinds",
    "asking",
    "recorder",
    "tracer",
    "metadata",
    "trace",
    "mutation",
    "cost",
    "stopwatch",
    "calibration",
    "lower",
    "pricing",
    "plan",
    "state",
    "siblings",
    "candidates",
    "search",
    "census",
    "sketch",
    "fold",
    "trials",
    "double",
    "maps",
    "certify",
    "ownership",
    "sharing",
    "naming",
    "rewrite",
    "verification",
    "equalization",
    "page",
    "report",
    "drawing",
    "pipeline",
    "islands",
    "exported",
    "dynamo",
    "api",
    "conversion",
    "bench",
    "training",
    "testing",
    "__init__",
    "zoo",
    "cli",
    "__main__",
)
WITHOUT_FX = ("kernel", "evaluation", "equal", "affine", "composition", "parts", "form", "shapes", "cost", "report")
CLI_MAY_IMPORT = {"bench", "calibration", "cost", "errors", "report", "api", "zoo", "__init__"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The entry of ORDER that a file belongs to: its own name, or its sub-package's."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def absolute(node: ast.ImportFrom, path: Path) -> str:
    """The module that `from … import` names, with the dots of a relative import resolved."""
    if not node.level:
        return node.module or ""
    package = ["fxrep", *path.relative_to(PACKAGE).parent.parts]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *filter(None, [node.module])])


def imported(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, anywhere in it: `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, path)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    """`import fxrep`, or a name of it that is no file, is an import of fxrep/__init__.py."""
    known = {room(file) for file in FILES}
    names = [name.split(".") for name in imported(path)]
    inside = [parts[1] if len(parts) > 1 else "__init__" for parts in names if parts[0] == "fxrep"]
    return {name if name in known else "__init__" for name in inside}


def test_every_file_has_its_place():
    unplaced = {room(path) for path in FILES} - set(ORDER)
    assert not unplaced, f"place these in ORDER: {sorted(unplaced)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_up_the_list(path: Path):
    own = room(path)
    later = {other for other in rooms_imported(path) - {own} if ORDER.index(other) > ORDER.index(own)}
    assert not later, f"{own} stands before {sorted(later)}"


def test_cli_uses_only_the_public_door():
    for path in (PACKAGE / "cli").glob("*.py"):
        assert rooms_imported(path) - {"cli"} <= CLI_MAY_IMPORT


@pytest.mark.parametrize("name", WITHOUT_FX)
def test_core_knows_no_fx(name: str):
    path = PACKAGE / f"{name}.py"
    attributes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)]
    used = {*imported(path), *map(ast.unparse, attributes)}
    assert not [dotted for dotted in used if f"{dotted}.".startswith("torch.fx.")]


@pytest.mark.parametrize("module", ["fxrep", "fxrep.errors", "fxrep.report", "fxrep.cli"])
def test_importing_is_light(module: str):
    """In a process of its own: whatever it pulls in, torch is not among it."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from . import x", "fxrep.readers"),
        ("from .linear import x", "fxrep.readers.linear"),
        ("from ..affine import x", "fxrep.affine"),
        ("from .. import affine", "fxrep"),
        ("from fxrep.form import x", "fxrep.form"),
    ],
)
def test_relative_imports_are_resolved(source: str, module: str):
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.ImportFrom)
    assert absolute(node, PACKAGE / "readers" / "conv.py") == module
