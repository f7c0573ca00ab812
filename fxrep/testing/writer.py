"""Writes random programs as source: values whose sizes are known for every input, and the table of ops."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
#: Per spatial axis: the size of a value for each size that the input's axis may have.
Sizes = tuple[tuple[int, ...], ...]

#: The spatial sizes of inputs, by kind: `rows` are (N, C), `tokens` (N, L, C), the others (N, C, *S).
INPUTS: Mapping[str, tuple[range, ...]] = {
    "rows": (), "tokens": (range(2, 6),), "1d": (range(8, 21),), "2d": (range(7, 15),) * 2, "3d": (range(5, 9),) * 3,
}  # fmt: skip
LARGEST = {0: 1, 1: 64, 2: 32, 3: 14}
MOST_CHANNELS = 16
_VALUE = re.compile(r"\b(?:x|y|v\d+)\b")


@dataclass(frozen=True)
class Step:
    """One instruction. Its operand is the value of `on` steps ago (modulo); a second is sought from `other` steps ago.

    `picks` are the op's choices in turn, each modulo the number of options and 0 where they have run out, so that any
    integers mean something, and zeros mean the plainest form.
    """

    op: str
    on: int = 0
    other: int = 0
    picks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Value:
    """A variable. `layout` is `map` (N, C, *S), `last` (N, *S, C), `tokens` (N, L, C) or `rows` (N, C); `memory` names
    the variable whose memory it may share."""

    name: str
    layout: str
    channels: int
    sizes: Sizes
    memory: str

    @property
    def axis(self) -> int:
        """The channel axis."""
        return 1 if self.layout == "map" else -1

    @property
    def dims(self) -> int:
        return len(self.sizes)

    def fits(self, other: Value) -> bool:
        """Whether the two differ at most in channels, whatever the size of the input."""
        return (self.layout, self.sizes) == (other.layout, other.sizes)


@dataclass(frozen=True)
class Layer:
    """A layer that may be called again: the call as a template, what it takes, and the sizes that it gives.

    Every side of its input is larger than `mirrors`, the most pixels that it reflects.
    """

    call: str
    layout: str
    channels: int
    outputs: int
    resize: Callable[[Sizes], Sizes]
    mirrors: int = 0

    def takes(self, value: Value) -> bool:
        return (
            (self.layout, self.channels) == (value.layout, value.channels)
            and possible(self.resize(value.sizes))
            and self.mirrors < min((n for axis in value.sizes for n in axis), default=1)
        )


@dataclass
class Writer:
    """The program so far: lines of `__init__`, lines of `forward`, and the values at hand."""

    inputs: tuple[Value, ...]
    functional: bool
    values: list[Value] = field(default_factory=list)
    build: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    weights: dict[tuple[object, ...], str] = field(default_factory=dict)
    pieces: dict[str, str] = field(default_factory=dict)
    unread: dict[str, None] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    count: int = 0

    def fresh(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def layer(self, stem: str, constructor: str) -> str:
        """A new attribute of the network, as `self.stem1`."""
        name = self.fresh(f"self.{stem}")
        self.build.append(f"{name} = {constructor}")
        return name

    def let(self, expression: str, like: Value, *, channels: int = 0, sizes: Sizes | None = None, layout: str = "",
            view: bool = False) -> Value:  # fmt: skip
        """A new variable; what is not told is as in `like`, whose memory a `view` shares."""
        name = self.fresh("v")
        self._note(f"{name} = {expression}", expression, name)
        memory = like.memory if view else name
        sizes = like.sizes if sizes is None else sizes
        return Value(name, layout or like.layout, channels or like.channels, sizes, memory)

    def write(self, statement: str, target: Value, source: str) -> Value:
        """A statement that writes what it reads from `source` into `target`."""
        self._note(statement, source, target.name)
        return target

    def once(self, x: Value, call: str) -> str:
        """The variable that holds what `call` gives of x, computed where it is first needed."""
        if call not in self.pieces:
            self.pieces[call] = self.fresh("p")
            self.lines.append(f"{self.pieces[call]} = {call}")
        self.unread.pop(x.name, None)
        return self.pieces[call]

    def _note(self, line: str, reads: str, makes: str) -> None:
        self.lines.append(line)
        for name in _VALUE.findall(reads):
            self.unread.pop(name, None)
        self.unread[makes] = None

    def source(self) -> str:
        """The two functions of the network; it returns every value that nobody read, and those that are kept."""
        results = list(dict.fromkeys([*self.unread, *self.kept])) or [self.values[-1].name]
        answer = results[0] if len(results) == 1 else f"({', '.join(results)})"
        build = ["def build(self):", *self.build, "return self"]
        forward = [f"def forward(self, {', '.join(v.name for v in self.inputs)}):", *self.lines, f"return {answer}"]
        return "".join(f"{line}\n" if line.startswith("def ") else f"    {line}\n" for line in (*build, *forward))


@dataclass
class At:
    """One step, as its op sees it."""

    writer: Writer
    step: Step
    taken: int = 0

    @property
    def x(self) -> Value:
        values = self.writer.values
        return values[-1 - self.step.on % len(values)]

    @property
    def functional(self) -> bool:
        return self.writer.functional

    def pick(self, *options: T) -> T:
        """The option that the step's next choice means."""
        picks = self.step.picks
        choice = picks[self.taken] if self.taken < len(picks) else 0
        self.taken += 1
        return options[choice % len(options)]

    def other(self, accepted: Callable[[Value], bool]) -> Value:
        """From `step.other` steps ago and back, the first accepted value that is not x; x where there is none."""
        values = self.writer.values[::-1]
        start = self.step.other % len(values)
        found = (v for v in values[start:] + values[:start] if v.name != self.x.name and accepted(v))
        return next(found, self.x)


Op = Callable[[At], Value]
OPS: dict[str, Op] = {}


def op(function: Op) -> Op:
    """Adds an op to the table, under its function's name."""
    name = function.__name__
    if name in OPS:
        raise ValueError(f"there already is an op {name!r}")
    OPS[name] = function
    return function


def possible(sizes: Sizes) -> bool:
    """Whether every size is one that a program may have."""
    largest = LARGEST[len(sizes)]
    return all(1 <= n <= largest for axis in sizes for n in axis)
