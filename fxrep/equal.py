"""What is equal by its numbers alone: compared here, and noted, because it need not be so of other weights."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

import torch

from fxrep import kernel as K
from fxrep.evaluation import evaluate
from fxrep.kernel import Kernel


@dataclass(frozen=True, eq=False)
class Equal:
    """Two per-channel constants (None is zero) whose numbers were found equal, where what they are made of is not."""

    a: Kernel | None
    b: Kernel | None
    length: int

    @property
    def holds(self) -> bool:
        """Whether they are equal to the accuracy of float64."""
        zeros = torch.zeros(self.length, dtype=torch.float64)
        a, b = (zeros if v is None else evaluate(K.spread(v, self.length)).cpu() for v in (self.a, self.b))
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-12)


_NOTED: ContextVar[list[Equal] | None] = ContextVar("noted", default=None)


class noting:
    """Collects what is found equal by its numbers meanwhile: it need not be so of other weights."""

    def __enter__(self) -> list[Equal]:
        noted: list[Equal] = []
        self.token = _NOTED.set(noted)
        return noted

    def __exit__(self, *_: object) -> None:
        _NOTED.reset(self.token)


def same_vector(a: Kernel | None, b: Kernel | None, length: int) -> bool:
    """Whether two per-channel constants are equal to the accuracy of float64 (None is zero)."""
    if a is b:
        return True
    found = Equal(a, b, length)
    if not found.holds:
        return False
    noted = _NOTED.get()
    if noted is not None:
        noted.append(found)
    return True
