"""Collapses a module as far as it can be traced: whole, or in islands inside of what must keep its own forward."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxrep.census import KINDS, census_of_module
from fxrep.errors import Refusal
from fxrep.frozen import lazily
from fxrep.islands.calls import Calls, calls_of
from fxrep.islands.function import ONE, Arguments, Slot
from fxrep.ownership import carry_attributes
from fxrep.pipeline import Pipeline
from fxrep.readers import is_hooked
from fxrep.readers.registry import meaning_of, registered
from fxrep.report import Report
from fxrep.trace import Traced, trace, untraceable
from fxrep.trees import named_modules

Begin = Callable[[str, Traced, Mapping[str, Any]], Pipeline]
OPENABLE = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Place:
    """A sub-module, the module that holds it, and how it is called."""

    path: str
    holder: nn.Module
    key: str
    module: nn.Module
    calls: tuple[Arguments, ...]


class Islands:
    """`begin` starts the pipeline of one traced module. Unless `writes`, everything is only planned and told."""

    def __init__(self, root: nn.Module, begin: Begin, writes: bool, inplace: bool = False) -> None:
        self.root, self.begin, self.writes, self.inplace = root, begin, writes, inplace

    @lazily
    def places(self) -> Counter[int]:
        """How many names each module has, by its identity."""
        return Counter(id(m) for _, m in named_modules(self.root))

    def collapse(self, examples: Mapping[str, Any]) -> tuple[nn.Module, Report]:
        """The root collapsed, or with islands in it; the root itself where its forward must stay."""
        return self._collapse(self.root, examples)

    def _collapse(self, module: nn.Module, examples: Mapping[str, Any]) -> tuple[nn.Module, Report]:
        traced = trace(module, examples)
        name = type(module).__name__
        if isinstance(traced, Refusal):
            unchanged = unchanged_report(name, module, traced)  # counted before anything is
            return module, _with_islands(unchanged, list(self._inside("", module, frozenset())))
        pipeline = self.begin(name, traced, examples)
        inplace = self.inplace and module is self.root  # an island may share tensors with what is around it
        result, report = pipeline.rewrite(inplace) if self.writes else (module, pipeline.explain())
        used = frozenset(str(n.target) for n in traced.graph.nodes if n.op in ("call_module", "get_attr"))
        kept = tuple(untraceable(path, reason) for path, reason in traced.kept.items())
        islands = [i for path in traced.kept for i in self._inside(path, traced.modules[path], used)]
        return result, _with_islands(replace(report, refusals=(*kept, *report.refusals)), islands)

    def _inside(self, path: str, module: nn.Module, used: frozenset[str]) -> Iterator[Report]:
        """Collapses what is in a module that keeps its own forward. `used` is what the graph around it uses too."""
        if getattr(type(module), "forward", None) is nn.Module.forward:
            return  # a container, which nobody calls
        calls = calls_of(module)
        chained: set[str] = set()
        for chain in self._runs(path, module, calls, used):
            for found in self._chain(path, module, chain):
                chained.update(chain)
                yield found
        for place in _places(path, module, calls):
            if place.key not in chained or place.holder is not module:
                yield from self._place(place, used)
        yield _told(path, module, calls, chained)

    def _runs(self, path: str, module: nn.Module, calls: Calls, used: frozenset[str]) -> Iterator[tuple[str, ...]]:
        """The parts of the chains of calls in which each member may be replaced."""
        for chain in calls.chains:
            for is_free, run in groupby(chain, lambda name: self._is_free(path, module, name, calls, used)):
                names = tuple(run)
                if is_free and len(names) > 1:
                    yield names

    def _is_free(self, path: str, module: nn.Module, name: str, calls: Calls, used: frozenset[str]) -> bool:
        member = module._modules[name]
        if member is None or calls.why_not(name) or self._why_kept(_join(path, name), member, used):
            return False
        return calls.of[Slot(name)] == [ONE] and _fits(member, [ONE])

    def _chain(self, path: str, module: nn.Module, chain: Sequence[str]) -> Iterator[Report]:
        """Sub-modules that are called one on the result of the other, as one module in the place of the first."""
        whole = nn.Sequential()
        for name in chain:
            whole.add_module(name, module._modules[name])
        counted = census_of_module(whole)
        result, report = self._collapse(whole.eval(), {})
        if not report.collapses:
            return
        if self.writes and isinstance(result, GraphModule):
            made = dict.fromkeys(chain, nn.Identity) | {chain[0]: lambda: result}
            for name in chain:
                replacement = made[name]().eval()
                carry_attributes(getattr(whole, name), replacement)
                module._modules[name] = replacement
        yield _under(path, report, counted)

    def _place(self, place: Place, used: frozenset[str]) -> Iterator[Report]:
        """One sub-module that its parent only calls."""
        if not _merges_in_sight(place.module):
            return
        reason = self._why_kept(place.path, place.module, used)
        if reason:
            yield _refused(place.path, Refusal(place.path, "reached-into", reason))
            return
        if not _fits(place.module, place.calls):
            refusal = untraceable(place.path, "its parent passes arguments that have defaults")
            yield _refused(place.path, refusal)
            yield from self._inside(place.path, place.module, used)
            return
        counted = census_of_module(place.module)
        result, report = self._collapse(place.module, {})
        if isinstance(result, GraphModule) and result is not place.module and report.collapses:
            carry_attributes(place.module, result)
            place.holder._modules[place.key] = result
        yield _under(place.path, report, counted)

    def _why_kept(self, path: str, module: nn.Module, used: frozenset[str]) -> str:
        if self.places[id(module)] > 1:
            return "it has several places in the model"
        if is_hooked(module):
            return "a hook on it may look inside"
        if any(target == path or target.startswith(f"{path}.") for target in used):
            return "the forward around its parent uses it as well"
        return ""


def _places(path: str, module: nn.Module, calls: Calls) -> Iterator[Place]:
    """The sub-modules that the module's own forward does nothing with but call them."""
    for name, child in module.named_children():
        if calls.why_not(name):
            continue
        level = [Place(_join(path, name), module, name, child, tuple(calls.of.get(Slot(name), ())))]
        for depth in range(1, calls.opened.get(name, 0) + 1):
            level = [p for place in level for p in _opened(place, tuple(calls.of.get(Slot(name, depth), ())))]
        yield from (p for p in level if p.calls)


def only_called(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The sub-modules, with their paths, that a forward which is not traced provably does nothing with but call."""
    return ((place.path, place.module) for place in _places(path, module, calls_of(module)))


def _opened(place: Place, calls: tuple[Arguments, ...]) -> Iterator[Place]:
    """The entries of a container; those of a Sequential that is called are called by it."""
    container = place.module
    if not isinstance(container, OPENABLE) or (place.calls and type(container) is not nn.Sequential):
        return
    inherited = (ONE,) if place.calls else ()
    for key, entry in container.named_children():
        yield Place(f"{place.path}.{key}", container, key, entry, (*calls, *inherited))


def _fits(module: nn.Module, calls: Sequence[Arguments]) -> bool:
    """Whether no call gives an argument that has a default: a trace takes it to have that, but for the first."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    optional = [p for p in parameters if p.default is not p.empty]
    if not optional:
        return True
    given = optional[0] is parameters[0] and optional[0].default is None
    required = given + sum(p.default is p.empty and p.kind not in VARIADIC for p in parameters)
    names = {p.name for p in optional[given:]}
    return all(
        c.positional is not None and c.keywords is not None and c.positional <= required and not c.keywords & names
        for c in calls
    )


def _merges_in_sight(module: nn.Module) -> bool:
    """Whether a layer in it is read as affine and something else has numbers too: one alone has nothing to merge with.

    What else it is shows when it is traced: a batch norm may well stand in a forward of its own.
    """
    numbered = [m for m in module.modules() if m._parameters or m._buffers]
    return len(numbered) > 1 and any(_is_affine_layer(m) for m in numbered)


def _is_affine_layer(module: nn.Module) -> bool:
    return not module._modules and bool(module._parameters) and meaning_of(module, registered()) is not None


def _told(path: str, module: nn.Module, calls: Calls, chained: set[str]) -> Report:
    """What is left apart inside, and why."""
    refusals = [
        Refusal(_join(path, name), "reached-into", calls.why_not(name))
        for name, child in module.named_children() if calls.why_not(name) and _merges_in_sight(child)
    ]  # fmt: skip
    layers = [n for n, child in module.named_children() if _is_affine_layer(child) and n not in chained]
    if len(layers) > 1:
        fact = f"its layers {', '.join(layers[:6])} stay as they are: "
        proof = "the source does not show that one of them takes just what another gives"
        name = path or type(module).__name__
        refusals.append(Refusal(name, "reached-into", fact + (calls.opaque or proof)))
    return _refused(path, *refusals)


def unchanged_report(name: str, module: nn.Module, refusal: Refusal) -> Report:
    """Of a module whose forward stays as it is."""
    counts = census_of_module(module)
    return Report(name, (), (refusal,), counts, counts, 0.0, 0.0)


def _refused(path: str, *refusals: Refusal) -> Report:
    nothing = dict.fromkeys(KINDS, 0)
    return Report(path, (), refusals, nothing, nothing, 0.0, 0.0)


def _under(path: str, report: Report, counted: Mapping[str, int]) -> Report:
    """An island's report in the names of the whole; its calls less those `counted` with the module around it."""
    collapses = tuple(
        replace(c, name=_join(path, c.name), replaced=tuple(_join(path, r) for r in c.replaced))
        for c in report.collapses
    )
    own = (report.model, "")
    refusals = tuple(replace(r, node=path if r.node in own else _join(path, r.node)) for r in report.refusals)
    before, after = ({k: n - counted.get(k, 0) for k, n in counts.items()} for counts in (report.before, report.after))
    pictures = tuple(replace(p, layer=_join(path, p.layer)) for p in report.pictures)
    return replace(
        report, collapses=collapses, refusals=refusals, before=before, after=after, pictures=pictures, scene=None
    )


def _with_islands(report: Report, islands: Sequence[Report]) -> Report:
    """One report of all."""
    parts = (report, *islands)
    return replace(
        report,
        collapses=tuple(c for p in parts for c in p.collapses),
        refusals=tuple(r for p in parts for r in p.refusals),
        before={k: sum(p.before[k] for p in parts) for k in KINDS},
        after={k: sum(p.after[k] for p in parts) for k in KINDS},
        cost_before=sum(p.cost_before for p in parts),
        cost_after=sum(p.cost_after for p in parts),
        pictures=tuple(picture for p in parts for picture in p.pictures),
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
