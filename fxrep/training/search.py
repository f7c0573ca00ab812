"""Hyper-search: the constants of RepOptimizer's scales, found by training them (arXiv 2205.15242, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor, nn

from fxrep.api import check_model
from fxrep.errors import FxrepError, Illegal
from fxrep.training.branches import Branches, ChannelAffine
from fxrep.training.expansion import Where, replace_sites
from fxrep.training.sites import Site

Scales = dict[str, dict[str, list[float]]]
S, T, R = "s", "t", "r"  # of the k×k, the 1×1 and the identity branch


class ScaledBranches(Branches):
    """norm(s⊙(W*x) + t⊙(w*x) + r⊙x), with a scale per channel at the end of each branch."""

    def scales(self) -> dict[str, list[float]]:
        """By branch."""
        last = {name: next(m for m in self[name].modules() if isinstance(m, ChannelAffine)) for name in self.summed}
        return {name: layer.weight.detach().double().tolist() for name, layer in last.items()}


def hyper_search(model: nn.Module, *, where: Where = None) -> nn.Module:
    """A copy of a plain network in which the scales of branches train, to be read by `scales_of` afterwards.

    Each convolution with more than one tap becomes s⊙k×k + t⊙1×1 + r⊙identity (the last where shapes allow), with one
    batch norm after the sum: the one that was there, or a new one. s and t begin at √(2/i) for the i-th convolution of
    its stage (1 for the 0-th), r at 1; a stage is a run of convolutions with maps of one size and as many channels.
    Convolutions that stay alone are in `.expansion.refusals`.
    """
    model = check_model(model)

    def build(site: Site) -> nn.Module:
        start = sqrt(2 / site.index) if site.index else 1.0
        values = {S: start, T: start} | ({R: 1.0} if site.keeps_shape else {})
        scales = {name: _vector(site, value) for name, value in values.items()}
        return _scaled(site, scales, trains=set(scales))

    return replace_sites(model, build, where, absorb=False)


def constant_scales(model: nn.Module, scales: Mapping[str, Mapping[str, list[float]]]) -> nn.Module:
    """A copy of a plain network with branches of constant scales, as `scales_of` gives them; only r trains.

    `target` makes of it the plain network again, with the gradients that the scales mean.

    Raises:
        FxrepError: a name that is no convolution of the model, or scales that do not fit it.
    """
    model = check_model(model)

    def build(site: Site) -> nn.Module:
        given = scales[site.name]
        wanted = {S, T, R} if site.keeps_shape else {S, T}
        channels = site.conv.out_channels
        if given.keys() != wanted or any(len(values) != channels for values in given.values()):
            told = ", ".join(f"{name}[{len(values)}]" for name, values in given.items())
            raise FxrepError(f"{site.name} takes {', '.join(sorted(wanted))} of {channels} channels, not {told}")
        return _scaled(site, {name: _vector(site, values) for name, values in given.items()}, trains={R})

    result = replace_sites(model, build, lambda name, _: name in scales, absorb=False)
    missing = sorted(scales.keys() - set(result.expansion.expanded))  # type: ignore[union-attr, arg-type]
    if missing:
        raise FxrepError(f"{type(model).__name__} has no convolution for the scales of {', '.join(missing[:4])}")
    return result


def scales_of(trained: nn.Module) -> Scales:
    """The trained scales by layer and branch: plain numbers, so that `json.dumps` takes them."""
    found = {name: m.scales() for name, m in trained.named_modules() if isinstance(m, ScaledBranches)}
    if not found:
        raise FxrepError(f"{type(trained).__name__} has no scaled branches; pass what hyper_search gave, trained")
    return found


def _vector(site: Site, value: float | list[float]) -> Tensor:
    weight = site.conv.weight
    values = torch.as_tensor(value, dtype=weight.dtype, device=weight.device)
    return values.expand(site.conv.out_channels).clone()


def _scaled(site: Site, scales: Mapping[str, Tensor], trains: set[str]) -> ScaledBranches:
    if site.is_one_tap:
        raise Illegal("not-expandable", "a kernel of one tap has no 1x1 kernel beside it")
    before = {S: (site.convolution(site.taps),), T: (site.convolution((1,) * site.dims),), R: ()}
    branches = {
        name: nn.Sequential(*before[name], ChannelAffine(vector, None, site.dims, name in trains))
        for name, vector in scales.items()
    }
    return ScaledBranches(branches, None if site.norm is not None else site.batch_norm())
