"""Hypothesis strategies: programs biased to legal merges, the networks they decode to, and inputs for those."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxrep.testing.program import Network, Program, decode
from fxrep.testing.writer import INPUTS, Step

Draw = st.DrawFn

#: How often each op is drawn, as repetitions; the first is what everything shrinks to.
WEIGHTED = (
    "conv", "conv", "conv", "conv", "bn", "bn", "bn", "add", "add", "add", "act", "scale", "shift", "same", "cat", "piece", "sub",
    "pool", "pad", "view", "turn", "reuse", "reuse", "broadcast", "deconv", "shuffle", "keep", "check", "head",
)  # fmt: skip
#: What is done on one branch of a block, beginning at the block's input.
BRANCHES = (
    ("conv",), ("conv", "bn"), ("conv", "bn"), ("bn",), ("same",), ("conv", "conv"), ("conv", "scale"), ("pool",), ("pool", "bn"),
    ("pad", "conv"), ("conv", "bn", "pool"), ("scale",),
)  # fmt: skip
#: Sequences that merge if their paddings allow.
CHAINS = (
    ("conv", "bn"), ("conv", "bn", "act"), ("conv", "conv"), ("bn", "conv"), ("pad", "conv", "bn"), ("conv", "scale", "shift"), ("conv", "pool"),
    ("turn", "conv", "turn"), ("turn", "conv", "bn"), ("deconv", "bn"), ("bn", "bn"), ("conv", "same", "bn"), ("conv", "view", "bn"),
    ("head", "conv", "bn"),
)  # fmt: skip

picks = st.lists(st.integers(0, 11), max_size=12).map(tuple)
operands = st.sampled_from((0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 6))


@st.composite
def step(draw: Draw, op: str, on: int | None = None, other: int | None = None, first: tuple[int, ...] = ()) -> Step:
    """A step of `op`; what is not told is drawn, and so are the choices after the `first` ones."""
    on, other = (draw(operands) if n is None else n for n in (on, other))
    return Step(op, on, other, (*first, *draw(picks)))


@st.composite
def single(draw: Draw) -> tuple[Step, ...]:
    return (draw(step(draw(st.sampled_from(WEIGHTED)))),)


@st.composite
def chain(draw: Draw) -> tuple[Step, ...]:
    """Ops in sequence. Two convolutions in a row meet as one does in published blocks: one is pointwise, and is first padded."""
    ops = draw(st.sampled_from(CHAINS))
    return tuple(draw(step(op, None if i == 0 else 0)) for i, op in enumerate(ops))


@st.composite
def branches(draw: Draw) -> tuple[Step, ...]:
    """Two to four branches of one value, of equal stride and width, summed (or, at times, joined)."""
    at, stride, width = draw(operands), draw(st.sampled_from((0, 0, 0, 3))), draw(st.sampled_from((0, 0, 0, 3)))
    steps: list[Step] = []
    last = None
    for _ in range(draw(st.integers(2, 4))):
        steps += draw(_branch(at + len(steps), stride, width))
        if last is not None:
            join = draw(st.sampled_from(("add", "add", "add", "add", "sub", "cat")))
            steps.append(draw(step(join, 0, len(steps) - 1 - last)))
        last = len(steps) - 1
    return tuple(steps)


@st.composite
def _branch(draw: Draw, on: int, stride: int, width: int) -> list[Step]:
    ops = draw(st.sampled_from(BRANCHES))
    steps = []
    for i, op in enumerate(ops):
        first: tuple[int, ...] = ()
        if op in ("conv", "pool"):  # only the first of them strides and widens
            size, bias = draw(st.integers(0, 11)), draw(st.integers(0, 3))
            first = (size, bias, stride, width, 0) if "conv" not in ops[:i] and "pool" not in ops[:i] else (size, bias, 0, 0, 0)
        steps.append(draw(step(op, on if i == 0 else 0, 0, first)))
    return steps


@st.composite
def split(draw: Draw) -> tuple[Step, ...]:
    """The channels cut in two, each part worked on, and joined again."""
    at, way = draw(operands), draw(st.integers(0, 3))
    one, two = draw(st.sampled_from(BRANCHES)), draw(st.sampled_from(BRANCHES))
    steps = [Step("piece", at, 0, (0, way)), *(draw(step(op, 0)) for op in one)]
    last = len(steps) - 1
    steps += [Step("piece", at + len(steps), 0, (1, way)), *(draw(step(op, 0)) for op in two)]
    return (*steps, draw(step("cat", 0, len(steps) - 1 - last)))


@st.composite
def programs(draw: Draw, *, inputs: str | None = None, max_phrases: int = 5) -> Program:
    """Programs whose input is of the kind `inputs` (default: any of `rows`, `tokens`, `1d`, `2d`, `3d`)."""
    kind = draw(st.sampled_from(("2d", "2d", "1d", "3d", "tokens", "rows"))) if inputs is None else inputs
    phrases = draw(st.lists(st.one_of(single(), chain(), branches(), branches(), split()), max_size=max_phrases))
    steps = [s for phrase in phrases for s in phrase]
    left_out = draw(st.lists(st.integers(0, 15), min_size=len(steps), max_size=len(steps)))
    return Program(
        input=kind, channels=draw(st.sampled_from((4, 4, 4, 2, 6, 1, 3))),
        steps=tuple(s for s, out in zip(steps, left_out, strict=True) if out),  # 0, to which integers shrink, leaves a step out
        inputs=draw(st.sampled_from((1, 1, 1, 1, 2))), seed=draw(st.integers(0, 999)),
    )  # fmt: skip


@st.composite
def networks(draw: Draw, *, inputs: str | None = None, max_phrases: int = 5) -> Network:
    """Networks in eval mode and float64, of every op that fxrep reads, with operands shared, reused and written in place.

    A network holds the `program` that it was decoded from, and prints as the source of a module. Its in-place ops may
    write into its inputs; run it under `torch.no_grad()`, on copies.
    """
    return decode(draw(programs(inputs=inputs, max_phrases=max_phrases)))


@dataclass(frozen=True)
class Inputs:
    """Positional inputs as data, so that a failing example prints in a line. Unpacks into new tensors each time."""

    shape: tuple[int, ...]
    count: int = 1
    seed: int = 0
    channels_last: bool = False

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.count):
            x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
            yield x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


@st.composite
def inputs_for(draw: Draw, network: Network) -> Inputs:
    """Inputs for `network(*inputs)`: batch, spatial sizes, numbers and memory format."""
    program = network.program
    batch, channels = draw(st.integers(1, 3)), program.channels
    sizes = tuple(draw(st.integers(min(axis), max(axis))) for axis in INPUTS[program.input])
    shape = (batch, *sizes, channels) if program.input == "tokens" else (batch, channels, *sizes)
    channels_last = len(shape) == 4 and draw(st.sampled_from((False, False, True)))
    return Inputs(shape, program.inputs, draw(st.integers(0, 999)), channels_last)


__all__ = ["Inputs", "inputs_for", "networks", "programs"]
