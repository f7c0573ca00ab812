"""`fxrep report MODEL` and `fxrep explain MODEL`."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import fxrep
from fxrep.cli.common import FAILED, INPUT_HELP, OK, add_autotune, add_profile, aims, an_input, complain
from fxrep.cli.models import MODEL_HELP, example_inputs, load
from fxrep.errors import FxrepError, Unusable

if TYPE_CHECKING:
    from torch import nn

    from fxrep.report import Report

EPILOG = f"""\
{MODEL_HELP}
exit codes
  0  the report was printed
  1  the model was loaded, but fxrep failed on it, or a collapse failed its certificate and was left out
  2  bad usage, or the model cannot be loaded or does not run on --input
"""
COMMANDS = {"report": "Collapse MODEL and report it.", "explain": "Say what would collapse, and why not."}


def add(commands: Any) -> None:
    for name, does in COMMANDS.items():
        looks: dict[str, Any] = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
        parser = commands.add_parser(name, help=does, description=does, **looks)
        parser.add_argument("model", metavar="MODEL", help="torchvision:NAME, timm:NAME or path/or.module:callable")
        parser.add_argument(
            "--input",
            metavar="SHAPE",
            type=an_input,
            action="append",
            help=INPUT_HELP,
        )
        parser.add_argument(
            "--strict", action="store_true", help="merge nothing that spreads an inf of the input further"
        )
        parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
        parser.add_argument("--full", action="store_true", help="print every row, fold nothing")
        parser.add_argument("--html", metavar="FILE", help="write a page to look at: graphs, decisions, costs, kernels")
        add_profile(parser)
        if name == "report":
            add_autotune(parser)
        parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):  # what the model's own code prints must not end up in the JSON
        model = load(args.model)
        example = example_inputs(model, args.input)
        options = aims(args) | ({"autotune": args.autotune} if args.command == "report" else {})
        report, collapsed = make_report(args.command, model, example, strict=args.strict, **options)
        if args.html:
            write_page(args.html, report, verdict(model, collapsed, example))
    print(report.to_json(indent=2) if args.json else report.text(full=args.full))
    broken = [refusal.node for refusal in report.refusals if refusal.code == "certificate-failed"]
    if broken:
        return complain(f"a collapse was not equal and was left out, at {', '.join(broken)}: please report it", FAILED)
    return OK


def make_report(command: str, model: nn.Module, example: Any, **options: Any) -> tuple[Report, nn.Module | None]:
    """The report, and the collapsed network where there is one."""
    if command == "explain":
        return fxrep.explain(model, example, **options), None
    collapsed = fxrep.reparameterize(model, example, **options)
    return cast("Report", collapsed.report), collapsed


def verdict(model: nn.Module, collapsed: nn.Module | None, example: Any) -> dict[str, Any] | None:
    """What a verification finds; nothing where there is nothing to run, or nothing to run it on."""
    if collapsed is None:
        return None
    try:
        return fxrep.verify(model, collapsed, example).to_dict()
    except FxrepError as error:
        complain(f"not verified for the page: {error}", OK)
        return None


def write_page(path: str, report: Report, found: dict[str, Any] | None) -> None:
    try:
        Path(path).write_text(report.to_html(found), encoding="utf-8")
    except OSError as error:
        raise Unusable(f"{path} cannot be written: {error.strerror}; name a file in a folder that exists") from None
