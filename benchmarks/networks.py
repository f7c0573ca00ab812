"""The table of docs/benchmarks.md: networks in every form under several engines.

    python benchmarks/networks.py --json networks.json --markdown networks.md [--minutes 12] [--only repvgg_a0]

Networks and engines are taken in order of importance; those that the minutes do not suffice for are named.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fxrep.bench import Bench, Row, Setting, bench
from fxrep.cli import load
from fxrep.cost import duration
from fxrep.zoo.preparation import randomise

NETWORKS = ("repvgg_a0", "mobileone_s1", "fastvit_t8", "repvit_m1", "ghostnetv3_050", "resnet50", "repvgg_b1")
FORMS = ("original", "control", "fxrep", "timm")
PASSES: tuple[dict[str, Any], ...] = (
    {"engines": ("eager", "frozen"), "forms": FORMS, "batch": 1},
    {"engines": ("onnxruntime", "openvino"), "forms": ("original", "fxrep"), "batch": 1},
    {"engines": ("eager",), "forms": FORMS, "batch": 32},
    {"engines": ("compile", "channels_last"), "forms": FORMS, "batch": 1},
)


def table(found: Bench) -> str:
    """A line for each network and engine: the original's time, and the ratios of its other forms to it, in turn."""
    cases = dict.fromkeys((r.model, r.shape, r.engine) for r in found.rows)
    rows = [_line(case, {r.form: r for r in found.rows if r.case == case}) for case in cases]
    headers = ("network", "batch", "engine", "original", "control", "fxrep", "timm")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _line(case: tuple[str, tuple[int, ...], str], forms: dict[str, Row]) -> tuple[str, ...]:
    model, shape, engine = case
    base = forms["original"].times
    ratios = [_ratio(forms.get(form), forms["original"]) for form in FORMS[1:]]
    shown = forms["original"].why if base is None else f"{duration(base.median)} ± {duration(base.spread)}"
    return model, str(shape[0]), engine, shown, *ratios


def _ratio(row: Row | None, original: Row) -> str:
    if row is None or row.times is None or original.times is None:
        return "-"
    ratio = row.times.to(original.times)
    return f"{ratio.median:.2f} ± {ratio.spread:.2f}"


def merged(parts: list[Bench]) -> Bench:
    return Bench(parts[0].setting, tuple(r for part in parts for r in part.rows))


def write(parts: list[Bench], args: argparse.Namespace) -> None:
    found = merged(parts)
    args.json.write_text(json.dumps(found.to_dict(), indent=1), "utf-8")
    lost = "\n".join(f"- {loss}" for loss in found.losses) or "nowhere"
    args.markdown.write_text(f"{found.setting}\n\n{table(found)}\n\nslower:\n{lost}\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("networks.json"))
    parser.add_argument("--markdown", type=Path, default=Path("networks.md"))
    parser.add_argument("--minutes", type=float, default=60.0, help="after these no further network begins")
    parser.add_argument("--seconds", type=float, default=12.0, help="of turns, for each network")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=NETWORKS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    setting = Setting(threads=args.threads, rounds=args.rounds, seconds=args.seconds)
    parts: list[Bench] = []
    for each in PASSES:
        for name in args.only:
            if time.monotonic() > end:
                print(f"no time left for {name} {each}", file=sys.stderr)
                continue
            torch.manual_seed(0)
            model = load(f"timm:{name}")
            randomise(model)
            shape = (each["batch"], 3, 224, 224)
            parts.append(bench({name: model}, [shape], setting, forms=each["forms"], engines=each["engines"]))
            print(f"{time.monotonic() - end + 60 * args.minutes:.0f} s: {name} {each}", file=sys.stderr)
            write(parts, args)


if __name__ == "__main__":
    main()
