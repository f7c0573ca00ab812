"""Random inputs for a model: at several sizes, batches and memory formats, of the shapes that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fxrep.copying import structural_copy
from fxrep.errors import FxrepError, Refusal
from fxrep.mutation import functionalize
from fxrep.readers import read_graph
from fxrep.trace import trace

Examples = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | None
Attempt = Callable[["Case"], str | None]
"""Runs the original on a case and gives the error, or None."""
Resize = Callable[[int, int], int]
"""Another size of a free axis: from its size and its place among the free axes."""

BATCHES = (2, 3, 1)
SIDES = (32, 64, 96, 128, 224, 256, 299, 384)  # tried in turn where no example tells a size
MOST_ENTRIES = 1 << 22
SMALL_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
PASS_EXAMPLES = "pass example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments"


@dataclass(frozen=True)
class Case:
    """The arguments of one call."""

    signature: inspect.Signature
    arguments: dict[str, Any]
    memory_format: str = "contiguous"

    def call(self, model: nn.Module) -> Any:
        """On copies, which a model may overwrite."""
        bound = self.mapped(Tensor.clone).bound()
        return model(*bound.args, **bound.kwargs)

    def bound(self) -> inspect.BoundArguments:
        return inspect.BoundArguments(self.signature, dict(self.arguments))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Case:
        return replace(self, arguments=tree_map_only(Tensor, change, self.arguments))

    def tensors(self) -> list[Tensor]:
        return [t for t in tree_leaves(self.arguments) if isinstance(t, Tensor)]

    def __str__(self) -> str:
        return ", ".join("x".join(map(str, t.shape)) or "scalar" for t in self.tensors())


@dataclass(frozen=True)
class Known:
    """What the network tells of an input: the number of its axes, and the sizes of some (counted from the end)."""

    rank: int | None = None
    sizes: dict[int, int] = field(default_factory=dict)

    def is_free(self, axis: int, rank: int) -> bool:
        """Whether another size may do; where nothing is known, the second axis is taken to hold the channels."""
        return axis - rank not in self.sizes if self.sizes else axis != 1


@dataclass(frozen=True)
class Sampler:
    """Draws cases like `own`, the example's or one inferred."""

    own: Case
    known: Mapping[str, Known]
    seed: int

    def cases(self, count: int, attempt: Attempt) -> Iterator[Case]:
        """The own size, an odd, an even and the smallest that runs, in turn, each with other batches and formats."""
        sides = (own_size, _odd, _even, self._smallest(attempt) if count > 3 else own_size)
        for i in range(count):
            batch, last = BATCHES[i % len(BATCHES)], (i + i // len(sides)) % 2 == 1
            side = sides[i % 4]
            # Halves, because some networks take nothing but multiples of a power of two.
            others: list[Resize] = [] if side is own_size else [side, partial(_halved, i % 2)]
            tries = [*((s, batch, last) for s in (*others, own_size)), (side, None, last), (own_size, None, last)]
            if last:  # a view of what lies otherwise in memory fails
                tries += [(side, batch, False), (own_size, batch, False), (own_size, None, False)]
            yield _first_that_runs([self.draw(*each, i) for each in tries], attempt)

    def _smallest(self, attempt: Attempt) -> Resize:
        tries = (partial(_fixed, n) for n in SMALL_SIDES)
        return next((r for r in tries if attempt(self.draw(r, None, False, 0)) is None), own_size)

    def draw(self, resize: Resize, batch: int | None, channels_last: bool, number: int) -> Case:
        """Random floating-point tensors; other arguments are kept as they are."""
        generator = torch.Generator().manual_seed(self.seed + number)
        arguments = {}
        for name, value in self.own.arguments.items():
            change = partial(_drawn, self.known.get(name, Known()), resize, batch, channels_last, generator)
            arguments[name] = tree_map_only(Tensor, change, value)
        is_last = channels_last and any(t.ndim in CHANNELS_LAST for t in tree_leaves(arguments) if _is_float(t))
        return replace(self.own, arguments=arguments, memory_format="channels_last" if is_last else "contiguous")


def _first_that_runs(cases: list[Case], attempt: Attempt) -> Case:
    errors: list[str] = []
    for case in cases:
        error = attempt(case)
        if error is None:
            return case
        errors.append(error)
    raise FxrepError(f"the original does not run on random numbers of the shape {cases[-1]}: {errors[-1]}")


def own_size(size: int, _position: int) -> int:
    return size


def _fixed(side: int, _size: int, _position: int) -> int:
    return side


def _halved(which: int, size: int, position: int) -> int:
    return size if position % 2 != which or size < 2 else size // 2


def _odd(size: int, position: int) -> int:
    """Sides differ, so that a swap of height and width is seen."""
    return size - 1 + size % 2 + 2 * position


def _even(size: int, position: int) -> int:
    return size + size % 2 + 2 * position


def _drawn(
    known: Known, resize: Resize, batch: int | None, last: bool, generator: torch.Generator, template: Tensor
) -> Tensor:
    if not _is_float(template):
        return template
    shape = list(template.shape)
    rank = len(shape)
    if batch is not None and rank > 1 and known.is_free(0, rank):
        shape[0] = batch
    for position, axis in enumerate(a for a in range(1, rank) if known.is_free(a, rank)):
        shape[axis] = resize(shape[axis], position)
    wide = torch.complex128 if template.is_complex() else torch.float64
    drawn = torch.randn(shape, generator=generator, dtype=wide)
    if not template.is_complex() and bool((template >= 0).all()):
        drawn = drawn.abs()  # the example may be one of values that cannot be negative
    drawn = drawn.to(template.device, template.dtype)
    return drawn.contiguous(memory_format=CHANNELS_LAST[rank]) if last and rank in CHANNELS_LAST else drawn


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def sampler(
    model: nn.Module, example_inputs: Examples, seed: int, like: tuple[torch.dtype, torch.device], attempt: Attempt
) -> Sampler:
    """Raises FxrepError where the arguments do not fit, or cannot be told."""
    signature = _signature(model)
    if example_inputs is None:
        known = _known(model, {})
        return Sampler(
            _inferred(model, signature, known, like, attempt), known if isinstance(known, dict) else {}, seed
        )
    given = Case(signature, _bound(model, signature, example_inputs))
    if any(t.is_meta for t in given.tensors()):
        raise FxrepError(
            f"example_inputs are on meta, where there are no numbers, and the model is on {like[1]}; pass tensors that "
            f"hold numbers, of any device: they are brought to {like[1]}"
        )
    own = given.mapped(lambda t: t.detach().to(like[1]))
    error = attempt(own)
    if error is not None:
        raise FxrepError(f"{type(model).__name__} does not run on example_inputs ({own}): {error}")
    known = _known(model, own.arguments)
    return Sampler(own, known if isinstance(known, dict) else {}, seed)


def _signature(model: nn.Module) -> inspect.Signature:
    try:
        return inspect.signature(model.forward)
    except ValueError:  # a program of torch.jit.trace has none

        def forward(*args: Any) -> None: ...

        return inspect.signature(forward)


def _bound(model: nn.Module, signature: inspect.Signature, examples: Examples) -> dict[str, Any]:
    if not isinstance(examples, (Tensor, tuple, list, Mapping)):
        raise FxrepError(f"example_inputs is a {type(examples).__name__}; {PASS_EXAMPLES}")
    try:
        if isinstance(examples, Mapping):
            return dict(signature.bind(**examples).arguments)
        return dict(signature.bind(*((examples,) if isinstance(examples, Tensor) else examples)).arguments)
    except TypeError as error:
        raise FxrepError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}") from None


def _known(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Known] | Refusal:
    """What fxrep reads of the model's inputs, by the names of the forward's parameters."""
    traced = trace(structural_copy(model), arguments)
    if isinstance(traced, Refusal):
        return traced
    modules = dict(traced.modules)
    functionalize(traced.graph, modules)
    inputs = {n.name: str(n.target) for n in traced.graph.nodes if n.op == "placeholder"}
    examples = {name: arguments.get(target) for name, target in inputs.items()}
    ranks = {name: value.ndim for name, value in examples.items() if isinstance(value, Tensor)}
    shapes = read_graph(traced.graph, modules, ranks).facts.shapes
    sizes: dict[str, dict[int, int]] = {name: {} for name in inputs}
    for axis, size in shapes.sizes.items():
        sizes.get(axis.root, {})[axis.place] = size
    return {target: Known(shapes.ranks.get(name), sizes[name]) for name, target in inputs.items()}


def _inferred(
    model: nn.Module, signature: inspect.Signature, known: dict[str, Known] | Refusal,
    like: tuple[torch.dtype, torch.device], attempt: Attempt,
) -> Case:  # fmt: skip
    """The first size at which the original runs."""
    name = type(model).__name__
    if isinstance(known, Refusal):
        raise FxrepError(f"{name} cannot be traced ({known.reason}), so its inputs cannot be told; {PASS_EXAMPLES}")
    required = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in _VARIADIC]
    error: str | None = f"its forward{signature} names no input"
    for shapes in _shapes(required, known):
        case = Case(signature, {p: torch.full(s, -0.5, dtype=like[0], device=like[1]) for p, s in shapes.items()})
        error = attempt(case)
        if error is None:
            return case
    raise FxrepError(f"no input was found on which {name} runs ({error}); {PASS_EXAMPLES}")


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _shapes(names: Sequence[str], known: Mapping[str, Known]) -> Iterator[dict[str, list[int]]]:
    """Shapes of all inputs, at one side after the other while they are not too large."""
    last: dict[str, list[int]] = {}
    for side in SIDES:
        shapes = {name: _shape(name, known, side) for name in names}
        if shapes == last or (last and sum(prod(s) for s in shapes.values()) > MOST_ENTRIES):
            return
        yield shapes
        last = shapes


def _shape(name: str, known: Mapping[str, Known], side: int) -> list[int]:
    """A batch, and before the axes of known size as many as it takes."""
    told = known.get(name, Known())
    if told.rank is None and not told.sizes:
        raise FxrepError(f"nothing tells the shape of the input {name}; {PASS_EXAMPLES}")
    rank = told.rank or max(-index for index in told.sizes) + 1
    return [told.sizes.get(i, BATCHES[0] if i == -rank else side) for i in range(-rank, 0)]
