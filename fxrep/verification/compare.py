"""Outputs of two models against those of the original in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from fxrep.verification.verdict import Comparison, Difference

FACTOR = 4.0
"""How much larger than the original's own error the collapsed model's may be, whatever it comes from."""
ROUNDED = 8.0
"""The same of what is known to be rounding. The largest error of a small output scatters: of 480 runs of RepVGG-like
networks in float32, all of them correct, five were beyond 4 times and none beyond 5.1."""
FLOOR = 2.0
"""What is allowed at least, in units of rounding of the output's dtype: the original may be exact by luck."""
LEAST = 1e-10
"""What is allowed at least in float64, where the original is the truth and has no error of its own."""


@dataclass(frozen=True)
class Leaf:
    """One tensor (or other value) of an output, and how to reach it."""

    path: str
    value: Any


def leaves(output: Any, path: str = "output") -> list[Leaf]:
    """All values in tuples, lists, dicts, dataclasses and whatever else is known to torch's pytree."""
    found: list[Leaf] = []
    for keys, value in tree_flatten_with_path(output)[0]:
        here = path + keystr(keys)
        if is_dataclass(value) and not isinstance(value, type):
            for part in fields(value):
                found += leaves(getattr(value, part.name), f"{here}.{part.name}")
        else:
            found.append(Leaf(here, value))
    return found


def compare(truth: Sequence[Leaf], own: Sequence[Leaf], new: Sequence[Leaf]) -> list[Comparison] | str:
    """One comparison a leaf, with `allowed` yet to be set; or why the outputs have nothing to do with each other."""
    names = [[leaf.path for leaf in side] for side in (truth, own, new)]
    if names[0] != names[1]:
        return f"the original gives {_listed(names[1])}, but {_listed(names[0])} in float64"
    if names[1] != names[2]:
        return f"the collapsed model gives {_listed(names[2])}, the original {_listed(names[1])}"
    return [_compared(t, o.value, n.value) for t, o, n in zip(truth, own, new, strict=True)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def _compared(leaf: Leaf, own: Any, new: Any) -> Comparison:
    truth = leaf.value
    if not (isinstance(truth, Tensor) and isinstance(own, Tensor) and isinstance(new, Tensor)):
        same = type(own) is type(new) and bool(own == new)
        return Comparison(leaf.path, 0.0, 0.0, LEAST, None, "" if same else f"{leaf.path} is {new!r}, not {own!r}")
    problem = _problem(leaf.path, truth, own, new)
    if problem:
        return Comparison(leaf.path, math.inf, 0.0, LEAST, None, problem)
    if not truth.is_floating_point() and not truth.is_complex():
        return Comparison(leaf.path, _share(new != truth), _share(own != truth), LEAST, None)
    finite = truth.isfinite() & own.isfinite() & new.isfinite()
    wrong = _share(((truth.isfinite() & own.isfinite()) & ~new.isfinite()) | (~truth.isfinite() & ~_alike(truth, new)))
    where = difference(new, truth, finite)
    own_where = difference(own, truth, finite)
    if wrong:
        problem = f"{leaf.path}: {wrong:.2%} of the values are not finite where the original's are, or the reverse"
    return Comparison(leaf.path, _largest(where), _largest(own_where), least_allowed(new.dtype), where, problem)


def _problem(path: str, truth: Tensor, own: Tensor, new: Tensor) -> str:
    if new.shape != own.shape:
        return f"{path} has the shape {tuple(new.shape)}, not {tuple(own.shape)}"
    if own.shape != truth.shape:
        return f"{path} of the original has the shape {tuple(own.shape)}, but {tuple(truth.shape)} in float64"
    return "" if new.dtype == own.dtype else f"{path} is {new.dtype}, not {own.dtype}"


def _alike(truth: Tensor, new: Tensor) -> Tensor:
    """Where both are nan, or the same infinity."""
    return (truth.isnan() & new.isnan()) | (truth == new)


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else 0.0


def difference(new: Tensor, truth: Tensor, counts: Tensor | None = None) -> Difference | None:
    """Where `new` is furthest from `truth` among the entries that count; None where there are none."""
    wide = torch.complex128 if truth.is_complex() else torch.float64
    new, truth = new.detach().to(wide), truth.detach().to(wide)
    error, size = (new - truth).abs(), truth.abs()
    if counts is not None:
        error, size = error.where(counts, 0.0), size.where(counts, 0.0)
    if not error.numel():
        return None
    error = error / (float(size.max()) or 1.0)
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    if error.ndim < 3:
        return Difference(index, "", 0.0, float(error.max()))
    edge = _edge(error.shape, error.device)
    border, interior = (float(error.where(mask, 0.0).max()) for mask in (edge, ~edge))
    return Difference(index, "border" if bool(edge.expand_as(error)[index]) else "interior", border, interior)


def _edge(shape: torch.Size, device: torch.device) -> Tensor:
    """Which pixels are the first or last along an axis after the second."""
    edge = torch.zeros(shape[2:], dtype=torch.bool, device=device)
    for axis in range(edge.ndim):
        edge.select(axis, 0).fill_(True)
        edge.select(axis, -1).fill_(True)
    return edge


def _largest(where: Difference | None) -> float:
    return max(where.border, where.interior) if where else 0.0


def least_allowed(dtype: torch.dtype) -> float:
    return max(FLOOR * torch.finfo(dtype).eps, LEAST)


def judged(trials: Sequence[list[Comparison]], factor: float = FACTOR) -> list[list[Comparison]]:
    """Sets what is allowed: for each output, by the larger of its own error in the trial and in the median trial."""
    typical: dict[str, list[float]] = {}
    for comparison in (c for trial in trials for c in trial):
        typical.setdefault(comparison.output, []).append(comparison.own_error)
    return [[_with_allowance(c, factor, median(typical[c.output])) for c in trial] for trial in trials]


def _with_allowance(comparison: Comparison, factor: float, typical: float) -> Comparison:
    return replace(comparison, allowed=comparison.allowed + factor * max(comparison.own_error, typical))
