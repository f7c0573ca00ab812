"""A target under RepOptimizer trains as the branches do, and only with all three of multiplier, start and decay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import relative_error
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from training_cases import BLOCKS, Scale, Sum, batches, built, masked, network, repghost, repvgg, scaled, train

import fxrep
from fxrep.errors import FxrepError

EXACT = 1e-12
NESTEROV = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}


def multipliers(model: nn.Module) -> dict[str, Tensor]:
    return fxrep.RepOptimizer(SGD((t := fxrep.target(model)).parameters(), lr=1.0), t).multipliers


def outputs(net: nn.Module) -> Tensor:
    """In training mode and in eval mode, of a copy: batch norms count what they see."""
    net, (x, _) = copy.deepcopy(net), batches(1)[0]
    with torch.no_grad():
        return torch.cat([net.train()(x), net.eval()(x)])


def difference(branches: nn.Module, target: nn.Module) -> float:
    """Of the outputs, and of the weights: what the branches amount to now, against what the target has become."""
    now = dict(fxrep.target(branches.train()).named_parameters())
    weights = [relative_error(p, now[name]) for name, p in target.named_parameters()]
    return max(relative_error(outputs(target), outputs(branches)), *weights)


# The rule of iteration, by hand.


def test_multiplier_of_three_branches():
    block = repvgg().train().double()
    s, t = (branch[1].weight.detach().flatten() for branch in block.branches[:2])
    expected = (s**2).reshape(-1, 1, 1, 1).expand(4, 4, 3, 3).clone()
    expected[:, :, 1, 1] += (t**2)[:, None]
    for c in range(4):
        expected[c, c, 1, 1] = 1 + s[c] ** 2 + t[c] ** 2
    (got,) = multipliers(block).values()
    assert torch.allclose(got, expected, rtol=1e-15, atol=0)


def test_multiplier_of_a_depthwise_kernel_and_the_identity():
    block = repghost().train().double()
    expected = (block.branches[0][1].weight.detach() ** 2).reshape(4, 1, 1, 1).expand(4, 1, 3, 3).clone()
    expected[:, 0, 1, 1] += 1
    (got,) = multipliers(block).values()
    assert torch.allclose(got, expected, rtol=1e-15, atol=0)


def test_multiplier_of_a_masked_kernel():
    block = masked().train().double()
    s, t = (branch[1].weight.detach()[..., None] for branch in block.branches)
    (got,) = multipliers(block).values()
    assert torch.allclose(got, (s**2 + t**2 * block.branches[1][0].mask).expand_as(got), rtol=1e-15, atol=0)


def test_multiplier_of_two_branches_of_one_size():
    block = Sum(4, scaled(4, 4, 3), scaled(4, 4, 3)).train().double()
    a, b = (branch[1].weight.detach() for branch in block.branches)
    (got,) = multipliers(block).values()
    assert torch.allclose(got, (a**2 + b**2).reshape(-1, 1, 1, 1).expand_as(got), rtol=1e-15, atol=0)


def test_initialisation_of_three_branches():
    block = repvgg().train().double()
    (wide, s), (narrow, t), r = ((*block.branches[0],), (*block.branches[1],), block.branches[2])
    expected = s.weight[..., None] * wide.weight
    expected[:, :, 1:2, 1:2] += t.weight[..., None] * narrow.weight
    expected[:, :, 1, 1] += torch.diag(r.weight.flatten())
    assert relative_error(fxrep.target(block).reparam.weight, expected) < 1e-15


def test_what_nothing_trains_is_an_offset_and_not_multiplied():
    block = Sum(4, scaled(4, 4, 3), nn.Identity()).train().double()
    (rule,) = fxrep.target(block).rules
    s = block.branches[0][1].weight.detach()
    assert torch.equal(rule.outputs[0].multiplier, (s**2)[..., None].expand(4, 4, 3, 3))
    assert torch.equal(rule.outputs[0].offset[:, :, 1, 1], torch.eye(4, dtype=torch.float64))


def test_a_fixed_operator_after_what_trains_is_no_multiplier():
    (rule,) = fxrep.target(built("edges")).rules
    assert rule.fold is not None
    assert rule.outputs[0].multiplier is None


def test_a_large_kernel_is_derived_as_a_small_one():
    """More numbers than are folded at once: where others are put in their place, every block must see them."""
    block = Sum(128, scaled(64, 128, 3), scaled(64, 128, 1)).train()
    target = fxrep.target(block)
    assert not target.report.refusals
    ((output,),) = (rule.outputs for rule in target.rules)
    s, t = (branch[1].weight.detach().double() for branch in block.branches)
    assert torch.allclose(output.multiplier[:, :, 1, 1], (s**2 + t**2)[:, 0].expand(128, 64))
    assert torch.allclose(output.multiplier[:, :, 0, 0], (s**2)[:, 0].expand(128, 64))


def test_what_is_frozen_stays():
    block = Sum(4, scaled(4, 4, 3), scaled(4, 4, 1)).train().double()
    block.branches[0].requires_grad_(False)
    target = fxrep.target(block)
    before = target.reparam.weight.detach().clone()
    optimizer = fxrep.RepOptimizer(SGD(target.parameters(), **NESTEROV), target)
    for _ in range(3):
        optimizer.zero_grad()
        target(torch.randn(2, 4, 5, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    moved = (target.reparam.weight - before).abs() > 0
    assert moved[:, :, 1, 1].all()
    moved[:, :, 1, 1] = False
    assert not moved.any()


# Equal, step by step.


@pytest.mark.parametrize("name", BLOCKS)
def test_fifty_steps_are_those_of_the_branches(name: str):
    branches = built(name)
    target = fxrep.target(branches)
    assert target.rules
    assert difference(branches, target) < EXACT
    data, start = batches(50), copy.deepcopy(target)
    train(branches, SGD(branches.parameters(), **NESTEROV), data)
    train(target, fxrep.RepOptimizer(SGD(target.parameters(), **NESTEROV), target), data)
    assert difference(branches, target) < EXACT
    assert difference(branches, start) > 1e-2  # they went somewhere


@pytest.mark.parametrize("options", [
    {"lr": 0.05}, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
], ids=lambda o: "+".join(o))  # fmt: skip
@pytest.mark.parametrize("name", ["repvgg", "residual"])
def test_other_kinds_of_sgd(name: str, options: dict[str, Any]):
    branches = built(name)
    target = fxrep.target(branches)
    train(branches, SGD(branches.parameters(), **options), batches(10))
    train(target, fxrep.RepOptimizer(SGD(target.parameters(), **options), target), batches(10))
    assert difference(branches, target) < EXACT


def _plain(target: nn.Module) -> Any:
    return SGD(target.parameters(), **NESTEROV)


@torch.no_grad()
def _restarted(target: nn.Module) -> Any:
    for rule in target.rules:
        for output in rule.outputs:
            target.get_parameter(output.name).normal_(0, 0.3)
    return fxrep.RepOptimizer(SGD(target.parameters(), **NESTEROV), target)


@pytest.mark.parametrize("spoiled", [_plain, _restarted], ids=["no multiplier", "another start"])
def test_the_rules_are_needed(spoiled: Callable[[nn.Module], Any]):
    branches = built("repvgg")
    target = fxrep.target(branches)
    optimizer = spoiled(target)
    train(branches, SGD(branches.parameters(), **NESTEROV), batches(20))
    train(target, optimizer, batches(20))
    assert difference(branches, target) > 1e-2


def test_the_identity_must_decay():
    """One-dimensional parameters are commonly spared: the identity's scale is a part of the kernel, and must not be."""
    branches = built("repvgg")
    target = fxrep.target(branches)
    spared = [m.weight for m in branches.modules() if isinstance(m, Scale)]
    rest = [p for p in branches.parameters() if not any(p is s for s in spared)]
    groups = [{"params": rest}, {"params": spared, "weight_decay": 0.0}]
    train(branches, SGD(groups, **NESTEROV), batches(20))
    train(target, fxrep.RepOptimizer(SGD(target.parameters(), **NESTEROV), target), batches(20))
    assert difference(branches, target) > 1e-3


class WritesAfterDropout(nn.Module):
    """What dropout gives is not what it was given, so writing into it leaves the other branch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.relu()
        y = self.drop(h)
        y += self.a(h) * 0.5
        return y + self.b(h) * 2.0


def test_writing_into_what_a_dropout_gives():
    torch.manual_seed(0)
    net, x = WritesAfterDropout().double(), torch.randn(5, 4, dtype=torch.float64)
    torch.manual_seed(1)
    expected = net(x)
    target = fxrep.target(net)
    torch.manual_seed(1)
    assert torch.allclose(target(x), expected, rtol=1e-12)


class NormOfItsOwn(nn.Module):
    """A batch norm whose forward is its own, and reads its mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, training=self.training).relu()


def test_a_module_that_reads_its_mode_keeps_its_forward_and_the_rest_is_derived():
    torch.manual_seed(0)
    branches = network([Sum(4, scaled(4, 4, 3), scaled(4, 4, 1), norm=False), NormOfItsOwn(4), repvgg()])
    target = fxrep.target(branches)
    assert len(target.rules) == 2
    assert any(r.node == "4" and "reads self.training" in r.reason for r in target.report.refusals)
    train(branches, SGD(branches.parameters(), **NESTEROV), batches(20))
    train(target, fxrep.RepOptimizer(SGD(target.parameters(), **NESTEROV), target), batches(20))
    assert difference(branches, target) < EXACT


class OneWayInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Sum(4, scaled(4, 4, 3), scaled(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if self.training else x


def test_an_outermost_forward_that_reads_its_mode_is_refused():
    target = fxrep.target(OneWayInTraining())
    assert not target.rules
    (refusal,) = target.report.refusals
    assert (refusal.code, "reads self.training" in refusal.reason) == ("not-traceable", True)


# AdamW: equal where one branch falls on an entry; else up to eps.


def _adam_difference(blocks: list[nn.Module], eps: float) -> float:
    torch.manual_seed(0)
    branches = network(blocks)
    target = fxrep.target(branches)
    options = {"lr": 1e-3, "weight_decay": 0.1, "eps": eps}
    train(branches, AdamW(branches.parameters(), **options), batches(20))
    train(target, fxrep.RepOptimizer(AdamW(target.parameters(), **options), target), batches(20))
    return difference(branches, target)


def test_adamw_of_one_branch_is_exact():
    assert _adam_difference([Sum(4, scaled(4, 4, 3)), Sum(4, scaled(4, 4, 3), nn.Identity())], eps=1e-3) < EXACT


@pytest.mark.parametrize(("eps", "most"), [(1e-12, 1e-7), (1e-8, 1e-4), (1e-3, 1e-1)])
def test_adamw_of_several_branches_is_off_by_eps(eps: float, most: float):
    got = _adam_difference([repvgg(), repvgg()], eps)
    assert got < most
    assert got > EXACT


def test_adamw_needs_the_rule():
    branches = built("repvgg")
    target = fxrep.target(branches)
    train(branches, AdamW(branches.parameters(), lr=1e-3), batches(20))
    train(target, AdamW(target.parameters(), lr=1e-3), batches(20))
    assert difference(branches, target) > 1e-3


# The door.


def test_the_model_is_not_touched():
    branches = built("edges")
    state, modes = copy.deepcopy(branches.state_dict()), [m.training for m in branches.modules()]
    target = fxrep.target(branches)
    train(target, fxrep.RepOptimizer(SGD(target.parameters(), lr=0.1), target), batches(2))
    assert all(torch.equal(a, b) for a, b in zip(state.values(), branches.state_dict().values(), strict=True))
    assert modes == [m.training for m in branches.modules()]


def test_a_copy_of_a_target_trains_too():
    for name in ("repvgg", "edges"):
        branches = built(name)
        target = copy.deepcopy(fxrep.target(branches))
        train(branches, SGD(branches.parameters(), **NESTEROV), batches(3))
        train(target, fxrep.RepOptimizer(SGD(target.parameters(), **NESTEROV), target), batches(3))
        assert difference(branches, target) < EXACT


def test_eval_mode_is_an_error():
    with pytest.raises(FxrepError, match=r"eval mode; call train\(\)"):
        fxrep.target(built("repvgg").eval())


def test_frozen_batch_norms_are_constants():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4).requires_grad_(False))
    branches = network([Sum(4, inner, scaled(4, 4, 1))])
    branches[3].branches[0][1].eval()
    target = fxrep.target(branches)
    assert len(target.rules) == 1
    for net in (branches, target):
        optimizer: Any = SGD([p for p in net.parameters() if p.requires_grad], **NESTEROV)
        train(net, optimizer if net is branches else fxrep.RepOptimizer(optimizer, target), batches(10))
    x, _ = batches(1)[0]
    assert relative_error(target.eval()(x), branches.eval()(x)) < EXACT
