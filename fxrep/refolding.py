"""What was folded from what: new weights of the same architecture go into a collapsed model without a plan anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxrep import kernel as K
from fxrep.equal import Equal
from fxrep.errors import FxrepError
from fxrep.evaluation import Doubles
from fxrep.frozen import arguments, frozen
from fxrep.kernel import Kernel
from fxrep.rows import blocks
from fxrep.snapshot import CONSTANT
from fxrep.trees import buffers, first_names, joined, named_modules, on_meta, own_attributes, parameters

DRAFT = "_fxrep_draft"  # where a collapsed module holds its folds until it is known what their leaves are called


@frozen(eq=False)
class Named(K.Leaf):
    """A leaf that stands for the tensor `name` of whatever model is folded."""

    name: str = ""


@frozen()
class Fold:
    """One tensor of a collapsed model: a kernel, and `groups` if it is stored columns first (a transposed layer's)."""

    kernel: Kernel
    dtype: torch.dtype
    shape: tuple[int, ...]
    groups: int | None = None

    def into(self, target: Tensor) -> None:
        """Evaluates in float64, casts once, writes."""
        rows = target.new_empty(self.kernel.shape) if self.groups else target.view(self.kernel.shape)
        for start, block in blocks(self.kernel, Doubles()):
            (rows if rows.shape == block.shape else rows[start : start + len(block)]).copy_(block)
        if self.groups:
            target.copy_(columns_first(rows, self.groups))


def columns_first(weight: Tensor, groups: int) -> Tensor:
    """(O, I/g, *K) as torch's (I, O/g, *K) for transposed layers."""
    rows, columns, *taps = weight.shape
    return weight.reshape(groups, rows // groups, columns, *taps).transpose(1, 2).flatten(0, 1).contiguous()


@dataclass(frozen=True)
class Draft:
    """The folds of one graph by the names of their targets, what had to be equal for them, and constant indices."""

    folds: Mapping[str, Fold]
    equal: Sequence[Equal]
    indices: Sequence[Tensor]


@dataclass(frozen=True)
class FoldPlan:
    """How each tensor of a collapsed model comes from those of its original; `print(plan)` shows the map of keys."""

    folds: Mapping[str, Fold] = field(default_factory=dict)
    #: tensors that are the model's own: new name -> name there
    kept: Mapping[str, str] = field(default_factory=dict)
    #: tensors that belong to the collapse alone (indices of channels), by their new name
    static: Mapping[str, Tensor] = field(default_factory=dict)
    equal: tuple[Equal, ...] = ()
    #: constant indices of the model, which must stay what they were
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    signature: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    layers: tuple[tuple[str, str, int], ...] = ()
    #: the names that `state_dict` of the collapsed model has
    keys: tuple[str, ...] = ()
    lost: str = ""
    """Why nothing can be folded with it, if so."""

    @property
    def key_map(self) -> dict[str, tuple[str, ...]]:
        """New key -> the keys that it is computed from."""
        folded = {new: tuple(dict.fromkeys(n.name for n in _named(f.kernel))) for new, f in self.folds.items()}
        return {**folded, **{new: (old,) for new, old in self.kept.items()}}

    def __str__(self) -> str:
        return "\n".join(f"{new}\n    {', '.join(old) or 'constants'}" for new, old in self.key_map.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldPlan:
        return self  # nothing of it changes

    def __reduce__(self) -> tuple[Any, ...]:
        return FoldPlan, ((), (), (), (), (), (), (), (), "a pickled model has lost how it was folded")

    def fold_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of the collapsed model from one of its original's. Kept tensors are those of `state`.

        Raises FxrepError where `state` is not of the architecture that was collapsed.
        """
        self._check(state)
        missing = next((n for n in self._needed() if n not in state), None)
        if missing is not None:
            raise FxrepError(f"{missing} is folded in but is in no state dict; refold from the model itself instead")
        found = self._folded(state)
        found |= {new: state[old] for new, old in self.kept.items() if old in state} | dict(self.static)
        return {key: found[key] for key in self.keys}

    def refold(self, collapsed: nn.Module, model: nn.Module) -> None:
        """Folds the weights of `model` into `collapsed`, in its dtypes and on its devices.

        Raises FxrepError, with nothing changed, where `model` is not of the architecture that was collapsed.
        """
        modules = named_modules(model)
        self._check(_registered(modules), _layers(modules))
        tensors = _tensors(modules)
        targets = _tensors(named_modules(collapsed))
        _check_numbers(tensors, "the model")
        _check_numbers(targets, "the collapsed model")
        self._check_needed(tensors)
        with torch.no_grad():
            for new, fold in self._bound(tensors):
                fold.into(targets[new].detach())
            for new, old in self.kept.items():
                targets[new].detach().copy_(tensors[old].detach())

    def _folded(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._check_needed(state)
        found = {}
        with torch.no_grad():
            for new, fold in self._bound(state):
                device = next((n.tensor.device for n in K.leaves(fold.kernel)), torch.device("cpu"))
                found[new] = torch.empty(fold.shape, dtype=fold.dtype, device=device)
                fold.into(found[new])
        return found

    def _check(self, state: Mapping[str, Tensor], layers: tuple[tuple[str, str, int], ...] | None = None) -> None:
        """Raises FxrepError unless `state` has the names, shapes and dtypes of the original, and it the same layers."""
        if self.lost:
            raise FxrepError(f"{self.lost}; collapse the model again with fxrep.reparameterize")
        there = {n: (tuple(t.shape), t.dtype) for n, t in state.items()}
        wrong = next((n for n in self.signature if layers is not None and n not in there), None)
        wrong = wrong or next((n for n in there if n not in self.signature), None)
        if wrong is not None:
            where = "only in the model that was collapsed" if wrong in self.signature else "not in it"
            raise FxrepError(f"another architecture than was collapsed: {wrong} is {where}; collapse this one anew")
        wrong = next((n for n, seen in there.items() if seen != self.signature[n]), None)
        if wrong is not None:
            (shape, dtype), (was, kind) = there[wrong], self.signature[wrong]
            fact = f"{wrong} is {shape} of {dtype}, not {was} of {kind}"
            raise FxrepError(f"another architecture than was collapsed: {fact}; collapse this one anew")
        other = next((new[0] for new, old in zip(layers or (), self.layers, strict=False) if new != old), None)
        if other is not None or len(layers or self.layers) != len(self.layers):
            raise FxrepError(f"another architecture than was collapsed: at {other or 'its end'}; collapse it anew")

    def _needed(self) -> list[str]:
        read = [n.name for f in self.folds.values() for n in _named(f.kernel)]
        read += [n.name for e in self.equal for k in (e.a, e.b) if k is not None for n in _named(k)]
        return list(dict.fromkeys([*read, *(old for new, old in self.kept.items() if new in self.keys)]))

    def _check_needed(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises FxrepError where what the plan took for granted of the numbers is not so of these."""
        missing = next((n for n in self._needed() if n not in tensors), None)
        if missing is not None:
            raise FxrepError(f"another architecture than was collapsed: {missing} is missing; collapse this one anew")
        changed = next((n for n, was in self.indices.items() if not torch.equal(was, tensors[n].cpu())), None)
        if changed is not None:
            raise FxrepError(f"{changed} holds other indices than when the model was collapsed; collapse it anew")
        for one in self.equal:
            if not _over(one, lambda kernel: _bind(kernel, tensors)).holds:
                names = ", ".join(n.name for k in (one.a, one.b) if k is not None for n in _named(k))
                fact = f"a border was padded with what {names} gave there, and these weights give something else"
                raise FxrepError(f"{fact}; collapse this model anew")

    def _bound(self, tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Fold]]:
        return ((n, replace(f, kernel=_bind(f.kernel, tensors))) for n, f in self.folds.items())


def refold(collapsed: nn.Module, model: nn.Module) -> None:
    """Folds new weights of the architecture that `collapsed` was made from into it, without tracing or planning.

    For an EMA copy, or the checkpoint of the next epoch: in the time of the folding alone. `model` may be in training
    mode and stays as it is. Kept tensors are refreshed too. The plan travels with a deep copy, not with a pickle.

    Raises FxrepError, with `collapsed` as it was, for a model of another architecture, shape or dtype.
    """
    plan = vars(collapsed).get("plan")
    if not isinstance(plan, FoldPlan):
        raise FxrepError(f"{type(collapsed).__name__} is no result of fxrep.reparameterize; refold into one that is")
    if not isinstance(model, nn.Module):
        raise FxrepError(f"got {type(model).__name__}, not a torch.nn.Module; plan.fold_state_dict takes a state dict")
    plan.refold(collapsed, model)


@dataclass(frozen=True)
class Architecture:
    """What another model must have in common with the one that was collapsed."""

    signature: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    layers: tuple[tuple[str, str, int], ...]
    tensors: Mapping[str, Tensor]

    @staticmethod
    def of(model: nn.Module) -> Architecture:
        modules = named_modules(model)
        registered = _registered(modules)
        signature = {n: (tuple(t.shape), t.dtype) for n, t in registered.items()}
        return Architecture(signature, _layers(modules), registered | _plain(modules))


def make_fold_plan(result: nn.Module, root: nn.Module, before: Architecture) -> FoldPlan:
    """From the drafts in `result` and the names that their leaves had before, or that tracing gave them in `root`."""
    drafts = [(name, vars(m).pop(DRAFT)) for name, m in named_modules(result) if DRAFT in vars(m)]
    names = {id(t): name for name, t in reversed({**_constants(named_modules(root)), **before.tensors}.items())}
    renamed = _renaming(names)
    folds, equal, indices = dict[str, Fold](), list[Equal](), dict[str, Tensor]()
    try:
        for prefix, draft in drafts:
            folds |= {joined(prefix, n): replace(f, kernel=renamed(f.kernel)) for n, f in draft.folds.items()}
            equal += [_over(e, renamed) for e in draft.equal]
            indices |= {names[id(t)]: t.detach().cpu().clone() for t in draft.indices if id(t) in names}
    except KeyError as unnamed:
        return FoldPlan(lost=str(unnamed.args[0]))
    present = named_modules(result)
    kept = {new: names[id(t)] for new, t in _tensors(present).items() if new not in folds and id(t) in names}
    static = {new: t for new, t in _registered(present).items() if new not in folds and new not in kept}
    keys = tuple(result.state_dict(keep_vars=True))
    return FoldPlan(folds, kept, static, tuple(equal), indices, before.signature, before.layers, keys)


def _check_numbers(tensors: Mapping[str, Tensor], whose: str) -> None:
    empty = on_meta(tensors)
    if empty is not None:
        raise FxrepError(f"{empty} of {whose} is on meta, where there are no numbers; bring weights onto cpu first")


def _registered(modules: Sequence[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """Parameters, then buffers, by their dotted names, each under every name that it has."""
    return {**parameters(modules), **buffers(modules)}


def _tensors(modules: Sequence[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """The registered ones, and those that are mere attributes."""
    return _registered(modules) | _plain(modules)


def _plain(modules: Sequence[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    return {joined(p, n): t for p, m in modules for n, t in own_attributes(m) if isinstance(t, Tensor)}


def _constants(modules: Sequence[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """What tracing stowed away."""
    stores = ((p, s) for p, m in modules for s in (m._parameters, m._buffers, vars(m)))
    return {joined(p, n): t for p, s in stores for n, t in s.items() if CONSTANT in n and isinstance(t, Tensor)}


def _layers(modules: Sequence[tuple[str, nn.Module]]) -> tuple[tuple[str, str, int], ...]:
    """Name, class and a hash of the plain settings of each module, told once: strides, pads, eps."""
    return tuple((name, type(m).__qualname__, _settings(m)) for name, m in first_names(modules))


def _settings(module: nn.Module) -> int:
    return hash(repr([(k, v) for k, v in own_attributes(module) if type(v) in _SETTINGS]))


_SETTINGS = frozenset((int, float, bool, str, tuple))


def _named(kernel: Kernel) -> Iterable[Named]:
    return (leaf for leaf in K.leaves(kernel) if isinstance(leaf, Named))


def _renaming(names: Mapping[int, str]) -> Callable[[Kernel], Kernel]:
    """Gives kernels with names in the place of the model's tensors; constants that tracing made stay. What kernels have
    in common is made once."""

    blanks: dict[torch.Size, Tensor] = {}

    def named(leaf: K.Leaf) -> Kernel:
        name = names.get(id(leaf.tensor))
        if name is None:
            raise KeyError("a weight is computed outside of the forward: by a parametrisation, a hook or a kept module")
        if CONSTANT in name and name.rpartition(".")[2].startswith(CONSTANT):
            return K.Leaf.of(leaf.tensor.detach().clone(), leaf.axes)
        shape = leaf.tensor.shape
        blank = blanks[shape] if shape in blanks else blanks.setdefault(shape, torch.empty(shape, device="meta"))
        return Named(leaf.shape, blank, leaf.axes, name)

    return _Changed(named)


def _bind(kernel: Kernel, tensors: Mapping[str, Tensor]) -> Kernel:
    def bound(leaf: K.Leaf) -> Kernel:
        return K.Leaf.of(tensors[leaf.name], leaf.axes) if isinstance(leaf, Named) else leaf

    return _Changed(bound)(kernel)


def _over(equal: Equal, change: Callable[[Kernel], Kernel]) -> Equal:
    a, b = (None if kernel is None else change(kernel) for kernel in (equal.a, equal.b))
    return Equal(a, b, equal.length)


class _Changed:
    """The same expressions over other leaves."""

    def __init__(self, change: Callable[[Any], Kernel]) -> None:
        self.change = change
        self.made: dict[int, tuple[Kernel, Kernel]] = {}

    def __call__(self, kernel: Kernel) -> Kernel:
        for node in () if id(kernel) in self.made else K.topological((kernel,)):
            if id(node) not in self.made:
                self.made[id(node)] = node, self._node(node)
        return self.made[id(kernel)][1]

    def _node(self, node: Kernel) -> Kernel:
        if isinstance(node, K.Leaf):
            return self.change(node)
        if not node.operands:
            return node
        return type(node)(*map(self._swapped, arguments(node)))

    def _swapped(self, value: Any) -> Any:
        if isinstance(value, Kernel):
            return self.made[id(value)][1]
        return tuple(map(self._swapped, value)) if isinstance(value, tuple) else value
