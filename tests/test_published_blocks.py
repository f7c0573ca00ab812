"""Published blocks collapse to their papers' deploy form, and equal their training form in float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from blocks import image
from helpers import randomise, relative_error
from published_blocks import PUBLISHED, Layer, Published
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxrep


class Executed(TorchDispatchMode):
    """The layers that run, below Python: geometry of convolutions and linear layers, and how many of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name == "convolution":
            self.layers.append(_conv(*args))
        elif name in ("addmm", "mm"):
            self.layers.append(("linear", *reversed(args[-1].shape)))
        else:
            self.others["add" if name in ("sub", "rsub") else name] += 1
        return func(*args, **(kwargs or {}))


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    pad: Any,
    dilation: Any,
    transposed: bool,
    _extra: Any,
    groups: int,
) -> Layer:
    out = weight.shape[1] * groups if transposed else weight.shape[0]
    return ("conv", out, x.shape[1], tuple(weight.shape[2:]), *map(tuple, (stride, pad, dilation)), groups, transposed)


def executed(model: nn.Module, x: Tensor) -> tuple[Tensor, Executed]:
    with torch.no_grad(), Executed() as calls:
        out = model(x)
    return out, calls


BLOCKS = pytest.mark.parametrize("name", PUBLISHED)


@BLOCKS
def test_collapses_to_the_deploy_form(name: str):
    block = PUBLISHED[name]
    training_form = build(block)
    collapsed = fxrep.reparameterize(training_form, image(*block.shapes[0]) if block.ambiguous else None)
    for shape in block.shapes:
        expected, before = executed(training_form, image(*shape))
        got, after = executed(collapsed, image(*shape))
        assert relative_error(got, expected) < 1e-10
        assert tuple(after.layers) == block.deploy
        assert len(before.layers) + before.others["native_batch_norm"] > len(after.layers)
        assert after.others["native_batch_norm"] == 0
        assert after.others["mul"] + after.others["div"] == 0
        assert after.others["add"] == block.additions


@BLOCKS
def test_collapses_in_float32_as_in_float64(name: str):
    """What is compared to prove a merge legal, such as DBB's border, is known only to float32's accuracy."""
    block = PUBLISHED[name]
    training_form = build(block).float()
    example = image(*block.shapes[0]).float()
    got, after = executed(fxrep.reparameterize(training_form, example if block.ambiguous else None), example)
    assert tuple(after.layers) == block.deploy
    assert relative_error(got, executed(training_form, example)[0]) < 1e-4


def test_a_rank_that_only_an_example_tells_is_asked_for():
    report = fxrep.reparameterize(build(PUBLISHED["LeViT"])).report
    assert [(r.node, r.code, r.hint) for r in report.refusals] == [
        (f"layers.{i}.bn", "rank-unknown", "pass example_inputs") for i in (0, 2)
    ]


def build(block: Published) -> nn.Module:
    torch.manual_seed(0)
    return randomise(block.build()).double().eval()
