"""The public door of equalisation: a collapsed network in, a copy of even ranges out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from tabulate import tabulate
from torch import nn
from torch.fx import GraphModule

from fxrep.equalization.lanes import wiring_of
from fxrep.equalization.ranges import Balance, Ranges
from fxrep.errors import FxrepError
from fxrep.verification import verify
from fxrep.verification.inputs import Examples

CONVERGED = 1e-3
"""Where no scale of a round is further than this from 1, the rounds end."""


@dataclass(frozen=True)
class Link:
    """A layer of which channels are scaled, and those that read these."""

    layer: str
    into: tuple[str, ...]
    before: float
    """Mean over its channels of min(p₁, p₂), where p is a channel's range relative to the largest of the layer, as
    it is written (1) and read (2): 1 is the best."""
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

    A channel goes on through a flatten, a mean over the image, zero padding, resizing and concatenations. Of values
    that are added, channel i of each has one scale, r₁ᵢ being the largest over all layers that write it and r₂ᵢ over
    all that read it. Anything else that reads a channel keeps its scale as it is; `equalization.left` says what does.

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
    wiring = wiring_of(result)
    names = {*wiring.writes, *wiring.reads}
    layers = {n: Ranges.of(result.get_submodule(n), len(wiring.reads.get(n, ())) or None) for n in names}
    balance = Balance(wiring, layers)
    before = balance.precisions()
    for _ in range(rounds):
        if balance.step() < CONVERGED:
            break
    for name, ranges in balance.layers.items():
        ranges.scale_layer(result.get_submodule(name))
    after = balance.precisions()
    links = tuple(Link(name, balance.readers_of(name), before[name], after[name]) for name in before)
    result.equalization = Equalization(links, balance.left())  # type: ignore[assignment]
    verdict = verify(collapsed, result, example_inputs)
    if not all(verdict.trials):  # the outputs: layers between them have other scales
        raise FxrepError(f"the equalised network is not equal to what it was made from\n{verdict}")
    return result
