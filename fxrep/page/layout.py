"""Layered drawing of a directed acyclic graph, top to bottom (Sugiyama, Tagawa, Toda 1981).

Layers by longest path, crossings lessened by barycentres, and within a layer the positions nearest to the neighbours'
means that keep order and distance: an isotonic regression, solved exactly by pooling adjacent violators. Edges that
span several layers run through bends, one chain of them for all edges of a node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]
Links = dict[int, list[int]]

COLUMN, ROW, BEND = 180.0, 62.0, 22.0
SWEEPS = 8
BEND_WEIGHT = 4.0  # long edges had rather be straight than boxes be centred


@dataclass(frozen=True)
class Drawing:
    """Centres of the nodes, and for each edge the points that it runs through on its way."""

    centres: dict[int, Point]
    bends: list[list[Point]]


def draw(nodes: Sequence[int], edges: Sequence[tuple[int, int]]) -> Drawing:
    """Nodes in an order in which every edge runs forward.

    >>> draw([0, 1], [(0, 1)]).centres
    {0: (0.0, 0.0), 1: (0.0, 62.0)}
    """
    layer = _layers(nodes, edges)
    chains = _chains(edges, layer)
    routes = [[s, *chains[s][: layer[t] - layer[s] - 1], t] for s, t in edges]
    segments = dict.fromkeys(pair for route in routes for pair in pairwise(route))
    above, below = _links((b, a) for a, b in segments), _links(segments)
    bends = {bend for chain in chains.values() for bend in chain}
    level = layer | {bend: layer[node] + 1 + i for node, chain in chains.items() for i, bend in enumerate(chain)}
    rows = _ordered(_rows(nodes, level, below), above, below)
    x = _upright(rows, _placed(rows, above, below, bends))
    at = {n: (x[n], ROW * level[n]) for n in level}
    return Drawing({n: at[n] for n in nodes}, [[at[b] for b in route[1:-1]] for route in routes])


def _layers(nodes: Sequence[int], edges: Iterable[tuple[int, int]]) -> dict[int, int]:
    readers = _links(edges)
    layer = dict.fromkeys(nodes, 0)
    for node in nodes:
        for target in readers.get(node, ()):
            layer[target] = max(layer[target], layer[node] + 1)
    return layer


def _chains(edges: Iterable[tuple[int, int]], layer: Mapping[int, int]) -> Links:
    """By node, the numbers of the bends below it: as many as its longest edge passes layers."""
    longest = dict.fromkeys(layer, 0)
    for source, target in edges:
        longest[source] = max(longest[source], layer[target] - layer[source] - 1)
    free = max(layer, default=0) + 1
    chains: Links = {}
    for node, count in longest.items():
        chains[node] = list(range(free, free + count))
        free += count
    return chains


def _links(pairs: Iterable[tuple[int, int]]) -> Links:
    links: Links = {}
    for a, b in pairs:
        links.setdefault(a, []).append(b)
    return links


def _rows(nodes: Sequence[int], level: Mapping[int, int], below: Links) -> list[list[int]]:
    """The layers, each in the order in which a walk downwards meets its nodes."""
    rows: list[list[int]] = [[] for _ in range(max(level.values(), default=-1) + 1)]
    seen: set[int] = set()
    for start in nodes:
        todo = [start]
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                rows[level[node]].append(node)
                todo.extend(reversed(below.get(node, ())))
    return rows


def _ordered(rows: list[list[int]], above: Links, below: Links) -> list[list[int]]:
    """Each layer sorted by the mean place of its neighbours in the layer before, down and up in turn."""
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        place: dict[int, float] = {}
        for row in rows if down else reversed(rows):
            near = above if down else below
            own = {n: float(i) for i, n in enumerate(row)}
            row.sort(key=lambda n: _mean([place[m] for m in near.get(n, ())], own[n]))
            middle = (len(row) - 1) / 2
            place |= {n: i - middle for i, n in enumerate(row)}
    return rows


def _placed(rows: list[list[int]], above: Links, below: Links, bends: set[int]) -> dict[int, float]:
    x = {n: COLUMN * (i - (len(row) - 1) / 2) for row in rows for i, n in enumerate(row)}
    weight = {n: BEND_WEIGHT if n in bends else 1.0 for n in x}
    half = {n: (BEND if n in bends else COLUMN) / 2 for n in x}
    for sweep in range(2 * SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            near = above if down else below
            wanted = [_mean([x[m] for m in near.get(n, ())], x[n]) for n in row]
            found = _apart(wanted, [weight[n] for n in row], [half[n] for n in row])
            x.update(zip(row, found, strict=True))
    return x


def _upright(rows: list[list[int]], x: dict[int, float]) -> dict[int, float]:
    """The same with the layers of one node exactly below each other, and those between moved along."""
    alone = [(i, x[row[0]]) for i, row in enumerate(rows) if len(row) == 1]
    shifts = [alone[0][1]] * len(rows) if alone else [0.0] * len(rows)
    for (i, a), (j, b) in pairwise([*alone, (len(rows), alone[-1][1])] if alone else []):
        for k in range(i, j):
            shifts[k] = a + (b - a) * (k - i) / (j - i)
    return {n: x[n] - shift for row, shift in zip(rows, shifts, strict=True) for n in row}


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _apart(wanted: Sequence[float], weights: Sequence[float], halves: Sequence[float]) -> list[float]:
    """The positions nearest to `wanted` (weighted least squares) in the same order and no nearer than their halves.

    >>> _apart([0.0, 0.0], [1.0, 1.0], [5.0, 5.0])
    [-5.0, 5.0]
    """
    offsets = [0.0]
    for left, right in pairwise(halves):
        offsets.append(offsets[-1] + left + right)
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight, offset in zip(wanted, weights, offsets, strict=True):
        mean, total, count = value - offset, weight, 1
        while pools and pools[-1][0] >= mean:
            before, its, many = pools.pop()
            mean = (mean * total + before * its) / (total + its)
            total, count = total + its, count + many
        pools.append((mean, total, count))
    means = [mean for mean, _, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=False)]
