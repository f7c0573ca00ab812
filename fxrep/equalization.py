"""Cross-layer range equalisation: the scale of each channel moved from a layer into those that read it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxrep import kernel as K
from fxrep.errors import FxrepError
from fxrep.evaluation import evaluate
from fxrep.readers import is_hooked
from fxrep.verification import verify
from fxrep.verification.inputs import Examples

LAYERS: Mapping[Any, int] = MappingProxyType({nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3})
"""Layers whose ranges are equalised -> the number of axes after the channels."""

HOMOGENEOUS: Mapping[Any, int | None] = MappingProxyType({
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)),
    **dict.fromkeys((torch.relu, F.relu, "relu", "relu_", torch.relu_, F.leaky_relu, F.prelu)),
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, F.max_pool1d), 1),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, F.max_pool2d), 2),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d, F.max_pool3d), 3),
})  # fmt: skip
"""Ops with f(s·x) = s·f(x) for s > 0, channel by channel -> the axes they act on; None: on each number alone."""

CONVERGED = 1e-3
"""Where no scale of a round is further than this from 1, the rounds end."""


@dataclass(frozen=True)
class Link:
    """A layer and those that read it through homogeneous ops alone."""

    layer: str
    into: tuple[str, ...]
    before: float
    """Mean over the channels of min(p₁, p₂), where p is a channel's range relative to its tensor's: 1 is the best."""
    after: float


@dataclass(frozen=True)
class Equalization:
    """What was equalised, and which layers were not and why."""

    links: tuple[Link, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        rows = [(k.layer, ", ".join(k.into), f"{k.before:.3f}", f"{k.after:.3f}") for k in self.links]
        table = tabulate(rows, ("layer", "into", "precision before", "after"), disable_numparse=True)
        return "\n".join([table, "", *(f"{layer}: left as it is, {reason}" for layer, reason in self.left.items())])


def equalize(collapsed: nn.Module, example_inputs: Examples = None, *, rounds: int = 40) -> nn.Module:
    """A copy of a collapsed network in which consecutive layers use the range of an int8 weight equally well.

    For f with f(s·x) = s·f(x), s > 0 (ReLU, PReLU, pooling), W₂ f(W₁x + b₁) = W₂S f(S⁻¹W₁x + S⁻¹b₁): rows of the inner
    layer are divided and columns of the outer multiplied by sᵢ = √(r₁ᵢ/r₂ᵢ), where r is the largest |w| of a channel,
    so that both get the range √(r₁ᵢr₂ᵢ). Repeated over the network until nothing moves. (Nagel et al., "Data-Free
    Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, §4.1.) In float64, then cast.

    Args:
        collapsed: a result of `fxrep.reparameterize`, or any `torch.fx.GraphModule`; it is not touched.
        example_inputs: what to verify with; as for `fxrep.verify`, by which the copy is judged before it is returned.
        rounds: at most so many.

    Returns:
        The copy, with an `Equalization` at `.equalization`. `refold` writes weights that are not equalised.

    Raises:
        FxrepError: no graph, or a copy that is not equal.
    """
    if not isinstance(collapsed, GraphModule):
        raise FxrepError(
            f"got {type(collapsed).__name__}, not a torch.fx.GraphModule; pass what reparameterize returns"
        )
    result = copy.deepcopy(collapsed)
    chains, left = _chains(result)
    layers = {name: Ranges.of(result.get_submodule(name)) for name, into in chains.items() for name in (name, *into)}
    before = [_precision(layers, *chain) for chain in chains.items()]
    for _ in range(rounds):
        moved = [_balance(layers, *chain) for chain in chains.items()]
        if max(moved, default=0.0) < CONVERGED:
            break
    for name, ranges in layers.items():
        ranges.scale_layer(result.get_submodule(name))
    after = [_precision(layers, *chain) for chain in chains.items()]
    links = (Link(*link) for link in zip(chains, chains.values(), before, after, strict=True))
    result.equalization = Equalization(tuple(links), left)  # type: ignore[assignment]
    verdict = verify(collapsed, result, example_inputs)
    if not verdict:
        raise FxrepError(f"the equalised network is not equal to what it was made from\n{verdict}")
    return result


@dataclass
class Ranges:
    """The largest |w| of a layer over its taps, (O, I/g), and by what its rows and columns are to be scaled."""

    largest: Tensor
    rows: Tensor
    columns: Tensor
    groups: int

    @staticmethod
    def of(layer: Any) -> Ranges:
        weight = layer.weight.detach().double().abs()
        largest = weight.reshape(*weight.shape[:2], -1).amax(2)
        groups = getattr(layer, "groups", 1)
        return Ranges(largest, weight.new_ones(len(weight)), weight.new_ones(weight.shape[1] * groups), groups)

    def of_rows(self) -> Tensor:
        return self._scaled(self.largest).amax(1)

    def of_columns(self) -> Tensor:
        return self._scaled(self.largest).unflatten(0, (self.groups, -1)).amax(1).flatten()

    def _scaled(self, weight: Tensor) -> Tensor:
        rows = K.ScaleRows(tuple(weight.shape), K.Leaf.of(weight), K.Leaf.of(self.rows))
        return evaluate(K.ScaleColumns(rows.shape, rows, K.Leaf.of(self.columns), self.groups))

    def scale_layer(self, layer: Any) -> None:
        with torch.no_grad():
            layer.weight.copy_(self._scaled(layer.weight))
            if layer.bias is not None:
                layer.bias.copy_(layer.bias.double() * self.rows)


def _balance(layers: Mapping[str, Ranges], name: str, into: tuple[str, ...]) -> float:
    """Gives the rows of a layer and the columns that read them one range, and says how far the scales are from 1."""
    inner, outer = layers[name].of_rows(), _columns(layers, into)
    scale = (inner / outer).sqrt()
    scale[(inner == 0) | (outer == 0)] = 1.0  # a channel that is constant, or that nobody reads
    layers[name].rows /= scale
    for reader in into:
        layers[reader].columns *= scale
    return float((scale.log().abs()).max())


def _columns(layers: Mapping[str, Ranges], into: tuple[str, ...]) -> Tensor:
    return torch.stack([layers[reader].of_columns() for reader in into]).amax(0)


def _precision(layers: Mapping[str, Ranges], name: str, into: tuple[str, ...]) -> float:
    inner, outer = layers[name].of_rows(), _columns(layers, into)
    tiny = torch.finfo(torch.float64).tiny
    return float(torch.minimum(*(r / r.max().clamp_min(tiny) for r in (inner, outer))).mean())


def _chains(module: GraphModule) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """The layers whose scale can be moved into their readers, with these; the others, and why not."""
    modules = dict(module.named_modules(remove_duplicate=False))
    calls = [n for n in module.graph.nodes if n.op == "call_module" and type(modules[str(n.target)]) in LAYERS]
    own = dict(_fixed(module, calls, modules))
    chains, left = dict[str, tuple[str, ...]](), dict[str, str]()
    for node in calls:
        try:
            if node in own:
                raise _Fixed(own[node])
            readers = list(_readers(node, LAYERS[type(modules[str(node.target)])], modules))
            fixed = next((f"{r.target} reads it: {own[r]}" for r in readers if r in own), "")
            if fixed or not readers:
                raise _Fixed(fixed or "nothing reads it")
            chains[str(node.target)] = tuple(str(r.target) for r in readers)
        except _Fixed as reason:
            left[str(node.target)] = str(reason)
    return chains, left


class _Fixed(Exception):
    """Why the scale of a layer cannot move."""


def _readers(value: Node, dims: int, modules: Mapping[str, nn.Module]) -> Iterator[Node]:
    """The layers that read a value through homogeneous ops. Raises _Fixed where anything else does."""
    for user in value.users:
        kind: Any = type(modules[str(user.target)]) if user.op == "call_module" else user.target
        reads_it = user.args[:1] == (value,) and value not in (*user.args[1:], *user.kwargs.values())
        if not reads_it or (user.op == "call_module" and is_hooked(modules[str(user.target)])):
            raise _Fixed(f"{user.name} reads it")
        if LAYERS.get(kind) == dims:
            yield user
        elif kind in HOMOGENEOUS and HOMOGENEOUS[kind] in (None, dims):
            yield from _readers(user, dims, modules)
        else:
            raise _Fixed(f"{user.name} reads it")


def _fixed(module: GraphModule, calls: Sequence[Node], modules: Mapping[str, Any]) -> Iterator[tuple[Node, str]]:
    """The calls of layers whose numbers must stay, and why."""
    holders = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
    called = Counter(id(modules[str(n.target)]) for n in calls)
    read = {str(n.target).rpartition(".")[0] for n in module.graph.find_nodes(op="get_attr")}
    for node in calls:
        name = str(node.target)
        layer = modules[name]
        if called[id(layer)] > 1:
            yield node, "it is called twice"
        elif name in read:
            yield node, "its weight is read besides"
        elif any(holders[id(p)] > 1 for p in layer.parameters()):
            yield node, "its weight is shared"
        elif is_hooked(layer):
            yield node, "a hook is on it"
