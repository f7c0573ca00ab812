"""Each refusal of the operators' algebra, with its witness: the same fold, unchecked, gives other numbers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from layers import Layer, border, execute, image, interior, layer, random, same, scale, transposed
from torch import Tensor

from fxrep import affine, composition
from fxrep.affine import AffineConv, add, stack
from fxrep.composition import compose
from fxrep.errors import CODES, Illegal, Refusal

SPATIAL = (1, 2, 3)
BIASED = {"bias": True, "seed": 5}


@dataclass(frozen=True)
class Refused:
    """Two layers (inner, outer; or two branches) that are refused, and where the naive fold of them is wrong.

    `width`: it is right further than this from the border (0: it is right nowhere). Without `at_every_size` it is
    wrong at some sizes alone.
    """

    code: str
    layers: Callable[[int], tuple[Layer, Layer]]
    width: int = 1
    at_every_size: bool = True


def strips(first: str, second: str) -> Callable[[int], tuple[Layer, Layer]]:
    """Kernels along one axis each, of two paddings."""

    def build(dims: int) -> tuple[Layer, Layer]:
        rest = (1,) * (dims - 2), (0,) * (dims - 2)
        inner = layer(dims, k=(3, 1, *rest[0]), lo=(1, 0, *rest[1]), mode=first, seed=5)
        return inner, layer(dims, k=(1, 3, *rest[0]), lo=(0, 1, *rest[1]), mode=second)

    return build


def over(outer_mode: str, **inner: object) -> Callable[[int], tuple[Layer, Layer]]:
    """A 3x3 with one pixel of padding over some other layer."""
    return lambda n: (layer(n, seed=5, **inner), layer(n, k=3, lo=1, mode=outer_mode))


SEQUENCES = {
    "zeros over a bias": Refused("pads-over-bias", over("zeros", bias=True)),
    "zeros over a BN": Refused("pads-over-bias", lambda n: (scale(n, bias=True), layer(n, k=3, lo=1, g=2, seed=5))),
    "zeros over a fill": Refused("pads-over-bias", over("zeros", lo=2, fill=random(9, 4))),
    "a fill over zeros": Refused(
        "pads-over-bias", lambda n: (layer(n, seed=5), layer(n, k=3, lo=1, fill=random(9, 4)))
    ),
    "another fill": Refused("pads-over-bias", lambda n: (layer(n, **BIASED), layer(n, k=3, lo=1, fill=random(9, 4)))),
    "scattered bias": Refused("pads-over-bias", lambda n: (layer(n, **BIASED), transposed(n, k=2))),
    "scattered bias, strided": Refused("pads-over-bias", lambda n: (layer(n, **BIASED), transposed(n, k=3, s=2)), 0),
    "zeros over a padded 3x3": Refused("pads-over-taps", over("zeros", k=3, lo=1)),
    "zeros over an unpadded 3x3": Refused("pads-over-taps", over("zeros", k=3)),
    "zeros over a crop": Refused("pads-over-taps", over("zeros", lo=-1)),
    "reflection over taps": Refused("padding-mode", over("reflect", k=3, lo=1), 2),
    "replication over taps": Refused("padding-mode", over("replicate", k=3)),
    "reflection over a stride": Refused("padding-mode", over("reflect", s=2), at_every_size=False),
    "wrapping over a crop": Refused("padding-mode", over("circular", lo=-1)),
    "reflection over zeros": Refused("padding-mode", over("reflect", lo=1), 2),
    "a conv over a transposed one": Refused("transposed", lambda n: (transposed(n, k=2, s=2), layer(n, k=2)), 0),
    "a transposed one over a conv": Refused("transposed", lambda n: (layer(n, k=2), transposed(n, k=2, s=2)), 0),
    "a transposed one over a stride": Refused("transposed", lambda n: (layer(n, s=2), transposed(n, k=2, s=2)), 0),
}

BRANCHES = {
    "zeros and reflection": Refused(
        "padding-mode", lambda n: (layer(n, k=3, lo=1), layer(n, k=3, lo=1, mode="reflect", seed=5))
    ),
    "replication and wrapping": Refused(
        "padding-mode", lambda n: (layer(n, k=3, lo=1, mode="replicate"), layer(n, k=3, lo=1, mode="circular", seed=5))
    ),
    "zeros and a fill": Refused(
        "pad-value", lambda n: (layer(n, k=3, lo=1), layer(n, k=3, lo=1, fill=random(9, 4), seed=5))
    ),
    "two fills": Refused(
        "pad-value",
        lambda n: (layer(n, k=3, lo=1, fill=random(8, 4)), layer(n, k=3, lo=1, fill=random(9, 4), seed=5)),
    ),
    "plain and transposed": Refused("transposed", lambda n: (layer(n, k=3, lo=1), transposed(n, k=3, p=1)), 0),
}  # fmt: skip


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns the algebra's checks off, so that it folds whatever it is given."""

    def turn_off() -> None:
        checks = ((composition, "check_geometry"), (composition, "check_outside"), (affine, "_check_alignable"))
        for room, check in checks:
            monkeypatch.setattr(room, check, lambda *_: None)

    return turn_off


def assert_wrong(case: Refused, naive: AffineConv, expected: Callable[[Tensor], Tensor], channels: int) -> None:
    errors = [_error(naive, expected, image(naive.dims, channels, grow)) for grow in (0, 1)]
    wrong = [e is None or bool(border(e.amax((0, 1), keepdim=True)).min() > 1e-3) for e in errors]
    if case.at_every_size:
        assert all(wrong), "every border pixel is wrong, in some channel"
    assert any(e is None or border(e).max() > 1e-3 for e in errors)
    for error in errors:
        if case.width:
            assert error is not None
            assert interior(error, case.width).max() < 1e-12
        else:
            assert error is None or interior(error).mean() > 1e-2


def _error(naive: AffineConv, expected: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """None where not even the sizes agree."""
    got, wanted = execute(naive, x), expected(x)
    return (got - wanted).abs() if got.shape == wanted.shape else None


@pytest.mark.parametrize("dims", SPATIAL)
@pytest.mark.parametrize("name", SEQUENCES)
def test_a_sequence_is_refused_and_the_refusal_is_needed(name, dims, unchecked):
    case = SEQUENCES[name]
    inner, outer = case.layers(dims)
    with pytest.raises(Illegal, match=rf"^\[{case.code}\] ") as refused:
        compose(outer.operator, inner.operator)
    assert refused.value.code == case.code
    unchecked()
    naive = compose(outer.operator, inner.operator)
    assert_wrong(case, naive, lambda x: outer.run(inner.run(x)), inner.operator.in_channels)


@pytest.mark.parametrize("dims", SPATIAL)
@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("swap", [False, True])
def test_a_sum_is_refused_and_the_refusal_is_needed(name, dims, swap, unchecked):
    case = BRANCHES[name]
    a, b = reversed(case.layers(dims)) if swap else case.layers(dims)
    with pytest.raises(Illegal, match=rf"^\[{case.code}\] "):
        add(a.operator, b.operator)
    unchecked()
    assert_wrong(case, add(a.operator, b.operator), lambda x: a.run(x) + b.run(x), 4)


@pytest.mark.parametrize("modes", [("reflect", "zeros"), ("zeros", "reflect"), ("circular", "replicate")], ids="-".join)
@pytest.mark.parametrize("dims", [2, 3])
def test_one_operator_has_one_padding_for_all_axes(dims, modes, unchecked):
    inner, outer = strips(*modes)(dims)
    with pytest.raises(Illegal, match="padding-mode"):
        compose(outer.operator, inner.operator)
    unchecked()
    x = image(dims, 4)
    error = (execute(compose(outer.operator, inner.operator), x) - outer.run(inner.run(x))).abs()
    assert interior(error).max() < 1e-12
    assert border(error).max() > 1e-3


@pytest.mark.parametrize("dims", SPATIAL)
def test_strides_that_differ(dims, unchecked):
    """Of 4 pixels both keep 2 along each axis, but not the same ones."""
    a, b = layer(dims, k=3, lo=1, s=2), layer(dims, s=3, seed=5)
    with pytest.raises(Illegal, match="stride"):
        add(a.operator, b.operator)
    unchecked()
    x = random(1, 1, 4, *(4,) * dims)
    for first, second in ((a, b), (b, a)):
        error = execute(add(first.operator, second.operator), x) - a.run(x) - b.run(x)
        assert error.abs().mean() > 1e-2
        assert error[(0, 0, *(0,) * dims)].abs() < 1e-12


@pytest.mark.parametrize("dims", SPATIAL)
def test_net_pads_that_differ(dims, unchecked):
    """A 2x2 and a 1x1 of stride 2 agree in size for 4 pixels; for 3 torch broadcasts one pixel against two."""
    a, b = layer(dims, k=2, s=2), layer(dims, s=2, seed=5)
    with pytest.raises(Illegal, match="net-pad"):
        add(a.operator, b.operator)
    unchecked()
    naive = add(a.operator, b.operator)
    errors = []
    for n in (4, 3):
        x = random(1, 1, 4, *(n,) * dims)
        errors.append(float((execute(naive, x) - a.run(x) - b.run(x)).abs().max()))
    assert errors[0] < 1e-12
    assert errors[1] > 1e-2


def test_net_pads_that_differ_have_no_sum_in_general():
    a, b = layer(2, k=3), layer(2, k=3, lo=1, seed=5)
    with pytest.raises(Illegal, match="net-pad"):
        add(a.operator, b.operator)
    with pytest.raises(RuntimeError):
        a.run(image(2, 4)) + b.run(image(2, 4))


@pytest.mark.parametrize("dims", SPATIAL)
def test_a_linear_layer_acts_on_another_axis(dims):
    """Taken for a pointwise convolution it would mix channels, where it mixes the last axis."""
    linear, conv = layer(0), layer(dims, k=3, lo=1, seed=5)
    for attempt in (compose, add):
        with pytest.raises(Illegal, match="layout"):
            attempt(linear.operator, conv.operator)
    mistaken = layer(dims)  # the same numbers on the channel axis
    x = random(1, 2, *(4,) * (dims + 1))
    weight = mistaken.run(torch.eye(4, dtype=torch.float64).reshape(1, 4, 4, *(1,) * (dims - 1))).reshape(4, 4)
    last_axis = x @ weight.T
    assert (execute(compose(mistaken.operator, conv.operator), x) - conv.run(x) @ weight.T).abs().mean() > 1e-2
    assert (execute(add(mistaken.operator, conv.operator), x) - last_axis - conv.run(x)).abs().mean() > 1e-2


def test_channels_that_do_not_meet():
    with pytest.raises(Illegal, match="broadcast"):
        compose(layer(2, 3, 4).operator, layer(2).operator)
    with pytest.raises(RuntimeError):
        layer(2, 3, 4).run(layer(2).run(image(2, 4)))


def test_one_channel_is_not_added_to_four(unchecked):
    """torch broadcasts it; the naive sum has the channels of whichever comes first."""
    one, four = layer(2, 4, 1), layer(2, 4, 4, seed=5)
    x = image(2, 4)
    with pytest.raises(Illegal, match="broadcast"):
        add(one.operator, four.operator)
    assert (one.run(x) + four.run(x)).shape[1] == 4
    with pytest.raises(Illegal, match="broadcast"):
        add(layer(2, 3, 4).operator, four.operator)


def test_stacks_that_are_no_operator():
    with pytest.raises(Illegal, match="broadcast"):
        stack(layer(2, 3, 4).operator, layer(2).operator, same_input=True)
    with pytest.raises(Illegal, match="broadcast"):
        stack(layer(2, 4, 4, g=2).operator, layer(2, 4, 8, g=2).operator, same_input=False)
    with pytest.raises(Illegal, match="broadcast"):
        stack(layer(2, 4, 4, g=2).operator, layer(2, 3, 3, g=1).operator, same_input=False)
    with pytest.raises(Illegal, match="stride"):
        stack(layer(2).operator, layer(2, s=2).operator, same_input=True)
    three, two = (layer(2, n, n, g=n, lo=1, fill=random(8, n)) for n in (3, 2))
    with pytest.raises(Illegal, match="pad-value"):
        stack(three.operator, two.operator, same_input=False)


def test_uneven_groups_side_by_side_are_no_grouped_convolution():
    """torch gives every group as many outputs as any other."""
    a, b = layer(2, 4, 4, g=2), layer(2, 4, 8, g=2, seed=5)
    weight = torch.cat([execute_weight(a), execute_weight(b)])
    mistaken = torch.nn.functional.conv2d(image(2, 8), weight, groups=4)
    apart = torch.cat([a.run(image(2, 8)[:, :4]), b.run(image(2, 8)[:, 4:])], 1)
    assert mistaken.shape == apart.shape
    assert (mistaken - apart).abs().mean() > 1e-2


def execute_weight(one: Layer) -> Tensor:
    """The weight, read off torch's own run on unit vectors."""
    width = one.operator.in_channels // one.operator.groups
    columns = one.run(torch.eye(one.operator.in_channels, dtype=torch.float64)[:, :, None, None])[:, :, 0, 0].T
    rows = one.operator.out_channels // one.operator.groups
    blocks = [columns[g * rows : (g + 1) * rows, g * width : (g + 1) * width] for g in range(one.operator.groups)]
    return torch.cat(blocks)[:, :, None, None]


def test_a_refusal_gives_numbers_and_a_way_out():
    inner, outer = layer(2, bias=True), layer(2, k=3, lo=1, seed=5)
    with pytest.raises(Illegal) as refused:
        compose(outer.operator, inner.operator)
    largest = float(random(2, 4).abs().max())
    assert "padding=1" in refused.value.reason
    assert f"{largest:.2g}" in refused.value.reason
    assert "padding=0" in Refusal("conv", refused.value.code, refused.value.reason, refused.value.hint).hint


def test_a_bias_of_zeros_is_no_bias():
    """What counts is the number: torch's own default for a BN's shift is zero."""
    zero = layer(2, 3, 4, seed=5).operator
    biased = AffineConv(
        zero.weight, 1, zero.stride, zero.pad_lo, zero.pad_hi, zero.dilation, affine.K.Constant((4,), 0.0)
    )
    x = image(2, 3)
    wanted = layer(2, k=3, lo=1).run(layer(2, 3, 4, seed=5).run(x))
    assert torch.allclose(execute(compose(layer(2, k=3, lo=1).operator, biased), x), wanted, rtol=0, atol=1e-12)


def test_the_identity_is_refused_nothing():
    for dims in SPATIAL:
        compose(layer(dims, k=3, lo=1, mode="reflect").operator, same(dims).operator)
        compose(transposed(dims, k=3, s=2, p=1).operator, same(dims).operator)


def test_every_code_that_the_algebra_raises_has_its_witness():
    raised = set(re.findall(r'Illegal\(\s*"([a-z-]+)"', inspect.getsource(affine)))
    assert raised <= set(CODES)
    here = inspect.getsource(inspect.getmodule(test_channels_that_do_not_meet))
    shown = {case.code for case in (*SEQUENCES.values(), *BRANCHES.values())} | set(
        re.findall(r'match="([a-z-]+)"', here)
    )
    assert raised <= shown, raised - shown
