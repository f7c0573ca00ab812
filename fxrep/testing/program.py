"""Programs and the networks they decode to: any list of steps is a valid network, and prints as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxrep.testing import layers, ops  # noqa: F401 - they fill the table of ops
from fxrep.testing.writer import INPUTS, OPS, At, Step, Value, Writer


@dataclass(frozen=True)
class Program:
    """A random network as data: always valid, and still valid when any of its steps is left out.

    `input` is one of `rows`, `tokens`, `1d`, `2d`, `3d`; `functional` spells every layer as a call of
    `torch.nn.functional`, on the same weights.
    """

    input: str = "2d"
    channels: int = 4
    steps: tuple[Step, ...] = ()
    inputs: int = 1
    seed: int = 0
    functional: bool = False

    def without(self, index: int) -> Program:
        """The program with one step left out."""
        return replace(self, steps=self.steps[:index] + self.steps[index + 1 :])


class Network(nn.Module):
    """What a program decodes to: in eval mode and float64, batch norms away from their defaults; prints its source."""

    def __init__(self, program: Program, source: str) -> None:
        super().__init__()
        self.program = program
        self.source = source
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(program.seed)
            _functions(source)["build"](self)
            _move_from_defaults(self)
        self.double().eval()

    def forward(self, x: Tensor) -> Any:
        return _functions(self.source)["forward"](self, x)

    def __repr__(self) -> str:
        build, forward = self.source.split("    return self\n")
        build = build.replace("def build(self):\n", "def __init__(self):\n    super().__init__()\n")
        lines = (f"    {line}" for line in (build + forward).splitlines())
        return f"torch.manual_seed({self.program.seed})\nclass Net(nn.Module):\n" + "\n".join(lines)


class NetworkOfTwo(Network):
    """A network with a second input, of the same size."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return _functions(self.source)["forward"](self, x, y)


def decode(program: Program) -> Network:
    """The network that a program means."""
    layout = program.input if program.input in ("rows", "tokens") else "map"
    sizes = tuple(tuple(sizes) for sizes in INPUTS[program.input])
    names = ("x", "y")[: program.inputs]
    inputs = tuple(Value(name, layout, program.channels, sizes, name) for name in names)
    writer = Writer(inputs, program.functional, list(inputs))
    for step in program.steps:
        writer.values.append(OPS[step.op](At(writer, step)))
    kind = NetworkOfTwo if len(names) == 2 else Network
    return kind(program, writer.source())


@lru_cache(maxsize=64)
def _functions(source: str) -> dict[str, Callable[..., Any]]:
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
    exec(compile(source, "<random network>", "exec"), names)
    return names


def _move_from_defaults(network: nn.Module) -> None:
    """Statistics, gains and shifts of batch norms that hide no error; a gain may be negative."""
    for module in network.modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.3, 2.0)
        if module.affine:
            module.weight.data.normal_(0, 1)
            module.bias.data.normal_(0, 0.5)
