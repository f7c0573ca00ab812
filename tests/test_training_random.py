"""Random networks of constant-scale branches: fifty steps of a target are those of its branches, and so are gradients
through branches that are folded online."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers import drawn, relative_error
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

import fxrep
from fxrep.testing import Network, constant_scales, inputs_for

EXACT = 1e-12
STEPS = 50
RANDOM = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
#: What torch says of a network that cannot train, or not on such an input.
UNFIT = ("inplace", "does not require grad", "more than 1 value per channel")


@settings(max_examples=15)
@given(st.data())
def test_random_topologies(data: st.DataObject):
    net = data.draw(constant_scales())
    inputs = [data.draw(inputs_for(net)) for _ in range(3)]
    assume(all(can_train(net, batch) for batch in inputs))
    target = fxrep.target(net)
    event(f"rules: {len(target.rules)}")
    rounded, off = another_rounding(net), trained_apart(net, target, inputs)
    if off >= EXACT:
        event("magnifies rounding")
        run(rounded, inputs, None)
        assert off < 30 * apart(fxrep.target(rounded), net, inputs[0])


@st.composite
def with_inputs(draw: st.DrawFn) -> tuple[Network, list[Any]]:
    net = draw(constant_scales())
    return net, [draw(inputs_for(net)) for _ in range(3)]


def test_random_topologies_have_rules_and_most_agree_to_twelve_digits():
    """A floor, so that the property above is not about nothing."""
    cases = [(net, inputs) for net, inputs in drawn(with_inputs(), 22, 1) if all(can_train(net, x) for x in inputs)]
    ruled = [(net, target, inputs) for net, inputs in cases if (target := fxrep.target(net)).rules]
    assert len(ruled) > 12
    assert sum(len(target.rules) for _, target, _ in ruled) > 22
    starts = [dict(copy.deepcopy(target).named_parameters()) for _, target, _ in ruled]
    errors = [trained_apart(*case) for case in ruled]
    assert sum(error < EXACT for error in errors) > 0.9 * len(ruled)
    for (_, target, _), start in zip(ruled, starts, strict=True):
        assert max(relative_error(p, start[name]) for name, p in target.named_parameters()) > 1e-2


@settings(max_examples=25)
@given(with_inputs())
def test_random_topologies_folded_online_have_the_gradients_of_their_branches(case: tuple[Network, list[Any]]):
    net, (batch, *_) = case
    assume(can_train(net, batch))
    online = fxrep.online(net)
    event(f"folded: {len(online.report.collapses)}")
    for model in (net, online):
        _seeded_loss(model, [x.clone() for x in batch]).backward()
    assert online.state_dict().keys() == net.state_dict().keys()
    theirs = dict(net.named_parameters(remove_duplicate=False))
    largest = max(p.grad.abs().max() for p in theirs.values() if p.grad is not None)
    for name, p in online.named_parameters(remove_duplicate=False):
        assert (p.grad is None) == (theirs[name].grad is None)
        assert p.grad is None or (p.grad - theirs[name].grad).abs().max() <= 1e-11 * largest


def trained_apart(net: nn.Module, target: nn.Module, inputs: list[Any]) -> float:
    """Trains both; how far the target is then from what the branches are."""
    run(net, inputs, None)
    run(target, inputs, target)
    return apart(target, net, inputs[0])


def apart(target: nn.Module, net: nn.Module, batch: Any) -> float:
    """The largest relative difference of weights, against what the branches amount to now, and of outputs."""
    weights, expected = (dict(model.named_parameters()) for model in (target, fxrep.target(net)))
    assert weights.keys() == expected.keys()
    errors = [relative_error(weights[name], expected[name]) for name in weights]
    pairs = zip(outputs(target, batch), outputs(net, batch), strict=True)
    return max([*errors, *(relative_error(got, wanted) for got, wanted in pairs)])


@torch.no_grad()
def outputs(net: nn.Module, batch: Any) -> tuple[Tensor, ...]:
    """In eval mode, of a copy."""
    out = copy.deepcopy(net).eval()(*[x.clone() for x in batch])
    return out if isinstance(out, tuple) else (out,)


def run(net: nn.Module, inputs: list[Any], target: nn.Module | None) -> None:
    """Trains a network, or the `target` that it is, on the inputs in turn."""
    optimizer = _sgd(net, RANDOM, target)
    for number in range(STEPS):
        loss = _seeded_loss(net, [x.clone() for x in inputs[number % len(inputs)]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def another_rounding(net: Network) -> Network:
    """The network with its weights off by about the last bit: what becomes of that is the network's own doing."""
    twin, generator = copy.deepcopy(net), torch.Generator().manual_seed(0)
    for p in twin.parameters():
        p.mul_(1 + torch.randn(p.shape, generator=generator, dtype=p.dtype) * torch.finfo(p.dtype).eps)
    return twin


def can_train(net: Network, batch: Any) -> bool:
    """Not where an operation in place takes from autograd what it needs, or a batch norm sees a single number."""
    try:
        _loss(copy.deepcopy(net), [x.clone() for x in batch]).backward()
    except (RuntimeError, ValueError) as error:
        return not any(fact in str(error) for fact in UNFIT)
    return True


def _sgd(net: nn.Module, options: dict[str, Any], target: nn.Module | None) -> Any:
    trained = [p for p in net.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(()))]
    sgd = SGD(trained, **options)
    return sgd if target is None or not target.rules else fxrep.RepOptimizer(sgd, target)


def _seeded_loss(net: nn.Module, args: list[Tensor]) -> Tensor:
    """Dropouts draw the same masks."""
    torch.manual_seed(0)
    return _loss(net, args)


def _loss(net: nn.Module, args: list[Tensor]) -> Tensor:
    out = net(*args)
    return torch.stack([o.square().mean() for o in (out if isinstance(out, tuple) else (out,))]).sum()
