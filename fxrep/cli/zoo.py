"""`fxrep zoo [NAME …]`."""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fxrep.cli.common import FAILED, OK
from fxrep.cli.models import load
from fxrep.errors import Unusable

EPILOG = """\
NAME is torchvision:NAME, timm:NAME, transformers:NAME or path/or.module:callable; without any, the smallest network of
each timm family, all of torchvision and transformers' convolutional models. Weights are random: nothing is downloaded.

exit codes
  0  every network of the table is equal
  1  one is not, or failed; the table says which and why
  2  bad usage
"""


def add(commands: Any) -> None:
    does = "Collapse many networks, compare and count, and write a table."
    looks: dict[str, Any] = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = commands.add_parser("zoo", help=does, description=does, **looks)
    parser.add_argument("names", metavar="NAME", nargs="*", help="the networks (default: a few hundred)")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("zoo.jsonl"), help="rows, a JSON object a line"
    )
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="the table to write")
    parser.add_argument("--only", metavar="PATTERN", action="append", help="names to take, such as 'timm:*'")
    parser.add_argument("--redo", action="store_true", help="examine those anew that FILE has a row of")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="networks at once (default: 1)")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=300.0, help="for each (default: 300)")
    parser.add_argument("--memory", metavar="GIB", type=float, default=8.0, help="for each (default: 8)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from fxrep import zoo

    asked = args.names or zoo.default_names()
    names = chosen(asked, args.only)
    limits = zoo.Limits(args.timeout, args.memory)
    done = {} if args.redo else {row.name: row for row in zoo.read_rows(args.out) if row.name in names}
    rows = zoo.sweep(names, load, args.out, jobs=args.jobs, limits=limits, redo=args.redo)
    with tqdm(total=len(names), initial=len(done), unit="network", file=sys.stderr) as bar:
        for row in rows:
            bar.update()
            bar.write(f"{row.name}: {row.status}" + (f": {row.why}" if row.why else ""), file=sys.stderr)
    return finish(args, asked)


def chosen(names: list[str], patterns: list[str] | None) -> list[str]:
    found = [name for name in names if not patterns or any(fnmatch(name, pattern) for pattern in patterns)]
    if not found:
        raise Unusable(f"no network is called {' or '.join(patterns or names)}: give a pattern such as 'timm:rep*'")
    return found


def finish(args: argparse.Namespace, asked: list[str]) -> int:
    """Writes the table of every row there is, of earlier sweeps too, and which were asked for and are not there."""
    from fxrep import zoo

    rows = sorted(zoo.read_rows(args.out), key=lambda row: row.name)
    zoo.write_rows(rows, args.out)
    if args.markdown:
        command = f"fxrep zoo --out {args.out} --markdown {args.markdown}"
        args.markdown.write_text(zoo.markdown(rows, command, asked), "utf-8")
    print(zoo.summary(rows))
    return OK if all(row.is_equal for row in rows) else FAILED
