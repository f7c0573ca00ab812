"""Where branches may go: the convolutions of a network, what follows each, and what geometry a branch must have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn
from torch.fx import Graph, Node
from torch.nn.utils import parametrize

from fxrep import kernel as K
from fxrep.affine import Ints
from fxrep.api import aim_of
from fxrep.copying import structural_copy
from fxrep.errors import Illegal, Refusal
from fxrep.fold import CONV_LAYERS
from fxrep.islands import only_called
from fxrep.pipeline import Pipeline
from fxrep.readers import is_hooked, read_graph
from fxrep.readers.convolution import CONVS, TRANSPOSED, pads_of
from fxrep.readers.registry import meaning_of
from fxrep.shapes import Shapes
from fxrep.trace import Traced, trace
from fxrep.training.branches import NORMS, batch_norm


@dataclass(frozen=True, eq=False)
class Site:
    """A convolution that can be replaced; `norm` is the batch norm that it alone feeds, `index` its place in its stage,
    the run of convolutions that give maps of one size and one number of channels. `is_shifted`: whether the layer that
    it is a part of in the deploy form has a bias."""

    name: str
    conv: Any
    norm_name: str | None
    norm: nn.Module | None
    index: int
    is_shifted: bool

    @property
    def dims(self) -> int:
        return self.conv.weight.ndim - 2

    @property
    def taps(self) -> Ints:
        return tuple(self.conv.weight.shape[2:])

    @property
    def is_one_tap(self) -> bool:
        return set(self.taps) == {1}

    @property
    def keeps_shape(self) -> bool:
        """Whether the identity is a branch: as many channels, no stride, and pads that undo the kernel."""
        return (
            self.conv.in_channels == self.conv.out_channels
            and set(self.conv.stride) == {1}
            and not any(self._pads_or_none((1,) * self.dims) or (1,))
        )

    def _pads_or_none(self, taps: Ints) -> Ints | None:
        try:
            return self.pads(taps)
        except Illegal:
            return None

    @property
    def borders(self) -> tuple[Ints, Ints]:
        return pads_of(self.conv.padding, self.taps, self.conv.dilation)

    @property
    def explicit_pads(self) -> list[int]:
        """In the order of `F.pad`, the last axis first."""
        return [p for pair in zip(*(reversed(b) for b in self.borders), strict=True) for p in pair]

    def pads(self, taps: Ints, dilation: Ints | None = None) -> Ints:
        """The padding with which a kernel of `taps` lies within the convolution's own, on its grid of taps.

        Output sizes agree if pad_lo + pad_hi - d(k-1) does. Raises Illegal where no equal padding gives that.
        """
        dilation = self.conv.dilation if dilation is None else dilation
        found = []
        for k, d, k_, d_, lo, hi in zip(self.taps, self.conv.dilation, taps, dilation, *self.borders, strict=True):
            total = lo + hi - d * (k - 1) + d_ * (k_ - 1)
            offset = lo - total // 2
            on_grid = offset % d == 0 and (k_ == 1 or d_ % d == 0) and 0 <= offset <= d * (k - 1) - d_ * (k_ - 1)
            if total < 0 or total % 2 or not on_grid:
                raise Illegal(
                    "not-expandable", f"a kernel of {k_} taps has no place in one of {k} padded by {lo}, {hi}"
                )
            found.append(total // 2)
        return tuple(found)

    def convolution(self, taps: Ints, dilation: Ints | None = None, bias: bool = False) -> nn.Module:
        """A new convolution between the same values, with torch's own initialisation."""
        conv = self.conv
        padding = conv.padding if taps == self.taps and dilation is None else self.pads(taps, dilation)
        return CONV_LAYERS[self.dims, False](
            conv.in_channels, conv.out_channels, taps, stride=conv.stride, padding=padding,
            dilation=conv.dilation if dilation is None else dilation, groups=conv.groups, bias=bias,
            padding_mode=conv.padding_mode, device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip

    def inner(self, outputs: int, taps: Ints, inputs: int | None = None, **options: Any) -> Any:
        """A new convolution without padding, for one end of a sequence."""
        conv = self.conv
        options = {"groups": conv.groups, "bias": False, **options}
        inputs = conv.in_channels if inputs is None else inputs
        return CONV_LAYERS[self.dims, False](
            inputs, outputs, taps, device=conv.weight.device, dtype=conv.weight.dtype, **options
        )

    def batch_norm(self, channels: int | None = None) -> nn.Module:
        return batch_norm(self.conv.out_channels if channels is None else channels, self.dims, self.conv.weight)


@dataclass(frozen=True, eq=False)
class _Part:
    """A piece of the model whose forward is traced; `paths` lead to its modules from the model."""

    root: nn.Module
    traced: Traced
    paths: Mapping[str, str]

    @cached_property
    def calls(self) -> dict[str, list[Node]]:
        """By module: the nodes that call it."""
        found: dict[str, list[Node]] = {}
        for node in self.traced.graph.find_nodes(op="call_module"):
            found.setdefault(str(node.target), []).append(node)
        return found

    @cached_property
    def read(self) -> set[str]:
        """The modules of which a tensor is read otherwise than by calling them."""
        return {str(n.target).rpartition(".")[0] for n in self.traced.graph.find_nodes(op="get_attr")}


def find_sites(model: nn.Module) -> tuple[list[Site], list[Refusal]]:
    """The convolutions that can be replaced, in the order in which they run, and why the others cannot."""
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    places += Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names = [n for n, m in model.named_modules() if isinstance(m, (*CONVS, *TRANSPOSED))]
    reasons = {n: Refusal(n, "not-traceable", "no traced call leads to it") for n in names}
    sites: list[Site] = []
    for part in _parts("", model, places):
        told = {name: _obstacle(part, name, places) for name, path in part.paths.items() if path in reasons}
        reasons |= {part.paths[name]: replace(r, node=part.paths[name]) for name, r in told.items() if r is not None}
        sites += _sites_of(part, [name for name in part.calls if name in told and told[name] is None])
    replaced = {site.name for site in sites}
    return sites, [r for name, r in reasons.items() if name not in replaced]


def _parts(path: str, module: nn.Module, places: Mapping[int, int]) -> Iterator[_Part]:
    """The module, if it can be traced, and what is only called by what cannot: that keeps its own forward."""
    is_bare = meaning_of(module, dict.fromkeys((*CONVS, *TRANSPOSED))) is not None
    root = nn.Sequential(module) if is_bare else module  # which calls it
    traced = trace(structural_copy(root))
    kept: Mapping[str, Any] = {"": module}
    if not isinstance(traced, Refusal):
        join = f"{path}.{{}}" if path else "{}"
        paths = {"0": path} if is_bare else {name: join.format(name) for name, _ in root.named_modules() if name}
        yield _Part(root, traced, paths)
        kept = traced.kept
    for name in kept:
        inside = root.get_submodule(name)
        for below, child in only_called(".".join(filter(None, (path, name))), inside):
            if places[id(child)] == 1 and not is_hooked(child):
                yield from _parts(below, child, places)


def _sites_of(part: _Part, order: list[str]) -> Iterator[Site]:
    """The sites of convolutions, in the order of their calls. Uses the traced graph up."""
    convs: list[Any] = [part.root.get_submodule(name) for name in order]
    indices = list(_places(part.traced.graph, part.traced.modules, [part.calls[n][0] for n in order]))
    norms = [_norm_after(part, name) for name in order]
    has_shift = [conv.bias is not None or norm is not None for conv, norm in zip(convs, norms, strict=True)]
    shifted = frozenset() if all(has_shift) else _shifted(part)
    for name, conv, norm_name, index, known in zip(order, convs, norms, indices, has_shift, strict=True):
        norm = None if norm_name is None else part.root.get_submodule(norm_name)
        norm_path = None if norm_name is None else part.paths[norm_name]
        yield Site(part.paths[name], conv, norm_path, norm, index, known or id(conv.weight) in shifted)


def _shifted(part: _Part) -> frozenset[int]:
    """The weights, by identity, of which `reparameterize` makes layers with a bias."""
    planned = Pipeline(type(part.root).__name__, part.traced, {}, aim_of(part.root.parameters())).plan
    layers = [e.kernels for d in planned.decisions.values() for e in d.recipe.emits]
    weights = [weight for weight, bias in layers if bias is not None]
    return frozenset(id(leaf.tensor) for leaf in K.leaves(*weights))


def _obstacle(part: _Part, name: str, places: Mapping[int, int]) -> Refusal | None:
    """`places`: by the identity of a module or a parameter, how often the model has it."""
    conv: Any = part.root.get_submodule(name)
    meaning = meaning_of(conv, dict.fromkeys((*CONVS, *TRANSPOSED)))
    if meaning in TRANSPOSED:
        return Refusal(name, "transposed", "a transposed convolution has no such branches")
    if meaning is None or parametrize.is_parametrized(conv):
        return Refusal(name, "not-expandable", "its class, or a parametrization, computes something of its own")
    if places[id(conv)] > 1 or places[id(conv.weight)] > 1:
        return Refusal(name, "tied-parameters", "its weight is shared with another layer")
    if name in part.read:
        return Refusal(name, "tied-parameters", "the network reads its tensors otherwise than by calling it")
    if is_hooked(conv):
        return Refusal(name, "hooked", "a forward hook looks at it")
    if name not in part.calls:
        return Refusal(name, "not-traceable", "no traced call leads to it")
    return None


def _norm_after(part: _Part, name: str) -> str | None:
    """The batch norm that reads a convolution's output, if each is the other's only one."""
    nodes = part.calls[name]
    users = [user for node in nodes for user in node.users]
    if len(nodes) != 1 or len(users) != 1 or users[0].op != "call_module":
        return None
    after = str(users[0].target)
    norm: Any = part.root.get_submodule(after)
    is_norm = meaning_of(norm, dict.fromkeys(NORMS.values())) is not None and norm.affine and norm.track_running_stats
    is_alone = len(part.calls[after]) == 1 and after not in part.read and not is_hooked(norm)
    return after if is_norm and is_alone else None


def _places(graph: Graph, modules: dict[str, nn.Module], nodes: list[Node]) -> Iterator[int]:
    """Of each convolution: how many before it, without a break, give maps like its own."""
    shapes = read_graph(graph, modules).facts.shapes
    before, index = None, 0
    for node in nodes:
        conv: Any = modules[str(node.target)]
        key = conv.out_channels, _sizes(shapes, node, conv.weight.ndim - 2)
        index = index + 1 if key == before else 0
        before = key
        yield index


def _sizes(shapes: Shapes, node: Node, dims: int) -> tuple[Any, ...]:
    return tuple(shapes.dim(shapes.of[node.name], i) for i in range(-dims, 0))
