"""Range equalisation: the same function, ranges as the formula has them, and a smaller error in int8."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import image, net
from helpers import relative_error
from torch import Tensor, nn
from torch.fx import symbolic_trace

import fxrep

EXAMPLES = Path(__file__).parents[1] / "examples"


def chain(activation: nn.Module, *, groups: int = 1, dims: int = 2) -> nn.Module:
    """Two biased layers of very unequal ranges around an activation."""
    torch.manual_seed(0)
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    inner, outer = conv(4, 8, 3, padding=1), conv(8, 6, 3, padding=1, stride=2, groups=groups)
    gain = torch.logspace(-2, 2, 8).reshape(8, *(1,) * (dims + 1))
    with torch.no_grad():
        inner.weight.mul_(gain)
        inner.bias.normal_()
        for rows, read in zip(outer.weight.chunk(groups), gain.flip(0).chunk(groups), strict=True):
            rows.mul_(read.transpose(0, 1))
    return symbolic_trace(nn.Sequential(inner, activation, outer).double().eval())


def ranges(inner: nn.Module, outer: nn.Module, groups: int = 1) -> tuple[list[float], list[float]]:
    """The largest |w| of each channel between two layers, as written and as read, entry by entry."""
    written = [max(abs(w) for w in inner.weight[c].flatten().tolist()) for c in range(inner.out_channels)]
    width, rows = outer.in_channels // groups, outer.out_channels // groups
    read = [
        max(abs(w) for w in outer.weight[c // width * rows : (c // width + 1) * rows, c % width].flatten().tolist())
        for c in range(outer.in_channels)
    ]
    return written, read


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "in place": lambda: nn.ReLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.3),
    "prelu": lambda: nn.PReLU(8, 0.2),
    "pooled": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, count_include_pad=False)),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_function_is_the_same_and_both_ranges_are_the_geometric_mean(kind: str, groups: int):
    model = chain(ACTIVATIONS[kind](), groups=groups)
    x = image(2, 4, 17, 14)
    equalised = fxrep.equalize(model, x)
    assert relative_error(equalised(x), model(x)) < 1e-13
    first, last = model.get_submodule("0"), model.get_submodule("2")
    inner, outer = ranges(first, last, groups)
    expected = torch.tensor([(a * b) ** 0.5 for a, b in zip(inner, outer, strict=True)])
    now = ranges(equalised.get_submodule("0"), equalised.get_submodule("2"), groups)
    for found in now:
        assert relative_error(torch.tensor(found), expected) < 1e-6
    (link,) = equalised.equalization.links
    assert link.after > 2 * link.before
    assert f"{link.after:.3f}" in str(equalised.equalization)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_any_number_of_axes(dims: int):
    model, x = chain(nn.ReLU(), dims=dims), image(2, 4, *(9, 8, 7)[:dims])
    equalised = fxrep.equalize(model, x)
    assert len(equalised.equalization.links) == 1
    assert relative_error(equalised(x), model(x)) < 1e-13


def test_linear_layers_and_several_readers():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 2, bias=False)
            with torch.no_grad():
                self.body.weight.mul_(torch.logspace(-2, 2, 7).unsqueeze(1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.relu(self.body(x))
            return self.left(y), self.right(y)

    torch.manual_seed(0)
    model = symbolic_trace(Heads().double().eval())
    x = image(3, 5)
    equalised = fxrep.equalize(model, x)
    assert [link.into for link in equalised.equalization.links] == [("left", "right")]
    for got, expected in zip(equalised(x), model(x), strict=True):
        assert relative_error(got, expected) < 1e-13


def test_a_collapsed_repvgg_is_equalised_and_left_as_it_was():
    collapsed = fxrep.reparameterize(net())
    before = {name: t.clone() for name, t in collapsed.state_dict().items()}
    equalised = fxrep.equalize(collapsed, image())
    assert [link.layer for link in equalised.equalization.links] == [
        "stem.reparam", "stages.0.0.reparam", "stages.0.1.reparam"
    ]  # fmt: skip
    assert relative_error(equalised(image(1, 3, 31, 20)), collapsed(image(1, 3, 31, 20))) < 1e-13
    assert all(torch.equal(t, before[name]) for name, t in collapsed.state_dict().items())
    assert not torch.equal(equalised.state_dict()["stem.reparam.weight"], before["stem.reparam.weight"])
    assert equalised.report is not None


def test_a_channel_of_zeros_keeps_its_scale():
    model = chain(nn.ReLU())
    with torch.no_grad():
        model.get_submodule("0").weight[3] = 0
        model.get_submodule("2").weight[:, 5] = 0
    equalised = fxrep.equalize(model, image(2, 4, 9, 8))
    assert all(bool(p.isfinite().all()) for p in equalised.parameters())
    assert torch.equal(equalised.get_submodule("0").bias[[3, 5]], model.get_submodule("0").bias[[3, 5]])


# What must stay, and that it must


@pytest.mark.parametrize("kind", [nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Hardswish])
def test_no_scale_moves_through_what_is_not_homogeneous(kind: Callable[[], nn.Module]):
    model = chain(kind())
    equalised = fxrep.equalize(model, image(2, 4, 9, 8))
    assert not equalised.equalization.links
    assert "reads it" in equalised.equalization.left["0"]
    x = image(2, 4, 9, 8)
    with torch.no_grad():  # moved all the same, it would be another function
        model.get_submodule("0").weight.mul_(8)
        model.get_submodule("0").bias.mul_(8)
        model.get_submodule("2").weight.div_(8)
    assert relative_error(model(x), equalised(x)) > 1e-2


class Reads(nn.Module):
    """A layer whose output, weight or second call somebody else needs as it is."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        if how == "tied":
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.a(x)) if self.how == "twice" else self.a(x)
        z = self.b(torch.relu(y))
        if self.how == "weight":
            return z + self.a.weight.sum()
        return z + y if self.how == "residual" else z


@pytest.mark.parametrize("how", ["twice", "tied", "weight", "residual"])
def test_a_scale_that_somebody_else_sees_stays(how: str):
    torch.manual_seed(0)
    model = symbolic_trace(Reads(how).double().eval())
    x = image(2, 4, 9, 8)
    equalised = fxrep.equalize(model, x)
    assert not equalised.equalization.links
    assert relative_error(equalised(x), model(x)) == 0


def test_a_layer_that_is_looked_at_stays():
    model = chain(nn.ReLU())
    model.get_submodule("1").register_forward_hook(lambda *_: None)
    assert not fxrep.equalize(model, image(2, 4, 9, 8)).equalization.links


def test_only_a_graph_can_be_equalised():
    with pytest.raises(fxrep.FxrepError, match="reparameterize"):
        fxrep.equalize(net())


# int8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("runtime", "most"), [("with_onnxruntime", 0.6), ("with_torchao", 0.9)])
def test_the_error_of_int8_falls_on_a_repvgg_of_unequal_ranges(runtime: str, most: float, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("quantize")
    torch.manual_seed(0)
    with torch.no_grad():
        batches = [torch.randn(4, 3, 32, 32) for _ in range(8)]
        x = torch.randn(4, 3, 32, 32)
        collapsed = fxrep.reparameterize(example.unequal_ranges(example.repvgg_stage(3, 16, 4)))
        expected = collapsed(x)
        errors = [
            float((getattr(example, runtime)(each, batches, x) - expected).norm() / expected.norm())
            for each in (collapsed, fxrep.equalize(collapsed, x))
        ]
    assert errors[1] < most * errors[0]
    assert errors[1] < 0.05
