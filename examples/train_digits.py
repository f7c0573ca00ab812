"""Plain VGG, RepVGG, a diverse-branch VGG and RepOpt-VGG on scikit-learn's digits: trained, collapsed, quantised.

python examples/train_digits.py                                        a short run, to see it work
python examples/train_digits.py --seeds 3 --epochs 16 --plots docs     the run that docs/training.md reports
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from digits import BATCH, Data, accuracy, fit, load, stored_bytes, vgg
from digits_report import draw, table
from int8 import quantised, ranges, rounding
from torch import nn

import fxrep


def search(data: Data, epochs: int) -> dict[str, dict[str, list[float]]]:
    """RepOptimizer's constants: the scales of a network that trains them, as plain numbers."""
    torch.manual_seed(1000)
    net = fxrep.hyper_search(vgg())
    fit(net, data, epochs, "hyper-search")
    return json.loads(json.dumps(fxrep.scales_of(net)))


def contestants(scales: dict[str, dict[str, list[float]]]) -> Iterator[tuple[str, nn.Module, object]]:
    """Name, network to train, and what is done to its optimizer."""
    yield "VGG", vgg(), lambda sgd, _: sgd
    yield "RepVGG", fxrep.expand(vgg(), "repvgg"), lambda sgd, _: sgd
    yield "DBB-VGG", fxrep.expand(vgg(), "dbb"), lambda sgd, _: sgd
    yield "RepOpt-VGG", fxrep.target(fxrep.constant_scales(vgg(), scales)), fxrep.RepOptimizer


def measure(net: nn.Module, wrap: object, train: Data, test: Data, epochs: int, title: str) -> dict[str, Any]:
    seconds = fit(net, train, epochs, title, wrap)
    deployed = fxrep.reparameterize(net)
    assert sum(isinstance(m, nn.Conv2d) for m in deployed.modules()) == 8  # whatever it trained with
    calibration = train[0][:256]
    int8 = {kind: quantised(deployed, calibration, kind == "channel") for kind in ("tensor", "channel")}
    return {
        "float32 %": 100 * accuracy(deployed, test),
        "int8 per tensor %": 100 * accuracy(int8["tensor"], test),
        "int8 per channel %": 100 * accuracy(int8["channel"], test),
        "ranges": ranges(deployed),
        "max|w|/std": statistics.mean(ranges(deployed)),
        "rounding %": 100 * statistics.mean(rounding(deployed)),
        "CPU ms a step": 1e3 * seconds,
        "kept MiB": stored_bytes(net.train(), train[0][:BATCH]) / 2**20,
        "parameters": sum(p.numel() for p in net.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--plots", type=Path, help="the folder to draw accuracy and weight ranges into")
    args = parser.parse_args()
    train, test = load()
    scales = search(train, args.epochs)
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        for name, net, wrap in contestants(scales):
            rows.setdefault(name, []).append(measure(net, wrap, train, test, args.epochs, f"{name}, seed {seed}"))
    print(table(rows))
    if args.plots:
        draw(rows, args.plots)


if __name__ == "__main__":
    main()
