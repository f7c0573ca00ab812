"""`fxrep COMMAND …`: arguments in, calls, exit codes out. A command is a file here, with `add(commands)` and a `run`.

Nothing heavy is imported before the arguments are parsed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import fxrep
from fxrep.cli import bench, calibrate, collapse, convert, zoo
from fxrep.cli.common import FAILED, INTERRUPTED, OK, UNUSABLE, complain, shape
from fxrep.cli.models import MODEL_HELP, load
from fxrep.errors import FxrepError, Unusable

__all__ = ["FAILED", "OK", "UNUSABLE", "load", "main", "make_parser", "shape"]

COMMANDS = (collapse, bench, calibrate, convert, zoo)

EPILOG = f"""\
{MODEL_HELP}
exit codes
  0  done
  1  the model was loaded, but fxrep failed on it
  2  bad usage, or what was named cannot be used
  130  interrupted
`fxrep COMMAND --help` tells more.
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except Unusable as error:
        return complain(error, UNUSABLE)
    except FxrepError as error:
        return complain(error, FAILED)
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)
    return code


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fxrep",
        description="Collapse a network to the convolutions it equals.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fxrep {fxrep.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
