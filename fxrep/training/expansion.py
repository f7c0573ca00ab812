"""The inverse of re-parameterization: convolutions replaced by the branches that they could have come from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fxrep.api import check_model
from fxrep.errors import FxrepError, Illegal, Refusal
from fxrep.training.blocks import BLOCKS, Block
from fxrep.training.branches import Branches
from fxrep.training.sites import Site, find_sites

Where = str | Callable[[str, nn.Module], bool] | None
UserBlock = Callable[[nn.Module], Mapping[str, nn.Module] | None]


@dataclass(frozen=True)
class Expansion:
    """Which layers were given branches, and why the others were not."""

    expanded: tuple[str, ...]
    refusals: tuple[Refusal, ...]

    def __str__(self) -> str:
        named = ", ".join(name or "the model itself" for name in self.expanded)
        return "\n".join([f"expanded: {named or 'nothing'}", *map(str, self.refusals)])


def expand(
    model: nn.Module, block: str | UserBlock = "repvgg", *, where: Where = None, preserve: bool = False
) -> nn.Module:
    """A copy of the network with training-time branches in the place of its convolutions.

    `reparameterize` of the result, trained or not, has the layers of `reparameterize(model)`, biases included: a
    convolution whose layer has none there stays alone, for the blocks named below all have shifts.

    Args:
        model: any network; it is not touched. In a forward that cannot be traced, what it provably only calls is
            expanded.
        block: one of `repvgg`, `acnet`, `dbb`, `mobileone`, `ecbsr`, `dilated`; or a function from a convolution to the
            branches beside it by name (None: it stays alone), each from its input to a map of its output's shape;
            with shifts where the convolution has none, the deployed layer gains a bias.
        where: a pattern of qualified names ("stages.*"), or a predicate of name and layer (None: every convolution).
        preserve: compute what the model computes, in training mode too: the convolution and its batch norm are kept as
            the first branch, and the last layer of every other one starts at zero. Else everything is initialised
            anew, as the block's paper says, from torch's global random state.

    Returns:
        The network, in the model's mode, with an `Expansion` at `.expansion`.

    Raises:
        FxrepError: an unknown block, a `where` that nothing fits, a branch that gives another shape, or, with
            `preserve`, one that does not end in a layer with weights.
    """
    model = check_model(model)
    chosen = _chosen(block)

    def build(site: Site) -> nn.Module:
        if chosen.shifting and not site.is_shifted:
            fact = "its branches add a bias, and the layer that the convolution is deployed as has none"
            raise Illegal("not-expandable", fact, "give the convolution a bias, or pass branches without one")
        extra = chosen.branches(site)
        if not extra:
            raise Illegal("not-expandable", "the block has no branch for its geometry")
        main = _kept(site, chosen) if preserve else _fresh(site, chosen)
        for name, branch in extra.items():
            _check_shape(site, name, branch)
            if preserve:
                _silence(site, name, branch)
        return Branches({"main": main, **extra})

    return replace_sites(model, build, where, absorb=chosen.normalised)


def replace_sites(model: nn.Module, build: Callable[[Site], nn.Module], where: Where, absorb: bool) -> nn.Module:
    """A copy of the model with `build(site)` at each site that `where` takes; with `absorb`, in the place of the batch
    norm after it too."""
    there, refusals = find_sites(model)
    takes = _predicate(where)
    sites = [s for s in there if takes(s.name, s.conv)]
    refusals = [r for r in refusals if takes(r.node, model.get_submodule(r.node))]
    if where is not None and not sites and not refusals:
        names = ", ".join(s.name for s in there[:4])
        raise FxrepError(f"where={where!r} fits no convolution of {type(model).__name__}; it has {names or 'none'}")
    result = copy.deepcopy(model)
    expanded = []
    for site in sites:
        try:
            branches = build(site)
        except Illegal as illegal:
            refusals.append(Refusal(site.name, illegal.code, illegal.reason, illegal.hint))
            continue
        branches.train(site.conv.training)
        expanded.append(site.name)
        if absorb and site.norm_name is not None:
            result = _with(result, site.norm_name, nn.Identity())
        result = _with(result, site.name, branches)
    result.expansion = Expansion(tuple(expanded), tuple(refusals))  # type: ignore[assignment]
    return result


def _with(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The model with another module at a path; at the empty one, that module itself."""
    if not name:
        return module
    model.set_submodule(name, module)
    return model


def _chosen(block: str | UserBlock) -> Block:
    if isinstance(block, str):
        if block not in BLOCKS:
            raise FxrepError(f"there is no block {block!r}; there are {', '.join(BLOCKS)}, or pass a function")
        return BLOCKS[block]
    return Block(lambda site: block(site.conv) or {}, normalised=False, shifting=False)


def _predicate(where: Where) -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda name, layer: True
    if isinstance(where, str):
        return lambda name, layer: fnmatchcase(name, where)
    return where


def _fresh(site: Site, block: Block) -> nn.Module:
    """The convolution anew."""
    if block.normalised:
        return nn.Sequential(site.convolution(site.taps), site.batch_norm())
    return site.convolution(site.taps, bias=site.conv.bias is not None)


def _kept(site: Site, block: Block) -> nn.Module:
    """The convolution as it is, with the batch norm after it where the branches have theirs."""
    conv = copy.deepcopy(site.conv)
    return nn.Sequential(conv, copy.deepcopy(site.norm)) if block.normalised and site.norm is not None else conv


def _check_shape(site: Site, name: str, branch: nn.Module) -> None:
    """Raises FxrepError for a branch whose output is not of the convolution's shape."""
    expected, got = (_run(site, module) for module in (site.conv, branch))
    if expected.shape != got.shape:
        fact = f"gives {tuple(got.shape)} where {site.name} gives {tuple(expected.shape)}"
        raise FxrepError(f"the branch {name!r} of the block {fact}; give it the same stride, padding and channels")


@torch.no_grad()
def _run(site: Site, module: nn.Module) -> Tensor:
    """What a module makes of a small map, in eval mode, without a trace of it."""
    size = [d * (k - 1) + 3 for k, d in zip(site.taps, site.conv.dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, site.conv.in_channels, *size, generator=generator).to(site.conv.weight)
    result: Tensor = copy.deepcopy(module).eval()(x)
    return result


def _silence(site: Site, name: str, branch: nn.Module) -> None:
    """Starts the last layer of a branch at zero. Raises FxrepError where that does not make the branch zero."""
    layers: list[Any] = [m for m in branch.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    for tensor in (layers[-1].weight, layers[-1].bias) if layers else ():
        if tensor is not None:
            nn.init.zeros_(tensor)
    if bool(_run(site, branch).any()):
        raise FxrepError(
            f"the branch {name!r} does not end in a layer with weights, which preserve=True starts at zero"
        )
