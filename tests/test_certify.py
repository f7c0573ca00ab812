"""The certificate: a fold that is wrong is caught before it is installed, whoever's reader it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from blocks import conv_bn, image
from helpers import error_against_original, randomise, relative_error
from torch import Tensor, nn

import fxrep
from fxrep import kernel as K
from fxrep.readers import Call, convolution, pooling, registry

REALLY: list[Callable[[Tensor], Tensor]] = []


def private_op(x: Tensor) -> Tensor:
    """An op that no reader of the package knows; the test says what it does."""
    return REALLY[-1](x)


torch.fx.wrap("private_op")


class Net(nn.Module):
    """Two chains that collapse, and the private op at the end of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(3, padding=1), conv_bn(4, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(private_op(self.first(x)).relu())


class Pooled(nn.Module):
    """Conv and BN, and an average of a 1x1 beside a convolution of as many taps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4)
        self.point, self.wide = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        return self.pool(self.point(y)) + self.wide(y)


@pytest.fixture
def read_as() -> Iterator[Callable[..., None]]:
    """Registers a reader of the private op for one test, and says what the op really does."""
    known = set(registry.registered())

    def register(read: Callable[[Call], object], really: Callable[[Tensor], Tensor]) -> None:
        fxrep.reader(private_op)(read)
        REALLY.append(really)

    yield register
    REALLY.clear()
    for target in set(registry.registered()) - known:
        del registry._READERS[target]


def doubled(at: Call) -> object:
    return at.operand().scale(K.Constant((), 2.0))


def test_a_right_reader_is_believed(read_as: Callable[..., None]):
    read_as(doubled, lambda x: 2 * x)
    model = Net()
    result = fxrep.reparameterize(model)
    assert error_against_original(result, model, image()) < 1e-12
    assert [len(c.replaced) for c in result.report.collapses] == [3, 2]
    assert not result.report.refusals


WRONG = {
    "another gain": lambda x: 2.001 * x,
    "a shift": lambda x: 2 * x + 0.01,
    "a small bend": lambda x: 2 * x + 1e-4 * x.square(),
    "a corner": lambda x: 2 * x + 1e-3 * F.pad(x[..., :1, :1], (0, x.shape[-1] - 1, 0, x.shape[-2] - 1)),
    "a border": lambda x: 2 * F.pad(x[..., 1:-1, 1:-1], (1, 1, 1, 1)),
    "one channel": lambda x: torch.cat([2 * x[:, :-1], 2.01 * x[:, -1:]], 1),
    "two channels swapped": lambda x: 2 * x[:, [1, 0, *range(2, x.shape[1])]],
    "odd rows": lambda x: 2 * x * (1 + 1e-3 * (torch.arange(x.shape[-2]) % 2).to(x)[:, None]),
    "another size": lambda x: 2 * F.pad(x, (0, 1)),
    "nothing that is a number": lambda x: 2 * x * float("nan"),
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True], ids=["copied", "in place"])
@pytest.mark.parametrize("really", WRONG.values(), ids=WRONG)
def test_a_wrong_reader_is_caught(read_as: Callable[..., None], really: Callable[[Tensor], Tensor], inplace: bool):
    """Its fold is left out and told; the rest collapses, and the result is equal."""
    read_as(doubled, really)
    model = Net().eval()
    expected = model(image())
    result = fxrep.reparameterize(model, inplace=inplace)
    got = result(image())
    assert torch.equal(got.isnan(), expected.isnan())
    assert relative_error(got.nan_to_num(), expected.nan_to_num()) < 1e-12
    told = [r for r in result.report.refusals if r.code == "certificate-failed"]
    assert len(told) == 1
    assert "private_op" in told[0].node
    assert "bug" in told[0].reason + told[0].hint
    assert not any("private_op" in name for c in result.report.collapses for name in c.replaced)
    assert {"second.0", "second.1"} in [set(c.replaced) for c in result.report.collapses]
    assert "certificate-failed" in str(result.report)


def test_a_fold_that_cannot_be_run_is_left_out(read_as: Callable[..., None]):
    def fails_on_small_maps(x: Tensor) -> Tensor:
        if x.shape[-1] < 14:
            raise ValueError("the map is too small")
        return 2 * x

    read_as(doubled, fails_on_small_maps)
    model = Net()
    result = fxrep.reparameterize(model)
    assert error_against_original(result, model, image()) < 1e-12
    told = [r for r in result.report.refusals if r.code == "certificate-failed"]
    assert [("private_op" in r.node, "too small" in r.reason) for r in told] == [(True, True)]


def test_a_reader_that_fails_takes_nothing_down(read_as: Callable[..., None]):
    """Every module that runs is accepted, whatever a plug-in does."""

    def fails(at: Call) -> object:
        raise ZeroDivisionError("division by zero")

    read_as(fails, lambda x: 2 * x)
    model = Net()
    result = fxrep.reparameterize(model)
    assert error_against_original(result, model, image()) < 1e-12
    assert result.report.after["bn"] == 0
    assert [r for r in result.report.refusals if "private_op" in r.node and "division by zero" in r.reason]


class Moved(nn.Module):
    """A batch norm of one channel over moved axes of a row-wise layer that something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(1, 1), nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.linear(x.relu().transpose(1, 2))
        return self.norm(rows.transpose(1, 2)), torch.cat([rows.mul(-2), rows], 1)


class MovedTwice(Moved):
    """The same behind two such layers, of which something reads the first too."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first = self.linear(x.relu().transpose(1, 2))
        rows = self.other(first)
        return self.norm(rows.transpose(1, 2)), torch.cat([rows.mul(-2), rows], 1), torch.cat([first, first.tanh()], 1)


class Averaged(nn.Module):
    """An average, less itself under a batch norm, of a convolution that reflects a border."""

    def __init__(self) -> None:
        super().__init__()
        mirrored = {"padding": 1, "padding_mode": "reflect", "dilation": (1, 2)}
        self.conv = nn.Conv2d(1, 1, (1, 3), bias=False, **mirrored)  # type: ignore[arg-type]
        self.norm, self.pool = nn.BatchNorm2d(1), nn.AvgPool2d(2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.pool(1.5 * self.conv(x))
        return (self.norm(y) - y,)


class Stacked(nn.Module):
    """A gain of three axes, on a value of which only a convolution with a computed weight tells that it has so many."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.weight = nn.Parameter(torch.rand(1, 1, 1) + 0.5), nn.Parameter(torch.randn(3, 3, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x.relu()
        return torch.stack([y / self.gain, y]).sum(0), F.conv2d(x, self.weight - self.weight.mean(0))


class Tiny(nn.Module):
    """A strided convolution and what it reads, which add up on maps of one pixel alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, (3, 1), stride=2, padding=(1, 0), bias=False)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x.relu()
        return (self.norm(self.conv(y)).add(self.other(y), alpha=0.5),)


class Dropped(nn.Module):
    """Channels that nobody reads, of a convolution that wraps around."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 3, (4, 1), padding="same", padding_mode="circular")
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x.relu()
        return (self.norm(self.conv(torch.cat([y, self.wide(x)], 1)[:, :3])),)


#: by name: the network, the size of its input, and whether it is told
CERTIFIED = {
    "moved": (Moved, (2, 1, 16), True), "moved twice": (MovedTwice, (2, 1, 16), True),
    "averaged": (Averaged, (2, 1, 9, 12), False),
    "stacked": (Stacked, (2, 3, 5, 6), False), "tiny": (Tiny, (2, 3, 1, 1), True),
    "dropped": (Dropped, (2, 3, 5, 6), False),
}  # fmt: skip


@pytest.mark.parametrize(("made", "size", "with_example"), CERTIFIED.values(), ids=CERTIFIED)
def test_a_right_fold_is_certified(made: type[nn.Module], size: tuple[int, ...], with_example: bool):
    model, x = randomise(made()).double().eval(), torch.randn(size, dtype=torch.float64)
    result = fxrep.reparameterize(model, (x,) if with_example else None)
    for got, expected in zip(result(x), model(x), strict=True):
        assert relative_error(got, expected) < 1e-12
    assert result.report.collapses
    assert [r for r in result.report.refusals if r.code == "certificate-failed"] == []


@pytest.mark.parametrize(
    ("target", "wrong"),
    [
        (nn.BatchNorm2d, lambda at, bn: at.operand().scale(K.Leaf.of(bn.weight), dims=2)),
        (nn.Conv2d, lambda at, conv: convolution.read_conv(at, without_bias(conv))),
        (nn.AvgPool2d, lambda at, pool: pooling.read_avg_pool(at, including_the_padding(pool))),
    ],
    ids=["batch norm without statistics", "conv without its bias", "average over the padding"],
)
def test_a_mistake_in_a_reader_of_ours_is_caught(
    monkeypatch: pytest.MonkeyPatch, target: type, wrong: Callable[..., object]
):
    monkeypatch.setitem(registry._READERS, target, wrong)
    model = randomise(Pooled()).double()
    result = fxrep.reparameterize(model)
    assert error_against_original(result, model, image()) < 1e-12
    assert "certificate-failed" in {r.code for r in result.report.refusals}


def without_bias(conv: nn.Conv2d) -> nn.Conv2d:
    """The tutorials' own fold drops it."""
    other = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
    other.weight = conv.weight
    return other


def including_the_padding(pool: nn.AvgPool2d) -> nn.AvgPool2d:
    return nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding, count_include_pad=True)
