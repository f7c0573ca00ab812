"""The page put together: a template, its style and script inside, and the data as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from fxrep.cost import duration
from fxrep.page.heat import kernel_figure
from fxrep.page.layout import Drawing, Point, draw
from fxrep.page.scene import Edge, Picture, Scene

STRAIGHT = 1.0  # pixels
NOTHING = '<p class="none">None.</p>'
NO_KERNELS = '<p class="none">Nothing is added up here: each new layer is one kernel, scaled.</p>'


def document(
    report: Mapping[str, Any], tables: Mapping[str, str], scene: Scene | None, pictures: Sequence[Picture],
    verdict: Mapping[str, Any] | None,
) -> str:  # fmt: skip
    """HTML that loads nothing: its own policy forbids it to."""
    fields = {
        "model": escape(str(report["model"])),
        "headline": _headline(report),
        "verdict_chip": _chip(verdict),
        "verdict": _verdict(verdict),
        "costs": _bars(report) + tables["costs"],
        "collapses": tables["collapses"] or NOTHING,
        "collapse_count": len(report["collapses"]),
        "refusals": tables["refusals"] or NOTHING,
        "refusal_count": len(report["refusals"]),
        "kernels": "".join(map(kernel_figure, pictures)) or NO_KERNELS,
        "style": _part("style.css"),
        "script": _part("script.js"),
        "data": _json(_graph(scene, report["collapses"])),
        "graph": "" if scene else "hidden",
        "no_graph": "hidden" if scene else "",
    }
    return Template(_part("page.html")).substitute(fields)


@cache
def _part(name: str) -> str:
    return files("fxrep.page").joinpath(name).read_text(encoding="utf-8")


def _json(value: object) -> str:
    """JSON that may stand in a script element whatever the model's names are."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028")


def _graph(scene: Scene | None, collapses: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Boxes and edges with their places before and after."""
    if scene is None:
        return None
    count = len(scene.boxes)
    after_nodes = _in_order(scene.after, [i for i, b in enumerate(scene.boxes) if b.stays], count)
    before = draw(range(count), scene.before)
    after = draw(after_nodes, scene.after)
    groups = [{"name": c["name"], "does": c["became"], "replaced": list(c["replaced"])} for c in collapses]
    return {
        "boxes": [{**asdict(b), "at": _rounded(before.centres[i])} for i, b in enumerate(scene.boxes)],
        "groups": groups,
        "after": {i: _rounded(p) for i, p in after.centres.items()},
        "before_edges": _routed(scene.before, before),
        "after_edges": _routed(scene.after, after),
    }


def _in_order(edges: Sequence[Edge], kept: Sequence[int], count: int) -> list[int]:
    """The nodes of the graph after, sources before readers."""
    nodes = dict.fromkeys([*kept, *sorted(n for e in edges for n in e)])
    waiting = dict.fromkeys(nodes, 0)
    readers: dict[int, list[int]] = {}
    for source, target in edges:
        readers.setdefault(source, []).append(target)
        waiting[target] += 1
    ready = [n for n, left in waiting.items() if not left]
    for node in ready:
        for target in readers.get(node, ()):
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    return ready


def _routed(edges: Sequence[Edge], drawing: Drawing) -> list[list[Any]]:
    return [[s, t, [_rounded(p) for p in _turns(bends)]] for (s, t), bends in zip(edges, drawing.bends, strict=True)]


def _turns(bends: Sequence[Point]) -> Iterator[Point]:
    """Without the points that lie on a straight line: of long edges, most."""
    for i, point in enumerate(bends):
        before, after = bends[max(i - 1, 0)], bends[min(i + 1, len(bends) - 1)]
        if i in (0, len(bends) - 1) or abs(before[0] - 2 * point[0] + after[0]) > STRAIGHT:
            yield point


def _rounded(point: Point) -> list[float]:
    return [round(point[0], 1), round(point[1], 1)]


def _headline(report: Mapping[str, Any]) -> str:
    before, after = report["before"], report["after"]
    kinds = [k for k in before if before[k] != after.get(k, 0)]
    parts = [f"<b>{before[k]} → {after.get(k, 0)}</b> {escape(k)}" for k in kinds]
    if 0 < report["cost_after"] < report["cost_before"]:
        parts.append(f"predicted <b>{report['cost_before'] / report['cost_after']:.2f}×</b> as fast")
    return " · ".join(parts) or "nothing collapsed"


def _bars(report: Mapping[str, Any]) -> str:
    whole = max(report["cost_before"], report["cost_after"]) or 1.0
    rows = [
        f'<div class="bar"><span>{name}</span><i class="{name}" style="width:{100 * cost / whole:.1f}%"></i>'
        f"<b>{escape(duration(cost))}</b></div>"
        for name, cost in (("before", report["cost_before"]), ("after", report["cost_after"]))
    ]
    return f'<div class="bars">{"".join(rows)}</div>'


def _chip(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return '<span class="chip">not verified here</span>'
    good = verdict["equal"]
    return f'<span class="chip {"good" if good else "bad"}">{"verified equal" if good else "NOT EQUAL"}</span>'


def _verdict(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return "<p>The two networks were not run beside each other for this page; <code>fxrep.verify</code> does.</p>"
    rows = [_trial(t) for t in verdict["trials"]]
    ratio = "" if verdict["ratio"] is None else f" Its mean error is {verdict['ratio']:.2f} times the original's own."
    parted = "" if verdict["equal"] or not verdict["parted"] else verdict["parted"]["layer"]
    where = f" They part at <code>{escape(parted)}</code>." if parted else ""
    head = "".join(f"<th>{h}</th>" for h in ("input", "memory", "collapsed", "original", "allowed", "equal"))
    return (
        f"<p>Both were run in {escape(verdict['dtype'])} on random inputs; errors are against the original in float64, "
        f"relative to its largest value.{ratio}{where}</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _trial(trial: Mapping[str, Any]) -> str:
    cells = [trial["inputs"], trial["memory_format"].replace("_", " ")]
    worst = max(trial["comparisons"], key=lambda c: c["error"] / c["allowed"], default=None)
    problem = trial["problem"] or (worst["problem"] if worst else "")
    numbers = [f"{worst[key]:.2g}" for key in ("error", "own_error", "allowed")] if worst else ["", "", ""]
    fine = worst is not None and not problem and worst["error"] <= worst["allowed"]
    why = f'<tr class="why"><td colspan="6">{escape(problem)}</td></tr>' if problem else ""
    return _row([*cells, *numbers, "yes" if fine else "no"]) + why


def _row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
