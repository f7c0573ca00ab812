"""Networks made for training: searched, derived, and refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import relative_error
from torch import Tensor, nn
from training_cases import Fixed, Scale, Sum, scaled

import fxrep
from fxrep.cli import load
from fxrep.errors import FxrepError

# Hyper-search.


def plain() -> nn.Sequential:
    convs = [(3, 4, 1), (4, 4, 1), (4, 4, 1), (4, 6, 2), (6, 6, 1)]
    parts = [(nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()) for i, o, s in convs]
    return nn.Sequential(*(layer for part in parts for layer in part)).double()


def test_the_searched_scales_begin_as_published():
    scales = fxrep.scales_of(fxrep.hyper_search(plain()))
    starts = {"0": 1.0, "3": 2**0.5, "6": 1.0, "9": 1.0, "12": 2**0.5}
    assert {name: entry["s"][0] for name, entry in scales.items()} == pytest.approx(starts)
    assert {name: entry["t"][0] for name, entry in scales.items()} == pytest.approx(starts)
    assert {name for name, entry in scales.items() if "r" in entry} == {"3", "6", "12"}
    assert all(entry.get("r", [1.0])[0] == 1.0 for entry in scales.values())


def test_scales_become_the_constants_of_a_target():
    searched = fxrep.hyper_search(plain())
    for parameter in searched.parameters():
        nn.init.normal_(parameter)
    scales = json.loads(json.dumps(fxrep.scales_of(searched)))
    target = fxrep.target(fxrep.constant_scales(plain(), scales))
    assert len(target.rules) == 5
    multiplier = target.rules[1].outputs[0].multiplier
    s, t = (torch.tensor(scales["3"][kind], dtype=torch.float64) for kind in "st")
    assert torch.allclose(multiplier[0, 0], _centred(s[0] ** 2, 1 + t[0] ** 2))
    assert torch.allclose(multiplier[0, 1], _centred(s[0] ** 2, t[0] ** 2))


def _centred(everywhere: Tensor, more: Tensor) -> Tensor:
    expected = everywhere.expand(3, 3).clone()
    expected[1, 1] += more
    return expected


def test_scales_that_do_not_fit_are_an_error():
    scales = fxrep.scales_of(fxrep.hyper_search(plain()))
    with pytest.raises(FxrepError, match="no convolution for the scales of 99"):
        fxrep.constant_scales(plain(), {**scales, "99": scales["3"]})
    with pytest.raises(FxrepError, match="takes s, t of 4 channels"):
        fxrep.constant_scales(plain(), {"0": scales["3"]})
    with pytest.raises(FxrepError, match="no scaled branches"):
        fxrep.scales_of(plain())


# Refusals of the theory.


def test_a_batch_norm_in_a_branch_is_refused():
    inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    target = fxrep.target(Sum(4, inner, scaled(4, 4, 1)).double())
    assert isinstance(target.get_submodule("branches.0.1"), nn.BatchNorm2d)  # a layer still, and the sum a sum
    assert [o.name for rule in target.rules for o in rule.outputs] == ["branches.1.reparam.weight"]
    assert any(r.code == "batch-statistics" and "in a branch" in r.reason for r in target.report.refusals)


def test_two_trained_operators_in_sequence_are_refused():
    inner = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False))
    target = fxrep.target(Sum(4, inner, scaled(4, 4, 3)).double())
    assert any(r.code == "parameters-not-linear" and "both train" in r.reason for r in target.report.refusals)


def test_a_kernel_that_trains_in_two_places_is_refused():
    shared = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    blocks = [Sum(4, nn.Sequential(shared, Scale(4)), scaled(4, 4, 1)) for _ in range(2)]
    target = fxrep.target(nn.Sequential(*blocks).double())
    ruled = {output.name for rule in target.rules for output in rule.outputs}
    assert all(".branches.1." in name for name in ruled)  # that one is nobody else's
    assert {r.code for r in target.report.refusals} >= {"tied-parameters"}


def test_a_fold_over_a_bias_that_happens_to_be_zero_is_refused():
    first = nn.Conv2d(4, 4, 1, groups=4)
    nn.init.zeros_(first.bias)
    target = fxrep.target(nn.Sequential(first, nn.ZeroPad2d(1), Fixed(4)).double())
    assert {r.code for r in target.report.refusals} & {"holds-by-value"}


# Gradients that do not go where the values come from.


class TurnedOff(nn.Module):
    """The input has no gradient by `a`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = scaled(4, 4, 3), scaled(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.a(x)
        return y + self.b(x)


class WritesThroughDetached(nn.Module):
    """`b` reads what is written, and its gradient does not go to what wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (scaled(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y, written = x * 0.5, self.a(x)
        z = y.detach()
        z += written
        return self.b(y) + self.c(z)


@pytest.mark.parametrize("make", [fxrep.target, fxrep.online])
@pytest.mark.parametrize("kind", [TurnedOff, WritesThroughDetached])
def test_gradients_go_where_the_forward_lets_them(kind: type[nn.Module], make: Any):
    torch.manual_seed(0)
    net = nn.Sequential(Sum(4, scaled(4, 4, 3), scaled(4, 4, 1), norm=False), kind()).double()
    made, x = make(net), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    assert any(collapse.name.startswith("0.") for collapse in made.report.collapses)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, given in zip((net, made), inputs, strict=True):
        model(given).square().sum().backward()
    assert relative_error(inputs[1].grad, inputs[0].grad) < 1e-12


# Networks of torchvision and timm.


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rules"), [("torchvision:resnet18", 17), ("timm:mobilenetv2_050", 18)])
def test_a_target_of_a_real_network(name: str, rules: int):
    """timm's batch norms read their mode, and keep their forward; every searched layer is derived."""
    torch.manual_seed(0)
    net = load(name).double()
    branches = fxrep.constant_scales(net, fxrep.scales_of(fxrep.hyper_search(net))).train()
    target = fxrep.target(branches)
    assert len(target.rules) == rules
    options = {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
    x, y = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.arange(4)
    for model in (branches, target):
        sgd = torch.optim.SGD(model.parameters(), **options)
        optimizer = sgd if model is branches else fxrep.RepOptimizer(sgd, target)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    expected = dict(fxrep.target(branches).named_parameters())
    # Absolute: a shift before a batch norm has no gradient, and is nothing but rounding.
    assert max(float((p - expected[n]).abs().max()) for n, p in target.named_parameters()) < 1e-11
