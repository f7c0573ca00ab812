"""Writes in place: whoever shares the memory sees them, as in the original, and whoever read before does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from reader_cases import TOLERANCE, Case, Net, bn, check, conv, executed, over, sequence
from torch import Tensor, fx, nn

import fxrep


def increment(t: Tensor) -> None:
    t += 1


def double(t: Tensor) -> None:
    t *= 2


def assign_first(t: Tensor) -> None:
    t[..., 0] = 0.5


def assign_all(t: Tensor) -> None:
    t[:] = t * 2


#: What may give the same memory again, on (N, 4, H, W); of some of them torch gives a copy.
ALIASES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "itself": lambda m, t: t,
    "Identity": lambda m, t: m.identity(t),
    "Dropout": lambda m, t: m.dropout(t),
    "Identity of Dropout": lambda m, t: m.identity(m.dropout(t)),
    "F.dropout": lambda m, t: F.dropout(t, 0.5, m.training),
    "F.dropout3d": lambda m, t: F.dropout3d(t, training=False),
    "F.alpha_dropout": lambda m, t: F.alpha_dropout(t, training=False),
    "F.feature_alpha_dropout": lambda m, t: F.feature_alpha_dropout(t, training=False),
    "torch.dropout": lambda m, t: torch.dropout(t, 0.5, False),
    "detach": lambda m, t: t.detach(),
    "data": lambda m, t: t.data,
    "contiguous": lambda m, t: t.contiguous(),
    "clone": lambda m, t: t.clone(),
    "pos": lambda m, t: +t,
    "positive": lambda m, t: torch.positive(t),
    "double": lambda m, t: t.double(),
    "to": lambda m, t: t.to(torch.float64),
    "type_as": lambda m, t: t.type_as(t),
    "view_as": lambda m, t: t.view_as(t),
    "expand_as": lambda m, t: t.expand_as(t),
    "view": lambda m, t: t.view(t.shape[0], -1),
    "reshape": lambda m, t: torch.reshape(t, (-1,)),
    "flatten": lambda m, t: t.flatten(1),
    "Flatten": lambda m, t: m.flatten(t),
    "ravel": lambda m, t: t.ravel(),
    "unflatten": lambda m, t: t.unflatten(1, (2, 2)),
    "transpose": lambda m, t: t.transpose(1, 2),
    "permute": lambda m, t: t.permute(0, 2, 3, 1),
    "swapdims": lambda m, t: torch.swapdims(t, 0, 1),
    "moveaxis": lambda m, t: torch.moveaxis(t, 1, -1),
    "movedim": lambda m, t: t.movedim(1, 3),
    "mT": lambda m, t: t.mT,
    "unsqueeze": lambda m, t: t.unsqueeze(0),
    "atleast_3d": lambda m, t: torch.atleast_3d(t),
    "real": lambda m, t: torch.real(t),
    "slice of channels": lambda m, t: t[:, 1:3],
    "slice of rows": lambda m, t: t[..., 2:5, :],
    "all": lambda m, t: t[:],
    "chunk": lambda m, t: t.chunk(2, 1)[1],
    "split": lambda m, t: torch.split(t, [1, 3], dim=1)[1],
    "tensor_split": lambda m, t: t.tensor_split(3, dim=1)[0],
    "narrow": lambda m, t: t.narrow(1, 1, 2),
    "select": lambda m, t: t.select(1, 2),
    "index": lambda m, t: t[:, 2],
    "unbind": lambda m, t: t.unbind(1)[3],
    "diagonal": lambda m, t: torch.diagonal(t, dim1=2, dim2=3),
    "unfold": lambda m, t: t.unfold(2, 2, 2),
    "as_strided": lambda m, t: t.as_strided((2, 2), (2, 1)),
    "einsum": lambda m, t: torch.einsum("nchw->nhwc", t),
    "ChannelShuffle": lambda m, t: m.shuffle(t),
}
#: What writes into a tensor of any shape.
WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "add_": lambda m, t: t.add_(1),
    "mul_": lambda m, t: t.mul_(0.5),
    "sub_ div_ neg_": lambda m, t: t.sub_(1).div_(2).neg_(),
    "+=": lambda m, t: increment(t),
    "*=": lambda m, t: double(t),
    "relu_": lambda m, t: t.relu_(),
    "torch.relu_": lambda m, t: torch.relu_(t),
    "F.relu": lambda m, t: F.relu(t, inplace=True),
    "F.leaky_relu_": lambda m, t: F.leaky_relu_(t, 0.3),
    "ReLU": lambda m, t: m.relu(t),
    "Hardswish": lambda m, t: m.hardswish(t),
    "clamp_": lambda m, t: t.clamp_(-0.5, 0.5),
    "zero_": lambda m, t: t.zero_(),
    "fill_": lambda m, t: t.fill_(2.0),
    "copy_": lambda m, t: t.copy_(t * 2),
    "masked_fill_": lambda m, t: t.masked_fill_(t > 0, 0.25),
    "setitem": lambda m, t: assign_first(t),
    "setitem of all": lambda m, t: assign_all(t),
    "out": lambda m, t: torch.add(t, 1, out=t),
    "addcmul_": lambda m, t: t.addcmul_(t, t, value=0.1),
}


def parts() -> dict[str, nn.Module]:
    return {
        "conv": conv(), "a": conv(1), "b": conv(1), "bn": bn(), "identity": nn.Identity(), "dropout": nn.Dropout(0.5),
        "flatten": nn.Flatten(), "shuffle": nn.ChannelShuffle(1), "relu": nn.ReLU(inplace=True),
        "hardswish": nn.Hardswish(inplace=True),
    }  # fmt: skip


def through_alias(alias: str, write: str, own_input: bool) -> nn.Module:
    """Reads, makes an alias, writes into the alias, reads all three again."""

    def body(m: Any, x: Tensor) -> Tensor:
        h = x if own_input else m.conv(x)
        before = m.a(h)
        other = ALIASES[alias](m, h)
        WRITES[write](m, other)
        return m.bn(before) + m.b(h) + other.mean()

    return Net(body, **parts())


def under_alias(alias: str, write: str, own_input: bool) -> nn.Module:
    """Reads, makes an alias, writes into what it is an alias of, reads all three again."""

    def body(m: Any, x: Tensor) -> Tensor:
        h = x if own_input else m.conv(x)
        before = m.a(h)
        other = ALIASES[alias](m, h)
        WRITES[write](m, h)
        return m.bn(before) + m.b(h) + other.mean()

    return Net(body, **parts())


def check_writes(network: nn.Module) -> None:
    """The outputs agree, and so does what became of the caller's input."""
    case = Case("writes", lambda: network)
    network = case.network().eval()
    collapsed = fxrep.reparameterize(network)
    for x in case.inputs():
        mine, theirs = x.clone(), x.clone()
        with torch.no_grad():
            got, expected = collapsed(mine), network(theirs)
        assert relative_error(got, expected) <= TOLERANCE
        assert relative_error(mine, theirs) <= TOLERANCE


TEMPLATES = pytest.mark.parametrize("template", [through_alias, under_alias])


@TEMPLATES
@pytest.mark.parametrize("own_input", [False, True])
@pytest.mark.parametrize("write", ["add_", "ReLU"])
@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_sees_a_write(alias: str, write: str, own_input: bool, template: Any) -> None:
    check_writes(template(alias, write, own_input))


@TEMPLATES
@pytest.mark.parametrize("own_input", [False, True])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("alias", ["Identity", "slice of channels"])
def test_every_write_is_seen(alias: str, write: str, own_input: bool, template: Any) -> None:
    check_writes(template(alias, write, own_input))


def residual(m: Any, x: Tensor) -> Tensor:
    """torchvision's block: `out += identity`, and one in-place activation for all."""
    out = m.relu(m.bn1(m.conv1(x)))
    out = m.bn2(m.conv2(out))
    out += x
    return m.relu(out)


def block() -> nn.Module:
    relu = nn.ReLU(inplace=True)
    return Net(residual, conv1=conv(bias=False), bn1=bn(), conv2=conv(bias=False), bn2=bn(), relu=relu)


def sharing_one_relu() -> nn.Module:
    relu = nn.ReLU(inplace=True)
    layers = [(conv(), bn()) for _ in range(3)]
    return nn.Sequential(*(m for pair in layers for m in (*pair, relu)), relu, relu)


def preactivation(m: Any, x: Tensor) -> Tensor:
    """The shortcut reads what the in-place activation left."""
    h = m.conv(x)
    return m.relu(m.b(m.relu(m.a(m.relu(h))))) + h


def accumulate(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y += m.a(x)
    y.add_(m.b(x), alpha=0.5)
    y -= x
    y *= 2
    y.mul_(-1).sub_(1)
    return m.bn(y)


def accumulate_in_list(m: Any, x: Tensor) -> Tensor:
    outs = [m.conv(x), m.a(x)]
    outs[0] += outs[1]
    outs[1] *= 3
    return torch.cat(outs, 1)


COLLAPSING = [
    Case("residual blocks", lambda: nn.Sequential(conv(), nn.ReLU(), block(), block()), "c5 b0"),
    Case("one relu for all", sharing_one_relu, "c3 b0"),
    Case("pre-activation", lambda: Net(preactivation, **parts()), "c3"),
    Case("accumulated", lambda: Net(accumulate, **parts()), "c1 b0 a0 m0"),
    Case("in a list", lambda: Net(accumulate_in_list, **parts()), "c2"),
    Case("in-place functionals", lambda: Net(
        lambda m, x: m.bn(F.relu(m.bn(m.conv(x)).add_(m.a(x)), inplace=True)), **parts()
    ), "c1 a0"),
    Case("Identity and Dropout between", sequence(
        conv(), nn.Identity(), bn(), nn.Dropout(0.3, inplace=True), nn.ReLU(inplace=True), nn.Dropout2d(), conv(1), bn()
    ), "c2 b0"),
]  # fmt: skip


@over(COLLAPSING)
def test_collapses_in_spite_of_writes(case: Case) -> None:
    check(case)


def padded_border(m: Any, x: Tensor) -> Tensor:
    """DBB's padding layer, which writes the batch norm of zero into the border."""
    y = F.pad(m.bn(m.a(x)), [1, 1, 1, 1])
    value = (m.bn.bias - m.bn.running_mean * m.bn.weight / (m.bn.running_var + m.bn.eps).sqrt()).view(1, -1, 1, 1)
    y[:, :, 0:1, :] = value
    y[:, :, -1:, :] = value
    y[:, :, :, 0:1] = value
    y[:, :, :, -1:] = value
    return m.valid(y) + m.conv(x)


def written_pieces(m: Any, x: Tensor) -> Tensor:
    a, b = m.conv(x).chunk(2, dim=1)
    a.add_(1)
    b *= a
    return torch.cat([a, b], 1)


def both_versions(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    old = h.clone()
    h[:, :2].mul_(3)
    h += old
    return m.bn(old) + m.bn(h)


def region_over_write(m: Any, x: Tensor) -> Tensor:
    """`conv` reads before the write; the batch norm that would swallow it comes after."""
    h = m.relu(m.a(x))
    y = m.conv(h)
    h[:, 1:].zero_()
    return m.bn(y) + h


def region_over_write_to_input(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    x.mul_(2)
    return m.bn(y) + m.b(x)


def returned_early(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    kept = [h, h.mean()]
    h.relu_()
    return torch.cat([kept[0] + kept[1], h])


def reads_itself(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    h += h.mean()
    h[:, 0] += h[:, 1]
    h.mul_(h)
    return m.bn(h)


def written_twice(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    view = h.view(h.size(0), -1)
    h.add_(1)
    view.mul_(2)
    h.add_(1)
    return m.bn(h) + view.mean()


class Doubling(nn.Module):
    """Cannot be traced, and writes into what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return x.mul_(2)


def written_by_untraceable(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    y = m.conv(h)
    m.opaque(h)
    return m.bn(y) + m.bn(m.b(h))


@fx.wrap
def double_wrapped(t: Tensor) -> Tensor:
    return t.mul_(2)


def written_by_wrapped(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    y = m.conv(h)
    double_wrapped(h)
    return m.bn(y) + m.bn(m.b(h))


@pytest.mark.parametrize(
    "body",
    [
        preactivation, accumulate, accumulate_in_list, padded_border, written_pieces, both_versions, region_over_write,
        region_over_write_to_input, returned_early, reads_itself, written_twice, written_by_untraceable,
        written_by_wrapped,
    ],
)  # fmt: skip
def test_writes_and_reads_keep_their_order(body: Callable[[Any, Tensor], Tensor]) -> None:
    check_writes(Net(body, valid=conv(padding=0), opaque=Doubling(), **parts()))


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Hardtanh(inplace=True), nn.Identity(), nn.Dropout(0.5)])
def test_the_callers_input_is_written_just_as_before(first: nn.Module) -> None:
    check_writes(nn.Sequential(first, nn.ReLU(inplace=True), conv(), bn()))


COPIES = [torch.clone, lambda t: t * 1, lambda t: t + 0, lambda t: t / 1, lambda t: t.clone().view_as(t)]


@pytest.mark.parametrize("copy", COPIES)
def test_results_share_no_memory_that_they_did_not_share(copy: Callable[[Tensor], Tensor]) -> None:
    """A copy that is handed out stays a copy, though its numbers are those of what it was made of."""
    network = Net(lambda m, x: (copy(x), h := m.conv(x), copy(h)), conv=conv()).double().eval()
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    outputs = (x, *fxrep.reparameterize(network, x)(x))
    assert len({t.data_ptr() for t in outputs}) == 4


def test_no_write_is_lost_where_a_module_stays_in_place() -> None:
    """After the fold an in-place activation may write again, and only into what was made for it."""
    network = Case("restored", lambda: nn.Sequential(conv(), bn(), nn.ReLU(inplace=True), conv(), bn())).network()
    collapsed = fxrep.reparameterize(network)
    (relu,) = (m for m in collapsed.modules() if isinstance(m, nn.ReLU))
    assert relu.inplace
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    before = x.clone()
    assert executed(collapsed, x)["c"] == 2
    assert torch.equal(x, before)


def test_the_callers_modules_stay_in_place_or_not() -> None:
    network = Case("kept", sharing_one_relu).network()
    fxrep.reparameterize(network)
    assert all(m.inplace for m in network.modules() if isinstance(m, nn.ReLU))


class Contiguous(nn.Module):
    """`contiguous()` copies a channels-last tensor, and gives any other itself: the convolution reads accordingly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        doubled = x + x
        written = doubled.contiguous()
        written += 1
        return written, self.conv(doubled)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_what_may_be_a_copy_is_written_where_it_was(format):
    network, x = Contiguous(), torch.randn(2, 4, 3, 5).to(memory_format=format)
    for got, expected in zip(fxrep.reparameterize(network)(x), network(x), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)
