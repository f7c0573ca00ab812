"""What the documents say of the code, where no block of theirs runs it."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

import fxrep
from fxrep.cli import make_parser
from fxrep.errors import CODES

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_the_table_of_ops_is_that_of_the_readers(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    table = importlib.import_module("ops_table").document()
    written = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    assert written == f"{table}\n", "python docs/ops_table.py > docs/ops.md"


def test_every_refusal_code_has_its_row():
    rows = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(CODES)


def test_every_public_name_is_in_the_reference():
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {name for name in fxrep.__all__ if not name.startswith("_")}
    assert named <= {path.rpartition(".")[2] for path in shown}
    for path in shown:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__


def test_every_document_is_in_the_navigation():
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == [path.name for path in DOCS]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_short_and_its_output_is_in_the_documents(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    if '__name__ == "__main__"' not in text:
        return  # what the scripts share
    assert f'run("{path.name}")' in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")


def test_every_command_in_the_documents_is_one():
    """What is between the shell's words need not exist here; names of commands, options and choices must."""
    said = [*ROOT.glob("*.md"), *DOCS]
    fences = (
        block
        for path in said
        for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    )
    lines = [line for block in fences for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fxrep ")]
    assert len(commands) >= 6
    for command in commands:
        make_parser().parse_args(command)
