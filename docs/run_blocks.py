"""Run the code blocks of Markdown documents, so that what they say stays true.

    python docs/run_blocks.py README.md docs/*.md      every python block; one process per document
    python docs/run_blocks.py --bash 1 README.md       print the document's first bash block

The python blocks of one document share a namespace, in order. Where a ```text block follows one directly, it must be
what that block prints (`...` stands for anything). A block after `<!-- needs: PACKAGE -->` is left out, aloud, where
the package cannot be imported.
"""

from __future__ import annotations

import argparse
import doctest
import importlib
import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

FENCE = re.compile(
    r"^(?:<!-- needs: (?P<needs>\w+) -->\n+)?```(?P<kind>\S*)[^\n]*\n(?P<code>.*?)^```[ \t]*$(?P<then>\s*)",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    kind: str
    code: str
    line: int
    """Number of the line before the first one of the code."""
    prints: str | None
    """The text block that follows directly."""
    needs: str | None
    """A package without which it cannot run."""


def blocks(text: str, kind: str) -> list[Block]:
    fences = list(FENCE.finditer(text))
    after = {fence.start(): fence["code"] for fence in fences if fence["kind"] == "text"}
    return [
        Block(kind, fence["code"], text.count("\n", 0, fence.start("code")), after.get(fence.end()), fence["needs"])
        for fence in fences
        if fence["kind"] == kind
    ]


def run_document(path: Path) -> None:
    main = sys.modules["__main__"] = ModuleType("__main__")
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        missing = block.needs and why_missing(block.needs)
        if missing:
            print(f"  {path}:{block.line + 1} NOT RUN: {missing}", flush=True)
            continue
        print(f"  {path}:{block.line + 1}", flush=True)
        # The blank lines make line numbers, in tracebacks and for inspect, those of the document.
        code = compile("\n" * block.line + block.code, str(path), "exec")
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, vars(main))
        check_printed(f"{path}:{block.line + 1}", block.prints, printed.getvalue())


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


def run_documents(paths: list[Path]) -> int:
    """Each in its own process: one document cannot lean on what another defined."""
    failed = []
    for path in paths:
        if not blocks(path.read_text(encoding="utf-8"), "python"):
            continue
        if subprocess.run([sys.executable, __file__, "--here", path], check=False).returncode:
            failed.append(str(path))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--bash", type=int, metavar="N", help="print the N-th bash block instead")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bash:
        print(blocks(args.documents[0].read_text(encoding="utf-8"), "bash")[args.bash - 1].code, end="")
        return 0
    if args.here:
        run_document(args.documents[0])
        return 0
    return run_documents(args.documents)


if __name__ == "__main__":
    sys.exit(main())
