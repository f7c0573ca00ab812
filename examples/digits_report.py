"""What `train_digits.py` prints, and what it draws with `--plots FOLDER`: accuracy, and the ranges that int8 meets."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from tabulate import tabulate

Runs = list[dict[str, Any]]
ACCURACIES = ("float32 %", "int8 per tensor %", "int8 per channel %")


def table(rows: dict[str, Runs]) -> str:
    columns = [c for c in next(iter(rows.values()))[0] if c != "ranges"]
    lines = [[name, *(spread([run[c] for run in runs]) for c in columns)] for name, runs in rows.items()]
    return tabulate(lines, ["", *columns], disable_numparse=True)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def draw(rows: dict[str, Runs], folder: Path) -> None:
    """Two SVGs of a few kilobytes: text stays text, and the same numbers give the same file."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "digits", "font.size": 9}):
        for name, figure in (("accuracy", accuracy(rows)), ("ranges", ranges(rows))):
            figure.savefig(folder / f"digits-{name}.svg", metadata={"Date": None, "Creator": None})


def accuracy(rows: dict[str, Runs]) -> Figure:
    """A dot for each seed, a line at their mean."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axis = figure.subplots()
    for number, runs in enumerate(rows.values()):
        for kind, (column, color) in enumerate(zip(ACCURACIES, ("tab:gray", "tab:orange", "tab:blue"), strict=True)):
            values, place = [run[column] for run in runs], number + 0.25 * (kind - 1)
            spots = [place + 0.03 * (i - (len(values) - 1) / 2) for i in range(len(values))]
            axis.scatter(spots, values, s=14, color=color, label=None if number else column.removesuffix(" %"))
            axis.hlines(statistics.mean(values), place - 0.08, place + 0.08, color=color)
    axis.set_xticks(range(len(rows)), list(rows))
    axis.set_ylabel("accuracy, %")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure


def ranges(rows: dict[str, Runs]) -> Figure:
    """By layer of the collapsed network: max|w| / std of its kernel, the mean over the seeds and their whole span."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axis = figure.subplots()
    for name, layers in _by_layer(rows):
        numbers = range(1, len(layers) + 1)
        axis.plot(numbers, [statistics.mean(values) for values in layers], marker="o", markersize=3, label=name)
        axis.fill_between(numbers, [min(v) for v in layers], [max(v) for v in layers], alpha=0.2)
    axis.set_xlabel("convolution of the collapsed network")
    axis.set_ylabel("max|w| / std")
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    return figure


def _by_layer(rows: dict[str, Runs]) -> Iterator[tuple[str, list[tuple[float, ...]]]]:
    for name, runs in rows.items():
        yield name, list(zip(*(run["ranges"] for run in runs), strict=True))
