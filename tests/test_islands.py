"""Inside a forward that cannot be traced: what its source proves to be only called is collapsed, and nothing else."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from blocks import Asserting
from helpers import randomise, relative_error
from reader_cases import TOLERANCE, bn, conv, draw, executed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import detection

import fxrep
from fxrep.islands.calls import calls_of
from fxrep.islands.function import ONE, Slot

SIZES = ((1, 4, 9, 13), (3, 4, 15, 11))


def pair() -> nn.Sequential:
    """What collapses: a convolution and its batch norm."""
    return nn.Sequential(conv(), bn())


class Branching(nn.Module):
    """Its forward cannot be traced: it looks at a size."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = pair(), pair()
        self.conv, self.bn, self.act = conv(), bn(), nn.ReLU()
        self.blocks = nn.ModuleList(pair() for _ in range(2))
        self.rows = nn.ModuleList(nn.ModuleList([pair()]) for _ in range(2))
        self.named = nn.ModuleDict({"a": pair(), "b": pair()})
        self.seq = nn.Sequential(pair(), pair())

    def grows(self, x: Tensor) -> bool:
        return bool(x.shape[-1] > 12)


# What collapses: the number of batch norms that run afterwards


class Activated(nn.BatchNorm2d):
    """A batch norm with a forward and parts of its own, which no reader knows before it is traced."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Outspoken(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(conv(), Activated(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if self.grows(x) else -self.block(x)


class Called(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if self.grows(x) else self.other(x)


class Looped(Branching):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        for i, block in enumerate(reversed(self.blocks)):
            x = block(x) + i
        return x if self.grows(x) else -x


class Zipped(Branching):
    def forward(self, x: Tensor) -> Tensor:
        ys = [a(x) + b(x) for a, b in zip(self.blocks, self.named.values())]  # noqa: B905
        for name, layer in self.named.items():
            ys.append(layer(x) * len(name))
        return sum(ys[1:], ys[0]) if self.grows(x) else ys[0]


class Indexed(Branching):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.blocks)):
            x = self.blocks[i](x)
        return self.named["a"](x) if self.grows(x) else self.seq[0](x)


class Nested(Branching):
    def forward(self, x: Tensor) -> Tensor:
        for row in self.rows:
            for block in row:
                x = block(x)
        return x if self.grows(x) else -x


class Aliased(Branching):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.block
        return layer(x) if self.grows(x) else x


class Through(Branching):
    """By way of a method and a property of its own, and of the class that it inherits from."""

    @property
    def flipped(self) -> bool:
        return self.training

    def body(self, x: Tensor) -> Tensor:
        return -self.block(x) if self.flipped else self.block(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.grows(x) else x


class Inheriting(Through):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class SequenceBoth(Branching):
    """Called as a whole and in part: its parts are replaced, not itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x) if self.grows(x) else self.seq[1](x)


class Optional(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.down = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x) if self.block is not None else x
        y = self.down(y) if self.down is not None else y
        return y if self.grows(x) else -y


class Chained(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        return y if self.grows(x) else -y


class Stepwise(Branching):
    def forward(self, x: Tensor) -> Tensor:
        if self.grows(x):
            x = -x
        x = self.conv(x)
        x = self.bn(x)
        return self.act(x)


class Renamed(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y)
        return z if self.grows(x) else -z


class SharedActivation(Branching):
    """The activation is called twice: the chain ends before it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        return self.act(-y) if self.grows(x) else y


def padded_for(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Padded as TensorFlow does it, by the stride and taps of the layer that follows."""
    stride, taps = layer.stride[0], layer.kernel_size[0]
    more = max(taps - (stride if x.shape[-1] % stride == 0 else x.shape[-1] % stride), 0)
    return nn.functional.pad(x, (more // 2, more - more // 2, 1, 1))


class PaddedByHand(Branching):
    """As in MobileNetV2 of transformers: a function reads the geometry of a layer, and norms are optional."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.none = conv(padding=0, stride=2), None

    def forward(self, x: Tensor) -> Tensor:
        x = padded_for(x, self.conv)
        x = self.conv(x)
        if self.none is not None:
            x = self.none(x)
        if self.bn is not None:
            x = self.bn(x)
        return self.act(x)


class ReadsStride(Branching):
    """The geometry of a layer in a chain is read by the forward itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)) * self.conv.stride[0] + self.bn.eps
        return y if self.grows(x) else -y


COLLAPSED: tuple[type[nn.Module], ...] = (
    Called, Outspoken, Looped, Zipped, Indexed, Nested, Aliased, Through, Inheriting, SequenceBoth, Optional, Chained,
    Stepwise, Renamed, SharedActivation, PaddedByHand, ReadsStride,
)  # fmt: skip


def original(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).eval()


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    network = randomise(make()).double()
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.4)
    return network


@torch.no_grad()
def assert_equal(collapsed: nn.Module, network: nn.Module) -> None:
    for size in SIZES:
        expected = original(network)(draw(*size))
        assert relative_error(collapsed(draw(*size)), expected) <= TOLERANCE


@pytest.mark.parametrize("kind", COLLAPSED)
@pytest.mark.parametrize("inside", [False, True], ids=["root", "inside"])
def test_what_is_only_called_collapses(kind: type[nn.Module], inside: bool) -> None:
    network = built((lambda: nn.Sequential(pair(), kind())) if inside else kind)
    collapsed = fxrep.reparameterize(network)
    assert_equal(collapsed, network)
    assert sum(executed(original(network), draw(*size))["b"] for size in SIZES) > 2 * inside
    assert sum(executed(collapsed, draw(*size))["b"] for size in SIZES) == 0
    assert_equal(copy.deepcopy(collapsed), network)
    assert not fxrep.reparameterize(collapsed).report.collapses


@pytest.mark.parametrize("kind", COLLAPSED)
def test_explain_tells_the_same_and_changes_nothing(kind: type[nn.Module]) -> None:
    network = built(kind)
    names = [name for name, _ in network.named_modules()]
    planned, done = fxrep.explain(network), fxrep.reparameterize(network).report
    assert [c.replaced for c in planned.collapses] == [c.replaced for c in done.collapses]
    assert (planned.before, planned.after) == (done.before, done.after)
    assert [name for name, _ in network.named_modules()] == names


def test_names_and_counts_are_those_of_the_whole() -> None:
    report = fxrep.reparameterize(built(lambda: nn.Sequential(pair(), Called()))).report
    assert [(c.name, c.replaced) for c in report.collapses] == [
        ("0.reparam", ("0.0", "0.1")),
        ("1.block.reparam", ("1.block.0", "1.block.1")),
        ("1.other.reparam", ("1.other.0", "1.other.1")),
    ]
    everywhere = sum(isinstance(m, nn.BatchNorm2d) for m in Called().modules())
    assert (report.before["bn"], report.after["bn"]) == (everywhere + 1, everywhere - 2)


# What stays apart, and why it must: in each the naive replacement gives something else or does not run


class ReadsWeights(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x) * self.block[0].weight.sum()
        return y if self.grows(x) else -y


class LooksInside(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x) + sum(isinstance(m, nn.BatchNorm2d) for m in self.modules())
        return y if self.grows(x) else -y


class HandsOn(Branching):
    """Hands the block to a function, which may do anything with it."""

    def forward(self, x: Tensor) -> Tensor:
        y = scaled(self.block, x)
        return y if self.grows(x) else -y


def scaled(block: Any, x: Tensor) -> Tensor:
    return block(x) * block[0].weight.sum()


class CallsAMethod(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.block.forward(x) + len(list(self.block.children()))
        return y if self.grows(x) else -y


class Unpacked(Branching):
    """A loop whose names are not understood."""

    def forward(self, x: Tensor) -> Tensor:
        for (block,) in self.rows:
            x = block(x) * block[0].weight.sum()
        return x if self.grows(x) else -x


class ByName(Branching):
    def forward(self, x: Tensor) -> Tensor:
        block = getattr(self, "block")  # noqa: B009
        y = self.block(x) * block[0].weight.sum()
        return y if self.grows(x) else -y


class Internals(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x) * self._modules["block"][0].weight.sum()
        return y if self.grows(x) else -y


class SeenBetween(Branching):
    """The result of the convolution goes elsewhere too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y)
        return z + y if self.grows(x) else z


class KeptBetween(Branching):
    """A closure reads the variable before it is set again."""

    def forward(self, x: Tensor) -> Tensor:
        y = x
        x = self.conv(x)
        first = (lambda: x * 1)()
        x = self.bn(x)
        return first + x if self.grows(y) else x


class Conditionally(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.grows(x):
            y = self.bn(y)
        return y


class CalledTwice(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.conv(y) if self.grows(x) else y


def weighed(x: Tensor, layer: Any) -> Tensor:
    return x * layer.weight.sum() + layer.stride[0]


class HandedForItsWeight(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(weighed(x, self.conv)))
        return y if self.grows(x) else -y


def remembered(x: Tensor, layer: Any) -> Tensor:
    """The layer goes on under another name."""
    same = layer
    return x * same.weight.sum() + layer.stride[0]


class HandedOn(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(remembered(x, self.conv)))
        return y if self.grows(x) else -y


class Restored(Branching):
    """A norm that is not there at first."""

    def __init__(self) -> None:
        super().__init__()
        self.late = None

    def forward(self, x: Tensor) -> Tensor:
        self.late = self.late if self.grows(x) else torch.neg
        y = self.conv(x)
        if self.late is not None:
            y = self.late(y)
        return self.bn(y)


class ElseWhere(Branching):
    """What happens where there is no norm is not what happens."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.bn is None:
            y = self.bn(y)
        return y if self.grows(x) else -y


APART: tuple[type[nn.Module], ...] = (
    ReadsWeights, LooksInside, HandsOn, CallsAMethod, Unpacked, ByName, Internals, SeenBetween,
    KeptBetween, Conditionally, CalledTwice, HandedForItsWeight, HandedOn, ElseWhere, Restored,
)  # fmt: skip


def naive(network: nn.Module) -> nn.Module:
    """What is done where nobody asks how the parent uses it: every pair is replaced by its convolution."""
    network = original(network)
    pairs = [(m, name) for m in network.modules() for name, c in m.named_children() if type(c) is nn.Sequential]
    for holder, name in [
        (h, n) for h, n in pairs if len(h._modules[n]) == 2 and type(h._modules[n][1]) is nn.BatchNorm2d
    ]:
        holder._modules[name] = fxrep.reparameterize(holder._modules[name])
    folded = fxrep.reparameterize(nn.Sequential(network.conv, network.bn))
    network.conv, network.bn = folded, nn.Identity()
    return network


@pytest.mark.parametrize("kind", APART)
@torch.no_grad()
def test_what_may_be_more_than_called_stays(kind: type[nn.Module]) -> None:
    network = built(kind)
    collapsed = fxrep.reparameterize(network)
    assert_equal(collapsed, network)
    assert "reached-into" in {r.code for r in collapsed.report.refusals}
    wrong = naive(network)
    try:
        errors = [relative_error(wrong(draw(*s)), original(network)(draw(*s))) for s in SIZES]
    except Exception:
        return  # it does not even run
    assert max(errors) > 1e-3


def test_a_function_of_torch_may_get_it_too_and_it_stays() -> None:
    class Checkpointed(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(self.block, x, use_reentrant=False)
            return y if self.grows(x) else -y

    network = built(Checkpointed)
    collapsed = fxrep.reparameterize(network)
    assert_equal(collapsed, network)
    assert collapsed.block[1].running_mean is not None


class HoldsTwice(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.block]

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x) + self.kept[0][0].weight.sum()
        return y if self.grows(x) else -y


class Bound(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.run = functools.partial(scaled, self.block)

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(x) + self.block(x)
        return y if self.grows(x) else -y


@pytest.mark.parametrize("kind", [HoldsTwice, Bound])
def test_what_an_attribute_holds_too_is_no_second_copy_of_the_weights(kind: type[nn.Module]) -> None:
    network = built(kind)
    collapsed = fxrep.reparameterize(network)
    assert_equal(collapsed, network)
    assert "reached-into" in {r.code for r in collapsed.report.refusals}
    assert isinstance(collapsed.block[1], nn.BatchNorm2d)


class WithDefault(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = pair()

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return self.body(x) + shift


class Shifting(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.inner = WithDefault()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, 0.5) if self.grows(x) else self.inner(x)


class Plainly(Shifting):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.grows(x) else -self.inner(x)


class WithMore(WithDefault):
    def forward(self, x: Tensor, shift: float = 0.0, **more: float) -> Tensor:
        return self.body(x) + shift


class ShiftingMore(Shifting):
    """What takes any keyword has no more arguments without a default for that."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = WithMore()


class FirstOptional(WithDefault):
    def forward(self, x: Tensor | None = None, shift: float = 0.0) -> Tensor:
        if x is None:
            raise ValueError("x is needed")
        return self.body(x) + shift


class Given(Plainly):
    """A first argument that defaults to None is what is passed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = FirstOptional()


@pytest.mark.parametrize("kind", [Shifting, ShiftingMore, Plainly, Given])
def test_an_argument_with_a_default_that_is_passed_is_not_taken_to_have_it(kind: type[nn.Module]) -> None:
    network = built(kind)
    collapsed = fxrep.reparameterize(network)
    assert_equal(collapsed, network)
    assert executed(collapsed, draw(*SIZES[0]))["b"] == 0
    assert isinstance(collapsed.inner, torch.fx.GraphModule) == (kind in (Plainly, Given))


def test_a_module_in_two_places_is_left_alone() -> None:
    class Twice(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.block

        def forward(self, x: Tensor) -> Tensor:
            y = self.block(self.again(x))
            return y if self.grows(x) else -y

    network = built(Twice)
    collapsed = fxrep.reparameterize(network)
    assert_equal(collapsed, network)
    assert collapsed.block is collapsed.again


def test_a_hook_inside_goes_on_seeing_its_module() -> None:
    network = built(Called)
    seen: list[nn.Module] = []
    network.block.register_forward_hook(lambda m, _args, _out: seen.append(m))
    collapsed = fxrep.reparameterize(network)
    assert_equal(collapsed, network)
    collapsed(draw(*SIZES[0]))
    assert all(isinstance(m[1], nn.BatchNorm2d) for m in seen)


def test_what_a_source_shows() -> None:
    calls = calls_of(Zipped())
    assert calls.of == {Slot("blocks", 1): [ONE], Slot("named", 1): [ONE, ONE]}
    assert not calls.opaque
    assert calls_of(Chained()).chains == [("conv", "bn", "act")]
    assert calls_of(ReadsWeights()).why_not("block").startswith("line ")
    made: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.block(x)", made)
    assert calls_of(type("Unseen", (Branching,), made)()).opaque == "the source of its forward cannot be read"


# Assertions, and numbers of sizes: traced


def test_assertions_are_kept_and_stop_no_trace() -> None:
    network = built(Asserting)
    collapsed = fxrep.reparameterize(network)
    assert isinstance(collapsed, torch.fx.GraphModule)
    assert_equal(collapsed, network)
    assert executed(collapsed, draw(*SIZES[0]))["b"] == 0
    for wrong in (torch.zeros(1, 4, 2, 9), torch.zeros(1, 4, 9, 120)):
        with pytest.raises(AssertionError, match="assertion of the network's own"):
            collapsed(wrong.double())


class Strides(Asserting):
    """A check with a name, that says what would do: several ways, of which all raise."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            height, width = x.shape[-2:]
            self.check(height, width)
        return self.body(x)

    def check(self, height: int, width: int) -> None:
        if height % 2 != 1 or width % 3 != 0:
            fits = height if height % 2 == 1 else height + 1
            if self.training:
                raise RuntimeError("train it on maps of odd height")
            raise ValueError(f"{height} rows are not odd; pad to {fits if fits > 0 else 1}, and columns to threes")


class Caught(Asserting):
    """What is raised and seen in the same function is one way of two."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            if x.shape[-1] > 12:
                raise ValueError("wide")
        except ValueError:
            return -self.body(x)
        return self.body(x)


def test_a_check_with_several_ways_to_raise_is_an_assertion() -> None:
    network = built(Strides)
    collapsed = fxrep.reparameterize(network)
    assert isinstance(collapsed, torch.fx.GraphModule)
    assert executed(collapsed, draw(1, 4, 9, 9))["b"] == 0
    for size in ((1, 4, 9, 9), (2, 4, 5, 12)):
        assert relative_error(collapsed(draw(*size)), original(network)(draw(*size))) <= TOLERANCE
    for size in ((1, 4, 8, 9), (1, 4, 9, 8)):
        with pytest.raises(ValueError, match="not odd"):
            original(network)(draw(*size))
        with pytest.raises(AssertionError, match="assertion of the network's own"):
            collapsed(draw(*size))


class Deciding(Asserting):
    """Two ways, of which neither raises: no assertion."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 12:
            if self.training:
                raise ValueError("not reached")
            return -self.body(x)
        return self.body(x)


@pytest.mark.parametrize("kind", [Deciding, Caught])
def test_a_branch_that_may_return_is_no_assertion(kind: type[nn.Module]) -> None:
    network = built(kind)
    collapsed = fxrep.reparameterize(network)
    assert not isinstance(collapsed, torch.fx.GraphModule)
    assert_equal(collapsed, network)
    assert executed(collapsed, draw(*SIZES[0]))["b"] == 0


def test_max_is_what_it_was() -> None:
    before = max, min
    fxrep.reparameterize(built(Asserting))
    assert (max, min) == before


def test_many_untraceable_modules_take_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[type] = []
    trace = fxrep.tracer.Tracer.trace
    monkeypatch.setattr(
        fxrep.tracer.Tracer, "trace", lambda s, root, *a: traces.append(type(root)) or trace(s, root, *a)
    )
    network = built(lambda: nn.Sequential(*(Called() for _ in range(5))))
    collapsed = fxrep.reparameterize(network)
    assert traces.count(nn.Sequential) == 1 + 2 * 5  # the whole, and each `block` and `other`
    assert_equal(collapsed, network)


# Detection: a forward that nobody traces


def detectors() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    small = {"weights": None, "weights_backbone": None, "num_classes": 4}
    sides = {"min_size": 64, "max_size": 96}
    yield "fasterrcnn", lambda: detection.fasterrcnn_mobilenet_v3_large_320_fpn(**small, **sides)
    yield "ssdlite", lambda: detection.ssdlite320_mobilenet_v3_large(**small)
    yield "retinanet", lambda: detection.retinanet_resnet50_fpn_v2(**small, **sides)


def of_heads(network: Any, x: Tensor) -> list[Tensor]:
    """What the heads say of each level of features, before boxes are sorted, where a tie would decide."""
    features = list(network.backbone(x).values())
    said = network.rpn.head(features) if hasattr(network, "rpn") else tuple(network.head(features).values())
    return [t for part in said for t in (part if isinstance(part, list) else [part])]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "make"), list(detectors()), ids=[name for name, _ in detectors()])
@torch.no_grad()
def test_a_detector_has_its_backbone_collapsed(name: str, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = randomise(make()).double().eval()
    collapsed = fxrep.reparameterize(network)
    x = torch.rand(2, 3, 64, 96).double()
    for got, expected in zip(of_heads(collapsed, x), of_heads(network, x), strict=True):
        assert relative_error(got, expected) <= 1e-10
    assert not any(isinstance(m, (nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d)) for m in collapsed.modules())
    assert collapsed.backbone(x).keys() == network.backbone(x).keys()
    boxes = collapsed([torch.rand(3, 70, 90).double(), torch.rand(3, 64, 64).double()])
    assert [sorted(b) for b in boxes] == [["boxes", "labels", "scores"]] * 2
