"""What the tests of the readers share: tiny networks as cases, and the one check that every case goes through."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import randomise, relative_error
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fxrep
from fxrep.tracer import Tracer

TOLERANCE = 1e-10
KINDS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "c"),
    **dict.fromkeys(("add", "add_", "__radd__", "sub", "sub_", "rsub", "__rsub__", "subtract", "sum"), "a"),
    **dict.fromkeys(("mul", "mul_", "multiply", "div", "div_", "divide", "true_divide", "addcmul", "neg"), "m"),
    "linear": "l", "batch_norm": "b", "pad": "z",
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), "p"),
}  # fmt: skip
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
REPORTED = {"c": "conv", "l": "linear", "b": "bn", "a": "add", "m": "mul"}


class Net(nn.Module):
    """Layers, parameters and buffers by name, and a forward written as a function of the network and its inputs."""

    def __init__(self, body: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def conv(taps: Any = 3, channels: int = 4, out: int = 4, dims: int = 2, **options: Any) -> nn.Module:
    """A convolution that keeps the size, unless told otherwise."""
    if isinstance(taps, int):
        options.setdefault("padding", taps // 2)
    return CONVS[dims](channels, out, taps, **options)


def bn(channels: int = 4, dims: int = 2, **options: Any) -> nn.Module:
    return NORMS[dims](channels, **options)


def linear(channels: int = 4, out: int = 4, **options: Any) -> nn.Linear:
    return nn.Linear(channels, out, **options)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def branches(*layers: nn.Module, identity: bool = False) -> Callable[[], nn.Module]:
    """The sum of layers on one input, and perhaps of the input itself."""

    def body(m: Any, x: Tensor) -> Tensor:
        total = m.layers[0](x)
        for layer in m.layers[1:]:
            total = total + layer(x)
        return total + x if identity else total

    return lambda: Net(body, layers=nn.ModuleList(layers))


def sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def image(channels: int = 4, dims: int = 2) -> tuple[tuple[int, ...], ...]:
    """Two odd sizes of a batch of `dims`-dimensional images."""
    small, large = {1: ((13,), (21,)), 2: ((9, 13), (15, 11)), 3: ((5, 9, 7), (9, 5, 11))}[dims]
    return (1, channels, *small), (3, channels, *large)


def rows(channels: int = 4) -> tuple[tuple[int, ...], ...]:
    return (1, channels), (5, channels)


def tokens(channels: int = 4) -> tuple[tuple[int, ...], ...]:
    return (1, 7, channels), (3, 11, channels)


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and what the algebra promises: at most the calls `left`; perhaps the code of a refusal."""

    name: str
    build: Callable[[], nn.Module]
    left: str = ""
    shapes: tuple[tuple[int, ...], ...] = image()
    refused: str = ""
    bare: bool = True  # whether the promise holds without example inputs too, which tell sizes for the cost and ranks

    def network(self) -> nn.Module:
        """The network in float64, with every number drawn anew."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        network = copy.deepcopy(self.build()).double()
        for parameter in network.parameters():
            parameter.data.normal_(0, 0.4, generator=generator)
        return randomise(network)

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(7)
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]


def over(cases: list[Case]) -> Any:
    """Parametrises a test over cases, under their names."""
    return pytest.mark.parametrize("case", cases, ids=[c.name for c in cases])


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [t for item in items for t in tensors_of(item)]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def equal_results(collapsed: nn.Module, original: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The same structure, the same numbers; the original is run on a copy of itself in eval mode."""
    with torch.no_grad():
        got, expected = collapsed(*args, **kwargs), copy.deepcopy(original).eval()(*args, **kwargs)
    assert type(got) is type(expected)
    assert not isinstance(got, dict) or got.keys() == expected.keys()
    pairs = list(zip(tensors_of(got), tensors_of(expected), strict=True))
    assert pairs
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
        assert (error := relative_error(mine, theirs)) <= TOLERANCE, error


def check(case: Case) -> nn.Module:
    """With and without example inputs: equal to the original, and no more left than promised."""
    network, (small, large) = case.network(), case.inputs()
    bare, told = fxrep.reparameterize(network), fxrep.reparameterize(network, small)
    original = copy.deepcopy(network).eval()
    for x, collapsed in ((small, bare), (large, bare), (small, told), (large, told)):
        with torch.no_grad():
            got, expected = collapsed(x.clone()), original(x.clone())
        assert got.shape == expected.shape
        assert relative_error(got, expected) <= TOLERANCE, f"at {tuple(x.shape)}"
    for collapsed in (bare, told) if case.bare else (told,):
        check_promises(case, collapsed, small)
    return told


def check_promises(case: Case, collapsed: nn.Module, x: Tensor) -> None:
    counts = executed(collapsed, x)
    for kind, most in promised(case.left).items():
        assert counts[kind] <= most, f"{dict(counts)} left, {case.left} promised\n{collapsed.report}"
        assert kind not in "clb" or collapsed.report.after[REPORTED[kind]] == counts[kind]
    codes = {r.code for r in collapsed.report.refusals}
    assert not case.refused or case.refused in codes, f"{case.refused} is not among {codes}"


def promised(left: str) -> dict[str, int]:
    """`"c1 b0"` as {"c": 1, "b": 0}."""
    return {word[0]: int(word[1:]) for word in left.split()}


class _Counting(TorchFunctionMode):
    """Counts the calls of interest where they happen, whoever makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in KINDS:
            self.counts[KINDS[name]] += 1
        return function(*args, **(kwargs or {}))


def executed(network: nn.Module, *inputs: Any) -> Counter[str]:
    """The calls in one forward, by kind."""
    with _Counting() as counting, torch.no_grad():
        network(*inputs)
    return counting.counts


def targets_of(network: nn.Module) -> set[Any]:
    """Every op that the network calls, as it is traced: module types, functions, names of methods."""
    modules = dict(network.named_modules())
    nodes = [n for n in Tracer().trace(network).nodes if n.op.startswith("call")]
    return {type(modules[str(n.target)]) if n.op == "call_module" else n.target for n in nodes}
