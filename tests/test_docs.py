"""What the documents say of the code, where no block of theirs runs it."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import metadata
from pathlib import Path
from types import ModuleType

import pytest

import fxrep
from fxrep.cli import make_parser
from fxrep.cli.models import load
from fxrep.errors import CODES

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAID = [*sorted(ROOT.glob("*.md")), *DOCS]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("run_blocks")


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


def test_every_command_in_the_documents_is_one(runner: ModuleType):
    """Of the blocks that cannot be run too: names of commands, options and choices must be right."""
    scripts = [block.code for path in SAID for block in runner.blocks(path.read_text(encoding="utf-8"), "bash")]
    lines = [line for script in scripts for line in script.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fxrep ")]
    assert len(commands) >= 6
    for command in commands:
        make_parser().parse_args(itertools.takewhile(lambda word: word != ">", command))


def rows(name: str, pattern: str) -> list[tuple[str, ...]]:
    """Rows of a document's table: the name of a network, its calls before and after."""
    return re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)


README = rows("README.md", r"^\| (\w+) `(\w+)` \| ([\d /]+) \| ([\d /]+) \|$")
BESIDE = rows("docs/comparison.md", r"^\| `(\w+):(\w+)` +\| ([\d /]+?) +\|.*\| ([\d /]+?) +\|$")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("zoo", "name", "before", "after", "layers"),
    [(*row, ("conv",)) for row in README] + [(*row, ("conv", "linear")) for row in BESIDE],
)
def test_calls_are_counted_as_the_tables_say(zoo: str, name: str, before: str, after: str, layers: tuple[str, ...]):
    report = fxrep.explain(load(f"{zoo}:{name}"))
    for counts, said in ((report.before, before), (report.after, after)):
        assert f"{sum(counts[kind] for kind in layers)} / {counts['bn']} / {counts['add']}" == said


def test_both_tables_of_calls_are_found():
    assert (len(README), len(BESIDE)) == (5, 12)


def test_every_extra_in_the_documents_is_one(runner: ModuleType):
    text = "".join(path.read_text(encoding="utf-8") for path in SAID)
    named = {extra for extras in re.findall(r'"(?:\.|fxrep)\[([\w,]+)\]"', text) for extra in extras.split(",")}
    assert {"vision", "export", "bench", "test"} <= named
    assert named <= set(metadata("fxrep").get_all("Provides-Extra"))


@pytest.mark.parametrize("path", SAID, ids=lambda path: path.name)
def test_every_block_is_run_or_says_why_not(runner: ModuleType, path: Path):
    """Output stands in text blocks; what is neither that nor code that the runner knows would never be run."""
    text = path.read_text(encoding="utf-8")
    blocks = runner.blocks(text, "python", "bash", "text")
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(blocks)
    assert path in DOCS or path.name in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for i, block in enumerate(blocks):
        if block.kind == "bash":
            assert re.fullmatch(rf"(?:{runner.NOT_RUN}\S.{{5,}})?", block.title)
        elif block.title:  # a file that somebody reads about is one that a script then uses
            assert block.kind == "python"
            assert any(block.title in later.code for later in blocks[i:] if later.kind == "bash" and not later.title)


def test_the_scripts_of_the_readme_are_steps_of_ci(runner: ModuleType):
    steps = re.findall(r"^readme (\d+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    scripts = runner.blocks((ROOT / "README.md").read_text(encoding="utf-8"), "bash")
    assert steps == [str(i + 1) for i, _ in enumerate(scripts)]


def run(runner: ModuleType, tmp_path: Path, text: str) -> str:
    """What the runner prints of a document."""
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    command = [sys.executable, runner.__file__, tmp_path / "page.md"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


def test_scripts_use_the_files_of_their_page_and_what_they_print_is_compared(runner: ModuleType, tmp_path: Path):
    page = '```python title="n.py"\nprint(1 + 1)\n```\n\n```bash\npython n.py\nls README.md\n```\n\n```text\n%s\n```\n'
    assert run(runner, tmp_path, page % "2 README.md").startswith("0\n")
    assert "where the document says" in run(runner, tmp_path, page % "3 README.md")
    assert not (ROOT / "n.py").exists()


def test_a_script_that_fails_is_told_and_one_that_is_not_run_says_why(runner: ModuleType, tmp_path: Path):
    assert "ends with 3" in run(runner, tmp_path, "```bash\n(exit 3)\necho ran\n```\n")
    said = run(runner, tmp_path, '```bash title="not run in CI: there is no such machine"\nfalse\n```\n')
    assert said.startswith("0\n")
    assert "page.md:2 NOT RUN: there is no such machine" in said


def test_a_script_that_does_not_end_is_ended_with_what_it_started(runner: ModuleType, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(runner, "LIMIT", 0.5)
    (block,) = runner.blocks(f"```bash\n(sleep 3; touch {tmp_path}/late) &\nsleep 60\n```\n", "bash")
    with pytest.raises(SystemExit, match="takes more than"):
        runner.run_bash(block, tmp_path / "page.md")
    time.sleep(3)
    assert not (tmp_path / "late").exists()
