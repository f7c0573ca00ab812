"""What a benchmark found: rows, and the table, the JSON and the plot of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxrep.cost import duration
from fxrep.stopwatch import Times

BASE = ("original", "eager")
OURS, CONTROL = "fxrep", "control"
LEAST = 0.01  # relative; less is no loss


@dataclass(frozen=True)
class Row:
    """One network at one size, in one form under one engine; without `times`, `why` says why not."""

    model: str
    shape: tuple[int, ...]
    form: str
    engine: str
    times: Times | None = None
    #: to the original in eager mode, turn by turn
    ratio: Times | None = None
    #: largest difference from what the original gives, relative to its largest value
    error: float | None = None
    peak: int | None = None
    why: str = ""

    @property
    def case(self) -> tuple[Any, ...]:
        """What two rows have in common that may be compared."""
        return self.model, self.shape, self.engine

    def to_dict(self) -> dict[str, Any]:
        plain = ("model", "shape", "form", "engine", "error", "peak", "why")
        found: dict[str, Any] = {key: getattr(self, key) for key in plain}
        for name, times in (("seconds", self.times), ("ratio", self.ratio)):
            found[name] = times and {"median": times.median, "spread": times.spread, "samples": len(times.samples)}
        return found


@dataclass(frozen=True)
class Loss:
    """Where the collapsed network is slower than another form under the same engine, by more than the noise."""

    row: Row
    other: str
    ratio: Times

    def __str__(self) -> str:
        by = f"{self.ratio.median:.2f} ± {self.ratio.spread:.2f}"
        return f"{self.row.model} {_sizes(self.row.shape)} {self.row.engine}: {by} times the time of {self.other}"


@dataclass(frozen=True)
class Bench:
    """`setting` says on what it was measured."""

    setting: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def losses(self) -> list[Loss]:
        """Noise is the spread of the ratios of single turns, and what the control differs from the original by."""
        return [loss for row in self.rows if row.form == OURS for loss in self._losses(row)]

    def _losses(self, row: Row) -> Iterator[Loss]:
        if row.times is None:
            return
        same = {r.form: r.times for r in self.rows if r.case == row.case and r.times}
        noise = LEAST
        if CONTROL in same and BASE[0] in same:
            noise = max(LEAST, abs(same[CONTROL].to(same[BASE[0]]).median - 1))
        for form, times in same.items():
            ratio = row.times.to(times)
            if form not in (OURS, CONTROL) and ratio.median - max(ratio.spread, noise) > 1:
                yield Loss(row, form, ratio)

    def __str__(self) -> str:
        cases = dict.fromkeys((r.model, r.shape) for r in self.rows)
        tables = [f"{m}, {_sizes(s)}\n\n{self._table(m, s)}" for m, s in cases]
        slower = "".join(f"\n  {loss}" for loss in self.losses) or " nowhere"
        return "\n\n".join([self._heading(), *tables, f"slower than another form under one engine:{slower}"])

    def _heading(self) -> str:
        s = self.setting
        versions = ", ".join(f"{name} {version}" for name, version in s["versions"].items())
        return f"{s['device']}, {s['dtype']}, {s['threads']} threads; {versions}"

    def _table(self, model: str, shape: tuple[int, ...]) -> str:
        rows = [_cells(r) for r in self.rows if (r.model, r.shape) == (model, shape)]
        headers = ("form", "engine", "median", "±", "to original", "±", "peak", "error")
        return tabulate(rows, headers, disable_numparse=True, colalign=("left", "left", *("right",) * 6))

    def to_dict(self) -> dict[str, Any]:
        losses = [str(loss) for loss in self.losses]
        return {"setting": dict(self.setting), "rows": [r.to_dict() for r in self.rows], "slower": losses}

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def plot(self, path: str | Path) -> None:
        """Bars: the time of each form under each engine, relative to the original in eager mode."""
        from matplotlib.figure import Figure

        cases = list(dict.fromkeys((r.model, r.shape) for r in self.rows))
        figure = Figure(figsize=(8, 1 + 0.28 * len(self.rows)), layout="constrained")
        axes = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
        for axis, (model, shape) in zip(axes, cases, strict=True):
            rows = [r for r in self.rows if (r.model, r.shape) == (model, shape) and r.ratio is not None][::-1]
            labels = [f"{r.form}, {r.engine}" for r in rows]
            ratios = [r.ratio for r in rows if r.ratio is not None]
            colors = ["tab:orange" if r.form == OURS else "tab:gray" for r in rows]
            axis.barh(labels, [t.median for t in ratios], xerr=[t.spread for t in ratios], color=colors)
            axis.axvline(1, color="black", linewidth=0.5)
            axis.set_title(f"{model}, {_sizes(shape)}", fontsize="medium")
        axes[-1].set_xlabel("time, relative to the original in eager mode")
        figure.savefig(path)


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _cells(row: Row) -> tuple[str, ...]:
    if row.times is None:
        return (row.form, row.engine, "-", "", "", "", "", row.why)
    ratio, spread = ("-", "") if row.ratio is None else (f"{row.ratio.median:.2f}", f"{row.ratio.spread:.2f}")
    peak = "-" if row.peak is None else f"{row.peak / 1e6:.1f} MB"
    error = "-" if row.error is None else f"{row.error:.0e}"
    return (row.form, row.engine, duration(row.times.median), duration(row.times.spread), ratio, spread, peak, error)
