"""A border written by item assignment is a padding value; anything else that is written stays a write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reader_cases import Case, Net, bn, check, conv, image, over
from torch import Tensor, nn

import fxrep

ALL, FIRST, LAST = slice(None), slice(None, 1), slice(-1, None)


def bordered(write: Any, dims: int = 2) -> Any:
    """1×1 with bias, padded by one pixel, `write(y, b)` into it, a valid 3×3; beside a 3×3 of the same input."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = F.pad(m.point(x), (1, 1) * dims)
        write(y, m.point.bias.view(-1, *(1,) * dims))
        return m.wide(y) + m.beside(x)

    parts = {"point": conv(1, dims=dims), "wide": conv(3, dims=dims, padding=0)}
    return lambda: Net(body, **parts, beside=conv(3, dims=dims))


def all_sides(y: Tensor, value: Any) -> None:
    y[:, :, 0:1, :] = value
    y[:, :, -1:, :] = value
    y[:, :, :, 0:1] = value
    y[:, :, :, -1:] = value


def from_the_end(y: Tensor, value: Any) -> None:
    y[..., :1] = value
    y[..., -1:] = value
    y[..., :1, :] = value
    y[..., -1:, :] = value


def one_axis(y: Tensor, value: Any) -> None:
    y[..., 0:1] = value
    y[..., -1:] = value


def only(*indices: Any) -> Any:
    def write(y: Tensor, value: Any) -> None:
        for index in indices:
            y[index] = value

    return write


def different(y: Tensor, value: Any) -> None:
    all_sides(y, value)
    y[:, :, 0:1, :] = 2 * value


SIDES = [(ALL, ALL, FIRST), (ALL, ALL, LAST), (ALL, ALL, ALL, FIRST), (ALL, ALL, ALL, LAST)]
CASES = [
    Case("all four sides", bordered(all_sides), "c1 a0 z0", bare=False),
    Case("counted from the end", bordered(from_the_end), "c1 a0 z0", bare=False),
    Case("short indices", bordered(only(*SIDES)), "c1 a0 z0", bare=False),
    Case("1d", bordered(one_axis, dims=1), "c1 a0 z0", image(dims=1), bare=False),
    Case("a side is left out", bordered(only(*SIDES[:3])), "c3 a1"),
    Case("two pixels of one", bordered(only(*SIDES[:3], (ALL, ALL, ALL, slice(-2, None)))), "c3 a1"),
    Case("into the middle", bordered(only(*SIDES, (ALL, ALL, slice(2, 4)))), "c3 a1"),
    Case("every other pixel", bordered(only(*SIDES[:3], (ALL, ALL, ALL, slice(None, None, 2)))), "c3 a1"),
    Case("different values", bordered(different), "c3 a1", refused="pad-value"),
]  # fmt: skip


@over(CASES)
def test_borders(case: Case) -> None:
    check(case)


def test_number_as_border() -> None:
    """What is written may be a number; it is what the convolution's own padding inserts if it is zero."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = F.pad(m.point(x), (1, 1, 1, 1), value=3.0)
        all_sides(y, 0.0)
        return m.wide(y)

    check(Case("zero", lambda: Net(body, point=conv(1, bias=False), wide=conv(3, padding=0)), "c1 z0", bare=False))


def test_border_of_a_value_read_elsewhere_is_kept() -> None:
    """Nothing pads by a value per channel: alone, the border is written as before, where the model writes it."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = F.pad(m.bn(m.conv(x)), (1, 1, 1, 1))
        all_sides(y, m.bn.bias.view(1, -1, 1, 1))
        return y.relu()

    collapsed = check(Case("kept", lambda: Net(body, conv=conv(), bn=bn()), "c1 b0 z1"))
    assert isinstance(collapsed, torch.fx.GraphModule)
    assert "clone" not in collapsed.code


def test_assignment_to_a_value_that_is_read_before_is_made_to_a_copy() -> None:
    """Old and new version both live: the old one must not see the write."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        old = y.relu()
        y[:, :, 0:1] = 1.0
        return m.last(y) + old

    check(Case("both versions", lambda: Net(body, conv=conv(), last=conv(1))))


@pytest.mark.parametrize("value", [1.0, torch.ones(())])
def test_assignment_into_the_input_is_left_alone(value: Any) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x[:, :, 0:1] = value
            return x * 2

    x = torch.randn(1, 2, 4, 4)
    mine, theirs = x.clone(), x.clone()
    assert torch.equal(fxrep.reparameterize(Writes())(mine), Writes()(theirs))
    assert torch.equal(mine, theirs)
