"""Views between layers: those that keep the channels where they are do not stop a fold, and the others do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import error_against_original
from reader_cases import TOLERANCE, Case, Net, bn, check, conv, executed, linear, over, tokens
from torch import Tensor, nn

import fxrep


def levit(m: Any, x: Tensor) -> Tensor:
    """LeViT's linear layer and batch norm, on tokens."""
    x = m.linear(x)
    return m.bn(x.flatten(0, 1)).reshape_as(x)


def levit_twice(m: Any, x: Tensor) -> Tensor:
    y = levit(m, x)
    z = m.again(y.sigmoid())
    return y + m.bn_again(torch.flatten(z, 0, 1)).view_as(z)


def by_sizes(m: Any, x: Tensor) -> Tensor:
    batch, count, channels = x.shape
    return m.bn(m.linear(x).view(batch * count, channels)).view(batch, count, channels)


def by_minus_one(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.linear(x).reshape(-1, 4)).reshape(x.size(0), -1, 4)


def by_torch_reshape(m: Any, x: Tensor) -> Tensor:
    return torch.reshape(input=m.bn(torch.reshape(m.linear(x), (-1, 4))), shape=x.shape)


def by_flatten_module(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.flatten(m.linear(x))).reshape(x.shape)


def over_four_axes(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x.unsqueeze(1))
    return m.bn(y.flatten(0, 2)).view(y.shape).squeeze(1)


def flattened_before(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.linear(x.flatten(0, 1))).reshape_as(x)


def two_linears(m: Any, x: Tensor) -> Tensor:
    return m.again(m.linear(x).view(-1, 4)).view(x.shape[0], x.shape[1], 4) + x


def axis_one(m: Any, x: Tensor) -> Tensor:
    """A batch norm of (N, 4, L), which are the channels moved to axis 1."""
    return m.bn(m.linear(x).transpose(1, 2)).transpose(1, 2)


def axis_one_by_permute(m: Any, x: Tensor) -> Tensor:
    return m.again(m.bn(m.linear(x).permute(0, 2, 1)).permute(0, 2, 1))


#: Linear(4, 4), BatchNorm1d(4) on tokens (N, L, 4): the batch norm goes.
FOLDING: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "levit": (levit, "l1 b0"),
    "levit twice": (levit_twice, "l2 b0"),
    "by sizes": (by_sizes, "l1 b0"),
    "by -1": (by_minus_one, "l1 b0"),
    "torch.reshape": (by_torch_reshape, "l1 b0"),
    "Flatten": (by_flatten_module, "l1 b0"),
    "four axes": (over_four_axes, "l1 b0"),
    "flattened before": (flattened_before, "l1 b0"),
    "not reshaped back": (lambda m, x: m.bn(m.linear(x).flatten(0, 1)), "l1"),
    "two linears": (two_linears, "l1"),
    "axis one": (axis_one, "l1 b0"),
    "axis one by permute": (axis_one_by_permute, "l1 b0"),
    "torch.permute": (lambda m, x: torch.permute(m.bn(torch.permute(m.linear(x), (0, 2, 1))), dims=(0, 2, 1)), "l1 b0"),
    "swapaxes": (lambda m, x: m.bn(m.linear(x).swapaxes(1, 2)).swapaxes(-1, -2), "l1 b0"),
    "torch.swapaxes": (lambda m, x: torch.swapaxes(m.bn(torch.swapaxes(m.linear(x), 1, 2)), 1, 2), "l1 b0"),
    "axis one of a sum": (lambda m, x: m.bn((m.linear(x) + x).transpose(1, 2)).transpose(1, 2), "l1 b0 a0"),
    "axis one before a layer": (lambda m, x: m.linear(m.bn(x.transpose(1, 2)).transpose(1, 2)), "l1 b0"),
    "scalar between": (lambda m, x: m.again((m.linear(x).transpose(1, 2) * 3 + 1).transpose(2, 1)), "l1 m0 a0"),
}


def scrambled(m: Any, x: Tensor) -> Tensor:
    """As many rows and columns as before, in another order."""
    y = m.linear(x)
    return m.bn(y.transpose(1, 2).reshape(-1, 4)).reshape_as(y)


def regrouped(m: Any, x: Tensor) -> Tensor:
    """Rows of two tokens' halves: channels that are no channels."""
    y = m.wide(x)
    return m.bn(y.reshape(-1, 4)).reshape(y.shape)


def halves(m: Any, x: Tensor) -> Tensor:
    """Each half of the channels through the same batch norm, by an axis of its own."""
    y = m.wide(x)
    return m.bn(y.view(x.shape[0], x.shape[1], 2, 4).flatten(0, 2)).view(y.shape)


def heads(m: Any, x: Tensor) -> Tensor:
    """An attention's queries and keys."""
    batch, count, _ = x.shape
    qkv = m.linear(x).reshape(batch, count, 2, 2).permute(2, 0, 3, 1)
    return m.again((qkv[0].transpose(1, 2) @ qkv[1]).softmax(-1) @ x)


def sized_by_each_other(m: Any, x: Tensor) -> Tensor:
    """A value that is looked through for its numbers, and asked for its size."""
    first = m.linear(x)
    y = m.bn(first.flatten(0, 1)).reshape_as(first)
    z = m.bn_again(y.flatten(0, 1)).reshape_as(y)
    return m.bn_last(z.flatten(0, 1)).reshape_as(z).sigmoid() + y.sigmoid()


def not_moved_back(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.linear(x).transpose(1, 2))


def moved_elsewhere(m: Any, x: Tensor) -> Tensor:
    return m.again(m.bn(m.linear(x).transpose(1, 2)).permute(2, 0, 1))


def read_between(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.linear(x).transpose(1, 2))
    return y.sigmoid().mean(2) + y.transpose(1, 2).sum(1)


def moved(m: Any, x: Tensor) -> Tensor:
    """The last axis after a transposition is another one than before."""
    y = m.linear(x)
    return y.transpose(0, 1).reshape(y.shape) + y


def summed_with_a_reshape(m: Any, x: Tensor) -> Tensor:
    y = m.linear(x)
    return y.flatten(0, 1).view(x.shape[1], x.shape[0], 4).transpose(0, 1) + m.again(x)


OTHERS = [
    scrambled,
    regrouped,
    halves,
    heads,
    sized_by_each_other,
    not_moved_back,
    moved_elsewhere,
    read_between,
    moved,
    summed_with_a_reshape,
]


def parts() -> dict[str, nn.Module]:
    return {
        "linear": linear(), "again": linear(), "bn": bn(dims=1), "bn_again": bn(dims=1), "bn_last": bn(dims=1),
        "wide": linear(4, 8), "flatten": nn.Flatten(0, 1),
    }  # fmt: skip


def image_to_tokens(m: Any, x: Tensor) -> Tensor:
    """A patch embedding."""
    return m.linear(m.bn(m.conv(x)).flatten(2).transpose(1, 2))


def frames(m: Any, x: Tensor) -> Tensor:
    """A batch of pairs of frames: a convolution of all at once, and back."""
    batch, _, height, width = x.shape
    y = m.bn(m.conv(x.view(batch * 2, 4, height, width)))
    return y.view(batch, 8, height, width)


def pooled_to_rows(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    return m.linear(torch.flatten(y.mean((2, 3), keepdim=True), 1))


def same_view(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.bn(y.view(y.shape).reshape_as(y).view_as(y))


def pixels_as_rows(m: Any, x: Tensor) -> Tensor:
    """A linear layer on the last axis of an image moved there, as ConvNeXt does."""
    y = m.conv(x).permute(0, 2, 3, 1)
    return m.linear(m.linear(y)).permute(0, 3, 1, 2)


def grouped_by_view(m: Any, x: Tensor) -> Tensor:
    """Split attention's: groups on an axis of their own, then summed."""
    y = m.wide_conv(x)
    return y.view(x.shape[0], 2, 4, y.shape[2], y.shape[3]).sum(1)


IMAGES = {
    "image to tokens": (image_to_tokens, "c1 b0"),
    "frames": (frames, "c1 b0"),
    "pooled to rows": (pooled_to_rows, "c1 b0"),
    "same view": (same_view, "c1 b0"),
    "pixels as rows": (pixels_as_rows, "c1 l1"),
    "grouped by view": (grouped_by_view, "c1"),
}


def image_parts() -> dict[str, nn.Module]:
    return {"conv": conv(), "bn": bn(), "linear": linear(), "wide_conv": conv(out=8)}


CASES = [
    *(Case(name, lambda f=f: Net(f, **parts()), left, tokens(), bare=False) for name, (f, left) in FOLDING.items()),
    *(Case(f.__name__, lambda f=f: Net(f, **parts()), "", tokens()) for f in OTHERS),
    *(
        Case(name, lambda f=f: Net(f, **image_parts()), left, ((1, 8, 9, 13), (3, 8, 15, 11)))
        for name, (f, left) in IMAGES.items() if f is frames
    ),
    *(Case(name, lambda f=f: Net(f, **image_parts()), left) for name, (f, left) in IMAGES.items() if f is not frames),
]  # fmt: skip


@over(CASES)
def test_equal_and_collapsed(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("body", [scrambled, halves, not_moved_back, axis_one, moved_elsewhere])
def test_square_sizes_fool_no_view(body: Callable[[Any, Tensor], Tensor]) -> None:
    """With 4 tokens of 4 channels every wrong axis has the right size."""
    check(Case("square", lambda: Net(body, **parts()), shapes=((4, 4, 4), (1, 4, 4))))


def test_two_axes_where_three_were_shown() -> None:
    """Examples tell the number of axes; what else is accepted must still be right, or be refused aloud."""
    case = Case("axes", lambda: Net(lambda m, x: m.again(m.linear(x)), **parts()), shapes=tokens())
    network, (x, _) = case.network(), case.inputs()
    collapsed = fxrep.reparameterize(network, x)
    assert executed(collapsed, x)["l"] == 1
    for other in (x[0], x[0, 0], x[None]):
        assert error_against_original(collapsed, network, other) <= TOLERANCE
