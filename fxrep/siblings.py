"""Layers that read one value and whose results stay apart, as one layer and views of its channels.

It pays where the launches and the readings of the input that are saved weigh more than the copies of those views that
somebody cannot read as they are. Only costs of this very machine can tell: shipped ones never merge siblings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from fxrep import form as forms
from fxrep.affine import AffineConv
from fxrep.form import AffineForm
from fxrep.lower import Emit, Recipe, recipe_of
from fxrep.parts import ONE, Anchor, Part
from fxrep.pricing import total
from fxrep.state import State


def merge_siblings(state: State) -> None:
    """Makes one layer of those that read one value alike, where that is no more work and faster."""
    aim = state.pricer.aim
    if aim.objective != "latency" or not (aim.profile.measured or aim.trial):
        return
    for members in list(_families(state)):
        stacked = _stacked(state, members)
        if stacked is not None and _pays(state, members, stacked):
            state.share(members, stacked, _views(state, members))


def _families(state: State) -> Iterator[list[str]]:
    """Layers on one value that differ in their numbers and output channels alone."""
    alike: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in sorted(state.recipes, key=state.order.__getitem__):
        operator = _layer(state, name)
        if operator is not None:
            pads = operator.pad_lo, operator.pad_hi, operator.mode
            geometry = operator.taps, operator.stride, operator.dilation, *pads
            alike[state.sources(name)[0], operator.dims, geometry].append(name)
    for (source, *_), members in alike.items():
        first, last = state.place(members[0]), state.place(members[-1])
        if len(members) > 1 and not any(first < w < last for w in state.problem.writes.get(source, ())):
            yield members


def _layer(state: State, name: str) -> AffineConv | None:
    """The one plain layer that computes the value, if it may be computed elsewhere."""
    if name in state.removed or name in state.hosts or name in state.problem.fixed:
        return None
    first, *others = state.recipes[name].emits
    operator = first.operator
    if others or operator is None or first.is_pad or first.anchor.rows is not None:
        return None
    plain = operator.groups == 1 and not operator.transposed and not operator.averages and operator.fill is None
    return operator if plain and first.anchor.source not in state.hosts else None


def _stacked(state: State, members: Sequence[str]) -> Recipe | None:
    """All of them as one layer, where it is no more work."""
    parts = [state.recipes[m].form for m in members]
    merged = forms.merged(forms.cat(parts, parts[0].dims or 0))
    if merged is None or merged.channels is None:
        return None
    recipe = recipe_of(merged)
    apart = total(state.efforts[m] for m in members)
    name = state.shared_name(members)
    state.shapes[name] = state.with_channels(members[0], merged.channels, merged.dims or 0)
    return None if state.effort(name, recipe).exceeds(apart) else recipe


def _views(state: State, members: Sequence[str]) -> list[Recipe]:
    """Each member's channels of the one layer; contiguous where somebody reads them who would copy them anyway."""
    name, dims = state.shared_name(members), state.recipes[members[0]].dims
    bounds = accumulate((state.recipes[m].form.channels or 0 for m in members), initial=0)
    views = []
    for member, (low, high) in zip(members, pairwise(bounds), strict=True):
        anchor = Anchor(name, tuple(range(low, high)))
        form = AffineForm((Part({anchor: ONE}, None, high - low),), dims)
        views.append(Recipe(form, ((Emit(anchor, dense=member in state.problem.dense),),)))
    return views


def _pays(state: State, members: Sequence[str], stacked: Recipe) -> bool:
    """Whether what is saved is more than what the views cost: their launches, and their copies."""
    profile = state.pricer.aim.profile
    views = zip(members, _views(state, members), strict=True)
    name = state.shared_name(members)
    return state.saved(members, name, stacked, state.cost(name, stacked)) > sum(
        state.cost(m, view) + profile.view for m, view in views
    )
