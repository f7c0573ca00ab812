"""What was collapsed, what was declined and why, as text, JSON and HTML. Decides nothing."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from tabulate import tabulate

from fxrep.cost import duration
from fxrep.errors import Refusal
from fxrep.page import Picture, Scene, document

SCHEMA = 1
"""Version of `Report.to_dict`: raised when a key goes or changes its meaning, not when one is added."""

WIDTH = 110
NOMINAL = "Predicted at nominal sizes (images of 224x224): no example_inputs tell others."
NAMES_SHOWN = 3
ROWS_BEFORE_FOLDING = 20
ROWS_WHEN_FOLDED = 12


@dataclass(frozen=True)
class Collapse:
    """One new layer and what it stands for."""

    name: str
    """Qualified name of the new layer."""
    replaced: tuple[str, ...]
    """Qualified names (of nodes, where there is no module) folded into it."""
    became: str
    """The layer in short, such as `Conv2d(64, 64, k3 s1 p1)`."""
    saved: float
    """Predicted seconds saved."""


@dataclass(frozen=True)
class Report:
    """`print(report)` folds long lists, `report.text(full=True)` does not."""

    model: str
    """Class name of the model."""
    collapses: tuple[Collapse, ...]
    refusals: tuple[Refusal, ...]
    before: dict[str, int]
    """Executed calls of the original, by kind: conv, linear, bn, add, mul, pool."""
    after: dict[str, int]
    cost_before: float
    """Seconds that the cost model predicts for the original."""
    cost_after: float
    nominal: bool = False
    """Whether the costs are those of nominal sizes (images of 224x224), as no example inputs were given."""
    scene: Scene | None = field(default=None, repr=False)
    """The network before and after, for drawing; None where it was not traced."""
    pictures: tuple[Picture, ...] = field(default=(), repr=False)
    """Some kernels and what adds up to them; nothing where nothing was folded."""

    def __str__(self) -> str:
        return self.text()

    def text(self, *, full: bool = False) -> str:
        parts = [
            f"fxrep: {self.model}",
            self._summary("simple"),
            *self._sizes(),
            *self._collapses(full),
            *self._refusals(full),
        ]
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "before": dict(self.before),
            "after": dict(self.after),
            "cost_before": self.cost_before,
            "cost_after": self.cost_after,
            "nominal": self.nominal,
            "collapses": [{**asdict(c), "replaced": list(c.replaced)} for c in self.collapses],
            "refusals": [asdict(r) for r in self.refusals],
        }

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def to_html(self, verdict: Mapping[str, Any] | None = None) -> str:
        """One page that needs nothing else: graphs, decisions, costs and kernels; and the `Verdict.to_dict()` given."""
        tables = {
            "costs": self._summary("html"),
            "collapses": self._collapse_table(),
            "refusals": self._refusal_table(),
        }
        return document(self.to_dict(), tables, self.scene, self.pictures, verdict)

    def _repr_html_(self) -> str:
        sections = [
            (_count(len(self.collapses), "collapse"), self._collapse_table()),
            (_count(len(self.refusals), "refusal"), self._refusal_table()),
        ]
        told = [f"<p>{title}</p>{table}" for title, table in sections if table]
        sizes = [f"<p>{note}</p>" for note in self._sizes()]
        return "\n".join([f"<h4>fxrep: {escape(self.model)}</h4>", self._summary("html"), *sizes, *told])

    def _collapse_table(self) -> str:
        return _table(_rows(self.collapses, None), _COLLAPSE_HEADERS, "html") if self.collapses else ""

    def _refusal_table(self) -> str:
        rows = [(r.node, r.code, r.reason, r.hint) for r in self.refusals]
        return _table(rows, ("node", "code", "reason", "hint"), "html") if rows else ""

    def _summary(self, form: str) -> str:
        kinds = dict.fromkeys([*self.before, *self.after])
        counts = [(kind, self.before.get(kind, 0), self.after.get(kind, 0)) for kind in kinds]
        rows = [(kind, str(old), str(new), "") for kind, old, new in counts if old or new]
        cost = ("affine ops, predicted", duration(self.cost_before), duration(self.cost_after), self._speedup())
        return _table([*rows, cost], ("", "before", "after", ""), form, align=("left", "right", "right", "left"))

    def _sizes(self) -> list[str]:
        return [NOMINAL] if self.nominal and self.cost_before else []

    def _speedup(self) -> str:
        if self.cost_after <= 0:
            return ""
        return f"{self.cost_before / self.cost_after:.2f}x as fast"

    def _collapses(self, full: bool) -> list[str]:
        if not self.collapses:
            return ["Nothing collapsed."]
        folded = not full and len(self.collapses) > ROWS_BEFORE_FOLDING
        shown = self.collapses[:ROWS_WHEN_FOLDED] if folded else self.collapses
        table = _table(_rows(shown, None if full else NAMES_SHOWN), _COLLAPSE_HEADERS, "simple", _COLLAPSE_ALIGN)
        more = f"\n… and {len(self.collapses) - len(shown)} more: {_HOW_TO_SEE_ALL}" if folded else ""
        return [f"{_count(len(self.collapses), 'collapse')}:\n{table}{more}"]

    def _refusals(self, full: bool) -> list[str]:
        if not self.refusals:
            return []
        groups = [[r] for r in self.refusals] if full else list(_by_code(self.refusals).values())
        lines = [_refusal_text(group) for group in groups]
        return [f"{_count(len(self.refusals), 'refusal')}:\n" + "\n".join(lines)]


_COLLAPSE_HEADERS = ("new layer", "became", "replaces", "saves")
_COLLAPSE_ALIGN = ("left", "left", "left", "right")
_HOW_TO_SEE_ALL = "print(report.text(full=True)), or --full on the command line"


def _rows(collapses: Sequence[Collapse], limit: int | None) -> list[tuple[str, ...]]:
    return [(c.name, c.became, _fold(_relative(c), limit), duration(c.saved)) for c in collapses]


def _relative(collapse: Collapse) -> list[str]:
    """Names under the new layer's own module, written from there: `.conv`, as in a relative import."""
    home = collapse.name.rpartition(".")[0]
    return [name[len(home) :] if home and name.startswith(f"{home}.") else name for name in collapse.replaced]


def _fold(names: Sequence[str], limit: int | None) -> str:
    if limit is None or len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} +{len(names) - limit} more"


def _by_code(refusals: Sequence[Refusal]) -> dict[str, list[Refusal]]:
    groups: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        groups.setdefault(refusal.code, []).append(refusal)
    return groups


def _refusal_text(group: Sequence[Refusal]) -> str:
    """`node: refused [code] reason. Hint: hint`; several nodes share the first one's reason."""
    names = _fold([refusal.node for refusal in group], NAMES_SHOWN)
    first, times = group[0], f" {len(group)} times" if len(group) > 1 else ""
    hint = f" Hint: {_sentence(first.hint)}" if first.hint else ""
    text = f"{names}: refused{times} [{first.code}] {_sentence(first.reason)}{hint}"
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _table(
    rows: Sequence[tuple[str, ...]], headers: Sequence[str], form: str, align: Sequence[str] | None = None
) -> str:
    """`html` escapes every cell; a layer that is called `1e5` stays a name."""
    return tabulate(rows, headers, tablefmt=form, disable_numparse=True, colalign=align)
