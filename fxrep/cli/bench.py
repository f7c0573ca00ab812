"""`fxrep bench MODEL …`."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import redirect_stdout
from typing import Any

from fxrep.cli.common import OK, add_autotune, add_profile, aims, shape
from fxrep.cli.models import MODEL_HELP, load, load_extra
from fxrep.errors import Unusable

EPILOG = f"""\
{MODEL_HELP}
Everything is timed in one run, in turn, after a warming up: medians of single turns with half their interquartile
range, and ratios to the original in eager mode within each turn. `error` is the largest difference from what the
original gives. `peak` is the memory that torch held at most during a call, beyond the weights. Clocks are left alone.

forms    original; control, the original once more; fxrep; timm, the authors' own deploy form; fuse, torch.fx's
engines  eager, channels_last, compile (Inductor), frozen (Inductor with freezing), cuda_graph, onnxruntime, openvino

exit codes
  0  done; what could not be run says why in its row
  1  fxrep failed on a model
  2  bad usage, or what was named cannot be used
"""


def add(commands: Any) -> None:
    does = "Time MODEL in every form and under every engine, side by side."
    looks: dict[str, Any] = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = commands.add_parser("bench", help=does, description=does, **looks)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="torchvision:NAME, timm:NAME or path:callable")
    parser.add_argument("--input", metavar="SHAPE", type=shape, default=(1, 3, 224, 224), help="default: 1,3,224,224")
    parser.add_argument(
        "--batch", metavar="SIZES", type=shape, help="batch sizes, such as 1,32,256, in place of SHAPE's"
    )
    parser.add_argument("--forms", metavar="FORM", nargs="+", help="default: all")
    parser.add_argument("--engines", metavar="ENGINE", nargs="+", help="default: all that there are here")
    parser.add_argument("--device", default="cpu", help="such as cuda:0 (default: cpu)")
    parser.add_argument("--dtype", default="fp32", help="fp32, fp16, bf16, autocast-fp16 or autocast-bf16")
    parser.add_argument("--threads", metavar="N", type=int, help="of the CPU (default: as torch has it)")
    parser.add_argument("--rounds", metavar="N", type=int, default=30, help="turns of each (default: 30)")
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=30.0, help="after these no further round begins (default: 30)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios, as .svg, .png or .pdf")
    add_profile(parser)
    add_autotune(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    tqdm = load_extra("tqdm", "bench").tqdm
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which tells the peaks, writes of every start
    if args.plot:
        load_extra("matplotlib", "bench")
    from fxrep.bench import FORMS, Setting, bench
    from fxrep.bench.door import steps_of
    from fxrep.bench.engines import here
    from fxrep.calibration import find_device

    setting = Setting(find_device(args.device), args.dtype, args.threads, args.rounds, args.seconds)
    forms = args.forms or list(FORMS)
    engines = args.engines or here(setting)
    shapes = [(size, *args.input[1:]) for size in args.batch] if args.batch else [args.input]
    with redirect_stdout(sys.stderr):  # what the models' own code and the exporters print
        models = {name: load(name) for name in args.models}
        total = steps_of(len(models), len(shapes), len(forms), len(engines), args.rounds)
        with tqdm(total=total, unit="step", file=sys.stderr, disable=None) as bar:

            def step(label: str) -> None:
                bar.set_description(label)
                bar.update()

            options = {**aims(args, args.device), "autotune": args.autotune}
            found = bench(models, shapes, setting, forms=forms, engines=engines, options=options, step=step)
    if args.plot:
        try:
            found.plot(args.plot)
        except (OSError, ValueError) as error:
            raise Unusable(
                f"{args.plot} cannot be drawn: {error}; name an .svg, .png or .pdf in a folder that exists"
            ) from None
    print(found.to_json(indent=2) if args.json else found)
    return OK
