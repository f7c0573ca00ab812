"""Sums, differences, scales and constants, in every spelling that torch has for them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reader_cases import Case, Net, bn, check, conv, image, linear, over, tokens, weight
from torch import Tensor, nn

Body = Callable[[Any, Tensor, Tensor], Tensor]

#: Of a = conv3×3(x) and b = conv1×1(x): always one convolution.
OF_TWO: dict[str, Body] = {
    "a + b": lambda m, a, b: a + b,
    "torch.add": lambda m, a, b: torch.add(a, b),
    "torch.add alpha": lambda m, a, b: torch.add(input=a, other=b, alpha=-2),
    "add": lambda m, a, b: a.add(b),
    "add alpha": lambda m, a, b: a.add(other=b, alpha=0.5),
    "add_": lambda m, a, b: a.add_(b),
    "add_ alpha": lambda m, a, b: a.add_(b, alpha=3),
    "iadd": lambda m, a, b: operator.iadd(a, b),
    "a - b": lambda m, a, b: a - b,
    "torch.sub": lambda m, a, b: torch.sub(a, b, alpha=2),
    "torch.subtract": lambda m, a, b: torch.subtract(a, b),
    "sub": lambda m, a, b: a.sub(b, alpha=0.5),
    "sub_": lambda m, a, b: a.sub_(b),
    "subtract": lambda m, a, b: a.subtract(b),
    "isub": lambda m, a, b: operator.isub(a, b),
    "torch.rsub": lambda m, a, b: torch.rsub(a, b, alpha=2),
    "sum of a list": lambda m, a, b: sum([a, b, a]),
    "sum of a generator": lambda m, a, b: sum((t for t in (a, b)), 0.5),
    "torch.addcmul": lambda m, a, b: torch.addcmul(a, m.gain, b, value=-2),
    "stack sum": lambda m, a, b: torch.stack([a, b]).sum(0),
    "stack sum of dim 1": lambda m, a, b: torch.sum(torch.stack((a, b, b), dim=1), dim=1),
    "stack sum of a list of dims": lambda m, a, b: torch.stack([a, b], 2).sum(dim=[2]),
    "stack mean": lambda m, a, b: torch.stack([a, b, b], dim=0).mean(dim=0),
    "torch.mean of stack": lambda m, a, b: torch.mean(torch.stack([a, b]), 0),
    "stack mean of the last dim": lambda m, a, b: torch.stack([a, b], -1).mean(-1),
}
#: Of a = conv3×3(x): the op vanishes into the convolution.
OF_ONE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "-a": lambda m, a: -a,
    "torch.neg": lambda m, a: torch.neg(a),
    "neg": lambda m, a: a.neg(),
    "neg_": lambda m, a: a.neg_(),
    "torch.negative": lambda m, a: torch.negative(a),
    "negative": lambda m, a: a.negative(),
    "+a": lambda m, a: +a * 2,
    "torch.positive": lambda m, a: torch.positive(a) * 2,
    "positive": lambda m, a: a.positive() * 2,
    "Identity": lambda m, a: m.identity(a) * 2,
    "torch.clone": lambda m, a: torch.clone(a) * 2,
    "clone": lambda m, a: a.clone() * 2,
    "contiguous": lambda m, a: a.contiguous() * 2,
    "2 * a": lambda m, a: 2 * a,
    "a * 0.5": lambda m, a: a * 0.5,
    "torch.mul": lambda m, a: torch.mul(a, 3),
    "mul": lambda m, a: a.mul(other=0.3),
    "mul_": lambda m, a: a.mul_(0.3),
    "imul": lambda m, a: operator.imul(a, 2),
    "torch.multiply": lambda m, a: torch.multiply(a, 1.5),
    "multiply": lambda m, a: a.multiply(1.5),
    "a / 2": lambda m, a: a / 2,
    "torch.div": lambda m, a: torch.div(a, 3),
    "torch.div without rounding": lambda m, a: torch.div(a, other=3, rounding_mode=None),
    "div": lambda m, a: a.div(3),
    "div_": lambda m, a: a.div_(3),
    "itruediv": lambda m, a: operator.itruediv(a, 3),
    "torch.divide": lambda m, a: torch.divide(a, 3),
    "torch.true_divide": lambda m, a: torch.true_divide(a, 3),
    "divide": lambda m, a: a.divide(3),
    "a + 1": lambda m, a: a + 1,
    "1 - a": lambda m, a: 1 - a,
    "torch.rsub": lambda m, a: torch.rsub(a, 1, alpha=2),
    "add with alpha": lambda m, a: torch.add(a, 3, alpha=2),
    "gain * a": lambda m, a: m.gain * a,
    "a * scalar": lambda m, a: a * m.scalar,
    "a / sigma": lambda m, a: a / m.sigma,
    "a + shift": lambda m, a: a + m.shift,
    "shift - a": lambda m, a: m.shift - a,
    "buffer + a": lambda m, a: m.buffer + a,
    "buffer - a": lambda m, a: m.buffer - a,
    "buffer * a": lambda m, a: m.buffer * a,
    "buffer.__rsub__": lambda m, a: m.buffer.__rsub__(a),
    "a / buffer": lambda m, a: a / (m.buffer.abs() + 1),
    "a - shift with alpha": lambda m, a: torch.sub(a, m.shift, alpha=3),
    "torch.addcmul": lambda m, a: torch.addcmul(m.shift, a, m.gain),
    "addcmul": lambda m, a: m.shift.addcmul(m.gain, a, value=0.5),
    "addcmul_": lambda m, a: a.addcmul_(a.clone(), m.scalar),
    "addcmul of two gains": lambda m, a: torch.addcmul(a, m.gain, m.shift),
    "sigmoid of gain": lambda m, a: a * torch.sigmoid(m.gain) + F.softplus(m.shift),
    "gain as a vector": lambda m, a: a * m.vector.view(1, -1, 1, 1) + m.vector[:, None, None],
    "gain of (C, 1, 1)": lambda m, a: a * m.vector.reshape(4, 1, 1),
    "new constant": lambda m, a: a * torch.tensor(2.0, dtype=torch.float64) + torch.ones(1, dtype=torch.float64),
    "Dropout": lambda m, a: m.dropout(a) * 2,
    "F.dropout": lambda m, a: F.dropout(a, 0.3, training=m.training) * 2,
    "F.dropout2d": lambda m, a: F.dropout2d(a, training=False) * 2,
    "torch.dropout": lambda m, a: torch.dropout(a, 0.5, False) * 2,
}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def two(body: Body) -> nn.Module:
    return Net(
        lambda m, x: m.bn(body(m, m.conv(x), m.point(x))), conv=conv(), point=conv(1), bn=bn(), gain=weight(4, 1, 1)
    )


def one(body: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    parts = {
        "gain": weight(1, 4, 1, 1), "scalar": nn.Parameter(torch.randn(())), "sigma": weight(4, 1, 1),
        "shift": weight(1, 4, 1, 1), "buffer": torch.randn(1, 4, 1, 1), "vector": weight(4),
        "identity": nn.Identity(), "dropout": nn.Dropout(0.4),
    }  # fmt: skip
    return Net(lambda m, x: m.bn(body(m, m.conv(x))), conv=conv(), bn=bn(), **parts)


def layer_scale(m: Any, x: Tensor) -> Tensor:
    """ConvNeXt's and CaiT's: x + γ·f(x)."""
    return m.relu(m.conv(x)) + m.gain * m.bn(m.point(m.relu(m.conv(x))))


def rep_mixer(m: Any, x: Tensor) -> Tensor:
    """FastViT's: x + γ·(mixer(x) - norm(x)), all of it one depthwise convolution."""
    mixed = m.mixer_bn(m.mixer(x)) + m.mixer_point_bn(m.mixer_point(x)) + m.mixer_id(x)
    return x + m.gain * (mixed - m.norm(x))


def rep_mixer_parts() -> dict[str, nn.Module]:
    return {
        "mixer": conv(3, groups=4, bias=False), "mixer_bn": bn(), "mixer_point": conv(1, groups=4, bias=False),
        "mixer_point_bn": bn(), "mixer_id": bn(), "norm": bn(), "gain": weight(4, 1, 1),
    }  # fmt: skip


def forgotten(m: Any, x: Tensor) -> Tensor:
    """A long chain of scales on a pointwise layer, read by two."""
    y = 3 * (1 - m.point(x) / 2) - 0.5
    return m.conv(x) + y * m.gain - (y + x) / 7


CASES = [
    *(Case(name, lambda f=f: two(f), "c1 b0 a0 m0") for name, f in OF_TWO.items()),
    *(Case(f"scaled: {name}", lambda f=f: one(f), "c1 b0 a0 m0") for name, f in OF_ONE.items()),
    *(
        Case(f"{kind.__name__}", lambda kind=kind: nn.Sequential(conv(), kind(0.3), bn(), kind(0.2), conv(1)), "c1 b0")
        for kind in (nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    ),
    Case("Dropout1d", lambda: nn.Sequential(conv(dims=1), nn.Dropout1d(0.3), conv(1, dims=1)), "c1", image(dims=1)),
    Case("layer scale", lambda: Net(
        layer_scale, conv=conv(), point=conv(1), bn=bn(), gain=weight(4, 1, 1), relu=nn.ReLU()
    ), "c3 b0 m0"),
    Case("rep mixer", lambda: Net(rep_mixer, **rep_mixer_parts()), "c1 b0 a0 m0"),
    Case("chain of scales", lambda: Net(forgotten, conv=conv(), point=conv(1), gain=weight(4, 1, 1)), "c1 a0 m0"),
    Case("identity less itself", lambda: Net(
        lambda m, x: m.conv(x) + x - x * m.gain, conv=conv(), gain=weight(4, 1, 1)
    ), "c1 a0 m0", bare=False),
    Case("mean of a weight", lambda: Net(
        lambda m, x: m.bn(m.conv(x) + m.w.mean()), conv=conv(), bn=bn(), w=weight(4, 9)
    ), "c1 b0 a0"),
    Case("scaled tokens", lambda: Net(
        lambda m, x: m.linear(x) * m.gain + 2 * x - m.shift, linear=linear(), gain=weight(4), shift=weight(1, 1, 4)
    ), "l1 a0 m0", tokens(), bare=False),
    Case("position embedding", lambda: Net(
        lambda m, x: m.out(m.linear(x) + m.position), linear=linear(), out=linear(4, 5), position=weight(1, 7, 4)
    ), "l2", ((1, 7, 4), (3, 7, 4)), refused="broadcast"),
    Case("per pixel", lambda: Net(
        lambda m, x: m.bn(m.conv(x) * m.mask), conv=conv(), bn=bn(), mask=weight(1, 1, 9, 11)
    ), "c1", ((1, 4, 9, 11), (3, 4, 9, 11)), refused="broadcast"),
    Case("product of values", lambda: Net(
        lambda m, x: m.bn(m.conv(x)) * m.point(x), conv=conv(), point=conv(1), bn=bn()
    ), "c2 b0"),
    Case("quotient of values", lambda: Net(
        lambda m, x: m.bn(m.conv(x)) / m.point(x), conv=conv(), point=conv(1), bn=bn()
    ), "c2 b0"),
    Case("rounded division", lambda: Net(
        lambda m, x: torch.div(m.bn(m.conv(x)), 0.1, rounding_mode="floor"), conv=conv(), bn=bn()
    ), "c1 b0"),
    Case("reciprocal", lambda: Net(lambda m, x: 1 / (m.bn(m.conv(x)).abs() + 1), conv=conv(), bn=bn()), "c1 b0"),
    Case("sum over pixels", lambda: Net(lambda m, x: m.bn(m.conv(x)).sum((2, 3)), conv=conv(), bn=bn()), "c1 b0"),
    Case("mean over pixels, keeping axes", lambda: Net(
        lambda m, x: m.point(m.bn(m.conv(x)).mean((2, 3), keepdim=True)), conv=conv(), bn=bn(), point=conv(1)
    ), "c2 b0"),
    Case("sum of another axis", lambda: Net(
        lambda m, x: torch.stack([m.conv(x), x]).sum(1), conv=conv()
    ), "c1"),
    Case("broadcast of a pooled value", lambda: Net(
        lambda m, x: m.bn(m.conv(x) + m.point(x.mean((2, 3), keepdim=True))), conv=conv(), point=conv(1), bn=bn()
    ), "c2"),
    Case("broadcast of one channel", lambda: Net(
        lambda m, x: m.bn(m.conv(x) + m.single(x)), conv=conv(), single=conv(1, out=1), bn=bn()
    ), "c2", refused="broadcast"),
    Case("broadcast of a batch", lambda: Net(
        lambda m, x: m.bn(m.conv(x) + m.conv(x[:1])), conv=conv(), bn=bn()
    ), "c2"),
]  # fmt: skip


@over(CASES)
def test_equal_and_collapsed(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("kind", DROPOUTS)
def test_dropout_is_the_identity_whatever_the_models_mode(kind: type[nn.Module]) -> None:
    dims = 1 if kind is nn.Dropout1d else 2
    case = Case("mode", lambda: nn.Sequential(conv(dims=dims), kind(0.9), conv(1, dims=dims)), "c1", image(dims=dims))
    assert case.network().training
    check(case)
