"""`fxrep convert MODEL OUT`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from contextlib import redirect_stdout
from typing import Any

import fxrep
from fxrep.cli.common import INPUT_HELP, OK, an_input
from fxrep.cli.models import MODEL_HELP, example_inputs, load

EPILOG = f"""\
{MODEL_HELP}
OUT ends in .pt2, .onnx, .xml (OpenVINO), .pth, .pt or .safetensors (state dicts). It is there when the file was run by
its own runtime and found equal to the original; until then, and after an error or an interrupt, there is nothing.

exit codes
  0    OUT was written and is equal
  1    the network cannot be exported, or is not equal: nothing was written
  2    bad usage, or a model, checkpoint, path or runtime that cannot be used
  130  interrupted (143: terminated)
"""


def add(commands: Any) -> None:
    does = "Collapse MODEL, write it to OUT, and check the file."
    looks: dict[str, Any] = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = commands.add_parser("convert", help=does, description=does, **looks)
    parser.add_argument("model", metavar="MODEL", help="torchvision:NAME, timm:NAME or path/or.module:callable")
    parser.add_argument("out", metavar="OUT", help="the file to write")
    parser.add_argument("--to", metavar="FORMAT", help="pt2, onnx, openvino or state_dict (default: by OUT's suffix)")
    parser.add_argument("--weights", metavar="FILE", help="a checkpoint to load: .pth, .pt or .safetensors")
    parser.add_argument("--entry", metavar="NAME", help="which mapping of the checkpoint to take (default: what fits)")
    parser.add_argument(
        "--ignore",
        metavar="PATTERN",
        action="append",
        default=[],
        help="names in the checkpoint to leave out, such as 'model_ema.*'",
    )
    parser.add_argument("--trust", action="store_true", help="unpickle the checkpoint even if it holds code")
    parser.add_argument("--input", metavar="SHAPE", type=an_input, action="append", help=INPUT_HELP)
    parser.add_argument("--dynamic", metavar="AXES", type=axes, default=(), help="axes left open, such as 0,2,3")
    parser.add_argument("--dtype", metavar="DTYPE", help="of the file: fp16, bf16, fp32 or fp64 (default: the model's)")
    parser.add_argument("--strict", action="store_true", help="merge nothing that spreads an inf of the input further")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def axes(text: str) -> tuple[int, ...]:
    """`0,2,3` -> (0, 2, 3)."""
    numbers = text.replace(" ", "").split(",")
    if not all(n.isdecimal() for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names no axes: give numbers with commas, such as 0,2,3")
    return tuple(map(int, numbers))


def run(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was begun is cleaned up
    with redirect_stdout(sys.stderr):  # what the model's own code and the exporters print
        model = load(args.model)
        done = fxrep.convert(
            model, args.out, example_inputs(model, args.input), to=args.to, weights=args.weights, entry=args.entry,
            ignore=args.ignore, trust=args.trust, dtype=args.dtype, dynamic=args.dynamic, strict=args.strict,
            force=args.force,
        )  # fmt: skip
    print(json.dumps(done.to_dict(), indent=2, ensure_ascii=False) if args.json else done)
    return OK
