"""Hypothesis strategies: programs biased to legal merges, the networks they decode to, and inputs for those."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxrep.testing.program import Network, Program, decode
from fxrep.testing.writer import INPUTS, OPS, Step

Draw = st.DrawFn
Picks = tuple[int, ...]

#: An op and its first choices (of a convolution: size, bias, stride, width, padding).
Word = tuple[str, Picks]
CONV, BN, SCALE, SHIFT, ACT = (("conv", ()), ("bn", ()), ("scale", ()), ("shift", ()), ("act", ()))
POOL, PAD, SAME, VIEW, TURN = (("pool", ()), ("pad", ()), ("same", ()), ("view", ()), ("turn", ()))
SHUFFLE, DECONV, HEAD, REUSE = (("shuffle", ()), ("deconv", ()), ("head", ()), ("reuse", ()))
POINTWISE, PADLESS = ("conv", (0, 0)), ("conv", (1, 0, 0, 0, 3))

#: What is done on one branch of a block, beginning at the block's input.
BRANCHES: tuple[tuple[Word, ...], ...] = (
    (CONV,), (CONV, BN), (CONV, BN), (BN,), (SAME,), (POINTWISE, CONV), (POINTWISE, POOL, BN), (CONV, SCALE), (POOL,),
    (PAD, PADLESS), (CONV, ACT), (SCALE,), (CONV, SHIFT, POINTWISE), (REUSE,),
)  # fmt: skip
#: What trains on a branch of a sum is one operator, and then a scale.
SCALED_BRANCHES: tuple[tuple[Word, ...], ...] = (
    (CONV, SCALE), (CONV, SCALE), (POINTWISE, SCALE), (CONV,), (SCALE,), (SAME,), (CONV, SCALE, SHIFT),
)  # fmt: skip
#: Sequences of which most merge.
CHAINS: tuple[tuple[Word, ...], ...] = (
    (CONV, BN), (CONV, BN, ACT), (POINTWISE, CONV), (CONV, POINTWISE), (CONV, PADLESS), (BN, PADLESS), (BN, BN),
    (PAD, PADLESS, BN), (CONV, SCALE, SHIFT), (POINTWISE, POOL), (TURN, CONV, TURN), (TURN, CONV, BN), (DECONV, BN),
    (CONV, SAME, BN), (CONV, VIEW, BN), (HEAD, CONV, BN), (CONV, SHUFFLE, CONV), (REUSE, BN), (CONV, BN, REUSE, REUSE),
)  # fmt: skip

JOINS = ("add", "add", "add", "add", "sub", "cat")

picks = st.lists(st.integers(0, 11), min_size=4, max_size=12).map(tuple)
seeds = st.integers(0, 999)
operands = st.sampled_from((0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 6))


@st.composite
def step(draw: Draw, op: str, on: int | None = None, other: int | None = None, first: Picks = ()) -> Step:
    """A step of `op`; what is not told is drawn, and so are the choices after the `first` ones."""
    on, other = (draw(operands) if n is None else n for n in (on, other))
    return Step(op, on, other, (*first, *draw(picks)))


@st.composite
def single(draw: Draw) -> list[Step]:
    return [draw(step(draw(st.sampled_from(tuple(OPS)))))]


@st.composite
def chain(draw: Draw) -> list[Step]:
    return draw(_sequence(draw(st.sampled_from(CHAINS)), draw(operands)))


@st.composite
def _sequence(draw: Draw, words: tuple[Word, ...], on: int, stride: int = 0, width: int = 0) -> list[Step]:
    """The words in turn, from the value `on` steps ago. The first window strides, the first convolution widens."""
    steps: list[Step] = []
    for op, told in words:
        window = (*told, *draw(st.tuples(*[st.integers(0, 11)] * 2)))[:2]
        first = told
        if op == "conv":
            first = told if len(told) > 2 else (*window, stride, width, 0)
            stride = width = 0
        elif op == "pool":
            first, stride = (*window, stride), 0
        steps.append(draw(step(op, 0 if steps else on, 0, first)))
    return steps


@st.composite
def branches(draw: Draw, kinds: tuple[tuple[Word, ...], ...] = BRANCHES, joins: tuple[str, ...] = JOINS) -> list[Step]:
    """Two to four branches of one value, of equal stride and width, summed (or, at times, joined)."""
    at, stride, width = draw(operands), draw(st.sampled_from((0, 0, 0, 3))), draw(st.sampled_from((0, 0, 0, 3)))
    steps = draw(_sequence(draw(st.sampled_from(kinds)), at, stride, width))
    for _ in range(draw(st.integers(1, 3))):
        last = len(steps) - 1
        steps += draw(_sequence(draw(st.sampled_from(kinds)), at + len(steps), stride, width))
        join = draw(st.sampled_from(joins))
        steps.append(draw(step(join, 0, len(steps) - 1 - last)))
    return steps


@st.composite
def split(draw: Draw) -> list[Step]:
    """The channels cut in two, each part worked on, and joined again."""
    at, way = draw(operands), draw(st.integers(0, 3))
    one, two = draw(st.sampled_from(BRANCHES)), draw(st.sampled_from(BRANCHES))
    steps = [Step("piece", at, 0, (0, way)), *draw(_sequence(one, 0))]
    last = len(steps) - 1
    steps += [Step("piece", at + len(steps), 0, (1, way)), *draw(_sequence(two, 0))]
    return [*steps, draw(step("cat", 0, len(steps) - 1 - last))]


@st.composite
def programs(draw: Draw, *, inputs: str | None = None, max_phrases: int = 8) -> Program:
    """Programs whose input is of the kind `inputs`: `rows`, `tokens`, `1d`, `2d`, `3d` (None: any)."""
    kind = draw(st.sampled_from(("2d", "2d", "1d", "3d", "tokens", "rows"))) if inputs is None else inputs
    phrase = st.one_of(single(), single(), single(), chain(), branches(), branches(), split())
    steps = [s for steps in draw(st.lists(phrase, max_size=max_phrases)) for s in steps]
    kept = [draw(st.integers(0, 15)) for _ in steps]  # 0, to which integers shrink, leaves a step out
    return Program(
        input=kind, channels=draw(st.sampled_from((4, 4, 4, 2, 6, 1, 3))),
        steps=tuple(s for s, keep in zip(steps, kept, strict=True) if keep),
        inputs=draw(st.sampled_from((1, 1, 1, 1, 2))), seed=draw(st.integers(0, 999)),
    )  # fmt: skip


@st.composite
def networks(draw: Draw, *, inputs: str | None = None, max_phrases: int = 8) -> Network:
    """Networks of every op that fxrep reads, with values and layers shared and written in place; eval mode, float64.

    A network holds the `program` that it was decoded from, and prints as the source of a module. Its in-place ops may
    write into its inputs: run it on copies, under `torch.no_grad()`.
    """
    return decode(draw(programs(inputs=inputs, max_phrases=max_phrases)))


@st.composite
def constant_scales(draw: Draw, *, inputs: str | None = None, max_blocks: int = 3) -> Network:
    """Networks of summed branches with constant scales, in training mode: each block ends in a batch norm or not, and
    in an activation. Some scales train all the same, and some convolutions do not."""
    kind = draw(st.sampled_from(("2d", "2d", "1d", "tokens"))) if inputs is None else inputs
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, max_blocks))):
        steps += draw(branches(SCALED_BRANCHES, ("add", "add", "add", "sub")))
        ends = draw(st.sampled_from((("bn", "act"), ("bn", "act"), ("act",))))
        steps += [draw(step(op, 0)) for op in ends]
    program = Program(input=kind, channels=draw(st.sampled_from((4, 2, 6))), steps=tuple(steps), seed=draw(seeds))
    network = decode(program).train()
    for name, parameter in network.named_parameters():
        is_scale = name.startswith(("gain", "shift"))
        trains = draw(st.sampled_from((False, False, False, True) if is_scale else (True,) * 7 + (False,)))
        parameter.requires_grad_(trains)
    return network


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


__all__ = ["Inputs", "constant_scales", "inputs_for", "networks", "programs"]
