"""Whose tensors are whose, in place and not, and what else of the caller's model the result carries."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from blocks import Block, conv_bn, image, net, real_network
from helpers import randomise, relative_error
from torch import Tensor, nn

import fxrep
from fxrep.bench.memory import peak_bytes

# Whose tensors


def storages(model: nn.Module) -> set[int]:
    held = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *held) if t.numel()}


class Keeps(nn.Module):
    """Tensors of every kind that survive a collapse: a layer's, a parameter's, a buffer's, a plain attribute's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.randn(4, 5))
        self.register_buffer("shift", torch.randn(4, 5))
        self.plain = torch.randn(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).relu() @ self.scale.exp() + (x.relu() @ self.shift).sigmoid() @ self.plain @ self.scale


def keeps() -> nn.Module:
    return Keeps().double().apply(lambda m: vars(m).update(plain=m.plain.double()) if hasattr(m, "plain") else None)


@pytest.mark.parametrize(
    ("make", "x"),
    [(net, image()), (lambda: net(torch.float32), image(dtype=torch.float32)), (real_network, image(1, 3, 32, 32)),
     (keeps, image(2, 4)), (conv_bn, image()), (lambda: nn.Conv2d(3, 4, 3).double(), image()),
     (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)).double(), image())],
    ids=["net", "float32", "real", "keeps", "conv-bn", "conv", "two convs"],
)  # fmt: skip
def test_the_result_shares_no_memory_with_the_model(make: Callable[[], nn.Module], x: Tensor):
    model = make().eval()
    collapsed = fxrep.reparameterize(model)
    assert not storages(model) & storages(collapsed)
    expected = model(x)
    for tensor in (*collapsed.parameters(), *collapsed.buffers()):
        tensor.data.zero_()
    assert torch.equal(model(x), expected)


def test_halving_the_result_leaves_the_model():
    model = net(torch.float32).eval()
    collapsed = fxrep.reparameterize(model)
    collapsed.half()
    assert {t.dtype for t in collapsed.parameters()} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_changing_the_model_leaves_the_result():
    model = net().eval()
    collapsed = fxrep.reparameterize(model)
    expected = collapsed(image())
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    assert torch.equal(collapsed(image()), expected)


def test_the_result_does_not_keep_the_model_alive():
    model = net()
    collapsed = fxrep.reparameterize(model)
    gone = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    del model
    gc.collect()
    assert [r for r in gone if r() is not None] == []
    assert collapsed.report.collapses


class Functional(nn.Module):
    """A batch norm and a convolution that are called as functions, on parameters that the trace reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.conv.weight * 2, self.conv.bias).relu()
        return F.batch_norm(y, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias).sigmoid()


@pytest.mark.parametrize("make", [net, Functional])
def test_the_models_tensors_go_with_it(make: Callable[[], nn.Module]):
    """At once: neither the result nor what the pass has left behind keeps one until Python's collector comes by."""
    model = make().eval()
    gc.collect()
    gc.disable()
    try:
        collapsed = fxrep.reparameterize(model)
        theirs = [weakref.ref(p) for p in model.parameters()]
        del model
        assert collapsed.report.before["conv"]
        assert not [r for r in theirs if r() is not None]
    finally:
        gc.enable()


class Tied(nn.Module):
    """Two layers on one weight, and a third use of it in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.second(self.first(x).relu()).relu(), self.first.weight.t()).tanh()


@pytest.mark.parametrize("inplace", [False, True])
def test_ties_stay_tied(inplace: bool):
    model, x = Tied().double().eval(), image(3, 4)
    expected = model(x)
    collapsed = fxrep.reparameterize(model, inplace=inplace)
    assert torch.equal(collapsed(x), expected)
    assert collapsed.first.weight is collapsed.second.weight
    assert sum(p.ndim == 2 for p in collapsed.parameters()) == 1


# In place


@pytest.mark.parametrize("make", [net, real_network, Tied, keeps, lambda: Block(3), conv_bn])
def test_in_place_gives_what_the_model_gave(make: Callable[[], nn.Module]):
    model = randomise(make()).double().eval()
    x = image(2, 4) if isinstance(model, (Tied, Keeps)) else image(2, 3, 32, 32)
    expected = model(x)
    assert relative_error(fxrep.reparameterize(model, inplace=True)(x), expected) < 1e-12


def test_in_place_reuses_what_is_kept():
    model = net()
    kept = model.head.weight
    collapsed = fxrep.reparameterize(model, inplace=True)
    assert any(p.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr() for p in collapsed.parameters())


class SharedMemory(nn.Module):
    """Two parameters on one memory, each with a batch norm of its own: neither may be written over for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, padding=1), conv_bn(4, padding=1)
        self.c = conv_bn(4, padding=1)
        self.c[0].weight = nn.Parameter(self.b[0].weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def test_in_place_minds_memory_that_two_parameters_share():
    model = SharedMemory().eval()
    expected = model(image())
    assert relative_error(fxrep.reparameterize(model, inplace=True)(image()), expected) < 1e-12


def live_bytes(before: set[int]) -> int:
    """Of all tensors alive that were not there before, each memory once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and id(t) not in before]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def heavy() -> nn.Module:
    """All weight: 16 convolutions with their batch norms, and few pixels."""
    layers = [m for _ in range(16) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())]
    return randomise(nn.Sequential(*layers))


def test_in_place_leaves_one_copy_of_the_weights():
    gc.collect()
    before = {id(t) for t in gc.get_objects() if issubclass(type(t), Tensor)}
    model = heavy()
    weights = live_bytes(before)
    collapsed = fxrep.reparameterize(model, inplace=True)
    assert collapsed.report.after["bn"] == 0
    assert live_bytes(before) < 1.1 * weights


def wide_conv_bn(inner: int, outer: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, size, padding=size // 2, bias=False), nn.BatchNorm2d(outer))


class Wide(nn.Module):
    """Branches of whose weights the largest, alone, is more than a block of rows; the result takes its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.wide, self.again = nn.Conv2d(3, 96, 1), wide_conv_bn(96, 96, 3), wide_conv_bn(96, 96, 3)
        self.narrow, self.skip, self.pointwise = wide_conv_bn(96, 96, 1), nn.BatchNorm2d(96), wide_conv_bn(96, 96, 1)
        self.head, self.scale = nn.Linear(96, 300), nn.BatchNorm1d(300)

    def forward(self, x: Tensor) -> Tensor:
        y = self.entry(x).relu()
        y = (self.wide(y) + self.again(y) + self.narrow(y) + self.skip(y)).relu()
        return self.scale(self.head(self.pointwise(y).relu().mean((2, 3)))).relu()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_in_place_gives_the_same_numbers(dtype: torch.dtype, memory_format: torch.memory_format):
    model = randomise(Wide()).to(dtype).to(memory_format=memory_format)
    copied = fxrep.reparameterize(model)
    inplace = fxrep.reparameterize(copy.deepcopy(model), inplace=True)
    assert copied.report.after["bn"] == 0
    for (name, a), (_, b) in zip(copied.state_dict().items(), inplace.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
        assert a.stride() == b.stride(), name


def test_in_place_takes_the_memory_of_the_largest_branch():
    model = randomise(Wide())
    there = {id(w): w.untyped_storage().data_ptr() for w in (model.wide[0].weight, model.again[0].weight)}
    collapsed = fxrep.reparameterize(model, inplace=True)
    (folded,) = (p for p in collapsed.parameters() if p.shape == (96, 96, 3, 3))
    assert folded.untyped_storage().data_ptr() in there.values()


def test_in_place_needs_a_fifth_of_the_weights():
    """Though one layer has nearly all of them."""
    model = randomise(nn.Sequential(wide_conv_bn(16, 512, 3), nn.ReLU(), wide_conv_bn(512, 512, 3), nn.ReLU()))
    weights = sum(p.nbytes for p in model.parameters())
    cpu = torch.device("cpu")
    assert peak_bytes(lambda: copy.deepcopy(model), cpu) >= weights
    assert peak_bytes(lambda: fxrep.reparameterize(model, inplace=True), cpu) < 0.2 * weights


# What else the model carries


def test_plain_attributes_are_carried():
    model = net()
    model.default_cfg = {"input_size": (3, 18, 14), "mean": (0.5,)}
    model.names, model.stride, model.task = ["cat", "dog"], torch.tensor([8.0, 16.0]), "detect"
    collapsed = fxrep.reparameterize(model)
    assert collapsed.default_cfg == model.default_cfg
    assert (collapsed.names, collapsed.task) == (["cat", "dog"], "detect")
    assert torch.equal(collapsed.stride, model.stride)
    collapsed.names.append("cow")
    collapsed.stride.zero_()
    assert model.names == ["cat", "dog"]
    assert model.stride.tolist() == [8.0, 16.0]


def test_hooks_of_the_root_go_on_to_see_what_they_saw():
    model, seen = net().eval(), []
    model.register_forward_hook(lambda _m, _args, out: seen.append(out))
    model.register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
    expected = model(image())
    got = fxrep.reparameterize(model)(image())
    assert relative_error(got, expected) < 1e-12
    assert len(seen) == 2
    assert relative_error(seen[1], seen[0]) < 1e-12
