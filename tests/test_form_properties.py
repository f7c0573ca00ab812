"""Random programs over forms, each of which decodes to a valid one: inlining every value changes no number."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from layers import execute, layer, random, scale
from torch import Tensor

from fxrep import kernel as K
from fxrep.evaluation import evaluate
from fxrep.form import AffineForm, cat, value
from fxrep.parts import Gain

CHANNELS = 4
SIZES = {1: (7,), 2: (6, 5)}
OPS = ("add", "add", "pointwise", "padded", "scale", "permute", "double", "cat", "keep", "keep")
programs = st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=10)

#: Two terms on other channels of one value become terms on the same channels.
MEETING_ROWS = [("permute", 1, 0), ("add", 0, 0), ("add", 0, 0), ("permute", 7, 1), ("add", 0, 0), ("permute", 0, 0)]


@dataclass(frozen=True)
class Known:
    """A value: torch's number, our form, and whether it is zero where all anchors are (so that it may be padded)."""

    number: Tensor
    form: AffineForm
    still: bool = True


@dataclass
class Machine:
    """Runs a program in torch and over forms side by side. Operand i means `values[i % len(values)]`."""

    dims: int
    values: list[Known] = field(default_factory=list)
    kept: dict[str, Known] = field(default_factory=dict)
    anchors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for i, name in enumerate(("x", "h")):
            self.anchors[name] = random(i, 2, CHANNELS, *SIZES[self.dims])
            self.values.append(Known(self.anchors[name], value(name, CHANNELS)))

    def step(self, op: str, i: int, j: int) -> None:
        a, b = self.values[-1 - i % len(self.values)], self.values[j % len(self.values)]
        self.values.append(getattr(self, op)(a, b, i + 10 * j))

    def add(self, a: Known, b: Known, seed: int) -> Known:
        return Known(a.number + b.number, a.form + b.form, a.still and b.still)

    def pointwise(self, a: Known, b: Known, seed: int) -> Known:
        bias = seed % 3 == 0
        one = layer(self.dims, CHANNELS, CHANNELS, g=(1, 2, 4)[seed % 3], bias=bias, seed=seed)
        return Known(one.run(a.number), a.form.then(one.operator), a.still and not bias)

    def padded(self, a: Known, b: Known, seed: int) -> Known:
        if not a.still:
            return self.pointwise(a, b, seed)
        one = layer(
            self.dims, CHANNELS, CHANNELS, k=(3, 5)[seed % 2], lo=(1, 2)[seed % 2], g=(1, 4)[seed % 2], seed=seed
        )
        return Known(one.run(a.number), a.form.then(one.operator), still=False)

    def scale(self, a: Known, b: Known, seed: int) -> Known:
        one = scale(self.dims, CHANNELS, bias=seed % 2 == 1, seed=seed)
        return Known(one.run(a.number), a.form.then(one.operator), a.still and seed % 2 == 0)

    def double(self, a: Known, b: Known, seed: int) -> Known:
        return Known(a.number * 2, a.form.scale(K.Constant((), 2.0)), a.still)

    def permute(self, a: Known, b: Known, seed: int) -> Known:
        rows = ((1, 0, 3, 2), (2, 3, 0, 1), (0, 0, 1, 3), (3, 2, 1, 0))[seed % 4]
        return Known(a.number[:, list(rows)], a.form.take(rows, self.dims), a.still)

    def cat(self, a: Known, b: Known, seed: int) -> Known:
        """Concatenated, then mixed back to as many channels by a layer whose groups may cross the seam or not."""
        one = layer(self.dims, 2 * CHANNELS, CHANNELS, g=(1, 2, 4)[seed % 3], bias=True, seed=seed)
        both = cat([a.form, b.form], self.dims).then(one.operator)
        return Known(one.run(torch.cat([a.number, b.number], 1)), both, still=False)

    def keep(self, a: Known, b: Known, seed: int) -> Known:
        """The value is computed: what follows reads it as an anchor of its own."""
        name = f"kept{len(self.kept)}"
        self.kept[name] = a
        return Known(a.number, value(name, CHANNELS), a.still)


def run(form: AffineForm, anchors: dict[str, Tensor]) -> Tensor:
    return torch.cat([_part(p, form.dims or 0, anchors) for p in form.parts], 1)


def _part(part, dims: int, anchors: dict[str, Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    if part.bias is not None:
        total = evaluate(K.spread(part.bias, CHANNELS)).reshape(-1, *(1,) * dims)
    for anchor, term in part.terms.items():
        x = anchors[anchor.source] if anchor.rows is None else anchors[anchor.source][:, list(anchor.rows)]
        total = total + (x * evaluate(term.factor) if isinstance(term, Gain) else execute(term, x))
    return total


def test_inlining_everything_changes_no_number():
    seen: Counter[str] = Counter()

    @settings(max_examples=150, deadline=None)
    @given(programs, st.integers(1, 2))
    @example(MEETING_ROWS, 1)
    def check(program: list[tuple[str, int, int]], dims: int) -> None:
        machine = Machine(dims)
        for instruction in program:
            machine.step(*instruction)
        last = machine.values[-1]
        numbers = machine.anchors | {name: known.number for name, known in machine.kept.items()}
        assert_equal(run(last.form, numbers), last.number)
        inlined = last.form
        for name, known in reversed(machine.kept.items()):
            inlined = inlined.substitute(name, known.form)
        assert set(inlined.sources) <= {"x", "h"}
        assert_equal(run(inlined, machine.anchors), last.number)
        seen.update(
            {"all": 1, "inlined": int(inlined.sources != last.form.sources), "parts": int(len(inlined.parts) > 1)}
        )
        event(f"inlined: {len(machine.kept)}")

    check()
    for feature in ("inlined", "parts"):
        assert seen[feature] >= 5, f"{feature}: {seen[feature]} of {seen['all']} examples"


def assert_equal(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max().clamp_min(1.0)
