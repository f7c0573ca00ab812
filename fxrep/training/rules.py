"""The rule of iteration: what the gradient of a fold becomes, so that its sum trains as its branches would.

W' = Σ L_i(W_i) + c with constant linear L_i. A step of SGD on the W_i moves W' by -λ Σ L_i L_iᵀ ∂L/∂W', so training W'
itself with the gradient preconditioned by P = Σ L_i L_iᵀ is the same (Ding et al., arXiv 2205.15242, for RepVGG's
branches). Where every L_i only places and scales, P is diagonal: the published GradMult.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxrep import kernel as K
from fxrep.errors import FxrepError
from fxrep.evaluation import evaluate
from fxrep.fold import in_layout
from fxrep.kernel import Leaf
from fxrep.lower import Emit
from fxrep.training.linear import derivative

TOLERANCE = 1e-12  # relative, in float64
Shape = tuple[int, ...]
Tensors = tuple[Tensor, ...]


@dataclass
class Output:
    """One parameter of the target. `offset` is c, the part of it that nothing trains (None: zero).

    `multiplier` is the diagonal of Σ L_i L_iᵀ and `scale` that of Σ |L_i|; None where they are not diagonal.
    """

    name: str
    multiplier: Tensor | None
    scale: Tensor | None
    offset: Tensor | None


@dataclass(frozen=True)
class Fold:
    """θ ↦ W' of one decision. `shapes` are those of W'; tensors of the model, by identity, train or are `constants`."""

    emits: tuple[Emit, ...]
    shapes: tuple[Shape, ...]
    trained: Mapping[int, Shape]
    constants: dict[int, Tensor]

    def __call__(self, values: Mapping[int, Tensor], like: Tensor) -> Tensors:
        """W', with the trained tensors at `values` (zero where none is given), made like `like`."""

        def read(leaf: Leaf) -> Tensor:
            key = id(leaf.tensor)
            if key in self.constants:
                return self.constants[key].to(like)
            return values[key] if key in values else like.new_zeros(self.trained[key])

        found = [w for e in self.emits for w in in_layout(e, lambda k: evaluate(k, read, like)) if w is not None]
        return tuple(w.reshape(shape) for w, shape in zip(found, self.shapes, strict=True))

    def precondition(self, gradients: Tensors) -> Tensors:
        """Σ L_i L_iᵀ g."""
        return _total(self.squared(gradients))

    def squared(self, gradients: Tensors) -> Iterator[Tensors]:
        """L_i L_iᵀ g for each trained tensor: the fold's VJP, then its JVP."""
        for key, shape in self.trained.items():
            zero = gradients[0].new_zeros(shape)

            def part(value: Tensor, key: int = key) -> Tensors:
                return self({key: value}, gradients[0])

            _, pull = torch.func.vjp(part, zero)  # type: ignore[misc]
            yield derivative(part, (zero,), pull(gradients))[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Fold:
        return replace(self, constants={k: t.clone() for k, t in self.constants.items()})  # its keys are identities

    def __reduce__(self) -> Any:
        raise FxrepError(
            "a target in which a fixed operator follows a trainable one cannot be pickled; save its state_dict()"
        )


@dataclass
class Rule:
    """What is done to the gradients of `outputs`, which one decision made: without a `fold` each is multiplied by its
    own `multiplier`, else the `fold` applies Σ L_i L_iᵀ."""

    outputs: tuple[Output, ...]
    fold: Fold | None


def derive(emits: Sequence[Emit], names: Sequence[str], shapes: Sequence[Shape]) -> Rule:
    """The rule of the parameters `names`, which the kernels of `emits` give in that order. In float64."""
    tensors = {id(leaf.tensor): leaf.tensor for e in emits for leaf in K.leaves(*e.kernels)}
    trained = {k: tuple(t.shape) for k, t in tensors.items() if t.requires_grad}
    constants = {k: t.detach().clone().double() for k, t in tensors.items() if k not in trained}
    fold = Fold(tuple(emits), tuple(shapes), trained, constants)
    like = torch.zeros((), dtype=torch.float64, device=next(iter(tensors.values())).device)
    offsets = [c if bool(c.any()) else None for c in fold({}, like)]
    ones = tuple(like.new_ones(s) for s in shapes)
    probes = _probes(shapes, like)
    diagonals = list(fold.squared(ones))
    if not all(_is_diagonal(d, probes, p) for d, p in zip(diagonals, fold.squared(probes), strict=True)):
        return Rule(tuple(Output(n, None, None, c) for n, c in zip(names, offsets, strict=True)), fold)
    scales = _total(tuple(d.sqrt() for d in part) for part in diagonals)
    rows = zip(names, _total(diagonals), scales, offsets, strict=True)
    return Rule(tuple(Output(*row) for row in rows), None)


def _probes(shapes: Sequence[Shape], like: Tensor) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator, dtype=like.dtype).to(like) for s in shapes)


def _is_diagonal(diagonals: Tensors, probes: Tensors, answers: Tensors) -> bool:
    """P v = d ⊙ v on random v, with d = P·1: true of no P but diag(d), except on a set of measure zero."""
    errors = [(a - d * v).abs().max() for d, v, a in zip(diagonals, probes, answers, strict=True)]
    sizes = [d.abs().max() for d in diagonals]
    return float(max(errors)) <= TOLERANCE * max(1.0, float(max(sizes)))


def _total(terms: Iterable[Tensors]) -> Tensors:
    return tuple(sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True))
