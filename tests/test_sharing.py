"""Layers that several calls share stay one layer, and a network never holds more numbers than before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import image
from helpers import randomise, relative_error
from reader_cases import Net, bn, conv, linear
from torch import Tensor, nn

import fxrep
from fxrep import kernel as K
from fxrep.sharing import Keys


def stored(model: nn.Module) -> int:
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def in_a_loop(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = m.bn(m.conv(x)).relu()
    return x


def residual(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = (m.conv(x) + x).relu()
    return x


def scaled(m: Any, x: Tensor) -> Tensor:
    """A scale that is a layer of its own, on two values."""
    return m.bn(x.relu()).sigmoid() * m.bn(x.sigmoid()).relu()


def with_other_norms(m: Any, x: Tensor) -> Tensor:
    return m.b(m.conv(m.bn(m.conv(x)).relu())).relu()


def once_with_a_norm(m: Any, x: Tensor) -> Tensor:
    return m.conv(m.bn(m.conv(x)).relu())


def shifted(m: Any, x: Tensor) -> Tensor:
    """A scalar scale and shift before a layer without bias, which would be a vector of biases."""
    return m.head(m.gain * x.relu() + m.shift)


def with_scalars() -> nn.Module:
    network = Net(shifted, head=nn.Conv2d(4, 40, 1, bias=False))
    network.gain, network.shift = nn.Parameter(torch.tensor([0.7])), nn.Parameter(torch.tensor([0.3]))
    return network


def ready(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomise(network).double().eval()


SHARED: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "a block in a loop": (lambda: Net(in_a_loop, conv=conv(bias=False), bn=bn()), {"conv": 3, "bn": 0}),
    "a residual": (lambda: Net(residual, conv=conv(groups=4)), {"conv": 3, "add": 0}),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_calls_of_one_layer_stay_calls_of_one_layer(name: str, inplace: bool):
    build, left = SHARED[name]
    network, x = ready(build()), image(2, 4, 9, 8)
    with torch.no_grad():
        expected, before = network(x), stored(network)
    collapsed = fxrep.reparameterize(network, inplace=inplace)
    assert {kind: collapsed.report.after[kind] for kind in left} == left
    assert len(layers(collapsed)) == 1
    assert stored(collapsed) <= before
    assert relative_error(collapsed(x), expected) < 1e-12


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_layer_is_refolded(name: str):
    network, x = ready(SHARED[name][0]()), image(2, 4, 9, 8)
    collapsed, other = fxrep.reparameterize(network), copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.1)
        assert relative_error(collapsed(x), other(x)) > 1e-3
        collapsed.refold(other)
        assert relative_error(collapsed(x), other(x)) < 1e-12


def test_a_shared_layer_tells_all_that_it_stands_for():
    from fxrep.rewrite import PROVENANCE

    network = Net(residual, conv=conv(groups=4))
    (layer,) = layers(fxrep.reparameterize(network))
    assert getattr(layer, PROVENANCE) == ("conv", "add", "add_1", "add_2")


def test_a_scale_on_two_values_is_held_once():
    network, x = ready(Net(scaled, bn=bn())), image(2, 4, 5, 6)
    collapsed = fxrep.reparameterize(network)
    assert stored(collapsed) <= stored(network)
    assert relative_error(collapsed(x), network(x)) < 1e-12


def test_programs_share_too():
    network, x = ready(SHARED["a residual"][0]()), image(2, 4, 9, 8)
    program = torch.export.export(network, (x,))
    collapsed = fxrep.reparameterize(program)
    assert sum(t.numel() for t in collapsed.state_dict.values()) == stored(network)
    assert relative_error(collapsed.module()(x), network(x)) < 1e-12


def test_another_norm_after_each_call_makes_a_layer_of_each():
    network, x = ready(Net(with_other_norms, conv=conv(), bn=bn(), b=bn())), image(2, 4, 9, 8)
    collapsed = fxrep.reparameterize(network)
    assert collapsed.report.after["bn"] == 0
    assert len(layers(collapsed)) == 2
    assert relative_error(collapsed(x), network(x)) < 1e-12


@pytest.mark.parametrize("forward", [with_other_norms, once_with_a_norm])
def test_where_parameters_count_no_weight_is_copied(forward: Callable[..., Tensor]):
    network, x = ready(Net(forward, conv=conv(), bn=bn(), b=bn())), image(2, 4, 9, 8)
    collapsed = fxrep.reparameterize(network, objective="params")
    assert stored(fxrep.reparameterize(network)) > stored(network) >= stored(collapsed)
    assert {r.code for r in collapsed.report.refusals} >= {"costs-more"}
    assert relative_error(collapsed(x), network(x)) < 1e-12


def test_a_scalar_is_not_made_a_vector_where_nothing_makes_up_for_it():
    network, x = ready(nn.Sequential(conv(), with_scalars())), image(3, 4, 5, 5)
    collapsed = fxrep.reparameterize(network)
    assert stored(collapsed) <= stored(network)
    refusal = next(r for r in collapsed.report.refusals if r.code == "costs-more")
    assert refusal.reason == "it would store 200 numbers in the place of 162"
    assert relative_error(collapsed(x), network(x)) < 1e-12


def test_what_a_norm_frees_makes_up_for_the_biases_of_another_layer():
    network, x = ready(nn.Sequential(conv(), bn(), with_scalars())), image(3, 4, 5, 5)
    wide = ready(nn.Sequential(conv(), *(bn() for _ in range(4)), with_scalars()))
    assert fxrep.reparameterize(network).report.after["mul"] == 1
    collapsed = fxrep.reparameterize(wide)
    assert (collapsed.report.after["mul"], collapsed.report.after["add"]) == (0, 0)
    assert stored(collapsed) <= stored(wide)
    assert relative_error(collapsed(x), wide(x)) < 1e-12


def test_the_zero_that_a_sum_begins_with_stores_nothing():
    network, x = ready(Net(lambda m, x: sum([x, m.linear(x)]), linear=linear(bias=False))), torch.randn(3, 4).double()
    collapsed = fxrep.reparameterize(network)
    assert collapsed.report.after["add"] == 0
    assert stored(collapsed) == stored(network)
    assert relative_error(collapsed(x), network(x)) < 1e-12


@pytest.mark.parametrize("scaled", [lambda y: y * 2 * 3, lambda y: y + 1 + 2, lambda y: 1 - y / 2, lambda y: 2 * y + 1])
def test_a_scale_by_plain_numbers_stores_nothing(scaled: Callable[[Tensor], Tensor]):
    network, x = ready(Net(lambda m, x: scaled(y := m.conv(x)).relu() + y.tanh(), conv=conv())), image(3, 4, 5, 5)
    collapsed = fxrep.reparameterize(network)
    assert len(collapsed.report.collapses) == 1
    assert stored(collapsed) == stored(network)
    assert sum(collapsed.report.after.values()) == sum(collapsed.report.before.values()) - 1
    assert relative_error(collapsed(x), network(x)) < 1e-12


def test_expressions_are_the_same_by_their_form_and_their_leaves():
    leaf, other, keys = K.Leaf.of(torch.ones(3)), K.Leaf.of(torch.ones(3)), Keys()

    def made(eps: float, of: K.Kernel = leaf) -> K.Kernel:
        return K.Map((3,), lambda v: v + eps, (of,))

    assert keys.of(made(0.1)) == keys.of(made(0.1))
    assert keys.of(made(0.1)) != keys.of(made(0.2))
    assert keys.of(made(0.1)) != keys.of(made(0.1, other))
    assert keys.of(K.scale(leaf, made(1.0))) == keys.of(K.scale(leaf, made(1.0)))
    assert keys.of(K.scale(leaf, made(1.0))) != keys.of(K.scale(made(1.0), leaf))
