"""What every command shares: exit codes, and how it says what it cannot use."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import fxrep
from fxrep.cost import OBJECTIVES

INPUT_HELP = "an input's shape, such as 1,3,224,224, or 1,128:int64 for zeros and ones; one for each"
DTYPES = ("int64", "int32", "bool", "float16", "bfloat16", "float32", "float64")
PROFILES = ("shipped", "measured")

OK, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130


def complain(error: object, code: int) -> int:
    print(f"fxrep: {error}", file=sys.stderr)
    return code


def shape(text: str) -> tuple[int, ...]:
    """`1,3,224,224` -> (1, 3, 224, 224)."""
    sizes = text.replace(" ", "").split(",")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: give positive sizes with commas, such as 1,3,224,224")
    return tuple(map(int, sizes))


class Input(NamedTuple):
    """An input as the command line has it; no dtype is that of the model's parameters."""

    sizes: tuple[int, ...]
    dtype: str = ""

    def __str__(self) -> str:
        return ",".join(map(str, self.sizes)) + (f":{self.dtype}" if self.dtype else "")


def an_input(text: str) -> Input:
    """`1,3,224,224`, or `1,128:int64`."""
    sizes, _, dtype = text.partition(":")
    if dtype and dtype not in DTYPES:
        raise argparse.ArgumentTypeError(f"{dtype!r} is no dtype of an input: there are {', '.join(DTYPES)}")
    return Input(shape(sizes), dtype)


def summary(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def add_profile(parser: argparse.ArgumentParser) -> None:
    """The options that say what a plan makes least, and by whose costs."""
    parser.add_argument("--objective", choices=OBJECTIVES, default="latency", help="what to make least")
    parser.add_argument(
        "--profile", choices=PROFILES, default="shipped", help="costs as shipped, or as measured on this machine"
    )


def add_autotune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--autotune", action="store_true", help="time both sides of a collapse of which the prediction is unsure"
    )


def aims(args: argparse.Namespace, device: str = "cpu") -> dict[str, Any]:
    """These options as `reparameterize` takes them; no profile is the shipped one."""
    profile = fxrep.calibrate(device) if args.profile == "measured" else None
    return {"objective": args.objective, "profile": profile}
