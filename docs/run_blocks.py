"""Run the code blocks of Markdown documents, so that what they say stays true.

    python docs/run_blocks.py README.md docs/*.md           every block; one process per document
    python docs/run_blocks.py --no-bash README.md           python blocks alone
    python docs/run_blocks.py --print 1 README.md           print the document's first bash block, to be run elsewhere

Each document is run in a copy of the repository. Its python blocks share a namespace, in order; its bash blocks are
scripts with a limit of time, in which pip resolves and builds but installs nothing. Where a ```text block follows one
directly, it must be what that block prints (`...` stands for anything). A title, which the site shows, says more:

    ```python title="nets.py"                   it is a file: written, for a bash block to use
    ```bash title="not run in CI: REASON"       it is left out, aloud

A block after `<!-- needs: PACKAGE -->` is left out, aloud, where the package cannot be imported.
"""

from __future__ import annotations

import argparse
import doctest
import importlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist")
LIMIT = 180.0  # seconds of a bash block
PIP = 'pip() { python -m pip "$1" --dry-run --quiet "${@:2}"; }'
"""Resolves and builds, and leaves the environment as it is."""
FENCE = re.compile(
    r'^(?:<!-- needs: (?P<needs>\w+) -->\n+)?```(?P<kind>\S*)(?: title="(?P<title>[^"\n]*)")?[ \t]*\n'
    r"(?P<code>.*?)^```[ \t]*$(?P<then>\s*)",
    re.MULTILINE | re.DOTALL,
)
NOT_RUN = "not run in CI: "


class Block(NamedTuple):
    kind: str
    code: str
    line: int
    """Number of the line before the first one of the code."""
    prints: str | None
    """The text block that follows directly."""
    needs: str | None
    """A package without which it cannot run."""
    title: str
    """The name of a file, or why the block is not run."""

    def why_not(self) -> str:
        """Why it is not run here; empty where it is."""
        if self.title.startswith(NOT_RUN):
            return self.title.removeprefix(NOT_RUN)
        return why_missing(self.needs) if self.needs else ""


def blocks(text: str, *kinds: str) -> list[Block]:
    fences = list(FENCE.finditer(text))
    after = {fence.start(): fence["code"] for fence in fences if fence["kind"] == "text"}
    return [
        Block(
            fence["kind"], fence["code"], text.count("\n", 0, fence.start("code")), after.get(fence.end()),
            fence["needs"], fence["title"] or "",
        )
        for fence in fences
        if fence["kind"] in kinds
    ]  # fmt: skip


def run_document(path: Path, *kinds: str) -> None:
    main = sys.modules["__main__"] = ModuleType("__main__")
    whole = path.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(shutil.copytree(ROOT, Path(folder, "fxrep"), ignore=NOT_COPIED))
        for block in blocks(whole.read_text(encoding="utf-8"), *kinds):
            where = f"{path}:{block.line + 1}"
            why_not = block.why_not()
            print(f"  {where} NOT RUN: {why_not}" if why_not else f"  {where}", flush=True)
            if not why_not:
                printed = run_bash(block, whole) if block.kind == "bash" else run_python(block, whole, vars(main))
                check_printed(where, block.prints, printed)
        os.chdir(ROOT)


def run_python(block: Block, document: Path, namespace: dict[str, Any]) -> str:
    if block.title:
        Path(block.title).write_text(block.code, encoding="utf-8")
        return ""
    # The blank lines make line numbers, in tracebacks and for inspect, those of the document.
    code = compile("\n" * block.line + block.code, str(document), "exec")
    with redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


def run_bash(block: Block, document: Path) -> str:
    command = ["bash", "-euo", "pipefail", "-c", f"{PIP}\n{block.code}"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        printed, complaints = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what the script has started
        sys.exit(f"{document}:{block.line + 1} takes more than {LIMIT:.0f} seconds")
    if process.returncode:
        sys.exit(f"{document}:{block.line + 1} ends with {process.returncode}\n{printed}{complaints}")
    return printed


def why_missing(package: str) -> str:
    try:
        importlib.import_module(package)
    except Exception as error:  # or it lacks a library of the system's
        return f"{package} cannot be imported ({error})"
    return ""


def check_printed(where: str, said: str | None, printed: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if said is not None and not doctest.OutputChecker().check_output(said, printed, options):
        sys.exit(f"{where} prints\n{printed}\nwhere the document says\n{said}")


def run_documents(paths: list[Path], options: list[str]) -> int:
    """Each in its own process: one document cannot lean on what another defined."""
    failed = []
    for path in paths:
        if subprocess.run([sys.executable, __file__, "--here", *options, path], check=False).returncode:
            failed.append(str(path))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--no-bash", action="store_true", help="run the python blocks alone")
    parser.add_argument("--print", type=int, metavar="N", help="print the N-th bash block instead")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.print:
        print(blocks(args.documents[0].read_text(encoding="utf-8"), "bash")[args.print - 1].code, end="")
        return 0
    if args.here:
        run_document(args.documents[0], "python", *([] if args.no_bash else ["bash"]))
        return 0
    return run_documents(args.documents, ["--no-bash"] if args.no_bash else [])


if __name__ == "__main__":
    sys.exit(main())
