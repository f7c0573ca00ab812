"""Kernels as small heat maps: the branches where they fall in the window, and their sum."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from fxrep.page.scene import Grid, Picture

CELL = 34


def kernel_figure(picture: Picture) -> str:
    """One filter W[out, in] of a layer as branch + branch + … = sum."""
    grids = [*(s.grid for s in picture.summands), picture.total]
    largest = max((abs(v) for grid in grids for row in grid for v in row), default=0.0) or 1.0
    terms = [_term(f"{s.taps}", s.label, s.grid, largest) for s in picture.summands]
    total = _term("sum", picture.layer, picture.total, largest)
    sides = '<span class="op">+</span>'.join(terms)
    where = f"output channel {picture.row}, input channel {picture.column}"
    return (
        f'<figure class="kernels"><figcaption><code>{escape(picture.layer)}</code> {where}</figcaption>'
        f'<div class="terms">{sides}<span class="op">=</span>{total}</div></figure>'
    )


def _term(title: str, label: str, grid: Grid, largest: float) -> str:
    return (
        f'<div class="term"><b>{escape(title)}</b>{_map(grid, largest)}'
        f'<small title="{escape(label)}">{escape(label)}</small></div>'
    )


def _map(grid: Grid, largest: float) -> str:
    """Blue below zero, orange above, nothing at zero; the size of a colour is the size of the number."""
    rows, columns = len(grid), len(grid[0])
    cells = "".join(_cell(x, y, v, largest) for x, y, v in _values(grid))
    numbers = max(rows, columns) <= 5
    texts = "".join(_text(x, y, v, largest) for x, y, v in _values(grid)) if numbers else ""
    width, height = CELL * columns, CELL * rows
    return f'<svg viewBox="0 0 {width} {height}" width="{min(width, 180)}" role="img">{cells}{texts}</svg>'


def _values(grid: Grid) -> Iterable[tuple[int, int, float]]:
    return ((x, y, v) for y, row in enumerate(grid) for x, v in enumerate(row))


def _cell(x: int, y: int, value: float, largest: float) -> str:
    sign = "pos" if value > 0 else "neg"
    strength = abs(value) / largest
    return (
        f'<rect class="cell" x="{CELL * x}" y="{CELL * y}" width="{CELL}" height="{CELL}"/>'
        f'<rect class="{sign}" x="{CELL * x}" y="{CELL * y}" width="{CELL}" height="{CELL}" opacity="{strength:.3f}"/>'
    )


def _text(x: int, y: int, value: float, largest: float) -> str:
    text = "0" if value == 0 else f"{value:.2f}".replace("-0.", "−.").replace("0.", ".", 1).replace("-", "−")
    dark = ' class="strong"' if abs(value) > 0.6 * largest else ""
    return f'<text x="{CELL * (x + 0.5):g}" y="{CELL * (y + 0.5):g}"{dark}>{text}</text>'
