"""What else a network does with its values, modules and weights: sizes, calls by two, ties, hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from reader_cases import (
    TOLERANCE,
    Case,
    Net,
    bn,
    check,
    conv,
    draw,
    equal_results,
    linear,
    over,
    sequence,
    weight,
)  # fmt: skip
from torch import Tensor, nn

import fxrep

SIZES = ((1, 4, 9, 13), (3, 4, 15, 11))


class Branching(nn.Module):
    """Branches on a size: cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-1] > 12 else -x


# Uses of a value's size, and of modules and weights


def upsampled(m: Any, x: Tensor) -> Tensor:
    """A feature pyramid: sizes of values that are folded away."""
    h = m.conv(x)
    low = m.down(m.bn(h))
    return F.interpolate(m.b(low), size=h.shape[-2:], mode="nearest") + m.bn(h)


def asserted(m: Any, x: Tensor) -> Tensor:
    torch._assert(x.ndim == 4, f"got {x.ndim} axes")
    h = m.conv(x)
    torch._assert(h.shape[1] == 4, "channels")
    torch._assert(h.size(2) == x.size(2), f"{h.shape}")
    return m.bn(h)


def averaged(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    return m.bn(h) / h.shape[-1] * h.shape[0] + h.dim()


def counted(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    return m.bn(h) / h.numel() + h.stride(1) + h.is_floating_point()


def cast(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    return m.bn(h).to(h.dtype) + torch.zeros(1, dtype=h.dtype, device=h.device)


def reshaped(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    batch, channels, height, width = h.shape
    return m.bn(h).view(batch, channels, height * width).transpose(1, 2).reshape(batch, height, width, channels)


def padded_to_even(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    y = F.pad(m.bn(h), (0, h.shape[-1] % 2, 0, h.shape[-2] % 2))
    return F.adaptive_avg_pool2d(y, (h.size(2) // 2, (h.size(-1) + 1) // 2))


def strided_sizes(m: Any, x: Tensor) -> Tensor:
    h = m.down(m.bn(m.conv(x)))
    return F.interpolate(h, scale_factor=2)[..., : x.shape[-2], : x.size(3)] * h.size()[2] + x.shape.numel()


def weight_sizes(m: Any, x: Tensor) -> Tensor:
    return m.bn(F.conv2d(x, m.conv.weight, padding=m.conv.weight.shape[-1] // 2, groups=4 // m.conv.weight.shape[1]))


def branch_on_weight(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) if m.conv.weight.shape[0] == 4 else x


def twice(m: Any, x: Tensor) -> Tensor:
    """One block at two places; once its norm can fold, once somebody reads in between."""
    h = m.conv(x)
    first = m.bn(h).relu() + h.sigmoid()
    return m.bn(m.conv(first))


def read_by_two(m: Any, x: Tensor) -> Tensor:
    """A value that escapes in the middle of a chain."""
    h = m.b(m.conv(x))
    return m.bn(h) * h.sigmoid()


def by_keyword(m: Any, x: Tensor) -> Tensor:
    return m.bn(input=m.conv(input=x)) + m.branch(x=x)


BODIES = {
    "upsampled": (upsampled, "c3"), "asserted": (asserted, "c1 b0"), "averaged": (averaged, "c1 b0"),
    "counted": (counted, "c1"),
    "cast": (cast, "c1 b0"), "reshaped": (reshaped, "c1 b0"), "padded to even": (padded_to_even, "c1 b0"),
    "strided sizes": (strided_sizes, "c2 b0"), "weight sizes": (weight_sizes, "c1 b0"),
    "branch on weight": (branch_on_weight, ""), "called twice": (twice, "c2 b1"), "read by two": (read_by_two, "c1"),
    "by keyword": (by_keyword, ""),
}  # fmt: skip


def tied() -> nn.Module:
    """Two convolutions with one weight, each with a norm of its own."""
    network = nn.Sequential(conv(), bn(), nn.ReLU(), conv(), bn(), nn.ReLU(), conv())
    network[3].weight = network[6].weight = network[0].weight
    return network


def repeated() -> nn.Module:
    block = nn.Sequential(conv(), bn(), nn.ReLU())
    return nn.Sequential(block, block, nn.Sequential(block, conv(1), bn()))


def named_reparam() -> nn.Module:
    return Net(lambda m, x: m.bn(m.conv(x)) + m.reparam(x).relu(), conv=conv(), bn=bn(), reparam=conv(1))


CASES = [
    *(Case(n, lambda f=f: Net(
        f, conv=conv(), b=conv(1), bn=bn(), down=conv(stride=2), branch=Branching()
    ), left, bare=f is not reshaped) for n, (f, left) in BODIES.items()),
    Case("tied weights", tied, "c3 b0"),
    Case("repeated block", repeated, "c4 b0"),
    Case("a child of the name that new layers get", named_reparam, "c2 b0"),
    Case("unused layers", lambda: Net(
        lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn(), head=linear(), w=weight(3)
    ), "c1 b0"),
    Case("nothing to collapse", sequence(nn.ReLU(), nn.MaxPool2d(2)), ""),
]  # fmt: skip


@over(CASES)
def test_equal_and_collapsed(case: Case) -> None:
    check(case)


# Hooks


class Recorder:
    """A hook that keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[type, Tensor]] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append((type(module), output.clone()))


HOOKED = {
    "leaf": lambda m: m[0],
    "norm": lambda m: m[1],
    "block": lambda m: m[2],
    "layer in a block": lambda m: m[2][0],
    "root": lambda m: m,
}


def hooked_network() -> nn.Module:
    network = nn.Sequential(conv(), bn(), nn.Sequential(conv(), bn(), nn.ReLU()), conv(), bn())
    return Case("hooked", lambda: network).network().eval()


@pytest.mark.parametrize("place", HOOKED)
def test_a_hook_sees_the_same_once_a_call(place: str) -> None:
    network, recorder = hooked_network(), Recorder()
    handle = HOOKED[place](network).register_forward_hook(recorder)
    collapsed = fxrep.reparameterize(network)
    assert recorder.seen == []
    x = draw(*SIZES[0])
    equal_results(
        collapsed, network, x
    )  # the copy that it runs has the hook's copy: only the collapsed one records here
    network(x)
    (_, mine), (_, theirs) = recorder.seen
    assert relative_error(mine, theirs) <= TOLERANCE
    assert collapsed.report.after["bn"] < 3
    handle.remove()
    collapsed(x)
    network(x)
    assert len(recorder.seen) == 3


@pytest.mark.parametrize("place", HOOKED)
def test_hooks_that_change_what_passes_still_do(place: str) -> None:
    network = hooked_network()
    target = HOOKED[place](network)
    target.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    target.register_forward_hook(lambda module, args, kwargs, out: out + 1 + len(kwargs), with_kwargs=True)
    target.register_forward_hook(lambda module, args, out: -out, prepend=True)
    collapsed = fxrep.reparameterize(network)
    for size in SIZES:
        equal_results(collapsed, network, draw(*size))
