"""Branches folded at each forward: their values, their gradients, and what they keep for the backward pass."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import randomise, relative_error
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from training_cases import Scale, Sum, scaled

import fxrep
from fxrep.errors import FxrepError

EXACT = 1e-12


def without_norms() -> nn.Module:
    inner = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False))
    return Sum(4, scaled(4, 4, 3, trains=True), inner, Scale(4, trains=True)).double()


def expanded(block: str) -> nn.Module:
    layers = [nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1)]
    return randomise(fxrep.expand(nn.Sequential(*layers), block)).double().train()


def frozen(net: nn.Module, affine: bool) -> nn.Module:
    """Batch norms by their own statistics, which stay; their scale and shift train unless `affine` is frozen too."""
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval().requires_grad_(not affine)
    return net


def agree(net: nn.Module, online: nn.Module) -> None:
    """Step by step: the second forward folds what the first step has made."""
    assert {n for n, _ in online.named_parameters()} == {n for n, _ in net.named_parameters()}
    torch.manual_seed(1)
    theirs, x = dict(net.named_parameters()), torch.randn(2, 4, 7, 6, dtype=torch.float64)
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (net, online)]
    optimizers = [torch.optim.SGD(parameters, lr=1e-3, momentum=0.9) for parameters in trained]
    for _ in range(3):
        outs = [model(x) for model in (net, online)]
        assert relative_error(outs[1], outs[0]) < EXACT
        for optimizer, out in zip(optimizers, outs, strict=True):
            optimizer.zero_grad()
            out.square().sum().backward()
        for name, parameter in online.named_parameters():
            assert (parameter.grad is None) == (theirs[name].grad is None)
            assert parameter.grad is None or relative_error(parameter.grad, theirs[name].grad) < EXACT, name
        for optimizer in optimizers:
            optimizer.step()


def test_gradients_are_those_of_the_branches():
    torch.manual_seed(0)
    net = without_norms()
    online = fxrep.online(net)
    assert sum(collapse.became.startswith("Conv2d") for collapse in online.report.collapses) == 1
    assert online.report.after["conv"] == 1
    agree(net, online)


@pytest.mark.parametrize("affine", [False, True], ids=["scales train", "all frozen"])
@pytest.mark.parametrize("block", ["repvgg", "acnet", "dbb", "mobileone"])
def test_gradients_through_frozen_batch_norms(block: str, affine: bool):
    torch.manual_seed(0)
    net = frozen(expanded(block), affine)
    online = fxrep.online(net)
    assert (online.report.after["conv"], online.report.after["bn"]) == (2, 0)
    agree(net, online)
    assert online.state_dict().keys() == net.state_dict().keys()


def test_batch_norms_in_training_mode_stay_and_say_so():
    torch.manual_seed(0)
    net = expanded("repvgg")
    online = fxrep.online(net)
    assert online.report.after == online.report.before
    told = [r for r in online.report.refusals if r.code == "batch-statistics"]
    assert len(told) == 5
    assert all("eval()" in r.hint for r in told)
    agree(net, online)
    buffers = dict(net.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in online.named_buffers() if n.endswith("tracked"))
    assert all(relative_error(b, buffers[n]) < EXACT for n, b in online.named_buffers() if n.endswith("mean"))


def test_folded_as_if_frozen_a_training_norm_would_train_otherwise():
    """The refusal's witness: what the batch's own statistics give is not what the stored ones give."""
    torch.manual_seed(0)
    net = expanded("repvgg")
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    naive = fxrep.online(frozen(copy.deepcopy(net), affine=False))
    assert relative_error(naive(x), net(x)) > 1e-2


class Counts(nn.Module):
    """A forward that decides by values."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(FxrepError, match=r"eval mode; call train\(\)"):
        fxrep.online(without_norms().eval())
    with pytest.raises(FxrepError, match="got int, not"):
        fxrep.online(3)  # type: ignore[arg-type]
    kept = fxrep.online(Counts())
    assert {r.code for r in kept.report.refusals} == {"not-traceable"}
    parametrized = Sum(4, scaled(4, 4, 3), weight_norm(nn.Conv2d(4, 4, 1))).double()
    assert "parameters-not-linear" in {r.code for r in fxrep.online(parametrized).report.refusals}


def test_it_is_not_pickled_and_its_state_dict_is_the_models():
    net = without_norms()
    online = fxrep.online(net)
    with pytest.raises(FxrepError, match="save its state_dict"):
        pickle.dumps(online)
    other = without_norms()
    online.load_state_dict(other.state_dict())
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    assert relative_error(online(x), other(x)) < EXACT


def test_tied_and_unused_layers_stay_in_the_state_dict():
    net = nn.Sequential(*(Sum(4, scaled(4, 4, 3, trains=True), scaled(4, 4, 1)) for _ in range(2))).double()
    net[0].branches[0][0].weight = net[1].branches[0][0].weight
    net[0].spare = nn.Conv2d(4, 4, 1).double()
    online = fxrep.online(net)
    assert online.state_dict().keys() == net.state_dict().keys()
    agree(net, online)


def test_it_keeps_less_for_the_backward_pass():
    net = Sum(4, *(scaled(4, 4, k, trains=True) for k in (3, 3, 1)), Scale(4, trains=True), norm=False).double()
    x = torch.randn(2, 4, 32, 32, dtype=torch.float64)
    assert _kept(fxrep.online(net), x) < _kept(net, x) / 2
    normed = frozen(expanded("dbb"), affine=False)
    assert _kept(fxrep.online(normed), x) < _kept(normed, x) / 3


def _kept(net: nn.Module, x: Tensor) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(x)
    assert out.requires_grad
    return sum(kept.values())
