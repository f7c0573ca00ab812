"""`fxrep calibrate`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import fxrep
from fxrep.cli.common import OK

if TYPE_CHECKING:
    from fxrep.cost import Profile


def add(commands: Any) -> None:
    does = "Measure what this machine does, for --profile measured, and keep it."
    parser = commands.add_parser("calibrate", help=does, description=does)
    parser.add_argument("--device", default="cpu", help="such as cuda:0 (default: cpu)")
    parser.add_argument("--again", action="store_true", help="measure although a measurement is kept")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    profile = fxrep.calibrate(args.device, again=args.again)
    print(json.dumps(asdict(profile), indent=2) if args.json else told(profile))
    return OK


def told(profile: Profile) -> str:
    """A line for each number."""
    from fxrep.cost import duration

    peaks = [f"{kind:<10} {peak / 1e9:8.1f} billion multiply-adds a second" for kind, peak in profile.peak.items()]
    moves = f"{'memory':<10} {profile.bandwidth / 1e9:8.1f} GB a second"
    return "\n".join([profile.name, *peaks, moves, f"{'launch':<10} {duration(profile.launch):>8}"])
