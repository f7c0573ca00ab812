"""The ranges of layers, channel by channel, and the scales that even them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxrep import kernel as K
from fxrep.equalization.lanes import Classes, Wiring
from fxrep.evaluation import evaluate

TINY = torch.finfo(torch.float64).tiny
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Ranges:
    """The largest |w| of a layer over its taps, (O, I/g), and by what its rows and columns are to be scaled."""

    largest: Tensor
    rows: Tensor
    columns: Tensor
    groups: int
    is_transposed: bool
    run: int
    """So many neighbouring columns have one scale, and one entry here."""

    @staticmethod
    def of(layer: Any, lanes: int | None = None) -> Ranges:
        """Of a layer that reads `lanes` channels, by default as many as it has columns."""
        groups, is_transposed = getattr(layer, "groups", 1), isinstance(layer, TRANSPOSED)
        weight = _rows_first(layer.weight.detach().abs(), groups, is_transposed)
        count = weight.shape[1] * groups
        run = count // (lanes or count)
        largest = weight.reshape(len(weight), weight.shape[1] // run, -1).amax(2).double()
        columns = largest.new_ones(count // run)
        return Ranges(largest, largest.new_ones(len(largest)), columns, groups, is_transposed, run)

    def of_rows(self) -> Tensor:
        return self._by_columns().amax(2).flatten() * self.rows

    def of_columns(self) -> Tensor:
        rows = self.rows.reshape(self.groups, -1, 1)
        return (self.largest.unflatten(0, (self.groups, -1)) * rows).amax(1).flatten() * self.columns

    def _by_columns(self) -> Tensor:
        return self.largest.unflatten(0, (self.groups, -1)) * self.columns.reshape(self.groups, 1, -1)

    def scale_layer(self, layer: Any) -> None:
        with torch.no_grad():
            weight = self._scaled(_rows_first(layer.weight, self.groups, self.is_transposed))
            layer.weight.copy_(_columns_first(weight, self.groups) if self.is_transposed else weight)
            if layer.bias is not None:
                layer.bias.copy_(layer.bias.double() * self.rows)

    def _scaled(self, weight: Tensor) -> Tensor:
        columns = self.columns.repeat_interleave(self.run)
        rows = K.ScaleRows(tuple(weight.shape), K.Leaf.of(weight), K.Leaf.of(self.rows))
        return evaluate(K.ScaleColumns(rows.shape, rows, K.Leaf.of(columns), self.groups))


def _rows_first(weight: Tensor, groups: int, is_transposed: bool) -> Tensor:
    """(I, O/g, …) of a transposed convolution as (O, I/g, …)."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1) if is_transposed else weight


def _columns_first(weight: Tensor, groups: int) -> Tensor:
    """(O, I/g, …) as (I, O/g, …)."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Group:
    """Layers that write or read channels of one scale, or of such as meet in a layer."""

    writers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)


class Balance:
    """The scales of a network's channels, and what they make of its layers."""

    def __init__(self, wiring: Wiring, layers: Mapping[str, Ranges]) -> None:
        self.layers, self.stays = layers, wiring.stays
        self.writes = {name: torch.tensor(ids) for name, ids in wiring.writes.items()}
        self.reads = {name: torch.tensor(ids) for name, ids in wiring.reads.items()}
        self.ends = [*self.writes.values(), *self.reads.values()]
        self.count = 1 + max((int(ids.max()) for ids in self.ends), default=-1)
        self.why_fixed = {i: why for i, why in wiring.why_fixed.items() if i < self.count}
        self.is_free = torch.zeros(self.count, dtype=torch.bool)
        for ids in self.reads.values():
            self.is_free[ids] = True
        self.is_free[list(self.why_fixed)] = False
        self.groups = self._grouped()

    def step(self) -> float:
        """Scales the channels of one group after the other, and says how far the scales were from 1."""
        return max((self._even(group) for group in self.groups), default=0.0)

    def precisions(self) -> dict[str, float]:
        """By layer with a channel to scale: how evenly its channels use the range of a weight."""
        found = {}
        for group in self.groups:
            _, read = self._largest(group)
            for name in group.writers:
                if self.is_free[self.writes[name]].any():
                    ends = self.layers[name].of_rows(), read[self.writes[name]]
                    found[name] = float(torch.minimum(*(r / r.max().clamp_min(TINY) for r in ends)).mean())
        return {name: found[name] for name in self.writes if name in found}

    def readers_of(self, name: str) -> tuple[str, ...]:
        own = torch.zeros(self.count, dtype=torch.bool)
        own[self.writes[name]] = True
        return tuple(reader for reader, ids in self.reads.items() if bool(own[ids].any()))

    def left(self) -> dict[str, str]:
        """The layers of which no channel can be scaled, and why not."""
        fixed = {
            name: next((self.why_fixed[i] for i in ids.tolist() if i in self.why_fixed), "nothing reads it")
            for name, ids in self.writes.items() if not self.is_free[ids].any()
        }  # fmt: skip
        return {**self.stays, **fixed}

    def _grouped(self) -> list[Group]:
        met = Classes(list(range(self.count)))
        for ids in self.ends:
            met.unite(ids[1:].tolist(), ids[:-1].tolist())
        groups: dict[int, Group] = defaultdict(Group)
        for name, ids in self.writes.items():
            groups[met.root(int(ids[0]))].writers.append(name)
        for name, ids in self.reads.items():
            groups[met.root(int(ids[0]))].readers.append(name)
        return list(groups.values())

    def _largest(self, group: Group) -> tuple[Tensor, Tensor]:
        """By class, the largest range that the group's layers write, and that they read."""
        written, read = torch.zeros(2, self.count, dtype=torch.float64)
        for name in group.writers:
            written.scatter_reduce_(0, self.writes[name], self.layers[name].of_rows(), "amax")
        for name in group.readers:
            read.scatter_reduce_(0, self.reads[name], self.layers[name].of_columns(), "amax")
        return written, read

    def _even(self, group: Group) -> float:
        """s = √(r₁/r₂) for each class that has both."""
        written, read = self._largest(group)
        scale = (written / read).sqrt()
        scale[~self.is_free | (written == 0) | (read == 0)] = 1.0  # some channels are constant, or read by nobody
        for name in group.writers:
            self.layers[name].rows /= scale[self.writes[name]]
        for name in group.readers:
            self.layers[name].columns *= scale[self.reads[name]]
        return float(scale.log().abs().max())
