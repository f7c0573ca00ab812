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
        "stem.reparam", "stages.0.0.reparam", "stages.0.1.reparam", "stages.1.0.reparam"
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


# What a scale goes through


class Meets(nn.Module):
    """Two branches of very unequal ranges, and what becomes of them until a layer reads it."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], width: int, dims: int = 2) -> None:
        super().__init__()
        self.body, conv = body, (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.a, self.b, self.c = conv(3, 8, 3, padding=1), conv(3, 8, 1), conv(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
        self.fc, self.last = nn.Linear(width, 5), conv(8, 5, 1)
        self.join, self.act, self.flat = conv(16, 5, 3), nn.PReLU(8, 0.3), nn.Flatten()
        with torch.no_grad():
            for layer in (self.a, self.b, self.c):
                layer.weight.mul_(torch.logspace(-2, 2, 8)[torch.randperm(8)].reshape(8, *(1,) * (dims + 1)))
                layer.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def residual(m: Any, x: Tensor) -> Tensor:
    y = m.act(m.a(x) + m.b(x))
    return m.last(torch.relu(y + m.c(y)))


THROUGH: dict[str, tuple[Callable[[Any, Tensor], Tensor], int, list[str]]] = {
    "flatten": (lambda m, x: m.fc(torch.flatten(m.a(x).relu(), 1)), 8 * 54, ["a"]),
    "flatten by its method": (lambda m, x: m.fc(m.act(m.a(x)).flatten(1)), 8 * 54, ["a"]),
    "relu after flatten": (lambda m, x: m.fc(torch.relu(m.flat(m.a(x)))), 8 * 54, ["a"]),
    "view": (lambda m, x: m.fc(m.a(x).relu().view(x.size(0), -1)), 8 * 54, []),
    "view of its own size": (lambda m, x: (lambda y: m.fc(y.view(y.size(0), -1)))(m.a(x).relu()), 8 * 54, ["a"]),
    "mean": (lambda m, x: m.fc(m.a(x).relu().mean((2, 3))), 8, ["a"]),
    "pool and flatten": (lambda m, x: m.fc(nn.functional.adaptive_avg_pool2d(m.a(x).relu(), 1).flatten(1)), 8, ["a"]),
    "sum": (lambda m, x: m.last(torch.relu(m.a(x) - m.b(x))), 8, ["a", "b"]),
    "residual": (residual, 8, ["a", "b", "c"]),
    "concatenation": (lambda m, x: m.join(torch.cat([m.a(x).relu(), m.b(x)], 1)), 8, ["a", "b"]),
    "into a transposed convolution": (lambda m, x: m.last(m.up(m.a(x).relu()).relu()), 8, ["a", "up"]),
    "resized": (lambda m, x: m.last(nn.functional.interpolate(m.a(x).relu(), scale_factor=2)), 8, ["a"]),
    "halved": (lambda m, x: m.last(m.a(x).relu() * 0.5), 8, ["a"]),
}


@pytest.mark.parametrize("kind", THROUGH)
def test_a_scale_goes_through(kind: str):
    torch.manual_seed(0)
    body, width, layers = THROUGH[kind]
    model, x = symbolic_trace(Meets(body, width).double().eval()), image(2, 3, 9, 6)
    equalised = fxrep.equalize(model, x)
    assert [link.layer for link in equalised.equalization.links] == layers
    assert relative_error(equalised(x), model(x)) < 1e-13
    for link in equalised.equalization.links:
        assert link.layer == "up" or link.after > 1.2 * link.before
        before, after = model.get_submodule(link.layer).weight, equalised.get_submodule(link.layer).weight
        assert not torch.equal(before, after)


def test_both_ranges_around_a_flatten_are_the_geometric_mean():
    torch.manual_seed(0)
    body, width, _ = THROUGH["flatten"]
    model, x = symbolic_trace(Meets(body, width).double().eval()), image(2, 3, 9, 6)
    equalised = fxrep.equalize(model, x)

    def around(m: Any) -> tuple[Tensor, Tensor]:
        entries = m.fc.weight.detach().abs().reshape(5, 8, 54)  # output, channel, pixel
        return m.a.weight.detach().abs().flatten(1).amax(1), entries.amax((0, 2))

    written, read = around(model)
    for now in around(equalised):
        assert relative_error(now, (written * read).sqrt()) < 1e-6


def test_both_ranges_around_a_transposed_convolution_are_the_geometric_mean():
    torch.manual_seed(0)
    body, width, _ = THROUGH["into a transposed convolution"]
    model, x = symbolic_trace(Meets(body, width).double().eval()), image(2, 3, 9, 6)
    equalised = fxrep.equalize(model, x)

    def read_and_written(m: Any) -> list[list[float]]:
        weight = m.up.weight.detach().abs()  # (input, output of its group, …)
        read = [float(weight[i].max()) for i in range(8)]
        written = [float(weight[o // 4 * 4 : o // 4 * 4 + 4, o % 4].max()) for o in range(8)]
        inner = [float(w.max()) for w in m.a.weight.detach().abs()]
        outer = [float(m.last.weight.detach().abs()[:, o].max()) for o in range(8)]
        return [inner, read, written, outer]

    inner, read, written, outer = map(torch.tensor, read_and_written(equalised))
    assert relative_error(inner, read) < 1e-2
    assert relative_error(written, outer) < 1e-2
    assert relative_error(equalised(x), model(x)) < 1e-13


STOPS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a sum with the input": (lambda m, x: m.last(m.a(x) + x.sum(1, keepdim=True)), "add reads it"),
    "a gate": (lambda m, x: m.last(m.a(x) * m.b(x).sigmoid()), "mul reads it"),
    "a shift": (lambda m, x: m.last(m.a(x) + 1), "add reads it"),
    "pieces": (lambda m, x: m.last(torch.cat(m.a(x).chunk(2, 1), 1)), "chunk reads it"),
    "another order of axes": (lambda m, x: m.fc(m.a(x).transpose(1, 3)), "transpose reads it"),
    "a mean of the channels": (lambda m, x: m.last(m.a(x).mean((1, 3), keepdim=True).expand(-1, 8, -1, 1)), "mean"),
    "a flatten of the batch": (lambda m, x: m.fc(m.a(x).flatten(2).mean(2)), "flatten reads it"),
    "a sum of which a part is looked at": (lambda m, x: (lambda y: m.last(y + m.b(x)) + y.mean())(m.a(x)), "mean"),
}


@pytest.mark.parametrize("kind", STOPS)
def test_what_no_scale_goes_through_is_told(kind: str):
    torch.manual_seed(0)
    body, fact = STOPS[kind]
    model, x = symbolic_trace(Meets(body, 8).double().eval()), image(2, 3, 9, 6)
    equalised = fxrep.equalize(model, x)
    assert not equalised.equalization.links
    assert fact in equalised.equalization.left["a"]
    assert f"a: left as it is, {equalised.equalization.left['a']}" in str(equalised.equalization)
    assert relative_error(equalised(x), model(x)) == 0


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
@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_int8_falls_on_a_repvgg_of_unequal_ranges(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    by_weight, by_row = importlib.import_module("quantize").errors(seed)
    assert by_weight[1] < 0.75 * by_weight[0]
    assert max(by_weight[1], *by_row) < 0.1  # of scales for each row nothing is promised but that they work
